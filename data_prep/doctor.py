"""doctor: one person or one file of a source, as index and prepare see it, on one screen.

    python -m data_prep doctor cohort sub-01
    python -m data_prep doctor cohort sub-01/anat/sub-01_T1w.nii.gz --cohort bids

The source is read as index reads it, and nothing is written.  What is printed has the cohort's own
ids and paths, as it was asked with them.
"""

from __future__ import annotations

import importlib
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import nibabel as nib
import numpy as np

from data_prep.cohorts.bids.names import MODALITIES, parse_name
from data_prep.cohorts.source import Findings, Found, Source
from data_prep.filenames import image_ending, is_partner, other_file, stem
from data_prep.index import READERS
from data_prep.scan import Scan, ScanError
from data_prep.volumes.reading.decode import decode
from data_prep.volumes.reading.volume import MAX_SERIES_VOXELS, read_scan
from neurojepa.errors import DataError

MEANINGS = {
    "other_form": "another form of the same acquisition is taken; docs/how-to/bids.md",
    "not_downloaded": "a pointer of git-annex or git-lfs stands in its place; fetch its content",
    "cohort_unusable": "ruled out by the cohort's own table or folder",
    "cohort_excluded": "ruled out by the cohort's own quality tables",
    "phantom": "the participant's label stands on the list of phantoms in bids.yaml",
    "missing_member": "the archive does not hold it",
}
_LINES = 16  # of a list; the rest is counted


def doctor(source: str, who: str, *, cohort: str = "bids", tables: Sequence[str] = ()) -> None:
    """Print what was seen of a person or a file, what was chosen, why, and what was not used.

    Parameters
    ----------
    who
        The source's own id of a participant, with or without ``sub-``, or the path or name of a
        file of the source.

    Raises
    ------
    DataError
        The source cannot be read, or holds nobody and no file of that name.
    """
    watched = _Watched(source, tables=tables)
    case = _Case()
    watched.told = re.compile(rf"(?<![A-Za-z0-9]){re.escape(_plain(who))}"
                              r"(?![A-Za-z0-9])", re.IGNORECASE)
    before = Counter(watched.notes)
    for found in importlib.import_module(READERS[cohort]).read_cohort(watched, "doctor"):
        if _is_asked(found, who):
            case.findings.append(found)
            case.notes += watched.notes - before
        before = Counter(watched.notes)
    if not case.findings and not watched.files:
        raise DataError(f"{source}: holds nobody and no file called {who}; give an id as the "
                        "source has it, or a path below the source, and check --cohort")
    case.notes = case.notes or watched.notes
    print("\n".join(_page(case, watched, who)))


@dataclass
class _Case:
    findings: list[Findings] = field(default_factory=list)
    notes: Counter[str] = field(default_factory=Counter)


class _Watched(Source):
    """A source that remembers which files it came across that have to do with the question."""

    told = re.compile("")

    def __init__(self, uri: str, *, tables: Sequence[str]) -> None:
        super().__init__(uri, tables=tables)
        self.files: dict[str, Found] = {}

    def walk(self, under: str = "", starting: str = "") -> Iterator[Found]:
        for found in super().walk(under, starting):
            self._remember(found)
            yield found

    def listing(self, under: str = "") -> tuple[list[Found], list[str]]:
        files, folders = super().listing(under)
        for found in files:
            self._remember(found)
        return files, folders

    def _remember(self, found: Found) -> None:
        if self.told.search(found.path):
            self.files[found.path] = found

    def below(self, uri: str) -> str:
        """A URI as a path below the source, where it lies there."""
        root = next(iter(self.files.values()), None)
        start = root.uri.removesuffix(root.path) if root else f"{self.uri}/"
        return uri.removeprefix(start)


def _is_asked(found: Findings, who: str) -> bool:
    if found.participant.casefold() == _plain(who).casefold():
        return True
    return any(_is_file(scan, who) for scan in found.scans)


def _plain(who: str) -> str:
    return re.sub(r"^sub-", "", who.strip("/"), flags=re.IGNORECASE)


def _is_file(scan: Scan, who: str) -> bool:
    return any(f"/{place.strip('/')}".endswith(f"/{who.strip('/')}")
               for place in (scan.uri, scan.member) if place)


# ---- the page ------------------------------------------------------------------------------------

