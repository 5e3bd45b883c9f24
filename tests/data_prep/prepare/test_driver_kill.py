"""Worker, node or driver killed while an archive is made: the next run ends with the same bytes."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from data_prep.archive import open_archive
from data_prep.prepare import driver
from data_prep.verify import verify
from tests.helpers import ROOT
from tests.helpers.fakes import QUICK, fake_prepare, make_manifest, run_here
from tests.helpers.ray_nodes import RAY, Cluster, cluster
from tests.helpers.trees import tree_bytes
from tests.helpers.waiting import wait_until

pytestmark = [pytest.mark.slow(12), pytest.mark.cluster]

PEOPLE = 8


@pytest.fixture(scope="module")
def ray_nodes() -> Iterator[Cluster]:
    with cluster() as made:
        yield made


class Runs:
    """Drivers over one manifest, and what an undisturbed run makes of it."""

    def __init__(self, root: Path, made: Cluster) -> None:
        self.root, self.cluster = root, made
        contents = {f"p{n}/{visit}/T1w": f"{n}-{visit}" for n in range(PEOPLE)
                    for visit in (1, 2)}
        # the same content in two people, a scan that is rejected, one that waits to be killed
        contents |= {"p7/2/T1w": "0-1", "p6/2/T1w": "bad", "p5/1/T1w": f"kill:{root}/pids"}
        self.manifest = make_manifest(root, contents)
        self.pids = root / "pids"
        self.pids.touch()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(driver, "run_tasks", run_here)
            driver.prepare([self.manifest], out=str(root / "undisturbed"), preset=QUICK, workers=1,
                         prepare_one=fake_prepare)
        self.pids.unlink()
        assert verify(str(root / "undisturbed")) == 0
        self.expected = tree_bytes(root / "undisturbed")

    def driver(self, out: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.fakes", str(self.root / out), self.manifest,
             "--ray-address", self.cluster.address], cwd=ROOT, env=self.cluster.environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    def ends_well(self, driver: subprocess.Popen[str]) -> str:
        said, _ = driver.communicate(timeout=200)
        assert driver.returncode == 0, said
        return said

    def num_records(self, out: str) -> int:
        return len(list((self.root / out / "results").glob("*.json")))

    def waiting_child(self) -> int:
        """Process id of the child that waits for its end; it has a Ray worker as its parent."""
        wait_until(self.pids.exists)
        return int(self.pids.read_text().split()[0])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, ray_nodes: Cluster) -> Runs:
    return Runs(tmp_path_factory.mktemp("kills"), ray_nodes)


@pytest.fixture
def runs(made: Runs) -> Iterator[Runs]:
    yield made
    made.pids.unlink(missing_ok=True)


def test_a_killed_ray_worker_and_then_a_killed_child(runs: Runs):
    driver = runs.driver("worker")
    child = psutil.Process(runs.waiting_child())
    worker = child.parent()
    assert worker is not None and worker.name().startswith("ray::")
    runs.pids.unlink()  # so that the next one waits, too
    worker.kill()
    child.wait(120)  # no work goes on behind the back of the worker's successor
    second = runs.waiting_child()
    assert second != child.pid
    os.kill(second, signal.SIGKILL)  # as the kernel does when memory is short
    runs.ends_well(driver)
    assert tree_bytes(runs.root / "worker") == runs.expected


def test_a_killed_node(runs: Runs):
    node = runs.cluster.add_node()
    driver = runs.driver("node")
    try:
        runs.waiting_child()
        wait_until(lambda: runs.num_records("node") >= 2)
    finally:
        runs.cluster.kill(node)
    with suppress(ProcessLookupError):  # it was on the other node
        os.kill(runs.waiting_child(), signal.SIGKILL)
    runs.ends_well(driver)
    assert tree_bytes(runs.root / "node") == runs.expected


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_driver(runs: Runs, number: signal.Signals):
    out = f"driver-{number.name}"
    driver = runs.driver(out)
    child = psutil.Process(runs.waiting_child())
    wait_until(lambda: runs.num_records(out) >= 2)
    driver.send_signal(number)
    said, _ = driver.communicate(timeout=120)
    if number != signal.SIGKILL:
        assert driver.returncode == 130 and "run the same command again" in said
    assert not (runs.root / out / "archive.json").exists()
    child.wait(120)  # its worker goes with the driver
    done = runs.num_records(out)
    said = runs.ends_well(runs.driver(out))
    assert f"{2 * (PEOPLE - done)} scans to prepare" in said  # nothing is done twice
    assert tree_bytes(runs.root / out) == runs.expected


def test_a_ray_job_adds_to_an_archive(runs: Runs):
    """``ray job submit`` of the command itself; its one new scan is no image."""
    out = runs.root / "job"
    shutil.copytree(runs.root / "undisturbed", out)
    manifest = make_manifest(runs.root, {"q1/1/T1w": "no image"}, "other", "n")
    done = subprocess.run(
        [RAY, "job", "submit", "--", sys.executable, "-m", "data_prep", "prepare", "--manifest",
         manifest, "--out", str(out), "--preset", "quick"], cwd=ROOT,
        env=runs.cluster.environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1/1 scans" in done.stdout and "no image" not in done.stdout
    *before, new = open_archive(str(out)).rows
    assert (new["participant"], new["status"], new["reason"]) == ("q1", "rejected", "not_nifti")
    assert len(before) == 2 * PEOPLE and verify(str(out)) == 0
