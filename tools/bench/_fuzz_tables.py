"""Three good tables and a sidecar of a small BIDS tree, and random damage to them, for fuzz.py."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.cohorts.bids.reader import read_cohort
from data_prep.cohorts.source import Source
from data_prep.tables import as_float
from data_prep.volumes.reading.timing import choose_time

SIDECAR = {"RepetitionTime": 2.0, "EchoTime": 0.03, "MagneticFieldStrength": 3,
           "Manufacturer": "Acme", "InstitutionName": "Site", "ImageType": ["ORIGINAL", "M"]}
GOOD: dict[str, str] = {
    "participants.tsv": "participant_id\tage\tsex\tsite\tdiagnosis\tfamily_id\tmmse\n" + "".join(
        f"sub-0{one}\t{50 + one}.5\t{'FM'[one % 2]}\tS{one % 2}\t{['CN', 'AD'][one % 2]}"
        f"\tfam{one // 2}\t{20 + one}\n" for one in range(1, 5)),
    "sub-01/sub-01_sessions.tsv": "session_id\tage\tmmse\nses-1\t51.5\t21\nses-2\t53.25\t19\n",
    "sub-02/ses-1/sub-02_ses-1_scans.tsv": "filename\tusable\tquality\n"
    "anat/sub-02_ses-1_T1w.nii.gz\t1\tgood\nfunc/sub-02_ses-1_task-rest_bold.nii.gz\t0\tbad\n",
    "task-rest_bold.json": json.dumps(SIDECAR, indent=1),
}
CELLS = ["", "n/a", "NaN", "1e400", "-5", "999", "\x00", '"', '"x', "1,5", "89+", "x" * 5000,
         "Ü", "None", "true", "[]", "0x10", "1_000", " 51 ", "٣", "=1+1", "M;F", "sub-", "../x"]
VALUES: list[Any] = [None, "", "2.0", "abc", [2.0], [], {}, {"a": 1}, -1, 0, 1e9, 1e400, True,
                     "x" * 5000, [1, "a"], "NaN"]


GONE = ("row gone", "column gone", "key gone", "empty")  # nothing is left that could be noted
MISSING_WORDS = {"", "n/a", "NaN", "None", "[]", "{}"}


def plant(tree: Path) -> None:
    """Write the tree: four people, two sessions, images of a byte, and the good tables."""
    files = {**GOOD, "dataset_description.json": '{"Name": "f", "BIDSVersion": "1.9.0"}'}
    for one in range(1, 5):
        for session in (1, 2):
            stem = f"sub-0{one}_ses-{session}"
            files[f"sub-0{one}/ses-{session}/anat/{stem}_T1w.nii.gz"] = "x"
            files[f"sub-0{one}/ses-{session}/func/{stem}_task-rest_bold.nii.gz"] = "x"
    for name, content in files.items():
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        (tree / name).write_text(content)


def damaged(rng: np.random.Generator, which: str) -> tuple[str, bytes]:
    """What was done to a good table or sidecar, and the file that came of it."""
    text = GOOD[which]
    if rng.random() < 0.35:
        return _bytes(rng, text.encode())
    return _key(rng, which) if which.endswith(".json") else _cell(rng, text)


def _cell(rng: np.random.Generator, text: str) -> tuple[str, bytes]:
    """One cell, the header's too, or a row or column as a whole."""
    rows = [line.split("\t") for line in text.splitlines()]
    row, column = int(rng.integers(len(rows))), int(rng.integers(len(rows[0])))
    kind = ("cell", "cell", "cell", "row gone", "row twice", "cell gone", "column gone",
            "column twice", "other delimiter")[rng.integers(9)]
    if kind == "cell":
        rows[row][column] = CELLS[rng.integers(len(CELLS))]
    elif kind == "row gone":
        del rows[row]
    elif kind == "row twice":
        rows.append(list(rows[row]))
    elif kind == "cell gone":
        del rows[row][column]
    elif kind == "column gone":
        rows = [cells[:column] + cells[column + 1:] for cells in rows]
    elif kind == "column twice":
        rows = [[*cells, cells[column]] for cells in rows]
    mark = ",; |"[rng.integers(4)] if kind == "other delimiter" else "\t"
    return kind, "\n".join(mark.join(cells) for cells in [*rows, []]).encode()


