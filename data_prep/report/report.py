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
from collections.abc import Sequence

import numpy as np

from data_prep.archive import Archive, check_reachable, open_archive, read_volume, slot
from data_prep.prepare.duplicates import NearPair
from data_prep.qc.judge import OUTLIER, FigureInfo, rules
from data_prep.report.figures import COLOURS, Line, ages, distribution, slices
from data_prep.rows import ArchiveRow, Status, archive_rows
from neurojepa.report import (
    Tone,
    grid,
    heading,
    key,
    page,
    paragraph,
    picture,
    section,
    stack,
    table,
    tiles,
)
from neurojepa.storage import write_bytes

PROCESSING = {"placement": "place in MNI152", "mask_source": "brain mask", "processing":
              "processing before delivery", "cohort_transform_fault":
              "why the cohort's transform was not used", "pet_reference": "reference of PET",
              "acquisition": "acquisition", "defaced": "defaced",
              "contrast_agent": "contrast agent"}
_COLUMNS = ("cohort", "participant", "family", "modality", "site", "split", "sex", "age_at_scan",
            "status", "reason", "scan_id", "preview", *PROCESSING)
TONES: dict[Status, Tone] = {Status.ACCEPTED: "good", Status.FLAGGED: "doubtful",
                             Status.REJECTED: "bad"}
SHOWN = 12  # pictures of a kind
PAIRS_SHOWN = 6
LINES = 8  # cohorts and modalities in one distribution
SITES = 25
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
        _contents(rows), _reasons(rows), _splits(rows), _coverage(rows), _processing(rows),
        _figures(rows),
        *(_mosaic(archive_uri, rows, status) for status in (Status.ACCEPTED, Status.FLAGGED)),
        _rejected(rows), _duplicates(archive_uri, rows, pairs)]).encode())
    print(f"{out}: {lead}")


def _rows(archive: Archive) -> list[ArchiveRow]:
    """The columns that the page needs, and none that names a source."""
    figures = [name + end for name in rules().figures for end in ("", "_reason")]
    return list(archive_rows(archive.scans.select([
        name for name in (*_COLUMNS, *figures) if name in archive.scans.column_names])))


# ---- counts --------------------------------------------------------------------------------------

def _contents(rows: list[ArchiveRow]) -> str:
    kinds: defaultdict[tuple[str, str], list[ArchiveRow]] = defaultdict(list)
    sites: defaultdict[tuple[str, str], list[ArchiveRow]] = defaultdict(list)
    for row in rows:
        kinds[row["cohort"], row["modality"]].append(row)
        if row["site"]:
            sites[row["cohort"], row["site"]].append(row)
    largest = sorted(sites.items(), key=lambda item: (-len(item[1]), item[0]))
    more = (paragraph(f"And {len(largest) - SITES:,} smaller sites.") if len(largest) > SITES
            else "")
    unknown = sum(not row["site"] for row in rows)
    return section(
        "What is in the archive", key(COLOURS.items()),
        _status_table(("cohort", "modality"), sorted(kinds.items())), heading("By site"),
        _status_table(("cohort", "site"), largest[:SITES]), more,
        paragraph(f"The site of {unknown:,} scans is not known.") if unknown else "")


def _status_table(names: tuple[str, str], groups: Sequence[tuple[tuple[str, str], list[ArchiveRow]]]
                  ) -> str:
    largest = max((len(group) for _, group in groups), default=1)
    body = []
    for name, group in groups:
        counts = Counter(row["status"] for row in group)
        body.append((*name, len({row["participant"] for row in group}),
                     *(counts[status] for status in Status),
                     stack([(counts[status], COLOURS[status]) for status in Status], largest)))
    return table((*names, "people", *Status, ""), body)


def _codes(row: ArchiveRow) -> list[str]:
    """The reasons of a row without details: paths and ids may be among them."""
    return [part if part.startswith(OUTLIER) else part.split(":")[0]
            for part in (row["reason"] or "").split(";") if part]


def _reasons(rows: list[ArchiveRow]) -> str:
    counts = Counter((row["status"], code) for row in rows for code in _codes(row))
    largest = max(counts.values(), default=1)
    body = [(status, _plain(code), _why(code), count, stack([(count, COLOURS[status])], largest))
            for (status, code), count in sorted(counts.items(), key=lambda item: (
                -list(Status).index(item[0][0]), -item[1], item[0][1]))]
    return section("Why scans were flagged or rejected",
                   paragraph("A scan may have several flags. Rejected scans are not in the feed."),
                   table(("status", "reason", "meaning", "scans", ""), body))


def _plain(code: str) -> str:
    """A flag or reason in words; flags of qc.yaml by the label of their figure."""
    side, _, name = code.partition(":" if code.startswith(OUTLIER) else "_")
    label = next((info.label for figure, info in rules().figures.items()
                  if name in (figure, figure.removeprefix("qc_"))), None)
    if label and side in ("low", "high", "outlier"):
        return f"{side}: {label}"
    return code.removesuffix("_of").replace("_", " ")


