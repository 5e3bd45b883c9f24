"""report: an archive on one HTML page that needs no network and can be printed.

Counts by cohort, modality, site, status and reason; sizes of the splits; which modalities people
have; distributions of the figures with their thresholds; slices of accepted, flagged and rejected
scans; duplicates and near-duplicates.  Scans go by the start of their content id: no names, no
dates, no paths.  Pictures are read one by one, and no more than ``SHOWN`` of a kind.
"""

from __future__ import annotations

import base64
import html
from collections import Counter, defaultdict

import numpy as np

from data_prep.archive import Archive, check_reachable, open_archive, read_volume, slot
from data_prep.prepare.duplicates import NearPair
from data_prep.qc.judge import FigureInfo, rules
from data_prep.report.counts import (
    PROCESSING,
    codes,
    contents,
    coverage,
    plain,
    processing,
    reasons,
    splits,
)
from data_prep.report.figures import COLOURS, Line, distribution, slices
from data_prep.rows import ArchiveRow, Status, archive_rows
from neurojepa.report import (
    Tone,
    grid,
    heading,
    page,
    paragraph,
    picture,
    section,
    stack,
    table,
    tiles,
)
from neurojepa.storage import write_bytes

_COLUMNS = ("cohort", "participant", "family", "modality", "site", "split", "sex", "age_at_scan",
            "status", "reason", "flags", "notes", "scan_id", "preview", *PROCESSING)
TONES: dict[Status, Tone] = {Status.ACCEPTED: "good", Status.FLAGGED: "doubtful",
                             Status.REJECTED: "bad"}
SHOWN = 12  # pictures of a kind
PAIRS_SHOWN = 6
LINES = 8  # cohorts and modalities in one distribution
_SIDES = ("The person's right is on the viewer's right (R) as far as the scan's header tells it; "
          "anterior is on the right of the first slice. The outline is the brain mask, dark blue "
          "was not scanned.")


def report(archive_uri: str, out: str) -> None:
    """Write the page of an archive.

    Raises
    ------
    DataError
        The archive is unfinished or damaged, or ``out`` cannot be written.
    """
    check_reachable(archive_uri)
    check_reachable(out)
    archive = open_archive(archive_uri)
    rows = _rows(archive)
    counts = Counter(row["status"] for row in rows)
    people = len({row["participant"] for row in rows})
    pairs = [NearPair(**row) for row in archive.review.to_pylist()]
    lead = (f"{len(rows):,} scans of {people:,} people: "
            + ", ".join(f"{counts[status]:,} {status}" for status in Status))
    write_bytes(out, page("Archive quality", lead, [
        tiles([(f"{people:,}", "people", ""), (f"{len(rows):,}", "scans", ""),
               *((f"{counts[status]:,}", str(status), TONES[status]) for status in Status),
               (f"{len(pairs):,}", "near-duplicate pairs", "")]),
        contents(rows), reasons(rows), splits(rows), coverage(rows), processing(rows),
        _figures(rows),
        *(_mosaic(archive_uri, rows, status) for status in (Status.ACCEPTED, Status.FLAGGED)),
        _rejected(rows), _duplicates(archive_uri, rows, pairs)]).encode())
    print(f"{out}: {lead}")


def _rows(archive: Archive) -> list[ArchiveRow]:
    """The columns that the page needs, and none that names a source."""
    figures = [name + end for name in rules().figures for end in ("", "_reason")]
    return list(archive_rows(archive.scans.select([
        name for name in (*_COLUMNS, *figures) if name in archive.scans.column_names])))


# ---- figures and pictures ------------------------------------------------------------------------

def _figures(rows: list[ArchiveRow]) -> str:
    usable = [row for row in rows if row["status"] != Status.REJECTED]
    drawn = [figure for name, info in rules().figures.items()
             if (figure := _distribution(usable, name, info))]
    return section(
        "Figures of quality", paragraph(
            "One mark is one scan: blue dots are accepted, orange diamonds flagged, for whatever "
            "reason. The box spans the quartiles, the dark line is the median. Upright red lines "
            "are thresholds: broken for a flag, full for rejection."),
        grid(drawn), _unmeasured(usable))


def _distribution(rows: list[ArchiveRow], name: str, info: FigureInfo) -> str:
    groups: defaultdict[tuple[str, str], list[ArchiveRow]] = defaultdict(list)
    for row in rows:
        if row["figures"].get(name) is not None:
            groups[row["cohort"], row["modality"]].append(row)
    largest = sorted(groups, key=lambda group: (-len(groups[group]), group))[:LINES]
    lines = []
    for cohort, modality in sorted(largest):
        limit = rules().thresholds.get(modality, {}).get(name)
        group = groups[cohort, modality]
        pairs = ((limit.flag_below, limit.flag_above), (limit.reject_below, limit.reject_above)
                 ) if limit else ((), ())
        flag_at, reject_at = (tuple(at for at in pair if at is not None) for pair in pairs)
        lines.append(Line(f"{cohort} · {modality}",
                          np.array([row["figures"][name] for row in group], np.float64),
                          np.array([row["status"] == Status.FLAGGED for row in group]),
                          flag_at, reject_at))
    return distribution(info.label, info.unit, lines) if lines else ""


