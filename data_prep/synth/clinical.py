"""What a clinic knows of the people of the cohort beside their scans, with gaps.

    genotype    doses of a risk allele: more in those with amyloid; one in five was not typed
    cognition   memory and attention, in points of mean 50 and sd 10 or so: fall with age, memory
                with the disease and small hippocampi; patients come to the test less often
    fluid       amyloid-beta and tau in cerebrospinal fluid, pg/mL: follow amyloid and the disease;
                two in five had a puncture

None of it knows of small vessel disease, so what it adds there is nothing.  Every size is assumed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from data_prep.synth.cohort import HIPPOCAMPUS_LOG_SD, MEAN_AGE, SyntheticPerson

ALLELE, ALLELE_OF_AMYLOID = 0.12, 0.32  # frequency without and with amyloid
TYPED, PUNCTURED = 0.8, 0.4  # share of people
CAME, PATIENTS_CAME = 0.95, 0.6  # likewise, to the test
POINTS, POINTS_SD, POINTS_PER_YEAR = 50.0, 8.0, -0.15
MEMORY_OF_PATIENT, MEMORY_OF_HIPPOCAMPI = -8.0, 2.0  # the latter of one sd beside the age's
ABETA, ABETA_OF_AMYLOID, TAU, TAU_OF_PATIENT = 1000.0, -0.5, 220.0, 0.4  # log
FLUID_LOG_SD = 0.3


@dataclass(frozen=True)
class Clinical:
    """None is what was not measured."""

    allele_dose: int | None
    memory: float | None
    attention: float | None
    csf_abeta: float | None
    csf_tau: float | None


def draw_clinical(seed: int, person: SyntheticPerson) -> Clinical:
    """What is known of a person; a stream of its own, so nothing else depends on it."""
    rng = np.random.default_rng([seed, 8, person.index])
    dose = int(rng.binomial(2, ALLELE_OF_AMYLOID if person.amyloid else ALLELE))
    age = POINTS + POINTS_PER_YEAR * (person.visits[0].age - MEAN_AGE)
    memory = (age + MEMORY_OF_PATIENT * person.patient
              + MEMORY_OF_HIPPOCAMPI * person.hippocampus_rest / HIPPOCAMPUS_LOG_SD)
    memory, attention = rng.normal([memory, age], POINTS_SD)
    abeta, tau = np.exp(rng.normal([np.log(ABETA) + ABETA_OF_AMYLOID * person.amyloid,
                                    np.log(TAU) + TAU_OF_PATIENT * person.patient], FLUID_LOG_SD))
    typed, came, punctured = rng.random(3) < [
        TYPED, PATIENTS_CAME if person.patient else CAME, PUNCTURED]
    return Clinical(dose if typed else None,
                    *((round(float(value), 1) if there else None)
                      for value, there in ((memory, came), (attention, came), (abeta, punctured),
                                           (tau, punctured))))
