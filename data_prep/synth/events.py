"""When something happens to the people of the cohort: event times from a hazard that is known.

The hazard is constant over time.  It follows age and sex, which anyone knows, and what only a scan
shows: hippocampi and ventricles beside what age predicts, the disease, and lesions.  Every size is
assumed.  Follow-up ends for some people before anything happened (censoring, independent of it).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.synth.cohort import (
    HIPPOCAMPUS_LOG_SD,
    MEAN_AGE,
    VENTRICLE_LOG_SD,
    SyntheticPerson,
)

BASE = 0.05  # events a year of a healthy woman of MEAN_AGE
PER_YEAR, OF_MEN = 0.03, 0.2  # log hazard
OF_PATIENT, OF_SMALL_VESSEL = 0.8, 0.4
OF_HIPPOCAMPI, OF_VENTRICLES = -0.5, 0.4  # of one sd beside what age predicts
FOLLOWED = (2.0, 12.0)  # years


@dataclass(frozen=True)
class Event:
    """``years`` to the event after the first visit, or to the end of follow-up without one."""

    years: float  # to the tenth, so that some are tied
    happened: bool
    log_hazard: float  # over that of BASE


def draw_event(seed: int, person: SyntheticPerson) -> Event:
    """The event of a person; a stream of its own, so nothing else depends on it."""
    log_hazard = (
        PER_YEAR * (person.visits[0].age - MEAN_AGE) + OF_MEN * (person.sex == "M")
        + OF_PATIENT * person.patient + OF_SMALL_VESSEL * person.small_vessel
        + OF_HIPPOCAMPI * person.hippocampus_rest / HIPPOCAMPUS_LOG_SD
        + OF_VENTRICLES * person.ventricle_rest / VENTRICLE_LOG_SD)
    rng = np.random.default_rng([seed, 7, person.index])
    wait = float(rng.exponential()) / (BASE * np.exp(log_hazard))
    end = float(rng.uniform(*FOLLOWED))
    return Event(max(0.1, round(min(wait, end), 1)), bool(wait <= end), round(log_hazard, 5))