def _unmeasured(rows: list[ArchiveRow]) -> str:
    """How many scans lack which figures, by the reason they give."""
    missing: defaultdict[tuple[str, str], list[str]] = defaultdict(list)
    for row in rows:
        for name in rules().figures:
            if reason := row["figures"].get(f"{name}_reason"):
                missing[str(row["scan_id"]), str(reason)].append(rules().figures[name].label)
    counts = Counter((reason, ", ".join(names)) for (_, reason), names in missing.items())
    return heading("Not measured") + table(
        ("reason", "figures", "scans"), [(*what, count) for what, count in counts.most_common()])


def _spread(rows: list[ArchiveRow], count: int) -> list[ArchiveRow]:
    """At most ``count`` rows, evenly spread over the archive, the same on every call."""
    places = np.unique(np.linspace(0, len(rows) - 1, min(len(rows), count)).round().astype(int))
    return [rows[place] for place in places] if rows else []


def _mosaic(uri: str, rows: list[ArchiveRow], status: str) -> str:
    all_of_it = [row for row in rows if row["status"] == status]
    chosen = _spread(all_of_it, SHOWN)
    if not chosen:
        return ""
    return section(f"{status.capitalize()}: {len(chosen):,} of {len(all_of_it):,}",
                   paragraph(_SIDES), grid(_scan(uri, row) for row in chosen))


def _scan(uri: str, row: ArchiveRow, note: str = "") -> str:
    scan_id = str(row["scan_id"])
    arrays = read_volume(uri, slot(row["participant"], scan_id))
    name = f"{row['cohort']} · {row['modality']}"
    told = note or "; ".join(plain(code) for code in codes(row))
    caption = (f"<b>{html.escape(name)}</b> {html.escape(scan_id[:8])}"
               + (f"<br>{html.escape(told)}" if told else ""))
    return picture(slices(arrays["image"], arrays["mask"]), f"slices of a scan, {name}", caption)


def _rejected(rows: list[ArchiveRow]) -> str:
    counts = Counter((code, row["cohort"], row["modality"]) for row in rows
                     if row["status"] == Status.REJECTED for code in codes(row))
    largest = max(counts.values(), default=1)
    shown = _spread([row for row in rows if row["status"] == Status.REJECTED
                     and row["figures"].get("preview")], SHOWN)
    return section(
        f"Rejected: {sum(row['status'] == 'rejected' for row in rows):,}",
        paragraph("Voxels of rejected scans are not kept, but for a coarse picture of those that "
                  "could be read. The message of each, with the file, is in scans.parquet."),
        table(("reason", "cohort", "modality", "scans", ""),
              [(plain(code), cohort, modality, count,
                stack([(count, COLOURS[Status.REJECTED])], largest))
               for (code, cohort, modality), count in sorted(counts.items())]),
        heading("Some of them") if shown else "", grid(map(_preview, shown)))


def _preview(row: ArchiveRow) -> str:
    name = f"{row['cohort']} · {row['modality']}"
    caption = f"<b>{html.escape(name)}</b><br>{html.escape('; '.join(map(plain, codes(row))))}"
    data = base64.b64decode(str(row["figures"]["preview"]))
    return picture(data, f"a rejected scan, {name}", caption)


def _duplicates(uri: str, rows: list[ArchiveRow], pairs: list[NearPair]) -> str:
    exact = sum(code == "duplicate_of" for row in rows for code in codes(row))
    relations = Counter(pair.relation for pair in pairs)
    by_slot = {(row["participant"], row["scan_id"]): row for row in rows}
    doubtful = [pair for pair in pairs if pair.relation == "different_people"]
    shown = [_scan(uri, by_slot[participant, scan_id], f"pair {number}, similarity "
                   f"{pair.similarity:.2f}")
             for number, pair in enumerate(doubtful[:PAIRS_SHOWN], 1)
             for participant, scan_id in ((pair.participant_a, pair.scan_id_a),
                                          (pair.participant_b, pair.scan_id_b))]
    names = {"different_people": "different people: one person under two names, or twins",
             "same_family": "people of one family",
             "same_person": "visits or repeats of one person"}
    return section(
        "Duplicates", paragraph(
            f"Equal voxels: {exact:,} scans were rejected as copies of another one. Scans that "
            "only look alike stay in the archive and are listed in review.parquet."),
        table(("near-duplicate pairs of", "pairs"),
              [(text, relations[name]) for name, text in names.items()]),
        heading("Most similar scans of different people") if shown else "", grid(shown))


