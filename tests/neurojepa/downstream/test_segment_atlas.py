"""Atlas vote: shares by hand, heads that are kept, heads that fail, both commands, label maps."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scipy import ndimage

import neurojepa
from neurojepa.downstream import register as registering
from neurojepa.downstream import segment_atlas as module
from neurojepa.downstream import segment_labels, segment_task, warps
from neurojepa.downstream.__main__ import main
from neurojepa.downstream.images import Image, box_around, cut
from neurojepa.downstream.segment_atlas import Atlas, Laid, head_of, vote
from neurojepa.downstream.segment_seen import learnt_from, why_seen
from neurojepa.downstream.segmenter import Segmentation
from neurojepa.errors import ConfigError, DataError
from tests.helpers.blobs import blob, save

CODES = [3, 7, 41]


def labels_of(image: Image) -> Image:
    """Left and right of the middle, and a ball inside: codes 3, 41 and 7."""
    points = np.indices(image.data.shape) - np.array(image.data.shape).reshape(3, 1, 1, 1) / 2
    codes = np.where((points**2).sum(0) < 7**2, 7, np.where(points[0] < 0, 3, 41)) * image.brain
    return replace(image, data=codes.astype(np.int32), name=f"labels of {image.name}", brain=None)


# ---- vote ----------------------------------------------------------------------------------------

def shifted(mm: float, ranks: np.ndarray, affine: np.ndarray) -> Laid:
    """A head that lies ``mm`` further along x."""
    field = np.zeros((3, 3, 3, 3), np.float32)
    field[..., 0] = mm
    return Laid(ranks, module.even(ranks), affine, field, np.diag([40.0, 40, 40, 1]), np.eye(4))


@pytest.mark.parametrize("slab", [1 << 26, 1])  # all at once, and plane by plane
def test_the_highest_mean_of_interpolated_one_hot_maps_wins(
        monkeypatch: pytest.MonkeyPatch, slab: int) -> None:
    monkeypatch.setattr(module, "VOTES", slab)
    rng = np.random.default_rng(0)
    affine = np.diag([2.0, 2.0, 2.0, 1.0])
    maps = [ndimage.zoom(rng.integers(0, 4, (5, 5, 5)), 3, order=0).astype(np.int32)
            for _ in range(3)]
    brain = np.zeros((20, 21, 22), bool)
    brain[4:16, 4:16, 4:16] = True
    scan = Image("scan", brain.astype(np.float32), np.diag([1.3, 1.3, 1.3, 1.0]), brain=brain)
    laid = [shifted(mm, ranks, affine) for mm, ranks in zip((0.0, 0.7, -1.1), maps, strict=True)]
    found = vote(scan, laid, 3)
    total = np.zeros((4, *brain.shape))
    for each in laid:
        points = warps.points_of(brain.shape, scan.affine) + each.field[0, 0, 0]
        total += [ndimage.map_coordinates((each.ranks == rank).astype(np.float32), np.moveaxis(
            points / 2, -1, 0), order=1, mode="nearest") for rank in range(4)]
    inside = (points > 0).all(-1) & (points < 28).all(-1)
    clear = inside & (np.diff(np.sort(total, 0)[-2:], axis=0)[0] > 1e-3)
    assert clear.sum() > 5000
    assert np.array_equal(found[clear], total.argmax(0)[clear])
    assert (found[clear] != maps[0][tuple(np.rint(points[clear] / 2).astype(int).T)]).any()


def test_of_equal_shares_the_lowest_wins_and_nothing_lies_beyond_a_label_map() -> None:
    ones = np.ones((6, 6, 6), np.int32)
    brain = np.ones((6, 6, 6), bool)
    scan = Image("scan", brain.astype(np.float32), np.eye(4), brain=brain)
    two = [shifted(0, rank * ones, np.eye(4)) for rank in (2, 1)]
    assert (vote(scan, two, 2) == 1).all()
    assert (vote(scan, [*two, two[0]], 2) == 2).all()
    away = vote(scan, [shifted(3.2, ones, np.eye(4))], 2)  # 3.2 to 8.2 of 0 to 5
    assert (away[:3] == 1).all() and not away[3:].any()


def test_only_places_near_the_brain_are_labelled() -> None:
    brain = np.zeros((50, 50, 50), bool)
    brain[24:26, 24:26, 24:26] = True
    scan = Image("scan", brain.astype(np.float32), np.eye(4), brain=brain)
    found = vote(scan, [shifted(0, np.ones((50, 50, 50), np.int32), np.eye(4))], 1)
    near = np.zeros_like(brain)
    near[10:40, 10:40, 10:40] = True
    assert np.array_equal(found == 1, near)


# ---- heads ---------------------------------------------------------------------------------------

def test_a_kept_head_is_the_brain_and_its_labels_where_they_lay() -> None:
    scan = blob(0)
    skull = replace(scan, data=scan.data + 5)
    image, labels = head_of(skull, labels_of(scan)).read()
    assert scan.brain is not None and image.brain is not None
    assert image.brain.sum() == scan.brain.sum() and image.data.size < scan.data.size
    assert not image.data[~image.brain].any()  # no skull, no face
    box = box_around(scan, scan.brain, module.SMOOTHING_MM)
    assert np.array_equal(image.data[image.brain], skull.data[box][image.brain])
    assert np.allclose(image.affine, cut(scan, box).affine, atol=1e-5)
    where = np.argwhere(labels.data == 7).mean(0) @ labels.affine[:3, :3].T + labels.affine[:3, 3]
    whole = labels_of(scan)
    there = np.argwhere(whole.data == 7).mean(0) @ whole.affine[:3, :3].T + whole.affine[:3, 3]
    assert np.allclose(where, there, atol=1e-4)
    assert np.bincount(labels.data.ravel())[1:].tolist() == np.bincount(
        whole.data.ravel())[1:].tolist()


def test_labels_elsewhere_are_told() -> None:
    far = labels_of(blob(0))
    far.affine[0, 3] += 900
    with pytest.raises(DataError, match="labels of blob 0: no label lies in the brain of blob 0"):
        head_of(blob(0), far)


def lays(monkeypatch: pytest.MonkeyPatch, refused: str = "none") -> None:
    """Heads lie where they are, but for one."""
    def register(moving: Image, fixed: Image) -> registering.Registration:
        if refused in moving.name:
            raise DataError(f"{moving.name}: its brain does not come to lie over {fixed.name}")
        grid = registering.Grid((2, 2, 2), np.diag([100.0, 100, 100, 1]), 100.0)
        still = np.zeros((2, 2, 2, 3), np.float32)
        return registering.Registration(fixed, moving, np.eye(4), grid, still, still, (1, 1),
                                        (1, 1))

    monkeypatch.setattr(registering, "register", register)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_head_that_cannot_be_laid_has_no_vote_and_is_named(
        monkeypatch: pytest.MonkeyPatch, workers: int) -> None:
    lays(monkeypatch, "blob 1")
    heads = [head_of(blob(seed), labels_of(blob(seed, 1 - 0.1 * seed))) for seed in range(3)]
    scan = blob(5)
    data, notes = Atlas(heads, CODES, ["a", "b", "c"], workers).segment(scan)
    alone, silent = Atlas([heads[0], heads[2]], CODES, ["a", "b", "c"]).segment(scan)
    assert np.array_equal(data, alone) and set(np.unique(data)) == {0, *CODES}
    assert not silent and len(notes) == 1
    assert notes[0].startswith("1 of 3 labelled heads have no vote in blob 5: blob 1: its brain")
    with pytest.raises(DataError, match="blob 5: none of 1 labelled heads can be laid over it"):
        Atlas([heads[1]], CODES, ["a", "b", "c"]).segment(scan)


def test_one_head_alone_gives_its_own_labels(monkeypatch: pytest.MonkeyPatch) -> None:
    lays(monkeypatch)
    scan = blob(0)
    data, notes = Atlas([head_of(scan, labels_of(scan))], CODES, ["a", "b", "c"]).segment(scan)
    assert np.array_equal(data, labels_of(scan).data) and not notes


def test_evened_images_are_the_same_whatever_their_shading_and_contrast() -> None:
    scan = blob(0)
    ramp = np.linspace(0.6, 1.4, scan.data.shape[0], dtype=np.float32)[:, None, None]
    even, other = (registering._evened(each) for each in (scan.data, scan.data * ramp * 0.7))
    inside = ndimage.binary_erosion(scan.brain, iterations=3)
    assert np.abs(even - other)[inside].mean() < 0.02 < np.abs(
        scan.data - scan.data * ramp)[inside].mean()
    assert abs(even[inside].mean() - 0.6) < 0.02 and 0.1 < even[inside].std() < 0.16
    assert not even[~(scan.data > 0)].any()


# ---- both commands -------------------------------------------------------------------------------

def people(folder: Path, count: int) -> tuple[list[str], list[str]]:
    files = []
    for seed in range(count):
        image = blob(seed, size=1 - 0.03 * seed)
        files.append([str(save(folder / f"sub-{seed}_{kind}.nii.gz", data, image.affine))
                      for kind, data in (("T1w", image.data), ("dseg", labels_of(image).data))])
    return [scan for scan, _ in files], [labels for _, labels in files]


@pytest.mark.slow(4)
def test_both_commands_and_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registering, "WORK_MM", (8.0, 8.0))
    monkeypatch.setattr(registering, "LEVELS", ((1, 5),))
    monkeypatch.setattr(registering, "MIN_CORRELATION", -1.0)  # blobs have a texture of their own
    scans, truths = people(tmp_path, 3)
    (tmp_path / "sub-1_dseg.tsv").write_text("index\tname\n3\tleft\n41\tright\n7\tball\n")
    turned = nib.load(scans[2]).as_reoriented(nib.orientations.axcodes2ornt(("P", "S", "R")))
    nib.save(turned, scans[2])
    nib.save(nib.load(truths[2]).as_reoriented(nib.orientations.axcodes2ornt(("P", "S", "R"))),
             truths[2])
    model, out = str(tmp_path / "model"), tmp_path / "out"
    assert main(["segment", "fit", *scans[:2], "--labels", *truths[:2], "--out", model]) == 0
    words = ["segment", "apply", model, *scans[1:], "--out", str(out), "--truth", *truths[1:]]
    assert main([*words, "--workers", "2"]) == 0
    file = nib.load(out / "sub-2/anat/sub-2_T1w_dseg.nii.gz")
    assert file.shape == turned.shape and np.allclose(file.affine, turned.affine)
    record = json.loads((out / "results.json").read_text())
    assert (record["schema"], record["method"], record["people"]) == (
        "neurojepa/segment/1", "atlas", 2)
    assert list(record["scores"]["regions"]) == ["left", "ball", "right"]
    assert record["scores"]["regions"]["ball"]["scans"] == 1  # sub-1 is not scored
    assert record["scores"]["all"]["dice"] > 0.8
    assert [note for note in record["notes"] if "the model learnt from this scan" in note]
    assert "2 labelled heads was laid over" in record["methods"]
    page = (out / "report.html").read_text()
    assert "left" in page and page.count("<img") == 2
    found = neurojepa.load_segmenter(model).segment(scans[2])
    found.to_nifti(str(tmp_path / "seg.nii.gz"))
    assert np.array_equal(np.asarray(nib.load(tmp_path / "seg.nii.gz").dataobj),
                          np.asarray(file.dataobj))
    assert (out / "dseg.tsv").read_text().splitlines() == [
        "index\tname", "3\tleft", "7\tball", "41\tright"]


def test_a_fit_that_was_stopped_keeps_what_is_done(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scans, labels = people(tmp_path, 3)
    model = tmp_path / "model"
    fit, words = ["segment", "fit"], ["--out", str(model)]
    with pytest.raises(DataError, match=r"gone\.nii"):
        main([*fit, *scans[:2], str(tmp_path / "gone.nii"), "--labels", *labels, *words])
    assert len(list((model / "heads").iterdir())) == 6
    with pytest.raises(DataError, match="no segmentation model here"):
        neurojepa.load_segmenter(str(model))
    monkeypatch.setattr(segment_task, "head_of", lambda scan, labels: pytest.fail("done already")
                        if scan.name == scans[0] else head_of(scan, labels))
    assert main([*fit, scans[0], scans[2], "--labels", labels[0], labels[2], *words]) == 0
    assert len(list((model / "heads").iterdir())) == 6  # those of sub-1 went
    config = json.loads((model / "config.json").read_text())
    assert [each["name"] for each in config["heads"]] == [scans[0], scans[2]]
    with pytest.raises(ConfigError, match="a model lies there already"):
        main([*fit, scans[0], "--labels", labels[0], *words])
    head = next((model / "heads").iterdir())
    head.write_bytes(head.read_bytes()[:-1])
    with pytest.raises(DataError, match=f"{head.name}: does not match the sha256"):
        neurojepa.load_segmenter(str(model))


@pytest.mark.parametrize("kept_before", [False, True])
def test_of_two_fits_at_once_the_first_to_finish_keeps_its_heads(tmp_path: Path,
                                                                 kept_before: bool) -> None:
    scans = [blob(seed) for seed in range(3)]
    heads = {module.key_of(scan, labels_of(scan)): head_of(scan, labels_of(scan))
             for scan in scans}
    keys, out = list(heads), str(tmp_path)
    about = {"codes": CODES, "names": ["a", "b", "c"]}
    for key in keys[:2] if kept_before else keys[:1]:
        module.keep(out, key, heads[key])
    module.save_atlas(out, [("first", keys[0])], about)  # and removes what the second has kept
    for key in keys[2:] if kept_before else keys[1:]:
        module.keep(out, key, heads[key])
    with pytest.raises(ConfigError, match="another fit has finished there meanwhile"):
        module.save_atlas(out, [("second", key) for key in keys], about)
    config = json.loads((tmp_path / "config.json").read_text())
    assert [head.name for head in module.load_atlas(out, config, 1).heads] == ["first"]
    assert {path.name.partition("_")[0] for path in (tmp_path / "heads").iterdir()} == {keys[0]}


def test_a_head_that_is_gone_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone_labels\.nii\.gz: not found"):
        module.save_atlas(str(tmp_path), [("a", "gone")], {})
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_is_told(tmp_path: Path) -> None:
    scans, labels = people(tmp_path, 1)
    out = tmp_path / "model"
    words = ["segment", "fit", *scans, "--labels", *labels, "--out", str(out)]
    for more, message in ((["--steps", "9"], "--steps and --mm are of a network"),
                          (["--mm", "2"], "--steps and --mm are of a network")):
        with pytest.raises(ConfigError, match=message):
            main([*words, *more])
    with pytest.raises(ConfigError, match="the same scan and label map are given twice"):
        main(["segment", "fit", *scans * 2, "--labels", *labels * 2, "--out", str(out)])
    with pytest.raises(ConfigError, match=r"--workers 0: at least 1"):
        main(["segment", "apply", str(out), *scans, "--out", str(out), "--workers", "0"])
    with pytest.raises(ConfigError, match="holds labelled heads of --method atlas"):
        main([*words, "--method", "network"])
    (tmp_path / "other").mkdir()
    (tmp_path / "other/fit.json").write_text("{}")
    with pytest.raises(ConfigError, match="holds a network's fit that was stopped"):
        main([*words[:-1], str(tmp_path / "other")])


# ---- label maps and people -----------------------------------------------------------------------

@pytest.fixture
def maps(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Label maps by name, which hold these codes."""
    known: dict[str, list[int]] = {}
    monkeypatch.setattr(segment_labels, "read_labels", lambda path: Image(
        path, np.array([[[0, *known[Path(path).name]]]]), np.eye(4)))
    return known