def _page(case: _Case, source: _Watched, who: str) -> Iterator[str]:
    scans = [scan for found in case.findings for scan in found.scans]
    asked = [scan for scan in scans if _is_file(scan, who)]
    if not scans:
        yield f"{who}: no scan of this name is taken from {source.uri}"
    elif asked:
        yield f"file {who}, of participant {asked[0].participant}"
    else:
        yield from _person(case.findings)
    taken = [scan for scan in asked or scans if not scan.reason]
    yield from _section("taken", [line for scan in taken
                                  for line in _taken(scan, source, closely=bool(asked))])
    yield from _section("not taken", [
        f"{scan.session} {scan.modality} {_place(scan, source)}: {scan.reason} "
        f"({MEANINGS.get(scan.reason, 'ruled out')})" for scan in asked or scans if scan.reason])
    if asked and any(scan.reason == "other_form" for scan in asked):
        yield from _section("taken of the same person", [
            f"{scan.session} {scan.modality} {_place(scan, source)}" for scan in scans
            if not scan.reason and scan.session in {one.session for one in asked}])
    if not asked:
        used = {source.below(uri) for scan in scans for uri in _uses(scan)}
        stems = {stem(path) for path in used}
        opened = {path for path, found in source.files.items()
                  if source.seen.get(found.uri) and path.endswith((".json", ".tsv"))}
        rest = [path for path in source.files if path not in used | opened
                and not (is_partner(path) and stem(path) in stems)]
        yield from _section("seen and read beside them", sorted(opened))
        yield from _section("seen and not used", [f"{path}: {_why(path)}" for path in rest])
    yield from _section("noted by index on the way", [
        f"{count} x {note}" for note, count in sorted(case.notes.items())])


def _section(title: str, lines: list[str]) -> Iterator[str]:
    if not lines:
        return
    yield f"{title}:"
    yield from (f"  {line}" for line in lines[:_LINES])
    if len(lines) > _LINES:
        yield f"  ... and {len(lines) - _LINES} more"


def _person(findings: list[Findings]) -> Iterator[str]:
    scans = [scan for found in findings for scan in found.scans]
    sessions = sorted({scan.session for scan in scans})
    yield f"participant {findings[0].participant}: {len(scans)} scans in {len(sessions)} sessions"
    for session in sessions:
        labels = {name: value for found in findings for at, name, value in found.labels
                  if at == session}
        site = next((scan.site for scan in scans if scan.session == session and scan.site), None)
        told = ", ".join(f"{name} {value}" for name, value in sorted(labels.items()))
        yield f"  session {session}: {told or 'no labels'}; site {site or 'unknown'}"
    ties = sorted({tie for found in findings for tie in found.ties})
    yield f"  ties to others: {', '.join(ties) or 'none'}"


def _why(path: str) -> str:
    """What the name of a file that is not used tells of the reason."""
    name = parse_name(path.rpartition("/")[2])
    if not (image_ending(path) or path.endswith(".nii")):
        return f"{other_file(path.rpartition('/')[2])}, no image"
    if path.startswith(("derivatives/", "sourcedata/")):
        return "derivative; see the notes below"
    if name.suffix not in MODALITIES:
        return f"suffix {name.suffix} is none of {', '.join(MODALITIES)}"
    return "see the notes below"


def _place(scan: Scan, source: _Watched) -> str:
    return source.below(scan.uri) + (f"::{scan.member}" if scan.member else "")


def _uses(scan: Scan) -> list[str]:
    return [uri for uri in (scan.uri, scan.mask_uri, scan.label_uri, scan.transform_uri,
                            scan.confounds_uri, *(scan.surface_uri or "").split(";")) if uri]


def _taken(scan: Scan, source: _Watched, closely: bool) -> Iterator[str]:
    yield f"{scan.session} {scan.modality} {_place(scan, source)}"
    yield f"    {_header(scan, closely)}"
    facts = {"scanner": scan.scanner, "tesla": scan.field_strength, "tracer": scan.tracer,
             "processing": scan.processing, "sidecar": scan.facts}
    if told := ", ".join(f"{name} {value}" for name, value in facts.items() if value):
        yield f"    {told}"
    for uri in _uses(scan)[1:]:
        yield f"    with {source.below(uri)}"


def _header(scan: Scan, closely: bool) -> str:
    """What the file itself says, or why prepare will refuse it; ``closely``: with its voxels."""
    try:
        found = decode(scan.uri, scan.member, MAX_SERIES_VOXELS)
        affine = np.asarray(found.image.affine)
        told = (f"{' x '.join(map(str, found.shape))} voxels of "
                f"{' x '.join(f'{size:.2f}' for size in nib.affines.voxel_sizes(affine))} mm, "
                f"axes {''.join(axis or '?' for axis in nib.aff2axcodes(affine))}, "
                f"{found.image.get_data_dtype()}")
        flags = [*found.flags, *found.notes]
        if closely and len(found.shape) == 3:
            volume = read_scan(scan.uri, scan.member)
            flags = [*volume.flags, *volume.notes]
    except ScanError as error:
        return f"prepare will refuse it, {error.code}: {error}"
    return told + (f"; {', '.join(flags)}" if flags else "")
