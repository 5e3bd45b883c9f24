"""Who is in the cohort: age, sex, diagnosis, site, family, visits; all drawn from (seed, index).

Person i does not depend on how many people there are, so a larger cohort begins with the smaller.
Volumes that a person *should* have follow measured regressions on healthy adults (181 IXI adults):
lateral ventricles 1.2 % of the intracranial volume, +2.0 % of themselves a year, log sd 0.45.
Assumed, not measured: disease shifts log ventricles by +0.5 and log hippocampi by -0.2; hippocampi
are 0.55 % of the intracranial volume (log sd 0.1) and lose 0.4 % a year from the age of 50.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

FAMILY_SHARE = 0.25  # of neighbouring pairs who are siblings
TWO_VISITS_SHARE = 0.25
MEAN_AGE = 48.0  # of the regression
VENTRICLE_LOG_SD, HIPPOCAMPUS_LOG_SD = 0.45, 0.10


@dataclass(frozen=True)
class Site:
    """A scanner: what its images have in common."""

    name: str
    manufacturer: str
    field_strength: float  # tesla
    contrast_sd: float  # log sd of each tissue's signal between scans
    noise: float  # Rician sd, relative to a signal of 1
    bias: float  # log sd of the coil's shading
    slices: float  # slice thickness of T2w and FLAIR, in units of the spacing


SITES = (
    Site("north", "Siemens", 3.0, 0.02, 0.020, 0.10, 1.0),
    Site("east", "GE", 3.0, 0.03, 0.025, 0.14, 1.5),
    Site("south", "Philips", 1.5, 0.04, 0.035, 0.08, 1.0),
    Site("west", "Siemens", 1.5, 0.03, 0.030, 0.06, 2.0),
)


@dataclass(frozen=True)
class Visit:
    session: str
    age: float  # years
    modalities: tuple[str, ...]  # T1w always


@dataclass(frozen=True)
class Person:
    """One participant, before any voxel is made."""

    index: int
    label: str  # BIDS participant label, without "sub-"
    family: str | None
    anatomy_key: int  # people of one family share it, and so their anatomy
    sex: str
    patient: bool
    site: Site
    head_scale: tuple[float, float, float]  # of the anatomy, along x, y, z
    ventricle_rest: float  # log deviation from what age predicts
    hippocampus_rest: float
    visits: tuple[Visit, ...]


def draw_person(seed: int, index: int) -> Person:
    """Person ``index`` of the cohort of ``seed``."""
    pair = np.random.default_rng([seed, 1, index // 2])
    siblings = bool(pair.random() < FAMILY_SHARE)
    shared_age, key = pair.uniform(20, 85), int(pair.integers(2 ** 31))
    rng = np.random.default_rng([seed, 2, index])
    age = float(np.clip(shared_age + rng.normal(0, 4), 20, 85)) if siblings else rng.uniform(20, 85)
    sex = "M" if rng.random() < 0.5 else "F"
    patient = bool(rng.random() < (0.5 if age >= 55 else 0.15))
    # men's heads are 4 % larger in each direction than women's; the rest is individual
    size = (0.02 if sex == "M" else -0.02) + rng.normal(0, 0.02)
    scale = np.exp(size + rng.normal(0, 0.01, 3))
    ages = [age]
    if rng.random() < TWO_VISITS_SHARE:
        ages.append(age + rng.uniform(2, 6))
    return Person(
        index=index, label=f"{index + 1:04d}",
        family=f"fam{index // 2 + 1:04d}" if siblings else None,
        anatomy_key=key if siblings else int(rng.integers(2 ** 31)),
        sex=sex, patient=patient, site=SITES[rng.integers(len(SITES))],
        head_scale=(float(scale[0]), float(scale[1]), float(scale[2])),
        ventricle_rest=float(rng.normal(0, VENTRICLE_LOG_SD)),
        hippocampus_rest=float(rng.normal(0, HIPPOCAMPUS_LOG_SD)),
        visits=tuple(Visit(f"{k + 1}", round(a, 1), _modalities(rng))
                     for k, a in enumerate(ages)))


def _modalities(rng: np.random.Generator) -> tuple[str, ...]:
    chance = rng.random()
    if chance < 0.15:
        return ("T1w",)
    if chance < 0.30:
        return ("T1w", "T2w", "FLAIR")
    return ("T1w", "T2w") if chance < 0.65 else ("T1w", "FLAIR")


def wanted_ml(person: Person, age: float, intracranial_ml: float) -> np.ndarray:
    """[2] millilitres that lateral ventricles and hippocampi should have at an age."""
    onset = person.visits[0].age
    progress = 0.04 * (age - onset) if person.patient else 0.0  # faster than ageing, assumed
    # 1.2 % is the mean of a log-normal whose total log sd is 0.55
    ventricles = (np.log(0.012) - 0.15 + 0.020 * (age - MEAN_AGE) + person.ventricle_rest
                  + (0.5 + progress if person.patient else 0.0))
    hippocampi = (np.log(0.0055) - 0.004 * max(age - 50, 0) + person.hippocampus_rest
                  - (0.2 + progress / 4 if person.patient else 0.0))
    return np.exp([ventricles, hippocampi]) * intracranial_ml


def choose_anatomy(person: Person, ventricles_ml: dict[str, float]) -> str:
    """Name of the anatomy a person is made from: by chance, rather one of fitting ventricles.

    ``ventricles_ml`` maps each anatomy to its own volume.  A member of a family chooses by what
    the family shares, so that siblings come from one anatomy.
    """
    names = sorted(ventricles_ml)
    if person.family is None:
        wish = wanted_ml(person, person.visits[0].age, 1450.0)[0]
        misfit = np.log([ventricles_ml[name] / wish for name in names])
        weights = np.exp(-0.5 * (misfit / 0.6) ** 2) + 1e-3
    else:
        weights = np.ones(len(names))
    bounds = np.concatenate([[0.0], np.cumsum(weights / weights.sum())])
    draw = np.random.default_rng([person.anatomy_key]).random()
    for name, (low, high) in zip(names, pairwise(bounds), strict=True):
        if low <= draw < high:
            return name
    return names[-1]