def _why(code: str) -> str:
    """What qc.yaml says of a threshold's flag, or what an outlier is."""
    if code.startswith(OUTLIER):
        return "far from the other scans of its cohort and modality"
    name = code.removeprefix("low_").removeprefix("high_")
    return next((limit.why for limits in rules().thresholds.values()
                 for figure, limit in limits.items() if figure.removeprefix("qc_") == name), "")


def _splits(rows: list[ArchiveRow]) -> str:
    usable = [row for row in rows if row["status"] != Status.REJECTED]
    splits = sorted({row["split"] for row in usable},
                    key=lambda name: (["train", "val", "test", name].index(name), name))
    body, known = [], {}
    for split in splits:
        mine = [row for row in usable if row["split"] == split]
        first: dict[str, ArchiveRow] = {}
        for row in sorted(mine, key=lambda row: row["age_at_scan"] or np.inf):
            first.setdefault(row["participant"], row)
        sexes = Counter(row["sex"] for row in first.values())
        years = [row["age_at_scan"] for row in first.values() if row["age_at_scan"] is not None]
        known[split] = years
        body.append((split, len(first), len({row["family"] for row in mine}), len(mine),
                     f"{sexes['F']:,} / {sexes['M']:,} / {len(first) - sexes['F'] - sexes['M']:,}",
                     _ages(years, len(first) - len(years))))
    header = ("split", "people", "families", "scans", "F / M / unknown",
              "age: median (5 to 95 %)")
    known = {split: years for split, years in known.items() if years}
    return section("Splits", paragraph("Families are never divided. Age is that of a person's "
                                       "first scan; rejected scans do not count."),
                   table(header, body), ages(known) if known else "")


def _ages(years: list[float], unknown: int) -> str:
    """Percentiles, not extremes: the oldest person of a cohort may be known."""
    low, median, high = np.percentile(years, (5, 50, 95)) if years else (0, 0, 0)
    parts = [f"{median:.0f} ({low:.0f} to {high:.0f})"] * bool(years)
    return ", ".join([*parts, *[f"{unknown:,} unknown"] * bool(unknown)])


def _coverage(rows: list[ArchiveRow]) -> str:
    has: defaultdict[str, set[str]] = defaultdict(set)
    for row in rows:
        if row["status"] != Status.REJECTED:
            has[row["participant"]].add(row["modality"])
    modalities = sorted({name for names in has.values() for name in names})
    combinations = Counter(frozenset(names) for names in has.values()).most_common(20)
    dot = {True: "●", False: "·"}
    body = [(*(dot[name in names] for name in modalities), count,
             stack([(count, COLOURS[Status.ACCEPTED])], combinations[0][1]))
            for names, count in combinations]
    return section("Which modalities people have",
                   paragraph("Over all sessions; the most frequent combinations."),
                   table((*modalities, "people", ""), body))


# ---- figures and pictures ------------------------------------------------------------------------

def _processing(rows: list[ArchiveRow]) -> str:
    """How the usable scans came to be as they are, by modality."""
    counts: Counter[tuple[str, str, str]] = Counter()
    for row in rows:
        told = {**row["figures"], "processing": row["processing"]}
        counts.update((title, str(told[name]), row["modality"])
                      for name, title in PROCESSING.items()
                      if row["status"] != Status.REJECTED and told.get(name) is not None)
    return section("Preparation", table(
        ("what", "", "modality", "scans"),
        [(*what, count) for what, count in sorted(counts.items())])) if counts else ""


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
    notes = note or "; ".join(_plain(code) for code in _codes(row))
    caption = (f"<b>{html.escape(name)}</b> {html.escape(scan_id[:8])}"
               + (f"<br>{html.escape(notes)}" if notes else ""))
    return picture(slices(arrays["image"], arrays["mask"]), f"slices of a scan, {name}", caption)


def _rejected(rows: list[ArchiveRow]) -> str:
    counts = Counter((code, row["cohort"], row["modality"]) for row in rows
                     if row["status"] == Status.REJECTED for code in _codes(row))
    largest = max(counts.values(), default=1)
    shown = _spread([row for row in rows if row["status"] == Status.REJECTED
                     and row["figures"].get("preview")], SHOWN)
    return section(
        f"Rejected: {sum(row['status'] == 'rejected' for row in rows):,}",
        paragraph("Voxels of rejected scans are not kept, but for a coarse picture of those that "
                  "could be read. The message of each, with the file, is in scans.parquet."),
        table(("reason", "cohort", "modality", "scans", ""),
              [(_plain(code), cohort, modality, count,
                stack([(count, COLOURS[Status.REJECTED])], largest))
               for (code, cohort, modality), count in sorted(counts.items())]),
        heading("Some of them") if shown else "", grid(map(_preview, shown)))


def _preview(row: ArchiveRow) -> str:
    name = f"{row['cohort']} · {row['modality']}"
    caption = f"<b>{html.escape(name)}</b><br>{html.escape('; '.join(map(_plain, _codes(row))))}"
    data = base64.b64decode(str(row["figures"]["preview"]))
    return picture(data, f"a rejected scan, {name}", caption)


def _duplicates(uri: str, rows: list[ArchiveRow], pairs: list[NearPair]) -> str:
    exact = sum(code == "duplicate_of" for row in rows for code in _codes(row))
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