def _key(rng: np.random.Generator, which: str) -> tuple[str, bytes]:
    content: dict[str, Any] = json.loads(GOOD[which])
    key = list(content)[rng.integers(len(content))]
    kind = ("value", "value", "value", "key gone", "key spelt otherwise", "no object")[
        rng.integers(6)]
    if kind == "value":
        content[key] = VALUES[rng.integers(len(VALUES))]
    elif kind == "key gone":
        del content[key]
    elif kind == "key spelt otherwise":
        content[key.lower()] = content.pop(key)
    return kind, json.dumps([content] if kind == "no object" else content).encode()


def _bytes(rng: np.random.Generator, data: bytes) -> tuple[str, bytes]:
    """Bytes that no editor means: cuts, marks, other encodings.  Letters and digits stay."""
    place = int(rng.integers(len(data)))
    odd = [b"\x00", b'"', b"\xff", b"\xfc", b"\r", b"\n", b"\t", b"\xef\xbb\xbf", b"'", b"\x1a"]
    made = {"byte put in": data[:place] + odd[rng.integers(len(odd))] + data[place:],
            "cut": data[:place], "empty": b"", "UTF-16": data.decode().encode("utf-16"),
            "BOM": b"\xef\xbb\xbf" + data, "old Mac lines": data.replace(b"\n", b"\r"),
            "binary": rng.bytes(200), "pointer": b"version https://git-lfs.github.com/spec/v1\n"}
    kind = list(made)[rng.integers(len(made))]
    return kind, made[kind]


# ---- judgement -----------------------------------------------------------------------------------

Known = tuple[dict[str, Any], Counter[str]]


def read(tree: Path) -> Known:
    """All that a reading of the tree knows of its people, and its notes."""
    source = Source(str(tree))
    known: dict[str, Any] = {}
    for found in read_cohort(source, "f"):
        known |= {f"ties {found.participant}": tie.partition(":")[2] for tie in found.ties}
        for session, name, value in found.labels:
            known[f"{name} of {found.participant} {session}"] = value
        for scan in found.scans:
            facts = json.loads(scan.facts or "{}")
            time, flags = choose_time(None, [], facts)
            known[f"{scan.participant} {scan.session} {scan.modality}"] = (
                scan.age_at_scan, scan.sex, scan.site, scan.reason, scan.field_strength,
                scan.scanner, time, facts.get("EchoTime"))
            source.notes.update(flags)
    told = {f"{table}: {column} as {what}": 1 for table, columns in source.columns.items()
            for column, what in columns.items()}  # index prints what it takes for what
    return known, source.notes + Counter(told)


def judge(tree: Path, good: Known, damage: str, content: bytes) -> tuple[str, str]:
    """equal, told, flagged or silent; told: the file itself says so, or says nothing any more."""
    known, notes = read(tree)
    changed = [key for key in {**good[0], **known} if known.get(key) != good[0].get(key)]
    if not changed:
        return "equal", ""
    said = sorted(note for note in notes | good[1] if notes[note] != good[1][note])
    first = f"{changed[0]}: {good[0].get(changed[0])} -> {known.get(changed[0])}"
    if said:
        return "flagged", f"{'; '.join(said)[:80]} {first}"
    # a byte inside a key makes it another key
    gone = damage in GONE or (damage == "byte put in" and content.startswith(b"{"))
    words = {word.strip().strip('"') for word in content.decode("utf-8", "replace").replace(
        "\n", "\t").split("\t")} | {str(value) for value in good[0].values()} if gone else _words(
            content)
    words |= {str(value) for value in SIDECAR.values()}  # the institution stands in for the site
    told = all(_is_told(good[0].get(key), known.get(key), words, gone) for key in changed)
    return ("told" if told else "silent"), first


def _words(content: bytes) -> set[str]:
    """What a table or sidecar says, value by value."""
    text = content.decode("utf-8", "replace")
    if text.startswith("{"):
        return {"" if (key, value) == ("RepetitionTime", 0) else str(value)  # 0: not known
                for key, value in json.loads(text).items()}
    return {cell.strip() for line in text.splitlines() for cell in line.split("\t")}


def _is_told(before: Any, after: Any, words: set[str], gone: bool) -> bool:
    """Whether each part that changed is missing from the file, or stands there as it is read."""
    pairs = list(zip(before, after, strict=True)) if isinstance(before, tuple) and isinstance(
        after, tuple) else [(before, after)]
    fallback = {number for word in words if (number := as_float(word)) is not None}
    return all(old == new or (new is None and (gone or words & MISSING_WORDS)) or str(new) in words
               or as_float(new) in fallback for old, new in pairs)
