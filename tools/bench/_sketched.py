"""People for --quick: the template's tissue, and a ball for ventricles; milliseconds each.

The feeds have the form of _people.py's, T1w alone.  What is measured on them means nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa

from data_prep.pack import placed_table, write_tar
from data_prep.synth.cohort import Levels, Visit, draw_person, truths, wanted_ml
from neurojepa.feed.format import (
    LABELS_SCHEMA,
    TRAINING_GRIDS,
    MaskCode,
    commit_feed,
    encode_array,
    is_brain,
    quantise,
)
from neurojepa.objective.anatomy import grid_mm, template, values_at
from neurojepa.storage import write_bytes
from tools.bench._alff import LINKS, lobes
from tools.bench._people import FEEDS

GRID, PEOPLE, SOURCES, SEED = TRAINING_GRIDS["3mm"], 64, 16, 14
YEARS = 4.0  # between visits
SPLITS = ("train", "train", "val", "test")  # of a quarter of the sources each
BRAIN_ML, LEVELS = 1450.0, Levels(csf=0.2, grey=0.5)


def sketch_people(work: Path) -> str:
    """Both feeds below ``work``; returns the URI of the first visits'."""
    where, (origin, _, grey, white) = grid_mm(GRID), template()
    tissue = {name: values_at(share, origin=origin, where=where)
              for name, share in (("grey", grey), ("white", white))}
    brain = tissue["grey"] + tissue["white"] > 0.3
    signal = 0.45 * tissue["grey"] + 0.75 * tissue["white"] + 0.1
    middle = np.linalg.norm(where - (0, -20, 12), axis=-1)
    for number, name in enumerate(FEEDS):
        rng, samples, labels = np.random.default_rng([SEED, number]), [], []
        for index in range(PEOPLE):
            person = draw_person(SEED, index)
            source, age = index % SOURCES, person.visits[0].age + YEARS * number
            visit = Visit(str(number + 1), round(age, 1), ("T1w",))
            ventricles = wanted_ml(person, age=age, intracranial_ml=BRAIN_ML,
                                   levels=LEVELS).ventricles
            radius_mm = (3 * 1000 * ventricles / (4 * np.pi)) ** (1 / 3)
            image = np.where(middle < radius_mm, 0.15, signal)
            image = np.clip(image + rng.normal(0, 0.03, image.shape), 0, 1)
            stored = quantise(image.astype(np.float32),
                              np.where(brain, MaskCode.BRAIN, MaskCode.AIR))
            samples.append(({
                "scan_id": hashlib.sha256(stored.tobytes()).hexdigest()[:24],
                "participant": person.label, "session": visit.session, "cohort": "people",
                "modality": "T1w", "site": person.site.name,
                "num_foreground": int(is_brain(stored).sum()),
                "split": SPLITS[source * len(SPLITS) // SOURCES], "family": f"source{source:02d}"},
                encode_array(stored), None))
            truth = {"age": visit.age, "sex": person.sex, "ventricle_ml": round(ventricles, 3),
                     "diagnosis": "patient" if person.patient else "control"}
            truth |= {f"{link}: {lobe}": truths(person, age)["fluctuation"] * rng.uniform(0.9, 1.1)
                      for link in LINKS for lobe in lobes().names}
            labels += [{"participant": person.label, "session": visit.session, "name": key,
                        "value": str(value)} for key, value in truth.items()]
        data, placed = write_tar(samples)
        write_bytes(str(work / name / "shards/all.tar"), data)
        commit_feed(str(work / name), GRID, rows=placed_table(placed, "shards/all.tar"),
                    labels=pa.Table.from_pylist(labels, schema=LABELS_SCHEMA), source=__name__)
    return str(work / FEEDS[0])
