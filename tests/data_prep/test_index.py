"""index: manifests with pseudonyms and splits, and what a second index keeps of the first."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from data_prep.cohorts.source import Source
from data_prep.identity import pseudonym
from data_prep.index import index
from data_prep.scan import Scan, labels_path, read_manifest
from data_prep.tables import read_table, write_table
from neurojepa.errors import ConfigError, DataError
from tests.helpers.texts import without_hashes
from tests.helpers.trees import DESCRIPTION, KEY, write


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write(tmp_path / "cohort", {
        "dataset_description.json": DESCRIPTION,
        "participants.tsv": "participant_id\tage\tfamily_id\tsplit_group\n"
                            "sub-007\t61.5\tf1\tn/a\nsub-8\t60\tf1\tg\nsub-9\t40\tn/a\tg\n",
        "sub-007/ses-a/anat/sub-007_ses-a_T1w.nii.gz": "x",
        "sub-007/ses-a/anat/sub-007_ses-a_T1w.json": '{"MagneticFieldStrength": 3}',
        "sub-007/ses-a/anat/sub-007_ses-a_FLAIR.nii.gz": "x",
        "sub-8/anat/sub-8_T1w.nii.gz": "x", "sub-8/anat/sub-8_T2star.nii.gz": "x",
        "sub-9/anat/sub-9_T1w.nii.gz": "x", "sub-10/anat/sub-10_T1w.nii.gz": "x"})


def indexed(tree: Path, out: Path, **arguments: object) -> dict[str, Scan]:
    """Index a tree; its scans by their file's name up to the suffix."""
    index("bids", str(tree), out=str(out), key=KEY, **arguments)  # type: ignore[arg-type]
    scans = [Scan(**row) for row in read_manifest(str(out))[0].to_pylist()]
    return {scan.uri.rsplit("/", 1)[-1].split(".")[0]: scan for scan in scans}


def person(number: str, cohort: str = "cohort") -> str:
    return pseudonym(KEY, cohort, number)


def set_split(out: Path, **splits: str) -> None:
    """Change the splits of people in a manifest, by label after an underscore."""
    rows = read_table(str(out)).to_pylist()
    changed = {person(label[1:]): split for label, split in splits.items()}
    for row in rows:
        row["split"] = changed.get(row["participant"], row["split"])
    write_table(str(out), read_table(str(out)).from_pylist(rows))


def test_manifest_has_pseudonyms_families_and_splits(tree: Path, tmp_path: Path, capsys):
    out = tmp_path / "m.parquet"
    scans = indexed(tree, out)
    assert {scan.cohort for scan in scans.values()} == {"cohort"}
    assert scans["sub-007_ses-a_T1w"].participant == person("007")
    text = read_table(str(out)).drop(["uri", "label_uri", "mask_uri", "modified"]).to_pylist()
    assert "007" not in without_hashes(json.dumps(text))
    families = {name.split("_")[0]: scan.family for name, scan in scans.items()}
    # f1 unites two people, and g one of them with a third
    assert families["sub-007"] == families["sub-8"] == families["sub-9"] != families["sub-10"]
    alone = scans["sub-10_T1w"]
    assert alone.family == alone.participant
    labels = read_table(labels_path(str(out)))
    assert sorted(set(labels["participant"].to_pylist())) == sorted(map(person, ["007", "8", "9"]))
    assert labels.to_pylist() == sorted(labels.to_pylist(), key=lambda row: (
        row["participant"], row["session"], row["name"]))
    printed = capsys.readouterr().out
    assert "5 scans (4 T1w, 1 FLAIR) of 4 people in 2 groups" in printed.replace(
        "1 FLAIR, 4 T1w", "4 T1w, 1 FLAIR") and "1 x not taken: suffix T2star" in printed


def test_equal_sources_give_equal_bytes(tree: Path, tmp_path: Path):
    first, second = tmp_path / "1" / "m.parquet", tmp_path / "2" / "m.parquet"
    for out in (first, second):
        index("bids", str(tree), out=str(out), key=KEY)
    for name in ("m.parquet", "m.labels.parquet", "m.seen.parquet"):
        assert (first.parent / name).read_bytes() == (second.parent / name).read_bytes()
    before = first.read_bytes()
    index("bids", str(tree), out=str(first), key=KEY)
    assert first.read_bytes() == before