def test_regions_that_some_label_maps_lack_are_told(
        tmp_path: Path, maps: dict[str, list[int]]) -> None:
    maps.update({"a.nii": [1, 2, 3], "b.nii": [1, 2, 3], "c.nii": [1, 2]})
    (tmp_path / "c.tsv").write_text("index\tname\n2\tputamen\n")
    found = segment_labels.read_all([str(tmp_path / name) for name in maps])
    assert (found.codes, found.names) == ([1, 2, 3], ["1", "putamen", "3"])
    assert found.notes == [
        "regions that not all of 3 label maps have, and how many have them: 3 (2)"]
    assert not segment_labels.read_all([str(tmp_path / "a.nii")]).notes


@pytest.mark.parametrize(("codes", "message"), [
    ([1, 7, 8, 9, 10], r"x\.nii: shares 1 of its 5 codes with the other label maps, which have 4"),
    ([2], r"x\.nii: shares 1 of its 1 codes"),
    ([11, 12], r"x\.nii: shares 0 of its 2 codes"),
])
def test_label_maps_of_another_protocol_are_refused(
        maps: dict[str, list[int]], codes: list[int], message: str) -> None:
    maps.update({"a.nii": [1, 2, 3, 4], "b.nii": [1, 2, 3, 4], "x.nii": codes})
    with pytest.raises(ConfigError, match=message):
        segment_labels.read_all(list(maps))


