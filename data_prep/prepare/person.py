"""The work on one person, as a Ray worker does it: prepare, write the voxels, commit the record.

Everything here may run twice, also at the same time (a worker taken for dead that is not): equal
inputs write equal bytes, and the record comes last.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import metadata
from typing import TYPE_CHECKING, Any

from data_prep.archive import slot, write_volume
from data_prep.flags import joined
from data_prep.prepare.child import Child, Death
from data_prep.prepare.duplicates import fingerprint
from data_prep.rows import Outcome, duplicate_of, judged_by, rejected_outcome
from data_prep.scan import Scan, ScanError, split_member
from neurojepa.errors import DataError
from neurojepa.storage import join, open_store, remove, write_bytes

if TYPE_CHECKING:
    from data_prep.volumes.pipeline import Prepared, Rejected
    from data_prep.volumes.preset import Preset

PrepareOne = Callable[[list[Scan], "Preset"], "Sequence[Prepared | Rejected]"]
DIED = ("worker_crashed", "worker_timeout", "worker_memory", "worker_failed")
_INPUTS = ("uri", "member", "size_bytes", "modified", "mask_uri", "label_uri", "modality",
           "session", "tracer", "processing", "transform_uri", "confounds_uri", "surface_uri",
           "facts")
_HASHED_AT_ONCE = 8 << 20  # bytes
_MEMBERS_LIMIT = 4 << 30  # bytes of an archive's members that are read again for their hash


@dataclass(frozen=True)
class Limits:
    """What the work on a person may take before it is ended."""

    memory_bytes: int = 8 << 30  # resident, of the process and the tools it starts
    seconds_per_scan: float = 1800.0


@dataclass(frozen=True, kw_only=True)
class PersonTask:
    """What a worker needs to know about one person."""

    out: str
    scans: list[Scan]
    record: str
    stale: list[str]  # records of other inputs or parameters, whose voxels will be replaced
    preset: Preset
    limits: Limits
    prepare_one: PrepareOne | None


def record_name(scans: list[Scan], preset: Preset) -> str:
    """Name of the record of a person's scans: equal inputs and parameters, equal name."""
    inputs = [[getattr(scan, name) for name in _INPUTS] for scan in scans]
    text = json.dumps([scans[0].cohort, inputs, asdict(preset)], sort_keys=True)
    return f"{scans[0].participant}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"


# ---- in the Ray worker ---------------------------------------------------------------------------

def run_person_task(task: PersonTask) -> int:
    """Prepare one person in a watched child; returns the number of scans that had to be given up.

    Raises
    ------
    DataError
        A store cannot be read or written, or a module is missing.
    """
    scans = task.scans
    end = _watched(task, len(scans), _prepare_and_write, task, scans, [])
    if not isinstance(end, Death):
        return 0
    given_up = [(scan, death) for scan in scans if len(scans) > 1
                and isinstance(death := _watched(task, 1, _try, task, scan), Death)]
    names = {id(scan) for scan, _ in given_up}
    if left := [scan for scan in scans if id(scan) not in names] if names else []:
        end = _watched(task, len(left), _prepare_and_write, task, left,
                       [_death(task, *each) for each in given_up])
        if not isinstance(end, Death):
            return len(given_up)
    # alone each would do, together they do not; or there is only one
    given_up += [(scan, end) for scan in scans if id(scan) not in names]
    _commit_record(task, [_death(task, *each) for each in given_up])
    return len(given_up)


@cache
def _child() -> Child:
    return Child()


def _watched(task: PersonTask, num_scans: int, function: Callable[..., Any],
             *arguments: Any) -> Any:
    """A call within the limits; a crash may come from outside, so it must happen twice."""
    for _ in range(2):
        end = _child().call(function, *arguments, memory_bytes=task.limits.memory_bytes,
                            seconds=num_scans * task.limits.seconds_per_scan)
        if not (isinstance(end, Death) and end.reason == "worker_crashed"):
            break
    return end


def _death(task: PersonTask, scan: Scan, death: Death) -> Outcome:
    return rejected_outcome(scan, reason=death.reason, message=nameless(death.message, task.scans),
                            provenance=_provenance(task.preset, None))


def _commit_record(task: PersonTask, outcomes: list[Outcome]) -> None:
    _remove_stale(task)
    write_bytes(join(task.out, "results", task.record),
                json.dumps(outcomes, allow_nan=False).encode())


def _remove_stale(task: PersonTask) -> None:
    for name in task.stale:
        remove(join(task.out, "results", name))


# ---- in the child --------------------------------------------------------------------------------

def _try(task: PersonTask, scan: Scan) -> None:
    """Whether a scan can be prepared at all; what comes out is not kept."""
    _prepared(task, [scan])


def _prepared(task: PersonTask, scans: list[Scan]) -> Sequence[Prepared | Rejected]:
    from data_prep.volumes import pipeline

    try:
        results = (task.prepare_one or pipeline.prepare_person)(scans, task.preset)
    except ScanError:
        raise  # of one scan, and a fault of the preparation
    except DataError as error:
        raise DataError(nameless(str(error), scans)) from None
    given = {(result.scan.uri, result.scan.member) for result in results}
    for scan in scans:
        if (scan.uri, scan.member) not in given:
            raise RuntimeError(f"{scan.uri}: the preparation gave no result")
    return results


