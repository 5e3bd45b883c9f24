"""No id and no date of the cohort's own reaches what is printed, the report or a message."""

from __future__ import annotations

from pathlib import Path

import pytest

from data_prep.archive import open_archive
from data_prep.identity import pseudonym
from data_prep.index import index
from data_prep.pack import pack
from data_prep.prepare import driver
from data_prep.report.report import report
from data_prep.scan import labels_path
from data_prep.tables import read_table
from data_prep.verify import verify
from data_prep.withdrawal.withdraw import withdraw
from neurojepa.errors import DataError
from neurojepa.feed.format import TRAINING_GRIDS
from tests.helpers.fakes import QUICK, fake_prepare, run_here
from tests.helpers.texts import without_hashes
from tests.helpers.trees import DESCRIPTION, KEY, write

IDS = ("NDARINV1", "NDARINV2", "NDARINV3")
SECRETS = ("NDARINV", "2011-06", "201106")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    texts = {IDS[0]: ("one", "bad"), IDS[1]: ("one", "crash"), IDS[2]: ("two", "three")}
    files = {f"sub-{name}/ses-2011060{visit}/anat/sub-{name}_ses-2011060{visit}_T1w.nii.gz": text
             for name, pair in texts.items() for visit, text in zip((2, 3), pair, strict=True)}
    files |= {f"sub-{name}/sub-{name}_sessions.tsv": "session_id\tacq_time\tage\n"
              "ses-20110602\t2011-06-02T10:11:12\t50\n" for name in IDS}
    return write(tmp_path / "cohort", files | {
        "dataset_description.json": DESCRIPTION,
        "participants.tsv": "participant_id\tsex\tdiagnosis\n" + "".join(
            f"sub-{name}\tF\tCN\n" for name in IDS)})


def test_only_pseudonyms_are_shown(tree: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(driver, "run_tasks", run_here)
    manifest, archive, feed, page = (str(tmp_path / name)
                                     for name in ("m.parquet", "a", "f", "r.html"))
    listing = tmp_path / "left.csv"
    listing.write_text(f"cohort,participant\nc,{IDS[2]}\n")
    index("bids", str(tree), out=manifest, key=KEY, name="c")
    driver.prepare([manifest], out=archive, preset=QUICK, workers=1, prepare_one=fake_prepare)
    rows = open_archive(archive).rows
    pack(archive, out=feed, grid=TRAINING_GRIDS["3mm"], shard_bytes=1 << 20)
    report(archive, page)
    assert verify(archive) == verify(feed) == 0
    withdraw([str(listing)], targets=[archive, feed], key=KEY)
    driver.prepare([manifest], out=archive, preset=QUICK, workers=1, prepare_one=fake_prepare)
    shown = capsys.readouterr().out.replace(str(tmp_path), "")
    assert {row["reason"].split(":")[0] for row in rows if row["reason"]} == {
        "truncated", "worker_failed", "duplicate_of"}
    shown += Path(page).read_text() + "".join(
        f"{row['participant']} {row['family']} {row['message']} {row['provenance']} {row['reason']}"
        for row in rows)
    shown += "".join((Path(target) / "audit.jsonl").read_text() for target in (archive, feed))
    shown = without_hashes(shown)
    assert len(shown) > 5000 and not [secret for secret in SECRETS if secret in shown]


def test_errors_that_end_a_run_name_no_person(tree: Path, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(driver, "run_tasks", run_here)
    for path in tree.rglob("*.nii.gz"):
        path.write_text("bad")
    index("bids", str(tree), out=str(tmp_path / "m.parquet"), key=KEY, name="c")
    with pytest.raises(DataError, match="none of 6 scans is usable") as error:
        driver.prepare([str(tmp_path / "m.parquet")], out=str(tmp_path / "a"), preset=QUICK,
                       workers=1,
                     prepare_one=fake_prepare)
    said = str(error.value) + capsys.readouterr().out
    assert "ends after 3 bytes" in said and not [secret for secret in SECRETS if secret in said]


def test_people_on_a_list_are_not_indexed(tree: Path, tmp_path: Path, capsys):
    (tmp_path / "w1_20250131.csv").write_text(f"{IDS[2]}\nNDARINV9\n")
    out = str(tmp_path / "m.parquet")
    index("bids", str(tree), out=out, key=KEY, name="c",
          withdrawn=[str(tmp_path / "w1_20250131.csv")])
    people = {row["participant"] for row in read_table(out).to_pylist()}
    assert people == {pseudonym(KEY, "c", name) for name in IDS[:2]}
    assert "noted 2 x scans of people who withdrew" in capsys.readouterr().out
    labels = read_table(labels_path(out))["participant"].to_pylist()
    assert labels and set(labels) == people