def test_names_that_contradict_are_told(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_text("index\tname\n17\thippocampus\n53\thippocampus\n3\tcortex\n")
    (tmp_path / "b.tsv").write_text("index\tname\n17\thippocampus\n3\tpallidum\n")
    names_of = segment_labels.names_of
    for ending in ("nii.gz", "nii", "NII.GZ", "mgz"):
        labels = str(tmp_path / f"a.{ending}")
        assert names_of([labels], [3, 4, 17]) == ["cortex", "4", "hippocampus"]
    with pytest.raises(ConfigError, match="codes 17 and 53 are both named 'hippocampus'"):
        names_of([labels], [3, 17, 53])
    both = [labels, str(tmp_path / "b.nii")]
    assert names_of(both, [17]) == ["hippocampus"]
    with pytest.raises(ConfigError, match=r"b\.nii: code 3 is named 'pallidum' .* and 'cortex'"):
        names_of(both, [3, 17])


@pytest.mark.parametrize(("text", "message"), [
    (b"code\tname\n3\tcortex\n", "expected columns index and name"),
    (b"index\tname\nx\tcortex\n", "expected columns index and name"),
    (b"index\tname\n3\tPutam\xe9n\n", "expected columns index and name"),
    (b"index\tname\n3\n", "code 3 has no name"),
])
def test_tables_of_names_that_cannot_be_read_are_told(
        tmp_path: Path, text: bytes, message: str) -> None:
    (tmp_path / "a.tsv").write_bytes(text)
    with pytest.raises(ConfigError, match=rf"a\.tsv: {message}"):
        segment_labels.names_of([str(tmp_path / "a.nii")], [3])


def test_a_table_of_names_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"\xef\xbb\xbfindex\tname\n3\tcortex\n")
    assert segment_labels.names_of([str(tmp_path / "a.nii")], [3]) == ["cortex"]


