"""Random damage to good files never ends in a traceback, a hang or another content unnoticed."""

from __future__ import annotations

import logging
from collections import Counter

import pytest

from data_prep.scan import ScanError
from tools.bench import _fuzz_scans as scans
from tools.bench import _fuzz_tables as tables
from tools.bench.fuzz import SUBJECTS, WRONG, _ended, fuzz


def test_good_files_are_equal_to_themselves(tmp_path) -> None:
    for which, (name, raw) in scans.GOOD.items():
        scans.write(tmp_path / name.removesuffix(".gz"), raw)
        assert scans.judge(tmp_path / name.removesuffix(".gz"), which) == ("equal", "")
    tables.plant(tmp_path / "tree")
    good = tables.read(tmp_path / "tree")
    for text in tables.GOOD.values():
        assert tables.judge(tmp_path / "tree", good, "cell", text.encode()) == ("equal", "")
    (tmp_path / "tree/sub-01/sub-01_sessions.tsv").write_text("session_id\tage\n1\t51.5\n2\t70\n")
    assert tables.judge(tmp_path / "tree", good, "cell", b"")[0] in ("silent", "flagged")


@pytest.mark.parametrize(("error", "outcome"), [
    (ScanError("x", "/a/name.nii: is bad"), "rejected"), (ScanError("x", "is bad"), "traceback"),
    (KeyError("name.nii"), "traceback")])
def test_only_an_error_that_names_the_file_is_a_rejection(error: Exception, outcome: str) -> None:
    def judge() -> tuple[str, str]:
        raise error

    assert _ended(judge, "name.nii")[0] == outcome


def test_a_hang_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def judge() -> tuple[str, str]:
        while True:
            pass

    monkeypatch.setattr("tools.bench.fuzz.MAX_SECONDS", 0.05)
    assert _ended(judge, "x")[0] == "hang"


@pytest.mark.slow(5)
def test_a_few_hundred_variants_end_as_they_should() -> None:
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL)
    ended = list(fuzz(480, first=10_000))
    wrong = [one for one in ended if one.outcome in WRONG]
    assert not wrong
    counts = Counter((one.subject, one.outcome) for one in ended)
    assert all(counts[subject, "equal"] for subject in SUBJECTS)
    assert all(counts[subject, "flagged"] + counts[subject, "rejected"] for subject in SUBJECTS)
