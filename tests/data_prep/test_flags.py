"""Whatever is said of a scan reaches its row: every flag and note, through every stage.

A stage is given a scan that has all of them, so a new flag is walked as soon as it is in the enum;
that code raises flags of the enum only is read from the source.
"""

from __future__ import annotations

import ast
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from data_prep.flags import Flag, Note, joined, of_companion
from data_prep.prepare.merge import merge, scan_rows
from data_prep.prepare.person import Limits, PersonTask, _prepare_and_write
from data_prep.qc.judge import rules
from data_prep.report.counts import _meaning, plain
from data_prep.rows import ArchiveRow, Status, archive_rows, flags_of, scan_table
from data_prep.scan import Scan
from data_prep.volumes import output, pipeline, published
from data_prep.volumes.functional import prepare as functional
from data_prep.volumes.functional.cifti import Cifti
from data_prep.volumes.functional.pet import NOT_OF_FRAMES
from data_prep.volumes.pipeline import Prepared, Rejected, prepare_person
from data_prep.volumes.placing.align import Placement, template
from data_prep.volumes.preset import PRESETS
from data_prep.volumes.reading.volume import Series, Volume
from data_prep.volumes.structural.session import StructuralScan
from tests.helpers import ROOT
from tests.helpers.fakes import QUICK, volume
from tests.helpers.synthetic_head import brain, flirt_matrix, save, save_matrix, scan

ALL_FLAGS, ALL_NOTES = [*Flag], [*Note]
BQ = json.dumps({"Units": "Bq/mL"})
SOURCES = sorted((ROOT / "data_prep").rglob("*.py"))
Stage = Callable[[Path, pytest.MonkeyPatch], "list[Prepared | Rejected]"]


# ---- stages: each prepares a scan that was read with every flag and note -------------------------

def head() -> tuple[np.ndarray, np.ndarray]:
    data, affine = brain()
    return data[::2, ::2, ::2], affine @ np.diag([2, 2, 2, 1.0])


def odd_volume(name: str = "a") -> Volume:
    data, affine = head()
    return Volume(name, data, affine, flags=list(ALL_FLAGS), notes=list(ALL_NOTES))


def placed() -> Placement:
    return Placement(np.eye(4), np.eye(4), 0.99, 1.0, 0.9)


def structural(folder: Path, patch: pytest.MonkeyPatch) -> list[Prepared | Rejected]:
    work = StructuralScan(scan("a"), odd_volume(), "id", mask=odd_volume().data > 0)
    return [output.write_scan(work, np.eye(4), placed(), QUICK)]


def rejected_later(folder: Path, patch: pytest.MonkeyPatch) -> list[Prepared | Rejected]:
    """A scan that is read and then fails."""
    patch.setattr(pipeline, "read_scan", lambda *_, **__: replace(
        odd_volume(), data=np.ones((40, 40, 40), np.float32)))
    return prepare_person([scan("a", mask_uri=None)], replace(QUICK, brain_ml=(1.0, 2.0)))


def paper(folder: Path, patch: pytest.MonkeyPatch) -> list[Prepared | Rejected]:
    patch.setattr(published, "read_scan", lambda *_, **__: odd_volume())
    patch.setattr(published, "correct_bias_field", lambda data, *_: data)
    patch.setattr(published, "place", lambda *_: placed())
    patch.setattr(published, "judge", lambda *_, **__: placed())
    return prepare_person([scan("a")], replace(PRESETS["paper"], spline=False))


def rejected_by_paper(folder: Path, patch: pytest.MonkeyPatch) -> list[Prepared | Rejected]:
    patch.setattr(published, "read_scan", lambda *_, **__: odd_volume())
    return prepare_person([scan("a", mask_uri=None)], replace(PRESETS["paper"], brain_ml=(1, 2)))


def odd_series(*_: object, **__: object) -> Series:
    still, affine = head()
    data = np.repeat(still[..., None], 3, axis=3) + np.arange(3, dtype=np.float32)
    return Series("a", data, affine, 2.0, flags=list(ALL_FLAGS), notes=list(ALL_NOTES))


def bold(folder: Path, patch: pytest.MonkeyPatch) -> list[Prepared | Rejected]:
    patch.setattr(functional, "read_series", odd_series)
    return prepare_person([scan("a", "BOLD", processing="fmriprep:MNI152")], QUICK)


