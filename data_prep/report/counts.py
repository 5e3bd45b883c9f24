"""The report's tables: what is in an archive, why scans were flagged, splits, how it came to be."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

import numpy as np

from data_prep.flags import COMPANIONS, OUTLIER, Flag, Note
from data_prep.qc.judge import rules
from data_prep.report.figures import COLOURS, ages
from data_prep.rows import ArchiveRow, Status, flags_of
from neurojepa.report import heading, key, paragraph, section, stack, table

PROCESSING = {"placement": "place in MNI152", "mask_source": "brain mask", "processing":
              "processing before delivery", "cohort_transform_fault":
              "why the cohort's transform was not used", "pet_reference": "reference of PET",
              "acquisition": "acquisition", "defaced": "defaced",
              "contrast_agent": "contrast agent"}
SITES = 25
_OF_COMPANIONS = tuple(f"{name}:" for name in COMPANIONS)
_CODES: dict[str, Flag | Note] = {code.value: code for kind in (Flag, Note) for code in kind}


def contents(rows: list[ArchiveRow]) -> str:
    """Scans by status of each cohort and modality, and of each of the largest sites."""
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


def codes(row: ArchiveRow) -> list[str]:
    """The flags of a row, or why it was rejected, without details: paths and ids may be there."""
    told = ([row["reason"] or ""] if row["status"] == Status.REJECTED else flags_of(row))
    return [code if code.startswith((OUTLIER, *_OF_COMPANIONS)) else code.split(":")[0]
            for code in told]


def reasons(rows: list[ArchiveRow]) -> str:
    """How often which flag, reason or note occurs, what it means and what to do."""
    counts = Counter((row["status"], code) for row in rows for code in codes(row))
    largest = max(counts.values(), default=1)
    body = [(status, plain(code), *_meaning(code), count,
             stack([(count, COLOURS[status])], largest))
            for (status, code), count in sorted(counts.items(), key=lambda item: (
                -list(Status).index(item[0][0]), -item[1], item[0][1]))]
    notes = Counter(note for row in rows for note in (row.get("notes") or "").split(";") if note)
    return section(
        "Why scans were flagged or rejected",
        paragraph("A flag says that something may be wrong with a scan; it may have several. "
                  "Rejected scans are not in the feed."),
        table(("status", "reason", "meaning", "what to do", "scans", ""), body),
        heading("Notes"), paragraph("A note says how a map was made. Nothing is wrong with it."),
        table(("note", "meaning", "what to do", "scans"),
              [(plain(note), *_meaning(note), count) for note, count in notes.most_common()]))


def plain(code: str) -> str:
    """A flag, reason or note in words; flags of qc.yaml by the label of their figure."""
    if code.startswith(_OF_COMPANIONS):
        return ": ".join(map(plain, code.split(":", 1)))
    side, _, name = code.partition(":" if code.startswith(OUTLIER) else "_")
    label = next((info.label for figure, info in rules().figures.items()
                  if name in (figure, figure.removeprefix("qc_"))), None)
    if label and side in ("low", "high", "outlier"):
        return f"{side}: {label}"
    return code.removesuffix("_of").replace("_", " ")


def _meaning(code: str) -> tuple[str, str]:
    """What a code means and what to do about it."""
    if code.startswith(_OF_COMPANIONS):
        companion, own = code.split(":", 1)
        meaning, cure = _meaning(own)
        return f"of the {companion} that came with the scan: {meaning}", cure
    if code in _CODES:
        return _CODES[code].meaning, _CODES[code].cure
    if code.startswith(OUTLIER):
        return "far from the other scans of its cohort and modality", "look at its slices"
    name = code.removeprefix("low_").removeprefix("high_")
    why = next((limit.why for limits in rules().thresholds.values()
                for figure, limit in limits.items() if figure.removeprefix("qc_") == name), "")
    return why, "look at its slices" if why else ""


def splits(rows: list[ArchiveRow]) -> str:
    """People, families, scans, sex and age of each split."""
    usable = [row for row in rows if row["status"] != Status.REJECTED]
    names = sorted({row["split"] for row in usable},
                    key=lambda name: (["train", "val", "test", name].index(name), name))
    body, known = [], {}
    for split in names:
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


def coverage(rows: list[ArchiveRow]) -> str:
    """Which modalities people have together."""
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


def processing(rows: list[ArchiveRow]) -> str:
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
