"""Who is in the cohort, and every effect size: all drawn from (seed, index).

Person i does not depend on how many people there are, so a larger cohort begins with the smaller.
What age, sex and disease do to a head stands in the constants below, each measured or assumed:
*measured* means the regression on 181 healthy adults of the IXI study (shares of the intracranial
volume, automatic segmentation), *assumed* means chosen here, in the range that is published.

Volumes hold some of the truth (ventricles, hippocampi, cortex, outer fluid, lesions).  The rest
lies in signal and shape: T1w contrast of cortex to white matter, the tracers' uptake, the size of
BOLD fluctuations, and a bend of the head that changes no volume.  Of people who are *linked*, none
unless asked for, uptake and fluctuations follow grey matter and its contrast.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np

# ---- volumes
MEAN_AGE = 48.0  # of the regressions
VENTRICLE_SHARE, VENTRICLE_PER_YEAR, VENTRICLE_LOG_SD = 0.012, 0.020, 0.45  # measured; log-linear
CSF_PER_YEAR, CSF_LOG_SD = 0.0115, 0.15  # measured; fluid around the brain, log-linear
GREY_PER_YEAR, GREY_SD = -0.00154, 0.03  # measured; share of the intracranial volume; of itself
HIPPOCAMPUS_SHARE, HIPPOCAMPUS_LOG_SD = 0.0055, 0.10  # assumed
HIPPOCAMPUS_PER_YEAR = -0.004  # assumed; log, from the age of 50
PATIENT_VENTRICLES, PATIENT_HIPPOCAMPI = 0.5, -0.2  # assumed; log
PATIENT_CSF, PATIENT_GREY = 0.10, -0.03  # assumed; log
PATIENT_PER_YEAR = 0.08  # assumed; of each shift above, added for each year after the first visit
LESION_ML, LESION_PER_YEAR, LESION_LOG_SD = 0.8, 0.045, 0.6  # assumed; at MEAN_AGE; log-linear
SMALL_VESSEL_LESIONS = 1.3  # assumed; log
MAX_LESION_ML = 60.0

# ---- head and shape
SEX_LOG_SIZE, LOG_SIZE_SD, LOG_ASPECT_SD = 0.02, 0.02, 0.01  # assumed; men +, women -; per axis
SHAPE_OF_SEX = 0.4  # assumed; sd of the shape trait by which men stand above, women below 0

# ---- signal
CONTRAST = 0.70  # T1w cortex over white matter at MEAN_AGE, from real scans, by eye
CONTRAST_PER_YEAR, CONTRAST_OF_MYELIN = 0.0015, 0.03  # assumed; log; myelin is a trait of sd 1
AMYLOID_BASE, AMYLOID_PER_YEAR, AMYLOID_OF_PATIENT = -3.2, 0.06, 2.2  # assumed; log odds
AV45_NEGATIVE, AV45_POSITIVE = (1.05, 0.03), (1.45, 0.12)  # assumed; cortex over cerebellum; sd
AV45_PER_YEAR = 0.02  # assumed; of positive people, after their first visit
FDG, FDG_SD, FDG_PER_YEAR, FDG_OF_PATIENT = 1.20, 0.05, -0.003, -0.15  # assumed; likewise
LINK = 0.8  # share of variance of linked people's uptake and fluctuation that anatomy tells
FLUCTUATION, FLUCTUATION_LOG_SD, FLUCTUATION_PER_YEAR = 0.012, 0.15, -0.006  # assumed; of the mean

# ---- who, how often
FAMILY_SHARE = 0.25  # of neighbouring pairs who are siblings
HERITABILITY = 0.5  # share of a trait's variance that siblings have in common
PATIENT_YOUNG, PATIENT_OLD = 0.15, 0.5  # before and from OLD_AGE
SMALL_VESSEL_YOUNG, SMALL_VESSEL_OLD = 0.1, 0.4
OLD_AGE = 55.0
TWO_VISITS_SHARE, PET_SHARE, BOLD_SHARE = 0.25, 0.15, 0.05  # the last two: of visits
TRACERS = ("AV45", "FDG")


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
    Site("north", "Siemens", 3.0, 0.010, 0.020, 0.10, 1.0),
    Site("east", "GE", 3.0, 0.015, 0.025, 0.14, 1.5),
    Site("south", "Philips", 1.5, 0.020, 0.035, 0.08, 1.0),
    Site("west", "Siemens", 1.5, 0.015, 0.030, 0.06, 2.0),
)


@dataclass(frozen=True)
class Visit:
    session: str
    age: float  # years
    modalities: tuple[str, ...]  # T1w always
    tracer: str | None = None  # of the PET


@dataclass(frozen=True)
class Traits:
    """What makes people of one age, sex and diagnosis differ; each of mean 0 and sd 1."""

    csf: float
    grey: float
    lesions: float
    myelin: float
    shape: float
    amyloid: float
    glucose: float
    fluctuation: float


@dataclass(frozen=True)
class SyntheticPerson:
    """One participant, before any voxel is made."""

    index: int
    label: str  # BIDS participant label, without "sub-"
    family: str | None
    anatomy_key: int  # people of one family share it, and so their anatomy
    sex: str
    patient: bool
    small_vessel: bool  # the second diagnosis, independent of the first
    amyloid: bool
    site: Site
    head_scale: tuple[float, float, float]  # of the anatomy, along x, y, z
    ventricle_rest: float  # log deviation from what age predicts
    hippocampus_rest: float
    traits: Traits
    visits: tuple[Visit, ...]
    linked: bool = False  # function follows anatomy: see ``_function``


@dataclass(frozen=True)
class Levels:
    """Shares of the intracranial volume at MEAN_AGE.

    They depend on who drew the labels: programs and people differ on where fluid ends.
    """

    csf: float  # fluid outside the ventricles
    grey: float  # all grey matter


@dataclass(frozen=True)
class Wanted:
    """Volumes that a head should have, in millilitres."""

    ventricles: float  # lateral
    hippocampi: float
    csf: float
    grey: float
    lesions: float


def draw_person(seed: int, index: int, linked: float = 0.0) -> SyntheticPerson:
    """Person ``index`` of the cohort of ``seed``; ``linked`` is the share of people whose function
    follows their anatomy, by a stream of its own."""
    pair = np.random.default_rng([seed, 1, index // 2])
    siblings = bool(pair.random() < FAMILY_SHARE)
    shared_age, key = pair.uniform(20, 85), int(pair.integers(2 ** 31))
    rng = np.random.default_rng([seed, 2, index])
    age = float(np.clip(shared_age + rng.normal(0, 4), 20, 85)) if siblings else rng.uniform(20, 85)
    sex = "M" if rng.random() < 0.5 else "F"
    old = age >= OLD_AGE
    patient = bool(rng.random() < (PATIENT_OLD if old else PATIENT_YOUNG))
    size = (SEX_LOG_SIZE if sex == "M" else -SEX_LOG_SIZE) + rng.normal(0, LOG_SIZE_SD)
    scale = np.exp(size + rng.normal(0, LOG_ASPECT_SD, 3))
    ages = [age]
    if rng.random() < TWO_VISITS_SHARE:
        ages.append(age + rng.uniform(2, 6))
    odds = (AMYLOID_BASE + AMYLOID_PER_YEAR * (age - MEAN_AGE)
            + (AMYLOID_OF_PATIENT if patient else 0.0))
    return SyntheticPerson(
        index=index, label=f"{index + 1:04d}",
        family=f"fam{index // 2 + 1:04d}" if siblings else None,
        anatomy_key=key if siblings else int(rng.integers(2 ** 31)),
        sex=sex, patient=patient,
        small_vessel=bool(rng.random() < (SMALL_VESSEL_OLD if old else SMALL_VESSEL_YOUNG)),
        amyloid=bool(rng.random() < 1 / (1 + np.exp(-odds))),
        site=SITES[rng.integers(len(SITES))],
        head_scale=(float(scale[0]), float(scale[1]), float(scale[2])),
        ventricle_rest=float(rng.normal(0, VENTRICLE_LOG_SD)),
        hippocampus_rest=float(rng.normal(0, HIPPOCAMPUS_LOG_SD)),
        traits=_draw_traits(rng, pair if siblings else rng),
        visits=tuple(_draw_visit(rng, f"{k + 1}", round(a, 1)) for k, a in enumerate(ages)),
        linked=bool(np.random.default_rng([seed, 9, index]).random() < linked))


def _draw_traits(own: np.random.Generator, shared: np.random.Generator) -> Traits:
    num = len(Traits.__dataclass_fields__)
    values = (np.sqrt(HERITABILITY) * shared.standard_normal(num)
              + np.sqrt(1 - HERITABILITY) * own.standard_normal(num))
    return Traits(*map(float, values))


def _draw_visit(rng: np.random.Generator, session: str, age: float) -> Visit:
    """Two scans mostly, so that PET and BOLD stand in for T2w rather than come on top."""
    anatomical, functional, tracer = rng.random(), rng.random(), TRACERS[rng.integers(2)]
    if functional < BOLD_SHARE:
        return Visit(session, age, ("T1w", "BOLD"))
    if functional < BOLD_SHARE + PET_SHARE:
        more = ("FLAIR", "PET") if anatomical < 0.5 else ("PET",)
        return Visit(session, age, ("T1w", *more), tracer)
    if anatomical < 0.20:
        return Visit(session, age, ("T1w",))
    if anatomical < 0.28:
        return Visit(session, age, ("T1w", "T2w", "FLAIR"))
    return Visit(session, age, ("T1w", "T2w") if anatomical < 0.64 else ("T1w", "FLAIR"))


# ---- what a person should look like at an age ----------------------------------------------------

def wanted_ml(person: SyntheticPerson, *, age: float, intracranial_ml: float,
              levels: Levels) -> Wanted:
    """Volumes that a head of ``intracranial_ml`` should have at an age."""
    years, traits = age - MEAN_AGE, person.traits
    ill = _illness(person, age)
    hippocampi = (np.log(HIPPOCAMPUS_SHARE) + HIPPOCAMPUS_PER_YEAR * max(age - 50, 0)
                  + person.hippocampus_rest + PATIENT_HIPPOCAMPI * ill)
    csf = (np.log(levels.csf) + CSF_PER_YEAR * years + CSF_LOG_SD * traits.csf
           + PATIENT_CSF * ill)
    grey = ((levels.grey + GREY_PER_YEAR * years) * (1 + GREY_SD * traits.grey)
            * np.exp(PATIENT_GREY * ill))
    lesions = (np.log(LESION_ML) + LESION_PER_YEAR * years + LESION_LOG_SD * traits.lesions
               + (SMALL_VESSEL_LESIONS if person.small_vessel else 0.0))
    return Wanted(
        ventricles=_ventricle_share(person, age) * intracranial_ml,
        hippocampi=float(np.exp(hippocampi)) * intracranial_ml,
        csf=float(np.exp(csf)) * intracranial_ml, grey=float(grey) * intracranial_ml,
        lesions=min(float(np.exp(lesions)), MAX_LESION_ML))


def truths(person: SyntheticPerson, age: float) -> dict[str, float]:
    """What volumes do not hold, as it stands in the tables."""
    traits, years, ill = person.traits, age - MEAN_AGE, _illness(person, age)
    contrast = CONTRAST * np.exp(CONTRAST_PER_YEAR * years - CONTRAST_OF_MYELIN * traits.myelin)
    mean, sd = AV45_POSITIVE if person.amyloid else AV45_NEGATIVE
    since = age - person.visits[0].age
    values = {
        "t1w_contrast": contrast,
        "shape_trait": traits.shape + (SHAPE_OF_SEX if person.sex == "M" else -SHAPE_OF_SEX),
        "av45_ratio": mean + sd * _function(person, "amyloid") + (
            AV45_PER_YEAR * since if person.amyloid else 0),
        "fdg_ratio": (FDG + FDG_PER_YEAR * years + FDG_SD * _function(person, "glucose")
                      + FDG_OF_PATIENT * ill),
        "fluctuation": FLUCTUATION * np.exp(
            FLUCTUATION_PER_YEAR * years + FLUCTUATION_LOG_SD * _function(person, "fluctuation")),
    }
    return {name: round(float(value), 5) for name, value in values.items()}


def _function(person: SyntheticPerson, name: str) -> float:
    """A trait of uptake or fluctuation; in linked people it is mostly told by what a T1w shows:
    grey matter beside what age predicts, and its contrast."""
    traits = person.traits
    own: float = getattr(traits, name)
    if not person.linked:
        return own
    anatomy = (traits.grey + traits.myelin) / np.sqrt(2)
    return float(np.sqrt(LINK) * anatomy + np.sqrt(1 - LINK) * own)


def _ventricle_share(person: SyntheticPerson, age: float) -> float:
    # VENTRICLE_SHARE is the mean of a log-normal whose total log sd is 0.55
    return float(np.exp(np.log(VENTRICLE_SHARE) - 0.15 + VENTRICLE_PER_YEAR * (age - MEAN_AGE)
                        + person.ventricle_rest + PATIENT_VENTRICLES * _illness(person, age)))


def _illness(person: SyntheticPerson, age: float) -> float:
    """1 for a patient at the first visit, more later; 0 for a control."""
    return 1 + PATIENT_PER_YEAR * (age - person.visits[0].age) if person.patient else 0.0


def choose_anatomy(person: SyntheticPerson, ventricles_ml: dict[str, float]) -> str:
    """Name of the anatomy a person is made from: by chance, rather one of fitting ventricles.

    ``ventricles_ml`` maps each anatomy to its own volume.  A member of a family chooses by what
    the family shares, so that siblings come from one anatomy.
    """
    names = sorted(ventricles_ml)
    if person.family is None:
        wish = 1450.0 * _ventricle_share(person, person.visits[0].age)
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