def pet(folder: Path, patch: pytest.MonkeyPatch) -> list[Prepared | Rejected]:
    def read(*_: object, **__: object) -> Series:
        series = odd_series()
        data = np.where(series.data[..., :1] > 0, 5, 0).astype(np.float32)
        return replace(series, data=data, facts=json.loads(BQ))

    patch.setattr(functional, "read_series", read)
    return prepare_person([scan("a", "PET", tracer="AV45", processing="x:MNI152")], QUICK)


def cifti(folder: Path, patch: pytest.MonkeyPatch) -> list[Prepared | Rejected]:
    data, affine = head()
    found = Cifti("dtseries", "id", {"BOLD": Volume("a", data, affine)}, data > 0, None, [], {},
                  list(ALL_FLAGS), list(ALL_NOTES))
    patch.setattr(functional, "read_cifti", lambda *_, **__: found)
    return prepare_person([scan("a.dtseries.nii", "BOLD")], QUICK)


STAGES: dict[str, Stage] = {"structural": structural, "rejected": rejected_later, "paper": paper,
                            "rejected by paper": rejected_by_paper, "bold": bold, "pet": pet,
                            "cifti": cifti}


def expected(stage: str) -> tuple[set[str], set[str]]:
    """All; but frames of PET have no repetition time, and what is rejected has no map to note."""
    flags = set(ALL_FLAGS) - (set(NOT_OF_FRAMES) if stage == "pet" else set())
    return flags, set() if stage.startswith("rejected") else set(ALL_NOTES)


def rows_of(results: list[Prepared | Rejected], folder: Path) -> list[ArchiveRow]:
    """Rows of the archive's table, once the results are written and merged."""
    source = folder / "a"
    source.write_text("x")
    for result in results:
        result.scan = replace(result.scan, uri=str(source))
    own = scan(str(source), results[0].scan.modality)
    task = PersonTask(out=str(folder / "archive"), scans=[own], record="p-0.json", stale=[],
                      preset=QUICK, limits=Limits(), prepare_one=lambda *_: results)
    _prepare_and_write(task, [own], [])
    outcomes = json.loads((folder / "archive/results/p-0.json").read_text())
    return list(archive_rows(merge(None, [scan_rows(own, outcomes)])))


@pytest.mark.parametrize("stage", STAGES)
def test_what_was_read_with_a_scan_is_in_its_row(stage, tmp_path, monkeypatch) -> None:
    results = STAGES[stage](tmp_path, monkeypatch)
    assert {type(result) for result in results} == {
        Rejected if stage.startswith("rejected") else Prepared}
    monkeypatch.undo()
    rows = rows_of(results, tmp_path)
    flags, notes = expected(stage)
    assert rows
    for row in rows:
        assert flags <= set(flags_of(row))
        assert set((row["notes"] or "").split(";")) - {""} >= notes
        if row["status"] == Status.FLAGGED:
            assert row["reason"] == row["flags"]


def test_what_the_place_of_a_scan_is_flagged_for_comes_to_what_was_read() -> None:
    volume = replace(odd_volume(), flags=[Flag.NEGATIVE_VALUES], notes=[])
    work = StructuralScan(scan("a"), volume, "id", mask=volume.data > 0, transform_fault="astray")
    far = np.eye(4)
    far[2, 3] = 60  # mm
    result = output.write_scan(work, far, replace(placed(), dice=0.5, ncc=0.1), QUICK)
    assert [flag for flag in result.flags if isinstance(flag, Flag)] == [
        Flag.NEGATIVE_VALUES, Flag.LOW_MASK_DICE, Flag.LOW_NCC, Flag.BRAIN_CUT,
        Flag.COHORT_TRANSFORM_FAILED]
    assert result.notes == [Note.LEFT_RIGHT_FROM_HEADER]


def test_a_copy_keeps_its_flags(tmp_path) -> None:
    """Of one person, where the second is not written, and of two, where the table rules it out."""
    image, mask = volume("x")
    one = Prepared(scan("a"), "id", image, mask, None, {}, ["low_ncc"], ["minimal"])
    first, second = rows_of([one, replace(one)], tmp_path)
    assert first["status"] == "flagged" and second["reason"].startswith("duplicate_of:")
    assert (second["flags"], second["notes"]) == ("low_ncc", "minimal")
    other = {**first, "participant": "q", "uri": "q"}
    last = [*archive_rows(merge(scan_table([first]), [[other]]))][-1]
    assert (last["status"], last["flags"]) == ("rejected", "low_ncc")


