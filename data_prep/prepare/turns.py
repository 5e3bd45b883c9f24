"""Turns that users state for scans, in a table: which file, and where its axes really point.

    file                                    turn
    sub-07/ses-2/anat/sub-07_ses-2_T2w.nii.gz    LPS

``file`` is the end of a scan's uri, from a "/" on, or ARCHIVE::MEMBER.  See volumes/reading/turn.py
for the letters.
"""

from __future__ import annotations

import json

import pyarrow as pa

from data_prep.scan import TURN
from data_prep.tables import read_tsv
from data_prep.volumes.reading.turn import turn_matrix
from neurojepa.errors import ConfigError


def read_turns(uri: str) -> dict[str, str]:
    """Turn by file, of a TSV or CSV with columns ``file`` and ``turn``.

    Raises
    ------
    ConfigError
        A column is missing, or a turn is none; the message names the row.
    DataError
        The table cannot be read.
    """
    turns: dict[str, str] = {}
    for number, row in enumerate(read_tsv(uri), start=2):
        file, turn = (row.get(name) or "" for name in ("file", "turn"))
        if not file or not turn:
            raise ConfigError(f"{uri}: row {number} has no "
                              f"{'file' if not file else 'turn'}; the table needs the columns "
                              "file and turn")
        try:
            turn_matrix(turn)
        except ValueError as error:
            raise ConfigError(f"{uri}: row {number}: {error}") from None
        if turns.setdefault(file, turn) != turn:
            raise ConfigError(f"{uri}: row {number}: {file} has two turns, {turns[file]} and "
                              f"{turn}")
    return turns


def with_turns(scans: pa.Table, turns: dict[str, str], uri: str) -> pa.Table:
    """The scans with the turns that a table states, in ``facts``.

    Raises
    ------
    ConfigError
        A row names no scan, or several.
    """
    places: dict[str, list[int]] = {file: [] for file in turns}
    for place, (one, member) in enumerate(zip(
            scans["uri"].to_pylist(), scans["member"].to_pylist(), strict=True)):
        for end in _ends(one, member) & places.keys():
            places[end].append(place)
    facts = scans["facts"].to_pylist()
    for file, turn in turns.items():
        if len(places[file]) != 1:
            raise ConfigError(f"{uri}: {file} is the end of {len(places[file])} scans' names; name "
                              "one, with as many of its folders as it takes")
        known = json.loads(facts[places[file][0]] or "{}")
        facts[places[file][0]] = json.dumps({**known, TURN: turn})
    column = scans.schema.get_field_index("facts")
    return scans.set_column(column, scans.schema.field(column), pa.array(facts, pa.string()))


def _ends(uri: str, member: str | None) -> set[str]:
    """The names a scan may go by: from any of its folders on."""
    parts = (member or uri).split("/")
    ends = {"/".join(parts[start:]) for start in range(len(parts))}
    return ends | ({f"{end}::{member}" for end in _ends(uri, None)} if member else set())