@pytest.mark.parametrize(("name", "seed", "why"), [
    ("sub-1_ses-2_T1w.nii", 2, "sub-1"), ("new.nii", 1, "this scan"), ("sub-2_T1w.nii", 2, None),
    ("sub-11_T1w.nii", 2, None), ("new.nii", 2, None),
])
@pytest.mark.parametrize("taught", ["x/sub-1_T1w.nii.gz", "x/sub-1_T1w/"])  # of DICOM slices
def test_people_who_taught_are_known_by_name_and_by_voxels(
        name: str, seed: int, why: str | None, taught: str) -> None:
    learnt = [learnt_from(replace(blob(1), name=taught))]
    found = why_seen(replace(blob(seed), name=f"y/{name}"), learnt)
    assert (found is None) == (why is None)
    assert why is None or f"the model learnt from {why}" in str(found)


@pytest.mark.parametrize(("allow_seen", "says"), [
    (False, "is not scored; --allow-seen scores it"), (True, "its scores are too good")])
def test_what_is_said_of_people_who_taught(allow_seen: bool, says: str) -> None:
    config = {"learnt_from": [learnt_from(blob(1))]}
    known, new = (Segmentation(blob(seed), np.zeros((1, 1, 1), np.int32), {}) for seed in (1, 2))
    told, = segment_task._told_if_seen(known, config, allow_seen)
    assert told.startswith("blob 1: the model learnt from this scan") and says in told
    for unknown, about in ((new, config), (known, {})):  # the first models do not say whom
        assert not segment_task._told_if_seen(unknown, about, allow_seen)
