"""People who leave: lists as delivered, tombstone and purge, the log, models that saw them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from data_prep.archive import open_archive
from data_prep.identity import pseudonym
from data_prep.pack import pack
from data_prep.prepare import driver
from data_prep.verify import verify
from data_prep.withdrawal import withdraw as withdrawal
from data_prep.withdrawal.audit import (
    NAME,
    append_event,
    audit_problems,
    read_events,
    withdrawn_people,
)
from data_prep.withdrawal.lists import read_lists
from data_prep.withdrawal.withdraw import withdraw
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import TRAINING_GRIDS, open_feed
from neurojepa.feed.loader import SampleReader
from tests.helpers.fakes import QUICK, fake_prepare, make_manifest, run_here

KEY = b"0123456789abcdef"
ORIGINAL = "S0071"  # no hash has an S
LEFT, STAYS, OTHER = (pseudonym(KEY, "fake", name) for name in (ORIGINAL, "8", "9"))


class Cohort:
    """An archive and a feed of three people, and a list that names one of them."""

    def __init__(self, root: Path) -> None:
        self.root, self.archive, self.feed = root, str(root / "a"), str(root / "f")
        self.list = root / "w1_20250131.csv"
        self.list.write_text(f"{ORIGINAL}\n999\n")

    def manifest(self, **more: str) -> str:
        return make_manifest(self.root, {
            f"{LEFT}/1/T1w": "one", f"{LEFT}/2/T1w": "two", f"{STAYS}/1/T1w": "three",
            f"{OTHER}/1/T2w": "four"} | more)

    def prepare(self, manifest: str) -> None:
        driver.prepare([manifest], out=self.archive, preset=QUICK, workers=1,
                       prepare_one=fake_prepare)

    def withdraw(self, *targets: str, **more) -> None:
        withdraw([str(self.list)], targets=targets or [self.archive, self.feed], key=KEY,
                 cohort="fake", **more)

    def files_of(self, person: str) -> list[Path]:
        return [path for root in (self.archive, self.feed) for path in Path(root).rglob("*")
                if person in path.name]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    cohort = Cohort(tmp_path_factory.mktemp("withdraw"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(driver, "run_tasks", run_here)
        cohort.prepare(cohort.manifest())
    pack(cohort.archive, out=cohort.feed, grid=TRAINING_GRIDS["3mm"], shard_bytes=256 << 20)
    return cohort.root


@pytest.fixture
def cohort(made: Path, tmp_path: Path, monkeypatch) -> Cohort:
    monkeypatch.setattr(driver, "run_tasks", run_here)
    for name in ("a", "f"):
        shutil.copytree(made / name, tmp_path / name)
    return Cohort(tmp_path)


def people_in(feed: str) -> set[str]:
    return set(open_feed(feed).index["participant"].to_pylist())


def test_a_withdrawn_person_is_gone_for_good(cohort: Cohort, capsys):
    feed = open_feed(cohort.feed)
    kept = SampleReader(feed).image(feed.index["participant"].to_pylist().index(STAYS))
    for _ in range(2):
        cohort.withdraw()
        assert verify(cohort.archive) == verify(cohort.feed) == 0
        assert people_in(cohort.feed) == {STAYS, OTHER}
    said = capsys.readouterr().out
    assert "list w1 of 20250131: 2 people" in said and ORIGINAL not in said
    assert f"{cohort.feed}: 2 scans of 2 listed people removed; audit log ends with" in said
    feed = open_feed(cohort.feed)
    assert (SampleReader(feed).image(feed.index["participant"].to_pylist().index(STAYS))
            == kept).all()
    assert cohort.files_of(LEFT) == [] and len(list(Path(cohort.feed).glob("shards/*"))) == 1
    for target in (cohort.archive, cohort.feed):
        assert [event["event"] for event in read_events(target)] == ["withdrawn", "purged"]
    cohort.prepare(cohort.manifest())  # does not bring it back
    tombs = [row for row in open_archive(cohort.archive).rows if row["participant"] == LEFT]
    assert len(tombs) == 2 and all(
        (row["status"], row["reason"], row["uri"], row["site"], row["figures"]["qc_snr"],
         row["provenance"])
        == ("rejected", "withdrawn", None, None, None, None) for row in tombs)
    assert LEFT not in open_archive(cohort.archive).labels["participant"].to_pylist()


def test_people_without_scans_so_far_and_copies_under_another_id_stay_out(cohort: Cohort):
    cohort.prepare(cohort.manifest(**{"x1/1/T1w": "one"}))  # the same voxels, another id
    copy = next(r for r in open_archive(cohort.archive).rows if r["participant"] == "x1")
    assert copy["reason"].startswith("duplicate_of:")
    cohort.withdraw(cohort.archive)
    newcomer = pseudonym(KEY, "fake", "999")
    cohort.prepare(cohort.manifest(**{"x1/1/T1w": "one", f"{newcomer}/1/T1w": "five"}))
    rows = open_archive(cohort.archive).rows
    assert newcomer not in {row["participant"] for row in rows}
    copy = next(row for row in rows if row["participant"] == "x1")
    assert (copy["status"], copy["reason"]) == ("rejected", "withdrawn_content")
    assert LEFT not in json.dumps(copy) and verify(cohort.archive) == 0


@pytest.mark.parametrize("stop", ["commit_feed", "write_tar", "remove_shards_except",
                                  "commit_tables", "remove_volume"])
def test_an_interrupted_withdrawal_is_finished_by_the_next(cohort: Cohort, monkeypatch, stop: str,
                                                           capsys):
    def interrupted(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(withdrawal, stop, interrupted)
        cohort.withdraw(cohort.feed, cohort.archive)
    if stop in ("write_tar", "remove_shards_except"):  # readers skip the person already
        assert LEFT not in people_in(cohort.feed)
        assert verify(cohort.feed) == 1
        assert "run withdraw with the same list again" in capsys.readouterr().out
    cohort.withdraw()
    assert people_in(cohort.feed) == {STAYS, OTHER} and cohort.files_of(LEFT) == []
    assert verify(cohort.archive) == verify(cohort.feed) == 0
    assert withdrawn_people(cohort.feed) == withdrawn_people(cohort.archive)


def test_verify_finds_whom_a_withdrawal_left_behind(cohort: Cohort, tmp_path: Path, capsys):
    """People logged as withdrawn whose rows, labels, records and voxels are all still there."""
    for target in (cohort.archive, cohort.feed):
        append_event(target, {"event": "withdrawn", "people": [LEFT], "lists": [], "shards": []})
        append_event(target, {"event": "purged", "scans": 2})
        capsys.readouterr()
        assert verify(target) == 1
        said = capsys.readouterr().out
        assert f"{LEFT} withdrew, but still has rows; run withdraw again" in said
        assert f"{LEFT} withdrew, but still has labels" in said
    assert verify(cohort.archive) == 1
    assert "a record of somebody who withdrew" in capsys.readouterr().out
    log = Path(cohort.feed) / NAME
    log.write_bytes(log.read_bytes().replace(b'"scans": 2', b'"scans": 1').replace(
        LEFT.encode(), STAYS.encode()))
    assert verify(cohort.feed) == 1
    assert "line 2: does not follow from the line before" in capsys.readouterr().out


# ---- lists ---------------------------------------------------------------------------------------

def test_the_newest_list_of_each_study_counts(tmp_path: Path):
    for name, text in (("w1_20240101.csv", "\ufeff1000001\r\n"),
                       ("w1_20250131.csv", "eid\n1000001\n1000002\n\n"),
                       ("left.csv", "cohort,participant\nabcd,sub-X1\n")):
        (tmp_path / name).write_text(text)
    left, ukb = read_lists([str(tmp_path)], "ukb")
    assert (ukb.study, ukb.date) == ("w1", "20250131")
    assert ukb.people == [("ukb", "1000001"), ("ukb", "1000002")]
    assert left.people == [("abcd", "X1")] and left.study == "left"
    os.utime(tmp_path / "left.csv", (0, 0))
    assert read_lists([str(tmp_path / "left.csv")])[0].date == "19700101T000000"
    (tmp_path / "w2_20250131.csv").write_text("1000001\n")  # ids of another application
    with pytest.raises(ConfigError, match="w1 and w2 are lists of different studies"):
        read_lists([str(tmp_path)], "ukb")


@pytest.mark.parametrize("text", [
    "cohort;participant\na;7\nb;8\n", "cohort\tparticipant\r\na\t7\r\nb\t8\r\n",
    '"cohort","participant"\r"a","7"\r"b","8"\r'])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-16", "utf-16-le"])
def test_lists_as_spreadsheets_save_them(tmp_path: Path, text: str, encoding: str):
    (tmp_path / "left.csv").write_bytes(text.encode(encoding))
    assert read_lists([str(tmp_path / "left.csv")])[0].people == [("a", "7"), ("b", "8")]
    (tmp_path / "left.csv").write_bytes(text.encode("utf-16") + b"x")
    with pytest.raises(DataError, match="is damaged utf-16; fetch it again"):
        read_lists([str(tmp_path / "left.csv")])


@pytest.mark.parametrize("text, message", [
    ("cohort,participant\n", "names nobody"), ("", "names nobody"), ("eid\n", "names nobody"),
    ("cohort,participant\na,7\nb,\n", "line 3: needs the columns"),
    ("7,8\n", "line 1: 2 cells")])
def test_a_bad_list_stops_before_anything_changes(cohort: Cohort, text: str, message: str):
    cohort.list.write_text(text)
    with pytest.raises(DataError, match=message):
        cohort.withdraw()
    assert read_events(cohort.archive) == [] and LEFT in people_in(cohort.feed)


def test_a_list_of_unknown_cohort_is_refused(cohort: Cohort):
    with pytest.raises(ConfigError, match="name it by --cohort"):
        withdraw([str(cohort.list)], targets=[cohort.feed], key=KEY)


def test_a_stale_list_is_refused(cohort: Cohort):
    cohort.withdraw()
    cohort.list = cohort.list.rename(cohort.root / "w1_20241231.csv")
    with pytest.raises(DataError, match=r"is of 20241231, but .* had the list of 20250131"):
        cohort.withdraw()
    cohort.list = cohort.root / "w1_20250301.csv"
    cohort.list.write_text(f"{ORIGINAL}\n999\n8\n")
    cohort.withdraw()
    assert people_in(cohort.feed) == {OTHER}


# ---- the log -------------------------------------------------------------------------------------

def test_a_changed_log_shows(tmp_path: Path):
    uri = str(tmp_path)
    for number in range(3):
        append_event(uri, {"event": "withdrawn", "people": [f"p{number}"]})
    log = tmp_path / NAME
    lines = log.read_bytes().splitlines(keepends=True)
    assert not list(audit_problems(uri)) and withdrawn_people(uri) == {"p0", "p1", "p2"}
    for changed in (lines[1:], [lines[0], lines[2]], [lines[0].replace(b"p0", b"p9"), *lines[1:]],
                    [lines[0], b"x\n", *lines[1:]]):
        log.write_bytes(b"".join(changed))
        assert "does not follow from the line before" in next(audit_problems(uri))
        with pytest.raises(DataError, match="the log was changed"):
            withdrawn_people(uri)


# ---- models --------------------------------------------------------------------------------------

def test_checkpoints_that_saw_the_person_are_named(cohort: Cohort, capsys):
    first = open_feed(cohort.feed).fingerprint

    def model(name: str, feed: str, split: str = "train", modalities: list[str] | None = None):
        path = cohort.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"feed": feed, "config": {"data": {
            "feed": cohort.feed, "split": split, "modalities": modalities, "weights": {}}}}))

    model("runs/r/checkpoints/step-2/manifest.json", first)
    model("runs/r/export/config.json", first)
    model("runs/t2/checkpoints/step-2/manifest.json", first, modalities=["T2w"])
    model("runs/val/checkpoints/step-2/manifest.json", first, split="val")
    cohort.withdraw()
    clean = open_feed(cohort.feed).fingerprint
    model("runs/clean/checkpoints/step-2/manifest.json", clean)
    model("runs/odd/checkpoints/step-2/manifest.json", "unheard-of")
    capsys.readouterr()
    cohort.withdraw(runs=[str(cohort.root / "runs")])
    runs = cohort.root / "runs"
    said = capsys.readouterr().out.splitlines()
    assert f"{runs}/r/checkpoints/step-2: saw 1 withdrawn people" in said
    assert f"{runs}/r/export: saw 1 withdrawn people" in said
    assert f"{runs}/odd/checkpoints/step-2: may have seen any of them: its feed is not known " \
           "here" in said
    assert said[-1] == "3 checkpoints and exports saw withdrawn people"
    logged = read_events(cohort.feed)[-1]
    assert logged["checkpoints"][f"{runs}/r/export"] == [LEFT]
    # whoever leaves later was seen by models of both fingerprints
    cohort.list = cohort.root / "w1_20250301.csv"
    cohort.list.write_text(f"{ORIGINAL}\n999\n8\n")
    cohort.withdraw(runs=[str(runs)])
    logged = read_events(cohort.feed)[-1]["checkpoints"]
    assert set(logged[f"{runs}/r/export"]) == {LEFT, STAYS}
    assert logged[f"{runs}/clean/checkpoints/step-2"] == [STAYS]
    with pytest.raises(DataError, match="no checkpoint and no exported weights"):
        cohort.withdraw(runs=[str(cohort.root / "a" / "results")])
