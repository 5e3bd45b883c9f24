"""index: how fast a cohort's tree becomes a manifest, ours beside bids2table's indexer.

The tree is BIDS on a local disk: per session three images with their sidecars, per person a
sessions.tsv, and a derivative with masks and label maps.  Images are empty, for none is opened.
Both run in a process of their own on one core, so that the peak memory is each one's.  bids2table
reads no sidecar, table or derivative; ours does, and a second index opens nothing again.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from tools.bench.common import clock, machine, print_table

SIDECAR = json.dumps({
    "Manufacturer": "Siemens", "ManufacturersModelName": "Prisma", "MagneticFieldStrength": 3,
    "RepetitionTime": 2.3, "EchoTime": 0.00298, "FlipAngle": 9, "SliceThickness": 1,
    "MRAcquisitionType": "3D", "InstitutionName": "Site", "ImageType": ["ORIGINAL", "PRIMARY"],
    "ImageOrientationPatientDICOM": [0.99, 0.05, 0, -0.05, 0.99, 0.02], "Extra": list(range(60))})
SCANS = ("anat/{}_T1w", "anat/{}_FLAIR", "func/{}_task-rest_bold")
SESSIONS = 2


def run(quick: bool, official: str | None) -> dict[str, Any]:
    """Measure; returns files_per_s (CPU time of one core), peak_mib and the peer's figures."""
    print(machine())
    with tempfile.TemporaryDirectory(prefix="bench-index-") as name:
        tree = Path(name) / "tree"
        count = _make(tree, 20_000 if quick else 200_000)
        print(f"{count} files of one BIDS tree")
        tasks = [("this index", "ours"), ("this index, again", "ours")]
        if find_spec("bids2table"):
            tasks.append(("bids2table (names alone)", "peer"))
        rows = [(what, *_measure(task, tree, Path(name))) for what, task in tasks]
    print_table(("indexer", "images", "CPU s", "wall s", "files/s per core", "peak MiB"),
                [(what, images, cpu, wall, count / cpu, peak)
                 for what, images, cpu, wall, peak in rows])
    ours, again = rows[:2]
    return {"files": count, "files_per_s": count / ours[2], "files_per_s_again": count / again[2],
            "peak_mib": ours[4],
            "ratio_vs_bids2table": rows[2][2] / ours[2] if len(rows) > 2 else None,
            "peak_mib_bids2table": rows[2][4] if len(rows) > 2 else None}


def _make(tree: Path, count: int) -> int:
    """Write about ``count`` files; returns how many."""
    per_person = 1 + SESSIONS * (2 * len(SCANS) + 2)
    people = count // per_person
    derived = tree / "derivatives" / "masks"
    tree.mkdir()
    description = '{"Name": "bench", "BIDSVersion": "1.9.0"}'
    (tree / "dataset_description.json").write_text(description)
    (tree / "participants.tsv").write_text("participant_id\tage\tsex\n" + "".join(
        f"sub-{person:06d}\t{60 - person % 40}\tF\n" for person in range(people)))
    for person in range(people):
        label = f"sub-{person:06d}"
        for session in range(SESSIONS):
            stem = f"{label}_ses-{session}"
            for kind in ("anat", "func"):
                (tree / label / f"ses-{session}" / kind).mkdir(parents=True)
            for scan in SCANS:
                path = tree / label / f"ses-{session}" / scan.format(stem)
                path.with_name(path.name + ".nii.gz").touch()
                path.with_name(path.name + ".json").write_text(SIDECAR)
            folder = derived / label / f"ses-{session}" / "anat"
            folder.mkdir(parents=True)
            (folder / f"{stem}_desc-brain_mask.nii.gz").touch()
            (folder / f"{stem}_desc-aseg_dseg.nii.gz").touch()
        (tree / label / f"{label}_sessions.tsv").write_text(
            "session_id\tage\n" + "".join(f"ses-{one}\t{60 + one}\n" for one in range(SESSIONS)))
    (derived / "dataset_description.json").write_text(description)
    return people * per_person + 3


def _measure(task: str, tree: Path, folder: Path) -> tuple[int, float, float, float]:
    """Images found, CPU and wall seconds, and peak MiB of a task in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.bench.index", task, str(tree), str(folder / "m.parquet")],
        check=True, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"})
    told = json.loads(done.stdout.splitlines()[-1])
    return told["images"], told["cpu_s"], told["wall_s"], told["peak_mib"]


def _child(task: str, tree: str, out: str) -> dict[str, Any]:
    """One task, timed without its imports."""
    if task == "ours":
        from data_prep.cohorts.bids import reader
        from data_prep.index import index
        from data_prep.tables import read_table

        assert reader.read_cohort  # imported before the clock runs
        with clock() as spent:
            index("bids", tree, out=out, key=b"0123456789abcdef", name="bench")
        peak = _peak_mib()
        images = read_table(out).num_rows
    else:
        from bids2table import index_dataset

        with clock() as spent:
            table = index_dataset(tree)
        peak = _peak_mib()
        images = sum(ext == ".nii.gz" for ext in table["ext"].to_pylist())
    return {**asdict(spent), "images": images, "peak_mib": peak}


def _peak_mib() -> float:
    """Of this process alone: what resource tells begins with the parent's at the fork."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) / 1024


if __name__ == "__main__":
    print(json.dumps(_child(*sys.argv[1:])))
