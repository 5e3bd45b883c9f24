"""One file of a BIDS tree, or a loose one, to a Scan."""

from __future__ import annotations

import hashlib
import json
from itertools import groupby
from typing import Any

from data_prep.cohorts.bids.derived import Taken
from data_prep.cohorts.bids.names import MODALITIES, Image, habits
from data_prep.cohorts.bids.tables import Person
from data_prep.cohorts.sidecars import TEXTS, Loaded, load_json, plain_facts
from data_prep.cohorts.source import Findings, Found, Source
from data_prep.scan import FACTS, Scan
from data_prep.tables import as_float

_KEPT = {*FACTS, "MagneticFieldStrength", "Manufacturer", "ManufacturersModelName",
         "DeviceSerialNumber", "InstitutionName", "TracerName",
         "AcquisitionTime", "SeriesNumber", "ImageType"}  # the last: forms of one acquisition


class Reader:
    """One file to a scan."""

    def __init__(self, source: Source, cohort: str) -> None:
        self.source, self.cohort = source, cohort
        self.notes = source.notes

    def load(self, sidecar: Found) -> dict[str, Any]:
        """The facts of a sidecar that are kept; none, with a note, where it cannot be read."""
        facts, mended = self.source.opened(sidecar, self._parse)
        if facts is None:
            self.notes["JSON sidecar unreadable, its facts are unknown"] += 1
        self.notes.update(f"JSON sidecar: {note}" for note in mended)
        return facts or {}

    def _parse(self, found: Found) -> Loaded:
        if found.size_bytes is None:
            return None, []
        content, mended = load_json(self.source.read(found))
        if content is None:
            return None, []
        spelt = {key.lower(): key for key in content}
        content = {key: content[spelt[key.lower()]] for key in (*_KEPT, "SeriesInstanceUID")
                   if key.lower() in spelt} | {key: value for key, value in content.items()
                                               if key in _KEPT}
        if others := [key for key in content if key not in spelt.values()]:
            mended.append(f"{', '.join(sorted(others))} in other capitals: taken")
        facts, odd = plain_facts({key: value for key, value in content.items() if key in _KEPT})
        if series := content.get("SeriesInstanceUID"):  # an identifier: kept as its hash
            facts["SeriesInstanceUID"] = hashlib.sha256(str(series).encode()).hexdigest()[:16]
        return facts, mended + [
            f"{key} is no {'text' if key in TEXTS else 'number'}: unknown" for key in odd]

    def take(self, image: Image, facts: dict[str, Any], processing: str | None = None) -> Taken:
        """What a scan is, by its name and the facts of its sidecars."""
        entities = image.name.entities
        for unknown in entities.keys() - set(habits()["entities"]):
            self.notes[f"taken, with an entity that BIDS does not know: {unknown}"] += 1
        modality = MODALITIES[image.name.suffix]
        if image.name.suffix == "UNIT1":
            facts = {**facts, "ImageType": ["UNI"]}
        if "ce" in entities and "ContrastBolusIngredient" not in facts:
            agent = "GADOLINIUM" if entities["ce"].lower().startswith("gad") else entities["ce"]
            facts = {**facts, "ContrastBolusIngredient": agent}
        return Taken(
            image, modality, facts, processing=processing,
            reason="not_downloaded" if self.source.not_downloaded(image.found) else None,
            tracer=_tracer(entities.get("trc"), facts.get("TracerName"))
            if modality == "PET" else None)

    def findings(self, person: Person, participant: str, taken: list[Taken]) -> Findings:
        """A person's scans with age, sex and site, and labels and ties."""
        findings = Findings(participant, ties=person.ties())
        for session, own in groupby(sorted(taken, key=lambda one: one.session),
                                    key=lambda one: one.session):
            told = person.describe(session)
            findings.scans += [self.scan(one, participant, age=told.age, sex=told.sex,
                                         site=told.site) for one in own]
            findings.labels += [(session, name, value) for name, value in told.labels.items()]
        person.count_unused()
        return findings

    def scan(self, taken: Taken, participant: str, *, age: float | None = None,
             sex: str | None = None, site: str | None = None) -> Scan:
        """The finished Scan, with what the tables tell of its person."""
        facts, found = taken.facts, taken.image.found
        scanner = " ".join(str(facts[part]) for part in ("Manufacturer", "ManufacturersModelName")
                           if facts.get(part))
        kept = {key: facts[key] for key in FACTS if key in facts}
        site = site or (str(facts["InstitutionName"]) if facts.get("InstitutionName") else None)
        return Scan(
            uri=found.uri, cohort=self.cohort, participant=participant, family="", split="",
            session=taken.session, modality=taken.modality, reason=taken.reason, age_at_scan=age,
            sex=sex, site=site, scanner=scanner or None, tracer=taken.tracer,
            field_strength=as_float(facts.get("MagneticFieldStrength")),
            processing=taken.processing, mask_uri=taken.mask_uri, label_uri=taken.label_uri,
            confounds_uri=taken.confounds_uri, surface_uri=taken.surface_uri,
            facts=json.dumps(kept) if kept else None, size_bytes=found.size_bytes,
            modified=found.modified)


def _tracer(*spellings: object) -> str | None:
    """The first spelling that is known, as PET_TRACERS has it; else the first, as it is."""
    from data_prep.volumes.functional.pet_table import tracer_name

    given = [str(spelling) for spelling in spellings if spelling]
    return next((name for one in given if (name := tracer_name(one))), given[0] if given else None)