# ---- single ways that lost them ------------------------------------------------------------------

def series_file(path: Path, seconds: float, shift: float = 0, hole: bool = False) -> str:
    still = np.where(template(2).mask, 1200 - brain()[0], 40).astype(np.float32)[::4, ::4, ::4]
    affine = brain()[1] @ np.diag([4, 4, 4, 1.0])
    data = still[..., None] * (1 + 0.02 * np.random.default_rng(0).standard_normal(
        (*still.shape, 6), np.float32))
    data[0, 0, 0] = np.nan if hole else data[0, 0, 0]
    image = nib.Nifti1Image(data, affine)
    image.set_sform(affine, 4)
    other = affine.copy()
    other[:3, 3] += shift
    image.header.set_qform(other, 1)
    image.header.set_xyzt_units("mm", "sec")
    image.header["pixdim"][4] = seconds
    nib.save(image, path)
    return str(path)


@pytest.mark.parametrize(("file", "sidecar_s", "flag"), [
    ({"seconds": 1.0}, 2.0, Flag.TR_DISAGREES),
    ({"seconds": 2.0}, 2000, Flag.TR_IMPLAUSIBLE),
    ({"seconds": 2.0, "shift": 30}, 2.0, Flag.SFORM_QFORM_DISAGREE),
    ({"seconds": 2.0, "hole": True}, 2.0, Flag.NON_FINITE_CLEANED)])
def test_a_series_keeps_what_its_header_was_flagged_for(tmp_path, file, sidecar_s, flag) -> None:
    own = scan(series_file(tmp_path / "a.nii", **file), "BOLD", processing="fmriprep:MNI152",
               facts=json.dumps({"RepetitionTime": sidecar_s}))
    (result,) = prepare_person([own], QUICK)
    assert isinstance(result, Prepared) and flag in result.flags
    assert set(result.flags) == {flag, Flag.SHORT_SERIES} and result.notes == [Note.MINIMAL]


def test_flags_of_a_mask_and_a_label_map_are_those_of_their_scan(tmp_path) -> None:
    data, affine = brain()
    uri = save(tmp_path / "t1.nii.gz", data, affine)
    shifted = affine.copy()
    shifted[:3, 3] += 30
    companions = []
    for name in ("mask", "label"):
        image = nib.Nifti1Image((data > 0).astype(np.uint8), affine)
        image.set_sform(affine, 1)
        image.set_qform(shifted, 1)
        companions.append(str(tmp_path / f"{name}.nii.gz"))
        nib.save(image, companions[-1])
    own = scan(uri, mask_uri=companions[0], label_uri=companions[1],
               transform_uri=save_matrix(tmp_path / "a.mat", flirt_matrix(uri, np.eye(4))))
    (result,) = prepare_person([own], QUICK)
    assert isinstance(result, Prepared), result
    assert {"mask:sform_qform_disagree", "label:sform_qform_disagree"} <= set(result.flags)
    assert plain("mask:sform_qform_disagree") == "mask: sform qform disagree"


def test_a_mean_transform_of_visits_that_fails_is_told(monkeypatch) -> None:
    visits = [StructuralScan(scan(name, session=name), odd_volume(name), name,
                             mask=odd_volume().data > 0, placement=placed()) for name in "ab"]
    monkeypatch.setattr(pipeline, "register_rigid", lambda *_, **__: np.eye(4))
    monkeypatch.setattr(pipeline, "place_given", lambda *_, **__: "mask Dice 0.5")
    monkeypatch.setattr(pipeline, "place", lambda *_: placed())
    pipeline._place(visits, QUICK)
    assert [visit.transform_fault for visit in visits] == ["mean of the visits: mask Dice 0.5"] * 2


# ---- the table of flags and notes ----------------------------------------------------------------

