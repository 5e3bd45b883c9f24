"""A small cohort of byte files and a stand-in for ``prepare_person`` that reads them.

A file's text decides its fate: "bad" is rejected, "crash" raises, "segv" kills the process, "hang"
sleeps (a file .hangs beside it says so), "eat" takes 1.5 GiB, "crowd" hangs only beside other
scans, "kill:PATH" waits to be killed on its first try (its process and parent are then in PATH);
other text is the seed of a volume.  A BOLD scan gives two results.

    python -m tests.helpers.fakes OUT [--ray-address A] MANIFEST...
"""

from __future__ import annotations

import argparse
import hashlib
import importlib
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.scan import SCAN_SCHEMA, Scan, labels_path
from data_prep.tables import write_table
from data_prep.volumes.pipeline import Prepared, Rejected
from data_prep.volumes.preset import PRESETS, Preset
from neurojepa.errors import run_command
from neurojepa.feed.format import ARCHIVE_GRID, LABELS_SCHEMA

QUICK = PRESETS["quick"]


def make_manifest(root: Path, contents: dict[str, str], cohort: str = "fake",
                  name: str = "m") -> str:
    """A manifest of "person/session/modality" -> text of the scan's file."""
    rows = []
    labels = []
    for key, text in sorted(contents.items()):
        person, session, modality = key.split("/")
        file = root / "files" / f"{cohort}_{person}_{session}_{modality}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        if not file.exists() or file.read_text() != text:
            file.write_text(text)
            os.utime(file, (1, 1))
        scan = Scan(str(file), cohort, person, person, session, modality, "train", site="A",
                    size_bytes=len(text), modified=1.0,
                    label_uri=str(file) if modality == "T1w" else None)
        rows.append(vars(scan))
        labels.append({"participant": person, "session": session, "name": "age", "value": "50"})
    path = str(root / f"{name}.parquet")
    write_table(labels_path(path), pa.Table.from_pylist(labels, schema=LABELS_SCHEMA))
    write_table(path, pa.Table.from_pylist(rows, schema=SCAN_SCHEMA))
    return path


def fake_prepare(scans: list[Scan], preset: Preset) -> list[Prepared | Rejected]:
    """What ``prepare_person`` does, in milliseconds."""
    for scan in scans:
        if Path(scan.uri).read_text() in (["hang", "crowd"] if len(scans) > 1 else ["hang"]):
            time.sleep(1)  # whoever watches has begun to count
            Path(scan.uri).with_suffix(".hangs").touch()
            time.sleep(120)
    return [result for scan in scans for result in _fake_scan(scan)]


def _fake_scan(scan: Scan) -> list[Prepared | Rejected]:
    text = Path(scan.uri).read_text()
    if text == "bad":
        return [Rejected(scan, "truncated", f"{scan.uri}: ends after 3 bytes")]
    _misbehave(text)
    image, mask = volume(text)
    label = (mask * 17).astype(np.int16) if scan.label_uri else None
    whole = Prepared(scan, hashlib.sha256(text.encode()).hexdigest()[:24], image, mask, label,
                     {"qc_snr": 10.0, "qc_odd": float("nan"), "orientation": "RAS"},
                     ["low_dice"] if text == "flag" else [])
    if scan.modality != "BOLD":
        return [whole]
    return [whole, replace(whole, scan=replace(scan, modality="tSNR"), image=image**2,
                           scan_id=f"{whole.scan_id}-tSNR")]


def _misbehave(text: str) -> None:
    if text == "crash":
        raise ZeroDivisionError("a fault in the code")
    if text == "segv":
        os.kill(os.getpid(), signal.SIGSEGV)
    if text == "eat":
        held = np.ones(1536 << 20, np.uint8)
        time.sleep(120)
        assert held.any()
    if text.startswith("kill:") and not os.path.exists(text[5:]):
        Path(text[5:] + ".tmp").write_text(f"{os.getpid()} {os.getppid()}")
        os.rename(text[5:] + ".tmp", text[5:])
        time.sleep(120)


def volume(text: str) -> tuple[np.ndarray, np.ndarray]:
    """An image and mask on the archive grid, different for every text."""
    seed = int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")
    rng = np.random.default_rng(seed)
    mask = np.zeros(ARCHIVE_GRID.shape, np.uint8)
    mask[40:140, 50:170, 40:140] = 1
    mask[:, :, :6] = 2
    coarse = rng.random((9, 9, 9), dtype=np.float32)
    image = np.kron(coarse, np.ones((20, 24, 20), np.float32)) * (mask == 1)
    return image, mask


def run_here(function, tasks, **options) -> dict[str, str]:
    """``run_tasks`` without Ray."""
    for each in tasks:
        function(each.argument)
    return {}


def main() -> int:
    """``prepare`` with the stand-in, as a process of its own."""
    from data_prep.prepare.driver import prepare

    parser = argparse.ArgumentParser()
    parser.add_argument("out")
    parser.add_argument("manifests", nargs="+")
    parser.add_argument("--ray-address")
    arguments = parser.parse_args()
    prepare(arguments.manifests, out=arguments.out, preset=QUICK, workers=None,
            ray_address=arguments.ray_address,
            prepare_one=importlib.import_module("tests.helpers.fakes").fake_prepare)
    return 0


if __name__ == "__main__":
    run_command(main)
