"""Scans that crash, hang or eat memory: given up alone, once, with a reason; the rest is kept."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from data_prep.archive import list_slots, open_archive
from data_prep.prepare import child as watching
from data_prep.prepare import driver
from data_prep.prepare.child import Child, Death
from data_prep.prepare.person import Limits, input_sha256, nameless
from data_prep.scan import Scan
from data_prep.verify import verify
from neurojepa.errors import DataError
from neurojepa.storage import sha256
from tests.helpers.fakes import QUICK, fake_prepare, make_manifest
from tests.helpers.trees import tree_bytes

LIMITS = Limits(memory_bytes=1 << 30, seconds_per_scan=60.0)


@pytest.fixture(autouse=True)
def hours(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks at a scan that hangs an hour passes."""
    passed, end = [0.0], Child.end

    def clock() -> float:
        passed[0] += 3600 * len(list(tmp_path.glob("files/*.hangs")))
        return time.monotonic() + passed[0]

    def ended(child: Child) -> None:
        end(child)
        for mark in tmp_path.glob("files/*.hangs"):
            mark.unlink()

    monkeypatch.setattr(watching, "time", SimpleNamespace(monotonic=clock))
    monkeypatch.setattr(Child, "end", ended)


@pytest.fixture
def prepare(calls, tmp_path: Path) -> Callable[..., dict[str, str | None]]:
    """Prepare "person/session/modality" -> text; returns the reason of each."""

    def run(contents: dict[str, str], **options) -> dict[str, str | None]:
        out = str(tmp_path / "a")
        driver.prepare([make_manifest(tmp_path, contents)], out=out, preset=QUICK, workers=1,
                     prepare_one=fake_prepare, limits=LIMITS, **options)
        return {"/".join((row["participant"], row["session"], row["modality"])): row["reason"]
                for row in open_archive(out).rows}

    return run


@pytest.mark.slow(4)
@pytest.mark.parametrize("text, reason, message", [
    ("segv", "worker_crashed", "the process died of SIGSEGV"),
    ("hang", "worker_timeout", "not done after 60 s"),
    ("eat", "worker_memory", "1.00 are allowed"),
    ("crash", "worker_failed", "ZeroDivisionError: a fault in the code (fakes.py:"),
])
def test_only_the_poison_scan_is_lost(prepare, calls, tmp_path: Path, text: str,
                                      reason: str, message: str):
    contents = {"p1/1/T1w": "one", "p1/2/T1w": text, "p2/1/T1w": "two"}
    assert prepare(contents) == {
        "p1/1/T1w": None, "p1/2/T1w": reason, "p2/1/T1w": None}
    row = open_archive(str(tmp_path / "a")).rows[1]
    assert message in row["message"] and row["scan_id"] is None
    assert verify(str(tmp_path / "a")) == 0
    before = tree_bytes(tmp_path / "a")
    prepare(contents)
    assert calls == ["p1", "p2"] and tree_bytes(tmp_path / "a") == before  # not tried for ever


def test_quarantined_people_are_tried_again_when_told_to(prepare, calls, tmp_path):
    contents = {"p1/1/T1w": "one", "p1/2/T1w": f"kill:{tmp_path}/no/folder", "p2/1/T1w": "two"}
    assert prepare(contents)["p1/2/T1w"] == "worker_failed"
    (tmp_path / "no").mkdir()
    (tmp_path / "no" / "folder").touch()  # what was wrong is put right
    assert prepare(contents)["p1/2/T1w"] == "worker_failed"
    assert prepare(contents, retry_quarantined=True)["p1/2/T1w"] is None
    assert calls == ["p1", "p2", "p1"] and verify(str(tmp_path / "a")) == 0


@pytest.mark.slow(5)
def test_scans_that_die_only_together_are_all_given_up(prepare):
    reasons = prepare({"p1/1/T1w": "one", "p1/2/T1w": "crowd", "p2/1/T1w": "two"})
    assert reasons == {"p1/1/T1w": "worker_timeout", "p1/2/T1w": "worker_timeout",
                       "p2/1/T1w": None}


