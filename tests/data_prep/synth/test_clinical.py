"""What a clinic knows of synthetic people, and whose function follows anatomy: known effects, gaps,
and nothing else changed."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data_prep.synth import clinical, cohort
from data_prep.synth.clinical import draw_clinical
from data_prep.synth.cohort import draw_person, truths

PEOPLE = [draw_person(5, index) for index in range(2000)]
CLINICS = [draw_clinical(5, person) for person in PEOPLE]


def column(name: str) -> np.ndarray:
    return np.array([np.nan if getattr(each, name) is None else getattr(each, name)
                     for each in CLINICS], dtype=float)


def test_clinics_know_what_is_stated_and_nothing_of_small_vessels() -> None:
    patient, amyloid, vessels = (np.array([getattr(person, name) for person in PEOPLE])
                                 for name in ("patient", "amyloid", "small_vessel"))
    age = np.array([person.visits[0].age for person in PEOPLE]) - cohort.MEAN_AGE
    design = np.column_stack([np.ones(len(age)), age, patient, amyloid, vessels]).astype(float)

    def effects(values: np.ndarray) -> list[float]:
        known = np.isfinite(values)
        return np.linalg.lstsq(design[known], values[known], rcond=None)[0][1:].tolist()

    assert effects(column("allele_dose")) == pytest.approx(
        [0, 0, 2 * (clinical.ALLELE_OF_AMYLOID - clinical.ALLELE), 0], abs=0.1)
    assert effects(column("memory")) == pytest.approx([-0.15, -8, 0, 0], abs=1.2)
    assert effects(column("attention")) == pytest.approx([-0.15, 0, 0, 0], abs=1.2)
    assert effects(np.log(column("csf_abeta"))) == pytest.approx([0, 0, -0.5, 0], abs=0.06)
    assert effects(np.log(column("csf_tau"))) == pytest.approx([0, 0.4, 0, 0], abs=0.06)


def test_gaps_are_as_stated() -> None:
    patient = np.array([person.patient for person in PEOPLE])
    there = {name: np.isfinite(column(name)) for name in clinical.Clinical.__dataclass_fields__}
    assert there["allele_dose"].mean() == pytest.approx(clinical.TYPED, abs=0.03)
    assert there["csf_tau"].mean() == pytest.approx(clinical.PUNCTURED, abs=0.03)
    assert there["memory"][patient].mean() == pytest.approx(clinical.PATIENTS_CAME, abs=0.05)
    assert there["memory"][~patient].mean() == pytest.approx(clinical.CAME, abs=0.02)
    assert np.array_equal(there["memory"], there["attention"])
    assert np.array_equal(there["csf_tau"], there["csf_abeta"])


def test_a_person_is_drawn_alike_whoever_else_is_there() -> None:
    assert draw_clinical(5, draw_person(5, 7)) == CLINICS[7] != draw_clinical(6, PEOPLE[7])


def test_linked_people_differ_in_function_alone() -> None:
    linked = [draw_person(5, index, 0.5) for index in range(len(PEOPLE))]
    assert [replace(person, linked=False) for person in linked] == PEOPLE
    share = np.mean([person.linked for person in linked])
    assert share == pytest.approx(0.5, abs=0.04) and not any(person.linked for person in PEOPLE)
    for one, other in zip(linked[:200], PEOPLE[:200], strict=True):
        now, before = (truths(each, each.visits[0].age) for each in (one, other))
        same = {name for name in now if now[name] == before[name]}
        assert {"t1w_contrast", "shape_trait"} <= same
        assert (now != before) == one.linked


@pytest.mark.parametrize("name", ["fdg_ratio", "fluctuation"])
def test_function_follows_anatomy_in_linked_people_and_in_no_others(name: str) -> None:
    linked = [draw_person(5, index, 0.5) for index in range(len(PEOPLE))]
    anatomy = np.array([(person.traits.grey + person.traits.myelin) / np.sqrt(2)
                        for person in linked])
    function = np.array([truths(person, person.visits[0].age)[name] for person in linked])
    design = np.array([[1, person.visits[0].age, person.patient] for person in linked], float)
    rest = np.log(function) - design @ np.linalg.lstsq(design, np.log(function), rcond=None)[0]
    whom = np.array([person.linked for person in linked])
    assert np.corrcoef(rest[whom], anatomy[whom])[0, 1] > 0.7
    assert abs(np.corrcoef(rest[~whom], anatomy[~whom])[0, 1]) < 0.08