def _prepare_and_write(task: PersonTask, scans: list[Scan], given_up: list[Outcome]) -> None:
    """Prepare scans of a person, write the voxels, then the record, with those given up before."""
    from data_prep.volumes.pipeline import Prepared
    from data_prep.volumes.preview import preview_of

    results = _prepared(task, scans)
    _remove_stale(task)
    provenance = {(scan.uri, scan.member): _provenance(task.preset, input_sha256(scan))
                  for scan in scans}
    outcomes, seen = list(given_up), set[str]()
    for result in results:
        scan = result.scan
        made_by = provenance[scan.uri, scan.member]
        if isinstance(result, Prepared):
            outcomes.append(_write(task, result, made_by, seen))
            continue
        outcomes.append(rejected_outcome(scan, reason=result.reason,
                                         message=nameless(result.message, task.scans),
                                         provenance=made_by, flags=result.flags))
        if not scan.reason and (picture := preview_of(scan)):
            outcomes[-1]["figures"]["preview"] = picture
    _commit_record(task, outcomes)


def _write(task: PersonTask, result: Prepared, provenance: str, seen: set[str]) -> Outcome:
    """Write the voxels of a scan, unless they are among those ``seen`` of this person."""
    scan = result.scan
    place = slot(scan.participant, result.scan_id)
    judged = judged_by(result.flags)
    outcome: Outcome = {
        "uri": scan.uri, "member": scan.member, "modality": scan.modality,
        "figures": {name: _plain(value) for name, value in result.figures.items()},
        "provenance": provenance, "scan_id": result.scan_id,
        "status": judged["status"], "reason": judged["reason"], "flags": judged["flags"],
        "notes": joined(result.notes), "message": None}
    if result.scan_id in seen:
        return {**outcome, **duplicate_of(place, same_person=True)}
    seen.add(result.scan_id)
    outcome["figures"]["fingerprint"] = fingerprint(result.image, result.mask)
    outcome["voxels_sha256"] = write_volume(task.out, place, image=result.image, mask=result.mask,
                                            label=result.label, parcels=result.parcels)
    return outcome


def _provenance(preset: Preset, digest: str | None) -> str:
    """How a volume came to be, as JSON; ``digest`` is that of its input."""
    return json.dumps({"software": f"neurojepa {_version()}", "parameters": asdict(preset),
                       "input_sha256": digest}, sort_keys=True)


def _plain(value: Any) -> float | str | None:
    """A figure as JSON can hold it: not finite is unknown."""
    if value is None or isinstance(value, str):
        return value
    return float(value) if math.isfinite(value) else None


@cache
def _version() -> str:
    try:
        return metadata.version("neurojepa")
    except metadata.PackageNotFoundError:
        return "from an uninstalled source tree"


def input_sha256(scan: Scan) -> str | None:
    """Hash of the bytes that a scan was read from: a file, members of an archive, or a folder.

    A folder of DICOM files counts as the hashes of its files by name.  None where it cannot be
    read: the scan itself is rejected for that, with the reason.
    """
    from data_prep.members import read_members

    try:
        if scan.member:
            prefix = scan.member if scan.member.endswith("/") else None
            digests = {name: hashlib.sha256(data).hexdigest() for name, data in read_members(
                scan.uri, lambda name: name.startswith(prefix) if prefix else name == scan.member,
                _MEMBERS_LIMIT)}
        else:
            fs, path = open_store(scan.uri)
            files = fs.find(path) if scan.uri.endswith("/") else [path]
            digests = {file: _file_sha256(fs, file) for file in files}
    except (DataError, OSError):
        return None
    if len(digests) == 1:
        return next(iter(digests.values()))
    return hashlib.sha256("".join(digests[name] for name in sorted(digests)).encode()).hexdigest()


def _file_sha256(fs: Any, path: str) -> str:
    digest = hashlib.sha256()
    with fs.open(path, "rb") as file:
        while block := file.read(_HASHED_AT_ONCE):
            digest.update(block)
    return digest.hexdigest()


def nameless(text: str, scans: Sequence[Scan]) -> str:
    """A message without the names of the scans' files, which hold the cohort's own ids."""
    for scan in scans:
        uris = (scan.uri, scan.member, scan.mask_uri, scan.label_uri, scan.transform_uri,
                scan.confounds_uri, *(scan.surface_uri or "").split(";"))
        names = {name for uri in uris if uri for name in _spellings(uri)}
        for name in sorted(names, key=lambda name: (-len(name), name)):
            text = text.replace(name, f"[{scan.participant} {scan.modality}]")
    return text


def _spellings(uri: str) -> set[str]:
    """A file's name as messages may have it: whole, without scheme, its folder, its last part."""
    names = {uri}
    for part in split_member(uri):
        if part:
            path = part.partition("://")[2] or part
            folder, _, last = path.rstrip("/").rpartition("/")
            names |= {part, path, path.rstrip("/"), last} | ({folder} if "/" in folder else set())
    return names
