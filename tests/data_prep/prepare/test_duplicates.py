"""Near-duplicates: copies under another name are found, different people are not."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from data_prep.prepare.duplicates import SCHEMA, fingerprint, near_pairs, review_table
from neurojepa.errors import DataError
from neurojepa.feed.format import ARCHIVE_GRID

SHAPE = ARCHIVE_GRID.shape
X, Y, Z = np.meshgrid(*((np.arange(n) - (n - 1) / 2).astype(np.float32) for n in SHAPE),
                      indexing="ij", sparse=True)
BRAIN = (X / 66) ** 2 + (Y / 84) ** 2 + (Z / 68) ** 2 < 1
COMMON = np.random.default_rng(99).random((13, 15, 13))


def person(seed: int, shift: float = 0.0, noise: float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """A brain: folds common to all, folds of one's own; a shift and noise of the scan at hand."""
    own = np.random.default_rng(seed).random(COMMON.shape)
    zoom = np.diag([(n - 1) / (m - 1) for n, m in zip(COMMON.shape, SHAPE, strict=True)])
    image = ndimage.affine_transform((COMMON + 0.7 * own).astype(np.float32), zoom,
                                     offset=shift * zoom.diagonal(), output_shape=SHAPE, order=1,
                                     mode="nearest") / 1.7
    if noise:
        image = image + np.random.default_rng(seed + 1000).normal(0, noise, SHAPE)
    return (np.clip(image, 0, 1) * BRAIN).astype(np.float32), BRAIN.astype(np.uint8)


def row(name: str, print_: str, participant: str | None = None, **more: str) -> dict:
    participant = participant or name
    return {"scan_id": f"id-{name}", "participant": participant, "family": participant,
            "session": "1", "cohort": "c", "modality": "T1w", "status": "accepted",
            "figures": {"fingerprint": print_}} | more


@pytest.fixture(scope="module")
def people() -> list[dict]:
    return [row(f"p{seed}", fingerprint(*person(seed))) for seed in range(10)]


@pytest.fixture(scope="module")
def copy() -> str:
    """Person 3 again, aligned 2 mm off and with noise of 8 % of the range."""
    return fingerprint(*person(3, shift=1.2, noise=0.08))


def test_different_people_are_no_pair(people: list[dict]) -> None:
    assert near_pairs(people) == [] and near_pairs(people[:4]) == []
    assert all(len(each["figures"]["fingerprint"]) < 3000 for each in people)


@pytest.mark.parametrize("count", [4, 10])  # few scans, and enough for a mean
def test_a_copy_under_another_name_is_found(people: list[dict], copy: str, count: int) -> None:
    pairs = near_pairs([*people[:count], row("other", copy, cohort="d")])
    assert [(pair.relation, pair.scan_id_a, pair.scan_id_b) for pair in pairs] == [
        ("different_people", "id-p3", "id-other")]
    assert pairs[0].cohort_b == "d" and 0.5 < pairs[0].similarity <= 1


def test_visits_and_families_are_told_apart(people: list[dict], copy: str) -> None:
    visit = row("again", copy, participant="p3", session="2")
    (pair,) = near_pairs([*people, visit])
    assert (pair.relation, pair.session_a, pair.session_b) == ("same_person", "1", "2")
    sibling = row("sibling", copy, family="p3")
    assert near_pairs([*people, sibling])[0].relation == "same_family"


def test_only_scans_of_one_modality_that_are_in_the_archive_are_compared(
        people: list[dict], copy: str) -> None:
    for more in ({"modality": "FLAIR"}, {"status": "rejected"}, {"figures": {"fingerprint": None}}):
        assert near_pairs([*people, row("other", copy) | more]) == []


def test_a_cluster_of_copies_stays_bounded_and_complete(people: list[dict]) -> None:
    copies = [row(f"c{i}", people[0]["figures"]["fingerprint"]) for i in range(60)]
    pairs = near_pairs([*people[1:], *copies])
    assert len(pairs) <= 60 * 20
    assert {pair.scan_id_a for pair in pairs} | {pair.scan_id_b for pair in pairs} == {
        each["scan_id"] for each in copies}


def test_blocks_give_what_one_product_gives(people: list[dict], copy: str, monkeypatch) -> None:
    rows = [*people, row("other", copy), row("more", copy)]
    whole = near_pairs(rows)
    monkeypatch.setattr("data_prep.prepare.duplicates.BLOCK", 5)
    assert near_pairs(rows) == whole and len(whole) == 3


def test_the_review_table_has_a_row_for_each_pair(people: list[dict], copy: str) -> None:
    table = review_table([*people, row("other", copy)])
    assert table.schema == SCHEMA and table.num_rows == 1
    assert review_table([]).num_rows == 0


def test_no_brain_has_no_fingerprint() -> None:
    nothing = np.zeros(SHAPE, np.uint8)
    assert fingerprint(nothing.astype(np.float32), nothing) is None


def test_a_damaged_fingerprint_is_named(people: list[dict]) -> None:
    with pytest.raises(DataError, match="scan id-x: its fingerprint is damaged"):
        near_pairs([*people, row("x", "AAAA")])