def test_a_second_index_opens_only_what_changed(tree: Path, tmp_path: Path, capsys, monkeypatch):
    opened = []
    parse = Source.read
    monkeypatch.setattr(Source, "read", lambda self, found: opened.append(found.name) or parse(
        self, found))
    out = tmp_path / "m.parquet"
    sidecar = tree / "sub-007/ses-a/anat/sub-007_ses-a_T1w.json"
    assert indexed(tree, out)["sub-007_ses-a_T1w"].field_strength == 3
    assert opened == [sidecar.name] and "earlier" not in capsys.readouterr().out

    opened.clear()
    write(tree, {"sub-8/anat/sub-8_T1w.nii.gz": "longer", "sub-8/anat/sub-8_FLAIR.nii.gz": "x"})
    (tree / "sub-10/anat/sub-10_T1w.nii.gz").unlink()
    again = indexed(tree, out)
    assert opened == [] and again["sub-007_ses-a_T1w"].field_strength == 3
    assert "1 new, 1 changed, 1 gone, 3 unchanged" in capsys.readouterr().out

    sidecar.write_text('{"MagneticFieldStrength": 1.5}')
    assert indexed(tree, out)["sub-007_ses-a_T1w"].field_strength == 1.5
    assert opened == [sidecar.name]
    os.utime(sidecar, (1, 1))  # same size, another time
    indexed(tree, out)
    assert opened == [sidecar.name] * 2


def test_people_keep_their_split_when_groups_are_renamed(tree: Path, tmp_path: Path):
    out = tmp_path / "m.parquet"
    first = indexed(tree, out)
    for other in ("test", "train"):  # one of them is not what the hash says
        set_split(out, _10=other, _007="val", _8="val", _9="val")
        # a tag that comes earlier in the alphabet renames the group
        write(tree, {"participants.tsv": "participant_id\tfamily_id\tsplit_group\nsub-007\tf1\t\n"
                                         "sub-8\tf1\tg\nsub-9\ta\tg\nsub-11\ta\t\n",
                     "sub-11/anat/sub-11_T1w.nii.gz": "x"})
        again = indexed(tree, out)
        assert again["sub-8_T1w"].family != first["sub-8_T1w"].family
        assert {again[name].split for name in ("sub-007_ses-a_T1w", "sub-8_T1w", "sub-9_T1w",
                                               "sub-11_T1w")} == {"val"}
        assert again["sub-10_T1w"].split == other


@pytest.mark.parametrize("one, other, united", [
    ("train", "test", "test"), ("val", "train", "val"), ("test", "val", "test")])
def test_united_groups_are_never_trained_on_if_one_was_tested(tree: Path, tmp_path: Path, capsys,
                                                              one, other, united):
    out = tmp_path / "m.parquet"
    indexed(tree, out)
    set_split(out, _10=one, _007=other, _8=other, _9=other)
    write(tree, {"participants.tsv": "participant_id\tfamily_id\tsplit_group\nsub-007\tf1\t\n"
                                     "sub-8\tf1\tg\nsub-9\t\tg\nsub-10\tf1\t\n"})
    capsys.readouterr()
    assert {scan.split for scan in indexed(tree, out).values()} == {united}
    moved = 1 if united == other else 3
    assert f"noted {moved} x people moved to another split" in capsys.readouterr().out


def test_linked_people_share_a_split_across_cohorts(tmp_path: Path):
    numbers = [f"{number:02d}" for number in range(30)]
    trees = {name: write(tmp_path / name, {
        "dataset_description.json": DESCRIPTION,
        **{f"sub-{name}{one}/anat/sub-{name}{one}_T1w.nii.gz": "x" for one in numbers}})
        for name in "ab"}
    links = write(tmp_path, {"links.csv": "\ufeffcohort,participant,person\n" + "".join(
        f"{name},{name}{one},person {one}\n" for name in "ab" for one in numbers[:20])})
    table = str(links / "links.csv")
    scans = {name: indexed(trees[name], tmp_path / f"{name}.parquet", links=table)
             for name in "ab"}
    pairs = [(scans["a"][f"sub-a{one}_T1w"], scans["b"][f"sub-b{one}_T1w"]) for one in numbers]
    assert all(one.split == other.split and one.family == other.family
               for one, other in pairs[:20])
    assert len({one.split for one, _ in pairs[:20]}) > 1
    assert all(one.family == one.participant for one, _ in pairs[20:])
    assert any(one.split != other.split for one, other in pairs[20:])