def test_every_code_is_raised_somewhere_and_no_other() -> None:
    """Raised: put into a list or set.  A code that is only compared with reaches no row."""
    raised, named, bare = set(), set(), []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            named |= {_code(node)}
            raised |= {_code(part) for part in _put_in(node)}
            bare += [f"{path.name}:{node.lineno}"] if _bare_code(node) else []
    codes = {f"{type(code).__name__}.{code.name}" for code in (*Flag, *Note)}
    assert not bare, "raise members of Flag or Note in data_prep/flags.py, not texts"
    assert raised - {""} == codes and named - {""} == codes


def _code(node: ast.AST) -> str:
    """The member of Flag or Note that an expression is; empty where it is none."""
    known = isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and (
        node.value.id in ("Flag", "Note"))
    return ast.unparse(node) if known else ""


def _put_in(node: ast.AST) -> list[ast.expr]:
    """What an expression puts into a list or set."""
    if isinstance(node, ast.List | ast.Set):
        return node.elts
    if isinstance(node, ast.Call) and getattr(node.func, "attr", "") == "append":
        return node.args
    return []


def _bare_code(node: ast.AST) -> bool:
    """A text that is put into a list called flags or notes."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        target, values = node.func.value, node.args
        if node.func.attr not in ("append", "extend"):
            return False
    elif isinstance(node, ast.AugAssign | ast.Assign):
        target = node.target if isinstance(node, ast.AugAssign) else node.targets[0]
        values = [node.value]
    else:
        return False
    name = getattr(target, "attr", getattr(target, "id", ""))
    return name in ("flags", "notes") and any(
        isinstance(part, ast.Constant) and isinstance(part.value, str) and "_" in part.value
        for value in values for part in ast.walk(value))


def test_codes_are_one_or_the_other_and_say_what_to_do() -> None:
    codes: list[Flag | Note] = [*Flag, *Note]
    assert len({code.value for code in codes}) == len(codes)
    assert all(code.meaning and code.cure and ";" not in code for code in codes)
    assert {_meaning(code) for code in codes} == {(code.meaning, code.cure) for code in codes}
    assert joined([Flag.NO_TR, "low_snr", Flag.NO_TR]) == "no_tr;low_snr" and joined([]) is None
    assert of_companion("label", [Flag.NO_TR]) == ["label:no_tr"]


def test_the_documents_have_the_same_tables() -> None:
    text = (ROOT / "docs/reference/flags.md").read_text()
    tables = [part.split("\n## ")[0] for part in text.split("\n## ")[1:]]
    flags, notes = (next(part for part in tables if part.startswith(name))
                    for name in ("Flags", "Notes"))
    for table, kind in ((flags, Flag), (notes, Note)):
        for code in kind:
            assert f"| `{code}` | {code.meaning} | {code.cure} |" in table, code
    codes = {f"{side.removeprefix('flag_').replace('below', 'low').replace('above', 'high')}_"
             f"{figure.removeprefix('qc_')}" for limits in rules().thresholds.values()
             for figure, limit in limits.items() for side in ("flag_below", "flag_above")
             if getattr(limit, side) is not None}
    assert codes and all(f"| `{code}` |" in flags for code in codes), codes


# ---- rows made before ----------------------------------------------------------------------------

def test_rows_made_before_notes_had_a_column_read_as_they_did() -> None:
    old = {**scan("a").__dict__, "scan_id": "s", "status": "flagged", "message": None,
           "provenance": None, "reason": "minimal;low_snr", "figures": {}}
    table = scan_table([old]).drop_columns(["flags", "notes"])
    (row,) = archive_rows(table)
    assert flags_of(row) == ["minimal", "low_snr"]
    new = {**old, "uri": "b", "scan_id": "t", "reason": "low_ncc", "flags": "low_ncc",
           "notes": "minimal"}
    first, second = archive_rows(merge(table, [[new]]))
    assert (first["reason"], first["flags"], first["notes"]) == ("minimal;low_snr", None, None)
    assert flags_of(first) == ["minimal", "low_snr"]
    assert (second["reason"], second["flags"], second["notes"]) == ("low_ncc", "low_ncc", "minimal")


def test_a_note_alone_leaves_a_scan_accepted(tmp_path) -> None:
    image, mask = volume("x")
    (row,) = rows_of([Prepared(Scan("a", "c", "p", "p", "1", "BOLD", "train"), "id", image, mask,
                               None, {}, [], ["minimal"])], tmp_path)
    assert (row["status"], row["reason"], row["flags"], row["notes"]) == (
        "accepted", None, None, "minimal")
