"""The tables and descriptions of the BIDS tree; volumes are read back from each person's table."""

from __future__ import annotations

import csv
import io
import json
from typing import Any

from data_prep.synth.clinical import draw_clinical
from data_prep.synth.cohort import SyntheticPerson
from data_prep.synth.contrast import label_names
from data_prep.synth.events import draw_event
from neurojepa.storage import join, read_bytes

BIDS_VERSION = "1.9.0"
COMMIT = "dataset_description.json"
COLUMNS = {
    "age": {"Description": "age at the first visit", "Units": "years"},
    "sex": {"Levels": {"F": "female", "M": "male"}},
    "diagnosis": {"Levels": {"control": "healthy", "patient": "larger ventricles, smaller "
                             "hippocampi and thinner cortex than age predicts"}},
    "small_vessel": {"Levels": {"no": "as age predicts", "yes": "more lesions of white matter"}},
    "amyloid": {"Levels": {"negative": "", "positive": "cortex takes up AV45"}},
    "site": {"Description": "scanner"},
    "linked": {"Levels": {"no": "", "yes": "uptake and fluctuation follow grey matter and its "
                                           "contrast"}},
    "family_id": {"Description": "siblings share it"},
    "split_group": {"Description": "anatomy that the person was made from; people of one group "
                                   "must not be spread over training and test"},
    "ventricle_ml": {"Description": "lateral ventricles (labels 4, 43) on the first visit's label "
                                    "map", "Units": "ml"},
    "hippocampus_ml": {"Description": "hippocampi (labels 17, 53), likewise", "Units": "ml"},
    "cortex_gm_ml": {"Description": "cortex (labels 3, 42), likewise", "Units": "ml"},
    "csf_ml": {"Description": "fluid around the brain (label 24), likewise", "Units": "ml"},
    "lesion_ml": {"Description": "lesions of white matter (label 77), likewise", "Units": "ml"},
    "brain_ml": {"Description": "all labels but 24, likewise", "Units": "ml"},
    "t1w_contrast": {"Description": "T1w signal of cortex over white matter, before what the "
                                    "scanner does to it; at the first visit, like all below"},
    "shape_trait": {"Description": "bend of the head, which changes no volume; of sd 1"},
    "av45_ratio": {"Description": "AV45 uptake of cortex over cerebellar cortex, scanned or not"},
    "fdg_ratio": {"Description": "FDG uptake, likewise"},
    "fluctuation": {"Description": "sd of a BOLD network's signal, as a share of the mean"},
    "event_years": {"Description": "from the first visit to the event, or to the end of follow-up",
                    "Units": "years"},
    "event": {"Levels": {"0": "none while followed (censored)", "1": "happened"}},
    "log_hazard": {"Description": "the true one, from which event times were drawn"},
    "allele_dose": {"Description": "alleles of risk, where typed; more in those with amyloid"},
    "memory": {"Description": "score of a test, where taken; falls with age and the diagnosis",
               "Units": "points"},
    "attention": {"Description": "likewise; falls with age alone", "Units": "points"},
    "csf_abeta": {"Description": "amyloid-beta in cerebrospinal fluid, where taken; lower in those "
                                 "with amyloid", "Units": "pg/mL"},
    "csf_tau": {"Description": "tau, likewise; higher in patients", "Units": "pg/mL"},
}
README = """\
Synthetic heads made by `python -m data_prep synth`; nobody was scanned.

Contrast, shading and noise are simulated on label maps, whose true volumes stand in
participants.tsv and in each sessions.tsv.  Each scan shows a bright sphere of 12 mm beside the
person's RIGHT temple, as a check of left and right.  People with the same split_group were
deformed from the same anatomy.
"""


def sessions_path(person: SyntheticPerson) -> str:
    return f"sub-{person.label}/sub-{person.label}_sessions.tsv"


def sessions(person: SyntheticPerson, volumes: list[dict[str, float]]) -> bytes:
    """A person's visits: age, true volumes, and the truths that volumes do not hold."""
    return _tsv([{"session_id": f"ses-{visit.session}", "age": visit.age, **measured}
                 for visit, measured in zip(person.visits, volumes, strict=True)])


def dataset_files(out: str, people: list[SyntheticPerson], *, origin: dict[str, str],
                  recipe: dict[str, Any]) -> dict[str, bytes]:
    """Files of the whole data set by path, the commit record last.

    ``origin`` maps a participant's label to the anatomy the person was made from.
    """
    rows = []
    for person in people:
        event = draw_event(recipe["seed"], person)
        first = _rows(read_bytes(join(out, sessions_path(person))))[0]
        rows.append({
            "participant_id": f"sub-{person.label}", "age": first["age"], "sex": person.sex,
            "diagnosis": "patient" if person.patient else "control",
            "small_vessel": "yes" if person.small_vessel else "no",
            "amyloid": "positive" if person.amyloid else "negative", "site": person.site.name,
            "linked": "yes" if person.linked else "no",
            "family_id": person.family or "n/a", "split_group": origin[person.label],
            **{name: value for name, value in first.items() if name not in ("session_id", "age")},
            "event_years": event.years, "event": int(event.happened),
            "log_hazard": event.log_hazard,
            **{name: "n/a" if value is None else value for name, value in vars(
                draw_clinical(recipe["seed"], person)).items()}})
    labels = [{"index": code, "name": f"{name} ({code})"}
              for code, name in sorted(label_names().items())]
    generator = [{"Name": "neurojepa data_prep synth", "Version": str(recipe["version"]),
                  "Description": f"seed {recipe['seed']}, {recipe['participants']} people"}]
    return {
        "README": README.encode(),
        "participants.json": _json(COLUMNS),
        "participants.tsv": _tsv(rows),
        "derivatives/labels/dseg.tsv": _tsv(labels),
        "derivatives/labels/dataset_description.json": _json({
            "Name": "True label maps", "BIDSVersion": BIDS_VERSION, "DatasetType": "derivative",
            "GeneratedBy": generator}),
        COMMIT: _json({"Name": "Synthetic heads", "BIDSVersion": BIDS_VERSION,
                       "DatasetType": "raw", "License": "CC0", "GeneratedBy": generator}),
    }


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _tsv(rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), delimiter="\t", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue().encode()


def _rows(data: bytes) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(data.decode()), delimiter="\t"))