def test_splits_and_families_of_a_linked_cohort_hold(tmp_path: Path):
    """Cohort a knows that 1 and 2 are siblings, b has only 2: both must be where a put them."""
    siblings = write(tmp_path / "a", {
        "dataset_description.json": DESCRIPTION,
        "participants.tsv": "participant_id\tfamily_id\nsub-1\tf\nsub-2\tf\n",
        "sub-1/anat/sub-1_T1w.nii.gz": "x", "sub-2/anat/sub-2_T1w.nii.gz": "x"})
    single = write(tmp_path / "b", {"dataset_description.json": DESCRIPTION,
                                    "sub-22/anat/sub-22_T1w.nii.gz": "x"})
    table = str(write(tmp_path, {"links.csv": "cohort,participant,person\na,1,p\na,2,q\nb,22,q\n"})
                / "links.csv")
    beside, out = tmp_path / "a.parquet", tmp_path / "b.parquet"
    for split in ("train", "val", "test"):
        indexed(siblings, beside)
        rows = [{**row, "split": split} for row in read_table(str(beside)).to_pylist()]
        write_table(str(beside), read_table(str(beside)).from_pylist(rows))
        a = indexed(siblings, beside, links=table)["sub-2_T1w"]
        b = indexed(single, out, links=table, beside=[str(beside)])["sub-22_T1w"]
        assert a.split == b.split == split and a.family == b.family
        out.unlink()
        beside.unlink()


def test_a_label_with_two_values_is_left_out(tree: Path, tmp_path: Path, monkeypatch, capsys):
    from data_prep.cohorts.bids import reader

    def twice(source, cohort):
        for found in bids_reader(source, cohort):
            found.labels += [("1", "x", "1"), ("1", "y", "1")]
            yield found
            found.scans, found.labels = [], [("1", "x", "2"), ("1", "y", "1")]
            yield found

    bids_reader = reader.read_cohort
    monkeypatch.setattr(reader, "read_cohort", twice)
    out = tmp_path / "m.parquet"
    assert len(indexed(tree, out)) == 5
    names = read_table(labels_path(str(out)))["name"].to_pylist()
    assert "x" not in names and names.count("y") == 4
    assert "noted 4 x labels with two values" in capsys.readouterr().out


# ---- walking -------------------------------------------------------------------------------------

def test_a_walk_is_ordered_and_streams(tmp_path: Path, monkeypatch):
    names = ["b.txt", "b/z.txt", "a/2/x", "a/10/x", "a-b/x", "a.txt", ".git/x", "a/.hidden/x"]
    source = Source(str(write(tmp_path / "s", dict.fromkeys(names, "x"))))
    paths = [found.path for found in source.walk()]
    assert paths == sorted(names[:6]) and [f.path for f in source.walk("a")] == paths[2:4]
    assert [found.path for found in source.walk(starting="b")] == ["b.txt", "b/z.txt"]
    assert [found.name for found in source.listing()[0]] == ["a.txt", "b.txt"]
    assert source.listing()[1] == ["a-b", "a", "b"] and source.listing("a")[1] == ["10", "2"]
    entered = []
    scandir = os.scandir
    monkeypatch.setattr(os, "scandir", lambda path: entered.append(path) or scandir(path))
    next(source.walk())
    assert [os.path.basename(path) for path in entered] == ["s", "a-b"]


def test_s3_is_walked_by_pages(s3, tmp_path: Path):
    import s3fs

    names = [f"walk/s/{folder}/{number}" for folder in ("a", "b") for number in range(600)]
    fs = s3fs.S3FileSystem()
    fs.pipe({f"{s3.uri}/{name}": b"x" for name in [*names, "walk/s/.git/x", "walk/sub/x"]})
    source = Source(f"{s3.uri}/walk/s")
    found = list(source.walk())
    assert [one.path for one in found] == sorted(name[7:] for name in names)
    assert found[0].uri == f"{s3.uri}/walk/s/a/0" and found[0].size_bytes == 1
    assert source.listing() == ([], ["a", "b"])
    assert len(list(source.walk("b"))) == 600 == len(list(source.walk(starting="b")))
    source.fetch(found[:3])
    assert source.read(found[0]) == b"x"
    with pytest.raises(DataError, match="no files there"):
        list(Source(f"{s3.uri}/walk/nothing").walk())


