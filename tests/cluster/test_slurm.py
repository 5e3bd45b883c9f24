"""The sbatch file that is shipped, under a real Slurm of two nodes: stopped, queued again, done."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.helpers import ROOT
from tests.helpers.launches import write_recipe
from tests.helpers.slurm import Slurm, skip_without_slurm, slurm
from tests.helpers.waiting import wait_until

STEPS = 60
# the sizes of a real cluster -> of this machine
SMALLER = {"--ntasks-per-node=8 --gpus-per-node=8 --cpus-per-task=8": "--ntasks-per-node=1",
           "srun python": f"srun {sys.executable}"}


def shipped(folder: Path) -> Path:
    """The template with paths of ours."""
    text = (ROOT / "cluster/templates/train.sbatch").read_text()
    for shown, here in {**SMALLER, "configs/demo.yaml": str(write_recipe(folder)),
                        "data.feed=feed": f"train.steps={STEPS}",
                        "run-slurm": str(folder / "run")}.items():
        assert shown in text
        text = text.replace(shown, here)
    (folder / "train.sbatch").write_text(text)
    return folder / "train.sbatch"


def submit(cluster: Slurm, script: Path) -> str:
    # Slurm's names of these nodes lead nowhere
    cluster.environment.update(MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1", DS_ACCELERATOR="cpu")
    return cluster.run("sbatch", "--parsable", f"--chdir={ROOT}",
                       f"--output={script.parent / 'out'}", str(script))


def wait_for_job(cluster: Slurm, number: str, out: Path, **fields: str) -> None:
    end = time.monotonic() + 200
    while (job := cluster.job(number)) and any(job[key] != value for key, value in fields.items()):
        assert time.monotonic() < end, f"{job['JobState']} {job['Reason']}: {out.read_text()}"
        time.sleep(0.3)


def events(run: Path) -> list[tuple[str, str | None]]:
    rows = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    return [(row["event"], row.get("reason")) for row in rows if row["event"] != "checkpoint"]


@pytest.mark.slow(25)
@pytest.mark.cluster
def test_a_job_that_is_stopped_in_time_is_queued_again_and_goes_on(tmp_path: Path) -> None:
    skip_without_slurm()
    run, out = tmp_path / "run", tmp_path / "out"
    with slurm(tmp_path) as cluster:
        number = submit(cluster, shipped(tmp_path))
        _wait_for_steps(run, out)
        cluster.run("scancel", "--signal=USR1", number)  # as the end of its time would
        wait_for_job(cluster, number, out, JobState="PENDING", Restarts="1")
        assert events(run) == [("start", None), ("stop", "signal")]
        cluster.run("scontrol", "update", f"JobId={number}", "StartTime=now")  # not in 2 minutes
        wait_for_job(cluster, number, out, JobState="COMPLETED", ExitCode="0:0")
    assert events(run)[2:] == [("resume", None), ("finish", None)]
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, STEPS + 1))
    assert "2 rank(s)" in out.read_text()


def _wait_for_steps(run: Path, out: Path) -> None:
    wait_until((run / "metrics.jsonl").exists,
               why=lambda: out.read_text() if out.exists() else "not started")


def test_a_job_that_an_operator_stops_stays_down(tmp_path: Path) -> None:
    """The part of the file behind srun, for every way in which a training ends."""
    text = (ROOT / "cluster/templates/train.sbatch").read_text()
    (tmp_path / "run-slurm").mkdir()
    for name, script in {"squeue": "echo 2026-11-28T12:00:00", "srun": "exit $STATUS",
                         "scontrol": "echo $@ >> called"}.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o700)
    for status, reason, requeued in (("75", "time limit", True), ("75", "signal", True),
                                     ("75", "operator", False), ("2", "signal", False),
                                     ("0", "signal", False)):
        (tmp_path / "called").unlink(missing_ok=True)
        row = {"event": "stop", "step": 4, "reason": reason}
        (tmp_path / "run-slurm/events.jsonl").write_text(
            json.dumps({**row, "reason": "operator"}) + "\n" + json.dumps(row) + "\n")
        done = subprocess.run(["bash", "-c", text], cwd=tmp_path, capture_output=True, text=True,
                              env={"PATH": f"{tmp_path}:/usr/bin:/bin", "SLURM_JOB_ID": "7",
                                   "STATUS": status})
        assert (done.returncode, done.stderr) == (int(status), "")
        assert (tmp_path / "called").exists() is requeued, (status, reason)
        if requeued:
            assert (tmp_path / "called").read_text() == "requeue 7\n"
