"""A BIDS tree to Scans.

BIDS: a folder with dataset_description.json.  Entities may come in any order, sessions are
optional, JSON sidecars are inherited from the levels above, participants.tsv, sessions.tsv,
scans.tsv and phenotype/*.tsv give age, sex, site, labels and exclusions.  The columns
``family_id`` and ``split_group`` of participants.tsv tie people to one split.  Derivatives are
looked for below derivatives/ and sourcedata/ at any depth: see derived.py.

Of several forms of one acquisition one is taken: see forms.py.  What .bidsignore names is left out.
Without dataset_description.json it is a folder of loose files: see loose.py.

A person's files are held at a time, never the tree's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Any

from data_prep.cohorts.bids.derived import (
    Companions,
    Taken,
    choose_runs,
    cleaned_series,
    is_derived,
    take_maps,
)
from data_prep.cohorts.bids.forms import (
    OTHER_FORM,
    form_rank,
    join_pairs,
    rule_out_other_forms,
)
from data_prep.cohorts.bids.loose import read_loose
from data_prep.cohorts.bids.names import (
    ANATOMICAL,
    DESCRIPTION,
    MODALITIES,
    VOLUMES,
    Image,
    Name,
    habits,
    is_phantom,
    parse_name,
)
from data_prep.cohorts.bids.scan import Reader
from data_prep.cohorts.bids.tables import PersonTables
from data_prep.cohorts.bids.visits import TABLES, Visits
from data_prep.cohorts.source import Findings, Found, Source
from data_prep.filenames import other_file

_DERIVATIVE_DEPTH = 5  # folders between the dataset and a derivative's sub-*
Sidecars = dict[tuple[str, str], list[Image]]  # by folder and suffix


def read_cohort(source: Source, cohort: str) -> Iterator[Findings]:
    """People of a BIDS tree or a folder of loose files, local or on an object store.

    Raises
    ------
    DataError
        The source is missing or empty, or one of its tables is damaged.
    """
    files, folders = source.listing()
    if any(found.name == DESCRIPTION for found in files):
        source.left_out.obey_bidsignore(source.uri)
        yield from _Dataset(source, cohort, files, folders).people()
    else:
        yield from read_loose(source, cohort)


class _Dataset(Reader):
    """One reading of a BIDS tree."""

    def __init__(self, source: Source, cohort: str, files: list[Found],
                 folders: list[str]) -> None:
        super().__init__(source, cohort)
        top = {found.name.lower(): found for found in files}
        phenotypes = source.listing("phenotype")[0] if "phenotype" in folders else []
        people = top.get("participants.tsv") or top.get("participants.csv")
        self.tables = PersonTables(
            source, people=[people.uri] if people else [], given=source.tables, measured=[
                *(found.uri for found in phenotypes if found.name.endswith(".tsv")),
                *source.tables])
        self.visits = Visits(source, top)
        self.sidecars = {"": _sidecars(files)}  # of the tops of the dataset and its derivatives
        self.derivatives: dict[str, list[str]] = defaultdict(list)  # folders of each person
        for folder in ("derivatives", "sourcedata"):
            if folder in folders:
                self._find_derivatives(folder, _DERIVATIVE_DEPTH)
        self._loaded: dict[str, dict[str, Any]] = {}  # the tops' sidecars

    def _find_derivatives(self, folder: str, depth: int) -> None:
        files, folders = self.source.listing(folder)
        if any(name.startswith("sub-") for name in folders):
            self.sidecars[folder] = _sidecars(files)
        for name in folders:
            if name.startswith("sub-"):
                self.derivatives[name.split("_")[0].removeprefix("sub-")].append(f"{folder}/{name}")
            elif not name.startswith("fsaverage"):
                if depth:
                    self._find_derivatives(f"{folder}/{name}", depth - 1)
                else:
                    self.notes["folder of derivatives not entered: too deep"] += 1

    def people(self) -> Iterator[Findings]:
        files = self.source.walk(starting="sub-")
        for folder, own in groupby(files, key=lambda found: found.path.partition("/")[0]):
            label = folder.removeprefix("sub-")
            if findings := self._person(label, list(own)):
                yield findings
        if self.derivatives:
            self.notes["people with derivatives but no raw folder"] = len(self.derivatives)
        self.tables.finish()

    def _person(self, label: str, files: list[Found]) -> Findings | None:
        derived = [found for folder in self.derivatives.pop(label, [])
                   for found in self.source.walk(folder)]
        sidecars = [found for found in (*files, *derived) if found.name.endswith(".json")]
        tables = [found for found in files if found.name.endswith(TABLES)]
        self.source.fetch([*sidecars, *tables])
        inherited = _sidecars(sidecars)
        raw, processed, others = self._sort(label, join_pairs(files, self.notes), derived)
        own: dict[str, dict[str, Any]] = {}  # of the sidecars that were read
        taken = self._take(raw, processed, inherited, own)
        self.visits.rule_out(taken, files)
        rule_out_other_forms(taken, self.notes)
        runs = choose_runs([one for one in taken if one.modality == "BOLD"], self.notes)
        taken = [*(one for one in taken if one.modality != "BOLD"), *runs,
                 *take_maps(processed, runs)]
        used = {id(one.image) for one in taken}
        Companions([one for one in taken if one.reason != OTHER_FORM], self.notes).give(
            [image for image in processed if id(image) not in used
             and not cleaned_series(image) and not self._is_gone(image)], others)
        self._count_unused(files, taken, {*own, *(found.uri for found in tables)})
        if not taken:
            return None
        if is_phantom(label):
            for one in taken:
                one.reason = "phantom"
        return self.findings(self.tables.person(label, self.visits.sessions(
            files, {one.session for one in taken})), label, taken)

    # ---- files

    def _sort(self, label: str, files: list[Found], derived: list[Found]
              ) -> tuple[list[Image], list[Image], list[Image]]:
        """Raw images, processed images, and the surfaces and tables that go with them."""
        raw: list[Image] = []
        processed: list[Image] = []
        others: list[Image] = []
        for place, found in [("raw", one) for one in files] + [("derived", one) for one in derived]:
            if found.name == "aseg.mgz" and found.folder.endswith("/mri"):
                processed.append(Image(found, _freesurfer_name(found)))
                continue
            name = parse_name(found.name)
            if name.extension.endswith((".gii", "tsv")):
                others.append(Image(found, name))
            elif name.extension == "json":
                continue
            elif name.extension not in VOLUMES and not name.extension.endswith(".nii"):
                self.notes[f"not taken: {other_file(found.name)}"] += 1
            elif "sub" not in name.entities and place == "derived":
                self.notes["derivative not used: a file of FreeSurfer or without a name of BIDS"
                           ] += 1
            elif name.entities.get("sub") != label:
                self.notes["not taken: file name and folder name different people"] += 1
            else:
                (processed if place == "derived" or is_derived(name) else raw).append(
                    Image(found, name))
        return raw, processed, others

    def _count_unused(self, files: list[Found], taken: list[Taken], used: set[str]) -> None:
        """Count the person's own sidecars, tables and surfaces that no scan needed."""
        for one in taken:
            used |= {one.confounds_uri or "", *(one.surface_uri or "").split(";")}
        for found in files:
            if found.name.endswith((".json", "tsv", ".gii")) and found.uri not in used:
                self.notes[f"not used: {other_file(found.name)}"] += 1

    def _is_gone(self, image: Image) -> bool:
        gone = self.source.not_downloaded(image.found)
        if gone:
            self.notes["derivative not used: not downloaded"] += 1
        return gone

    def _take(self, raw: list[Image], processed: list[Image], inherited: Sidecars,
              own: dict[str, dict[str, Any]]) -> list[Taken]:
        taken = [self.take(image, self._facts(image, inherited, own))
                 for image in self._first_echoes(raw)]
        have = {one.modality for one in taken}
        for image in processed:
            name = image.name
            program = cleaned_series(image)
            if (not program and name.suffix in ANATOMICAL and name.suffix not in have
                    and name.entities.get("desc") == "preproc" and "space" not in name.entities):
                program = habits()["cleaned"]["preproc"]
            if program:
                taken.append(self.take(image, self._facts(image, inherited, own), program))
        return taken

    def _first_echoes(self, raw: list[Image]) -> Iterator[Image]:
        """Raw images of a kind that is taken; of several echoes the first."""
        echoes: dict[tuple[str, frozenset[tuple[str, str]]], list[Image]] = defaultdict(list)
        for image in raw:
            if image.name.suffix not in MODALITIES:
                self.notes[f"not taken: suffix {image.name.suffix}"] += 1
            elif image.name.entities.get("part", "mag") != "mag":
                self.notes["not taken: phase, real or imaginary part"] += 1
            else:
                echoes[image.name.suffix, image.name.without("echo")].append(image)
        for images in echoes.values():
            images.sort(key=lambda image: (image.name.entities.get("echo", "").zfill(4),
                                           form_rank(image.found)))
            if "echo" in images[-1].name.entities and len(images) > 1:
                self.notes["not taken: further echo of a scan"] += len(images) - 1
                images = images[:1]
            yield from images

    def _facts(self, image: Image, inherited: Sidecars, own: dict[str, dict[str, Any]]
               ) -> dict[str, Any]:
        """Facts of the sidecars that apply: merged from the dataset's top down, nearer ones win."""
        merged: dict[str, Any] = {}
        folder, name = image.found.folder, image.name
        top = max((top for top in self.sidecars if not top or folder.startswith(top + "/")),
                  key=len)
        levels = [top]
        for part in folder[len(top):].strip("/").split("/"):
            levels.append(f"{levels[-1]}/{part}" if levels[-1] else part)
        for level in levels:
            known, loaded = (self.sidecars[top], self._loaded) if level == top else (inherited, own)
            fitting = [sidecar for sidecar in known.get((level, name.suffix), ())
                       if sidecar.name.entities.items() <= name.entities.items()]
            if len(fitting) > 1:
                self.notes["several sidecars of one level apply, against BIDS: the one with most "
                           "entities wins"] += 1
                fitting.sort(key=lambda sidecar: len(sidecar.name.entities))
            for sidecar in fitting:
                uri = sidecar.found.uri
                if uri not in loaded:
                    loaded[uri] = self.load(sidecar.found)
                merged.update(loaded[uri])
        return merged


def _sidecars(files: Iterable[Found]) -> Sidecars:
    sidecars: Sidecars = defaultdict(list)
    for found in files:
        if found.name.endswith(".json"):
            name = parse_name(found.name)
            sidecars[found.folder, name.suffix].append(Image(found, name))
    return sidecars


def _freesurfer_name(found: Found) -> Name:
    """The name of SUBJECT/mri/aseg.mgz, where SUBJECT is sub-X or sub-X_ses-Y."""
    subject = found.folder.split("/")[-2]
    return Name({**parse_name(subject + "_dseg").entities, "desc": "freesurfer"}, "dseg", "mgz")
