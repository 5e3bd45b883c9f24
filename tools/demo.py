"""The main job, end to end: cohort -> archive -> feed -> pretraining that is killed -> probe.

Runs the commands a user would type, on a local S3 server unless --store names a directory, and
writes DIR/report.html and DIR/summary.json.  Every stage keeps what is already there, so a second
run is short and an interrupted one continues.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from neurojepa.errors import ClusterError, ConfigError, run_command

ROOT = Path(__file__).resolve().parent.parent
RANKS = 2
# The demo's pseudonyms protect no one: its people are invented, or public as the real scans are.
# A fixed key makes the split, and so the whole demo, the same everywhere.
DEMO_KEY = "the demo cohort is invented; its key is public (4372)"  # a split with all parts
SPACING_MM = "2"  # of the synthetic scans; the feed is 3 mm
SCAN_SUFFIXES = ("_T1w", "_T2w", "_FLAIR")


class Demo:
    """Where everything lies, and the stages in order."""

    def __init__(self, out: Path, store: str, scans: Path | None, participants: int,
                 environment: dict[str, str]) -> None:
        self.out, self.scans, self.participants = out, scans, participants
        self.archive, self.feed = f"{store}/archive", f"{store}/feed"
        self.environment = {**os.environ, **environment, "OMP_NUM_THREADS": "1"}
        self.seconds: dict[str, float] = {}
        self.key = out / "demo.key"

    def run(self) -> None:
        for name, stage in (
            ("synthetic cohort", self.synthesise),
            ("index, prepare, pack", self.prepare),
            ("pretraining, undisturbed", self.train_undisturbed),
            ("pretraining, one rank killed", self.train_killed),
            ("export and probe", self.probe),
            ("report", self.report),
        ):
            print(f"\n== {name}", flush=True)
            began = time.monotonic()
            stage()
            self.seconds[name] = round(time.monotonic() - began, 1)
            print(f"== {name}: {self.seconds[name]:.0f} s", flush=True)

    # ---- stages ----------------------------------------------------------------------------------

    def synthesise(self) -> None:
        labels = self.scans / "labels" if self.scans else None
        anatomies = ["--anatomies", str(labels)] if labels and labels.is_dir() else []
        self.command("data_prep", "synth", "--out", str(self.out / "cohort"), "--participants",
                     str(self.participants), "--spacing-mm", SPACING_MM, "--workers", str(RANKS),
                     *anatomies)

    def prepare(self) -> None:
        self.key.touch(mode=0o600)
        self.key.write_text(DEMO_KEY)
        self._index_and_prepare([("synthetic", self.out / "cohort")], "quick")
        if self.scans:
            self._index_and_prepare(scan_sources(self.scans), "default")
        self.command("data_prep", "pack", "--archive", self.archive, "--out", self.feed,
                     "--grid", "3mm")
        self.command("data_prep", "verify", self.feed)

    def _index_and_prepare(self, sources: list[tuple[str, Path]], preset: str) -> None:
        manifests = []
        for name, source in sources:
            manifests.append(str(self.out / "manifests" / f"{name}.parquet"))
            self.command("data_prep", "index", "--cohort", "bids", "--name", name, "--source",
                         str(source), "--out", manifests[-1], "--key", str(self.key))
        if manifests:
            self.command("data_prep", "prepare", "--manifest", *manifests, "--out", self.archive,
                         "--preset", preset, "--workers", str(RANKS))

    def train_undisturbed(self) -> None:
        self.execute([str(Path(sys.executable).parent / "deepspeed"), "--num_gpus", str(RANKS),
                      "--module", "neurojepa.pretrain", *self._recipe("run-undisturbed")],
                     {"DS_ACCELERATOR": "cpu"} if not has_accelerator() else {})

    def train_killed(self) -> None:
        run = self.out / "run"
        watch = threading.Thread(target=kill_half_way, args=(run,), daemon=True)
        watch.start()
        self.command("cluster", "supervise", "--ranks", str(RANKS), "--", *self._recipe("run"))
        self.command("cluster", "status", str(run))

    def _recipe(self, run: str) -> list[str]:
        return ["--config", "configs/demo.yaml", f"data.feed={self.feed}",
                f"run.dir={self.out / run}"]

    def probe(self) -> None:
        self.command("neurojepa.weights", "export", str(self.out / "run"), "--out",
                     str(self.out / "encoder"))
        shutil.rmtree(self.out / "weights", ignore_errors=True)  # an earlier encoder's, or cut off
        self.command("neurojepa", "code", "--weights", str(self.out / "encoder"), "--feed",
                     self.feed, "--out", str(self.out / "weights"))
        self.command("neurojepa.downstream", "probe", "--weights", str(self.out / "weights"),
                     "--feed", self.feed, "--cohort", "synthetic", "--modality", "T1w", "--out",
                     str(self.out / "probe"))

    def report(self) -> None:
        from tools.demo_report import write_report

        os.environ.update(self.environment)
        summary = write_report(self.out, self.archive, self.feed, self.seconds)
        if not summary["bit_equal"]:
            raise ClusterError("the restarted run differs from the undisturbed one: "
                               f"{summary['difference']}; see {self.out / 'summary.json'}")

    # ---- commands --------------------------------------------------------------------------------

    def command(self, module: str, *arguments: str) -> None:
        """Run ``python -m module``, its output passing through."""
        self.execute([sys.executable, "-m", module, *arguments], {})

    def execute(self, command: list[str], environment: dict[str, str]) -> None:
        print("$", " ".join(command).replace(str(Path(sys.executable).parent) + "/", ""),
              flush=True)
        status = subprocess.run(command, cwd=ROOT, env={**self.environment, **environment},
                                check=False).returncode
        if status:
            raise ClusterError(f"`{' '.join(command)}` ended with status {status}; its own message "
                               "is above; run the same command again to continue")


def kill_half_way(run: Path) -> None:
    """SIGKILL rank 1 between two checkpoints in the middle of the run, once in its life.

    What was done is written to ``killed.json`` in the run directory, so that a second demo, which
    finds the run finished, still knows it.
    """
    from cluster.rundir import RunDir
    from neurojepa.config import load_config

    steps = load_config(ROOT / "configs/demo.yaml", ["data.feed=x", "run.dir=x"]).train.steps
    at, record = steps // 2 + 4, run / "killed.json"
    while not record.exists():
        for beat in RunDir(str(run)).heartbeats():
            if beat.rank == 1 and beat.step >= at and is_rank_of(run, beat.pid):
                os.kill(beat.pid, signal.SIGKILL)
                record.write_text(json.dumps({"step": beat.step, "pid": beat.pid, "rank": 1}))
                print(f"== killed rank 1 (process {beat.pid}) at step {beat.step}", flush=True)
        time.sleep(0.02)


def is_rank_of(run: Path, pid: int) -> bool:
    """Whether a process is alive and a rank of this run: an old file may name a reused id."""
    with contextlib.suppress(OSError):
        command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
        return f"run.dir={run}".encode() in command
    return False


def scan_sources(folder: Path) -> list[tuple[str, Path]]:
    """Folders below (and with) ``folder`` that hold scans: BIDS datasets, or files by suffix."""
    folders = [folder, *sorted(child for child in folder.iterdir() if child.is_dir())]
    sources = [(path.name, path) for path in folders
               if (path / "dataset_description.json").exists()
               or any(file.name.split(".")[0].endswith(SCAN_SUFFIXES) for file in path.iterdir())]
    left = [path.name for path in folders[1:] if (path.name, path) not in sources]
    if left:
        print(f"{folder}: nothing taken from {', '.join(left)}: no BIDS dataset and no file named "
              f"{' or '.join('*' + suffix for suffix in SCAN_SUFFIXES)}")
    return sources


def has_accelerator() -> bool:
    import torch

    return torch.cuda.is_available()


@contextlib.contextmanager
def open_demo_store(out: Path, store: str | None) -> Iterator[tuple[str, dict[str, str]]]:
    """The store's URI and environment: a directory, or a bucket on a local S3 server."""
    if store:
        yield str(Path(store).resolve()), {}
        return
    import s3fs

    from tools.store import serve_s3

    with serve_s3(out / "s3") as environment:
        client: dict[str, Any] = {"endpoint_url": environment["AWS_ENDPOINT_URL"],
                                  "key": environment["AWS_ACCESS_KEY_ID"],
                                  "secret": environment["AWS_SECRET_ACCESS_KEY"]}
        s3fs.S3FileSystem(**client).makedirs("neurojepa-demo", exist_ok=True)
        yield "s3://neurojepa-demo", environment


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="tools/demo.sh", description=__doc__)
    parser.add_argument("--out", default="demo", help="where everything goes (default: demo)")
    parser.add_argument("--store", help="directory for archive and feed; default: a local S3 "
                        "server whose data lies in OUT/s3")
    parser.add_argument("--scans", help="folder of real scans to add: BIDS datasets, or files "
                        "named *_T1w.nii.gz, *_T2w.nii.gz, *_FLAIR.nii.gz (default: "
                        "../shared/data where it exists)")
    parser.add_argument("--participants", type=int, default=48, help="size of the synthetic cohort")
    arguments = parser.parse_args(argv)
    default_scans = ROOT.parent / "shared" / "data"
    scans = Path(arguments.scans) if arguments.scans else default_scans
    if not scans.is_dir():
        if arguments.scans:
            raise ConfigError(f"--scans {scans}: no such folder")
        scans = None  # type: ignore[assignment]
    out = Path(arguments.out).resolve()
    out.mkdir(parents=True, exist_ok=True)
    with open_demo_store(out, arguments.store) as (store, environment):
        Demo(out, store, scans, arguments.participants, environment).run()
    print(f"\nread {out / 'report.html'}; figures are in {out / 'summary.json'}")
    return 0


if __name__ == "__main__":
    run_command(main)
