"""What the derivatives of a person give to the scans: cleaned series, label maps, masks, motion.

A derivative belongs to a scan when it lies in that scan's own space and names no entity that the
scan has otherwise.  One that fits several scans is not used.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import Any

from data_prep.cohorts.bids.names import ANATOMICAL, DERIVED, SERIES, VOLUMES, Image, Name, habits

_RUN = ("space", "desc", "res", "den", "stat", "echo", "part")  # not part of a run's identity
_OWN_SPACE = ("", "orig", "boldref", "func")
_SURFACE = "surf.gii"
UNUSABLE = "cohort_unusable"
MAPS = {"alff": "ALFF", "falff": "fALFF", "tsnr": "tSNR"}  # dscalar files of a run


@dataclass
class Taken:
    """A scan in the making."""

    image: Image
    modality: str
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None
    processing: str | None = None
    tracer: str | None = None
    mask_uri: str | None = None
    label_uri: str | None = None
    confounds_uri: str | None = None
    surface_uri: str | None = None

    @property
    def session(self) -> str:
        return self.image.name.entities.get("ses", "1")

    @property
    def is_cifti(self) -> bool:
        return self.image.name.extension not in VOLUMES


def is_derived(name: Name) -> bool:
    """Whether a name tells of processing, wherever the file lies."""
    return bool(name.entities.keys() & DERIVED) or name.extension not in VOLUMES


def cleaned_series(image: Image) -> str | None:
    """Processing of a cleaned BOLD series in a space that is taken ("fmriprep:T1w"), else None."""
    name, made = image.name, habits()["cleaned"]
    space, desc = name.entities.get("space", ""), name.entities.get("desc", "")
    if name.extension == SERIES:  # fMRIPrep gives its CIFTI series no desc
        program = made.get(desc or "preproc") if space in ("fsLR", "") else None
    else:
        program = made.get(desc) if space in habits()["spaces"] else None
    if name.suffix != "bold" or not program or name.extension not in (*VOLUMES, SERIES):
        return None
    return f"{program}:{space}" if space else program


def choose_runs(series: list[Taken], notes: Counter[str]) -> list[Taken]:
    """One series of each run: a cleaned one if there is, a volume rather than a CIFTI file."""
    runs: dict[frozenset[tuple[str, str]], list[Taken]] = defaultdict(list)
    for taken in series:
        runs[taken.image.name.without(*_RUN)].append(taken)
    chosen = []
    for run in runs.values():
        best, *others = sorted(run, key=_rank)
        for other in others:
            notes["raw BOLD series not taken: a cleaned one is" if other.processing is None else
                  "derivative not used: the BOLD series in another space or form is"] += 1
            if other.processing is None:
                best.facts = {**other.facts, **best.facts}
                if other.reason == UNUSABLE:  # cleaning does not mend what the cohort rules out
                    best.reason = UNUSABLE
        chosen.append(best)
    return chosen


def _rank(taken: Taken) -> tuple[bool, bool, bool, int, int, str]:
    name = taken.image.name
    cleaned, spaces = list(habits()["cleaned"].values()), habits()["spaces"]
    space = name.entities.get("space", "")
    return (taken.reason is not None, taken.processing is None, taken.is_cifti,
            cleaned.index(taken.processing.partition(":")[0]) if taken.processing else 0,
            spaces.index(space) if space in spaces else 0, taken.image.found.path)


def take_maps(images: list[Image], series: list[Taken]) -> list[Taken]:
    """CIFTI maps of runs of which no series is there (else they are computed from it)."""
    have = {taken.image.name.without(*_RUN) for taken in series}
    return [Taken(image, modality, processing="xcp_d:fsLR") for image in images
            if image.name.extension == "dscalar.nii"
            and (modality := MAPS.get(image.name.entities.get("stat", image.name.suffix)))
            and image.name.without(*_RUN) not in have]


class Companions:
    """Gives what the derivatives hold to the scans taken of one person."""

    def __init__(self, taken: list[Taken], notes: Counter[str]) -> None:
        self.taken, self.notes = taken, notes

    def give(self, images: list[Image], others: list[Image]) -> None:
        """Hand out ``images`` (volumes) and ``others`` (surfaces and tables)."""
        for image in sorted(images, key=_label_rank):
            self._give_image(image)
        for image in others:
            if image.name.suffix in ("timeseries", "regressors", "motion"):
                self._give_motion(image)
        self._give_surfaces([image for image in others if image.name.extension == _SURFACE])

    def _give_image(self, image: Image) -> None:
        name = image.name
        kind = {"dseg": "label_uri", "mask": "mask_uri"}.get(name.suffix)
        if name.extension not in VOLUMES:
            self._unused(f"CIFTI {name.extension.removesuffix('.nii')}")
        elif not kind or (kind == "mask_uri" and name.entities.get("desc") != "brain"):
            self._unused(name.suffix)
        elif "task" in name.entities:
            self._attach(image, kind, [taken for taken in self._of_run(name) if not taken.is_cifti
                                       and _space(taken.image.name) == _space(name)])
        else:
            space = name.entities.get("space", "orig")
            modality = "T1w" if space == "orig" else space  # BIDS: no space, that of the T1w
            if modality not in ANATOMICAL:
                self._unused(f"in the space {space}, not in a scan's")
                return
            own = name.without(*DERIVED)
            self._attach(image, kind, [taken for taken in self.taken if taken.modality == modality
                                       and own <= taken.image.name.entities.items()])

    def _attach(self, image: Image, kind: str, fitting: list[Taken]) -> None:
        if len(fitting) != 1:
            self._unused(f"fits {'several scans' if fitting else 'no scan'}")
        elif getattr(fitting[0], kind):
            self._unused(f"the scan has another {image.name.suffix}")
        else:
            setattr(fitting[0], kind, image.found.uri)

    def _of_run(self, name: Name) -> list[Taken]:
        run = name.without(*_RUN)
        return [taken for taken in self.taken
                if taken.modality == "BOLD" and taken.image.name.without(*_RUN) == run]

    def _give_motion(self, image: Image) -> None:
        for taken in self._of_run(image.name):
            if not taken.confounds_uri or image.name.entities.get("desc") == "confounds":
                taken.confounds_uri = image.found.uri

    def _give_surfaces(self, surfaces: list[Image]) -> None:
        """Midthickness of both hemispheres, on the mesh that CIFTI files have."""
        pairs: dict[frozenset[tuple[str, str]], dict[str, str]] = defaultdict(dict)
        for image in surfaces:
            entities = image.name.entities
            if (image.name.suffix == "midthickness" and entities.get("space") == "fsLR"
                    and entities.get("den", "32k") == "32k"):
                pairs[image.name.without("hemi")][entities.get("hemi", "")] = image.found.uri
        for names, pair in pairs.items():
            own = {(key, value) for key, value in names if key not in DERIVED}
            for taken in self.taken:
                if (taken.is_cifti and pair.keys() == {"L", "R"} and not taken.surface_uri
                        and own <= taken.image.name.entities.items()):
                    taken.surface_uri = f"{pair['L']};{pair['R']}"

    def _unused(self, why: str) -> None:
        self.notes[f"derivative not used: {why}"] += 1


def _space(name: Name) -> str:
    space = name.entities.get("space", "")
    return "" if space in _OWN_SPACE else space


def _label_rank(image: Image) -> tuple[int, str]:
    order, entities = habits()["labels"], image.name.entities
    desc = entities.get("desc", entities.get("seg", ""))
    return order.index(desc) if desc in order else len(order), image.found.path