def test_a_scan_with_several_results_and_one_that_is_not_read(calls, tmp_path):
    import pyarrow as pa

    from data_prep.tables import read_table, write_table

    path = make_manifest(tmp_path, {"p1/1/BOLD": "b", "p1/1/T1w": "one", "p2/1/T1w": "crash"})
    rows = read_table(path).to_pylist()
    for row in rows:
        row["reason"] = "cohort_unusable" if row["participant"] == "p2" else None
    write_table(path, pa.Table.from_pylist(rows, schema=read_table(path).schema))
    out = str(tmp_path / "a")
    assert driver.prepare([path], out=out, preset=QUICK, workers=1, prepare_one=fake_prepare) == {
        "accepted": 3, "rejected": 1}
    found = {row["modality"]: row for row in open_archive(out).rows if row["participant"] == "p1"}
    assert set(found) == {"BOLD", "tSNR", "T1w"} and len(list_slots(out)) == 3
    assert found["tSNR"]["uri"] == found["BOLD"]["uri"]
    assert found["tSNR"]["scan_id"] == found["BOLD"]["scan_id"] + "-tSNR"
    assert found["tSNR"]["voxels_sha256"] != found["BOLD"]["voxels_sha256"]
    ruled_out = open_archive(out).rows[-1]
    assert (ruled_out["status"], ruled_out["reason"]) == ("rejected", "cohort_unusable")
    assert calls == ["p1"] and verify(out) == 0


# ---- the watched child ---------------------------------------------------------------------------

def test_a_child_is_reused_and_dies_with_its_parent(tmp_path: Path):
    import subprocess
    import sys

    import psutil

    script = ("import os, time\nfrom data_prep.prepare.child import Child\nchild = Child()\n"
              "call = lambda: child.call(os.getpid, seconds=60, memory_bytes=1 << 30)\n"
              "assert call() == (pid := call())\nprint(pid, flush=True)\ntime.sleep(60)\n")
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE,
                          text=True) as parent:
        assert parent.stdout is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.ppid() == parent.pid
        parent.kill()
        child.wait(timeout=120)


def test_faults_of_a_store_are_raised_and_not_a_death():
    child = Child()
    with pytest.raises(DataError, match="nowhere: not found"):
        child.call(sha256_of, "nowhere", seconds=60, memory_bytes=1 << 30)
    end = child.call(os._exit, 7, seconds=60, memory_bytes=1 << 30)
    assert end == Death("worker_crashed", "the process ended with status 7")
    child.end()


def sha256_of(uri: str) -> str:
    from neurojepa.storage import read_bytes

    return sha256(read_bytes(uri))


# ---- what is recorded ----------------------------------------------------------------------------

SCAN = Scan("s3://b/adni/002_S_0295/2011-06-02/I45108.nii", "c", "5ab3", "5ab3", "1", "T1w",
            "train")


def test_messages_have_no_names():
    said = ("s3://b/adni/002_S_0295/2011-06-02/I45108.nii: bad; I45108.nii: bad; "
            "b/adni/002_S_0295/2011-06-02: bad; mask T1/x_002_S_0295.nii in A.zip: bad")
    assert nameless(said, [replace(SCAN, mask_uri="A.zip::T1/x_002_S_0295.nii")]) == (
        "[5ab3 T1w]: bad; [5ab3 T1w]: bad; [5ab3 T1w]: bad; mask [5ab3 T1w] in [5ab3 T1w]: bad")


def test_hash_of_a_file_a_member_and_a_series(tmp_path: Path):
    import zipfile

    (tmp_path / "s").mkdir()
    for name in "ab":
        (tmp_path / "s" / name).write_text(name)
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        for name in ("s/a", "s/b", "c"):
            archive.writestr(name, name[-1])

    def digest(uri: str, member: str | None = None) -> str | None:
        return input_sha256(replace(SCAN, uri=str(tmp_path / uri), member=member))

    assert digest("s/a") == digest("z.zip", "s/a") == sha256(b"a")
    assert digest("s", None) is None and digest("gone") is None
    series = sha256((sha256(b"a") + sha256(b"b")).encode())
    assert input_sha256(replace(SCAN, uri=f"{tmp_path}/s/")) == digest("z.zip", "s/") == series