def test_index_prints_columns_and_labels_of_how_many_people(tree: Path, tmp_path: Path, capsys):
    write(tree, {"participants.tsv": "participant_id\tAge\tGender\tGroup\tnote\n"
                 "sub-8\t61\tF\tpatient\tseen by Dr X\nsub-9\t62\tM\tcontrol\tn/a\n"})
    indexed(tree, tmp_path / "m.parquet")
    told = capsys.readouterr().out
    for line in ("columns of participants.tsv:", "age in years: Age", "sex: Gender",
                 "label, words (2 classes): Group", "left out: may name people: note",
                 "labels: age (2 people), group (2 people, 2 classes), sex (2 people, 2 classes)"):
        assert f"  {line}\n" in told
    assert "Dr X" not in told


@pytest.mark.parametrize("option", ["tables", "links"])
def test_a_folder_given_as_a_table_is_named(tree: Path, tmp_path: Path, option: str):
    given: object = str(tmp_path) if option == "links" else [str(tmp_path)]
    with pytest.raises(DataError, match="is a folder; name the table in it"):
        index("bids", str(tree), out=str(tmp_path / "m.parquet"), key=KEY, **{option: given})


# ---- errors --------------------------------------------------------------------------------------

def test_a_source_without_scans_is_an_error(tmp_path: Path):
    root = write(tmp_path / "s", {"x/readme.txt": "x", "x_dseg.nii": "x"})
    with pytest.raises(DataError, match=r"s: no scan found \(1 x not taken: file without"):
        index("bids", str(root), out=str(tmp_path / "m.parquet"), key=KEY)
    assert not list(tmp_path.glob("*.parquet"))


@pytest.mark.parametrize("name, message", [
    ("m.parquet", r"m\.parquet: not a Parquet table"),
    ("m.seen.parquet", r"m\.seen\.parquet: not a table of an index")])
def test_a_damaged_earlier_index_is_named(tree: Path, tmp_path: Path, name: str, message: str):
    write(tmp_path, {name: "not parquet"})
    with pytest.raises(DataError, match=message):
        index("bids", str(tree), out=str(tmp_path / "m.parquet"), key=KEY)


def test_a_damaged_manifest_is_named(tmp_path: Path):
    write(tmp_path, {"m.parquet": "not parquet", "m.labels.parquet": ""})
    with pytest.raises(DataError, match=r"m\.parquet: not a Parquet table"):
        read_manifest(str(tmp_path / "m.parquet"))
    with pytest.raises(ConfigError, match="must end in"):
        labels_path("m.csv")


def test_a_manifest_of_other_people_is_not_replaced(tree: Path, tmp_path: Path):
    out = tmp_path / "m.parquet"
    indexed(tree, out)
    before = out.read_bytes()
    with pytest.raises(DataError, match="none of these people, so it was made with another key"):
        index("bids", str(tree), out=str(out), key=KEY[::-1])
    assert out.read_bytes() == before


def test_links_need_their_columns(tree: Path, tmp_path: Path):
    write(tmp_path, {"links.csv": "cohort,participant\ncohort,8\n"})
    with pytest.raises(DataError, match=r"links\.csv: needs the columns"):
        index("bids", str(tree), out=str(tmp_path / "m.parquet"), key=KEY,
              links=str(tmp_path / "links.csv"))


def test_command_line(run_cli, tmp_path: Path):
    key = tmp_path / "key"
    key.write_bytes(KEY)
    key.chmod(0o600)
    done = run_cli("-m", "data_prep", "index", "--cohort", "bids", "--source",
                   str(tmp_path / "nowhere"), "--out", str(tmp_path / "m.parquet"),
                   "--key", str(key))
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "nowhere" in done.stderr
    assert list(tmp_path.iterdir()) == [key]
    told = run_cli("-m", "data_prep", "index", "--help").stdout
    assert all(f"\n  {cohort} " in told for cohort in ("ukb", "abcd", "adni", "bids"))
