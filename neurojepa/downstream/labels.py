"""Labels from a table of the user's own, joined with embeddings by the user's own ids.

Embeddings hold pseudonyms.  An id of the table becomes one by the same key, so ids meet scans on
the user's machine alone.  What does not meet is counted and told: labels without scans, scans
without labels, missing values, rows that stand twice.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import pyarrow as pa

from neurojepa.downstream.table import vectors
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.labels import as_numbers
from neurojepa.storage import read_bytes

CODES = {-9, -99, -999, -9999, -7, -8, -77, -88, 99, 999, 9999, -4, -1}
WORKBOOK = b"PK"  # how .xlsx and .ods begin
FAR = 6  # median absolute deviations from the median: a code among numbers, not a value
# covariates that embed tells
_OF_SCANS = ("age", "sex", "brain_ml", "site", "scanner", "field_strength")


@dataclass(frozen=True)
class People:
    """n people, or visits of people, with an embedding and what the table says of them."""

    values: np.ndarray  # float32 [n, D]
    ids: np.ndarray  # str [n], the user's own
    participant: np.ndarray  # str [n], pseudonym
    family: np.ndarray  # str [n]
    seen: np.ndarray | None  # bool [n], in the pretraining of the weights; None: not known
    columns: dict[str, np.ndarray]  # str [n], "" where missing: the table's, then those of scans
    notes: list[str] = field(default_factory=list)  # what did not meet, counted
    volumes: np.ndarray | None = None  # float64 [n, V] ml of tissue by region, where all have them
    sessions: np.ndarray | None = None  # str [n], where visits are told apart
    scans: np.ndarray | None = None  # object [n], tuples of the ids of each one's scans

    def column(self, name: str) -> np.ndarray:
        """A column [n] of str.

        Raises
        ------
        ConfigError
            Neither the table nor the scans have it.
        """
        if name not in self.columns:
            raise ConfigError(f"column {name!r}: neither the table nor the scans have it; there "
                              "are " + ", ".join(sorted(self.columns)))
        return self.columns[name]

    def replaced(self, values: np.ndarray) -> People:
        """The same people with other features [n, D]."""
        return replace(self, values=values)

    def take(self, chosen: np.ndarray) -> People:
        """The people of an index or mask [n]."""
        return People(self.values[chosen], self.ids[chosen], self.participant[chosen],
                      self.family[chosen], None if self.seen is None else self.seen[chosen],
                      {name: column[chosen] for name, column in self.columns.items()}, self.notes,
                      *(None if each is None else each[chosen]
                        for each in (self.volumes, self.sessions, self.scans)))


def read_rows(uri: str, missing: Sequence[str], notes: list[str],
              ids: Sequence[str | None] = ()) -> list[dict[str, str]]:
    """Rows of a table, read as ``index`` reads tables; "" is a missing value.

    Parameters
    ----------
    missing : values that stand for nothing, beside those that do so in any table
    notes : is added what had to be mended
    ids : columns where such a value is a name, and stays: a person may be called 99

    Raises
    ------
    DataError
        It cannot be read, is no table, or a row has more cells than the header.
    """
    from data_prep.tables import parse_table

    data, mended = read_bytes(uri), Counter[str]()
    rows = [] if data.startswith(WORKBOOK) else parse_table(data, uri, mended)
    if not rows:
        raise DataError(f"{uri}: no table of text with a header and rows; save it as .csv")
    notes += [f"{count} x {note}" for note, count in sorted(mended.items())]
    codes = {code.lower() for code in missing}
    return [{name: "" if cell is None or (cell.lower() in codes and name not in ids) else cell
             for name, cell in row.items()} for row in rows]


def join(embeddings: pa.Table, uri: str, *, key: str | None, id_column: str,
         session_column: str | None = None, modality: str | None = None,
         missing: Sequence[str] = (), volumes: Mapping[str, np.ndarray] | None = None,
         several: bool = False) -> People:
    """People, or visits where a column of sessions is named, of both the table and the embeddings.

    Parameters
    ----------
    embeddings : as table.read_embeddings gives them
    uri : of the table of labels
    key : file of the pseudonym key that embed used
    missing : values that stand for nothing, such as -9
    volumes : ml of tissue by region [V] of scans, as volumes.read_volumes gives them
    several : scans of all modalities together, for those who read them one by one (``scans``)

    Raises
    ------
    ConfigError
        A column is not there, or there are several modalities to choose from.
    DataError
        Nobody is in both, or an id stands twice with different values.
    """
    notes = list[str]()
    rows = read_rows(uri, missing, notes, (id_column, session_column))
    for name in (id_column, session_column):
        if name and name not in rows[0]:
            raise ConfigError(f"{uri}: no column {name!r}; it has {', '.join(rows[0])}")
    if not several:
        embeddings = one_modality(embeddings, modality)
    told = _by_key(rows, uri, id_column, session_column, notes)
    groups = _groups(embeddings, session_column is not None)
    names = _pseudonyms({person for person, _ in told}, set(embeddings["cohort"].to_pylist()), key)
    met = {}
    for person, session in told:
        there = [each for each in names[person] if (each, session) in groups]
        if len(there) > 1:
            raise DataError(f"{uri}: id {person!r} is a person in each of {len(there)} cohorts of "
                            "the embeddings; embed a feed's cohorts one by one (--cohort)")
        if there:
            met[person, session] = groups[there[0], session]
    if not met:
        raise DataError(f"{uri}: " + _why_none(told, names, groups, id_column, session_column))
    _count(notes, len(told) - len(met), "rows of the table without a scan")
    _count(notes, len(groups) - len(met), "people or visits with a scan but no row in the table")
    order = sorted(met)
    values, scans = vectors(embeddings), embeddings.drop_columns(["embedding"]).to_pylist()
    first = [scans[met[each][0]] for each in order]
    ids = np.empty(len(order), object)
    ids[:] = [tuple(scans[number]["scan_id"] for number in met[each]) for each in order]
    columns = {name: np.array([told[each][name] for each in order])
               for name in rows[0] if name not in (id_column, session_column)}
    for name in _OF_SCANS:
        if name in scans[0]:
            columns.setdefault(name, np.array(["" if row[name] is None else str(row[name])
                                               for row in first]))
    return People(
        values=np.stack([values[met[each]].mean(0) for each in order]),
        ids=np.array([person for person, _ in order]),
        participant=np.array([row["participant"] for row in first]),
        family=np.array([row["family"] for row in first]),
        seen=_seen([[scans[number].get("seen") for number in met[each]] for each in order]),
        columns=columns, notes=notes,
        volumes=_volumes([[scans[number]["scan_id"] for number in met[each]] for each in order],
                         volumes, notes),
        sessions=np.array([session for _, session in order]) if session_column else None,
        scans=ids)


def _why_none(told: Mapping[tuple[str, str], object], names: Mapping[str, list[str]],
              groups: Mapping[tuple[str, str], object], id_column: str,
              session_column: str | None) -> str:
    """Why no row of the table meets a scan: other people, or other names of their visits."""
    visits = {person: sorted(session for who, session in groups if who in names[person])
              for person, _ in told} if session_column else {}
    for person, session in told:
        if visits.get(person):
            return (f"{session_column} {session!r} of id {person!r} is no visit of the embeddings, "
                    f"nor is any other row's; theirs are {', '.join(visits[person])}: write visits "
                    "as embed saw them")
    people = list(names)
    return (f"none of its {len(people)} ids (first: {next(iter(told))[0]!r}) is a person of the "
            f"embeddings; is {id_column!r} the column of the ids that embed saw, and --key its "
            "key?")


def _volumes(of_scans: list[list[str]], volumes: Mapping[str, np.ndarray] | None,
             notes: list[str]) -> np.ndarray | None:
    """float64 [n, V]: mean over each one's scans; None, and a note, where some have none."""
    if volumes is None:
        return None
    lack = sum(not any(scan in volumes for scan in scans) for scans in of_scans)
    if lack:
        notes.append(f"region volumes are not compared with: {lack} of {len(of_scans)} have none "
                     "in volumes.csv")
        return None
    return np.stack([np.mean([volumes[scan] for scan in scans if scan in volumes], 0)
                     for scans in of_scans])


def _seen(of_scans: list[list[bool | None]]) -> np.ndarray | None:
    """Whose scans were seen in pretraining, bool [n]; None where it is not known of a scan."""
    if any(each is None for scans in of_scans for each in scans):
        return None
    return np.array([any(scans) for scans in of_scans])


def one_modality(embeddings: pa.Table, modality: str | None) -> pa.Table:
    """Rows of a modality; None: of the only one.

    Raises
    ------
    ConfigError
        There are several, or not this one.
    """
    names = np.array(embeddings["modality"].to_pylist())
    there = sorted(set(names.tolist()))
    if modality is None and len(there) > 1:
        raise ConfigError(f"the embeddings are of {', '.join(there)}; choose one by --modality")
    if modality is not None and modality not in there:
        raise ConfigError(f"{modality}: the embeddings are of {', '.join(there)}; choose one "
                          "of these, or embed such scans")
    return embeddings.filter(pa.array(names == (modality or there[0])))


def _by_key(rows: list[dict[str, str]], uri: str, id_column: str, session_column: str | None,
            notes: list[str]) -> dict[tuple[str, str], dict[str, str]]:
    """Rows by id and session ("" without sessions); those that stand twice and agree count once."""
    told: dict[tuple[str, str], dict[str, str]] = {}
    nameless = twice = 0
    for row in rows:
        person = row[id_column].removeprefix("sub-")
        session = (row[session_column].removeprefix("ses-") or "1") if session_column else ""
        if not person:
            nameless += 1
            continue
        earlier = told.setdefault((person, session), row)
        if earlier is not row:
            twice += 1
            differing = [name for name in row if row[name] != earlier[name]
                         and name not in (id_column, session_column)]
            if differing:
                raise DataError(
                    f"{uri}: id {person!r} stands twice, with {differing[0]} "
                    f"{earlier[differing[0]]!r} and {row[differing[0]]!r}; keep one row, or, "
                    "where labels change with visits, name their column by --session (reliability "
                    "takes one row a person)")
    _count(notes, nameless, "rows without an id")
    _count(notes, twice, "rows that stand twice, alike: counted once")
    return told


def first_visits(embeddings: pa.Table, everything: pa.Table) -> tuple[pa.Table, list[str]]:
    """Scans of each person's first visit, and what is to be said of it.

    Visits go by age where it is known and differs, else by name, in which numbers count as numbers.

    Parameters
    ----------
    everything : scans of other modalities, too, which tell whether a visit came before
    """
    visits, others = _visits(embeddings), _visits(everything)
    first = {person: min(ages, key=partial(_order, ages)) for person, ages in visits.items()}
    kept = [first[person] == session for person, session in zip(
        embeddings["participant"].to_pylist(), embeddings["session"].to_pylist(), strict=True)]
    several = [ages for ages in visits.values() if len(ages) > 1]
    by_name = sum(len(set(ages.values())) < len(ages) or None in ages.values() for ages in several)
    late = sum(min(others[person], key=partial(_order, others[person])) != name
               for person, name in first.items())
    notes = [f"{len(several)} people have several visits; their first one is taken, by age"
             + (f", or by name for {by_name} whose ages are not known or equal" if by_name else "")
             + " (name the table's column of visits with --session to choose another)"
             ] if several else []
    _count(notes, late, "people have no such scan at their first visit: their first one that has "
           "one is taken, from which time must count")
    return embeddings.filter(pa.array(kept)), notes


def _visits(embeddings: pa.Table) -> dict[str, dict[str, float | None]]:
    """Of each person, the age at each visit; None where no scan tells it."""
    ages = (embeddings["age"].to_pylist() if "age" in embeddings.column_names
            else [None] * embeddings.num_rows)
    visits: dict[str, dict[str, float | None]] = {}
    for person, session, age in zip(embeddings["participant"].to_pylist(),
                                    embeddings["session"].to_pylist(), ages, strict=True):
        of_person = visits.setdefault(person, {})
        known = [each for each in (age, of_person.get(session))
                 if each is not None and each == each]
        of_person[session] = min(known, default=None)
    return visits


def _order(ages: dict[str, float | None], name: str) -> tuple[float, list[tuple[int, str]]]:
    age = ages[name]
    return (age if age is not None and None not in ages.values() else 0.0,
            [(int(part), "") if part.isdigit() else (0, part)
             for part in re.findall(r"[0-9]+|[^0-9]+", name)])


def _groups(embeddings: pa.Table, by_session: bool) -> dict[tuple[str, str], list[int]]:
    groups: dict[tuple[str, str], list[int]] = {}
    for number, (person, session) in enumerate(zip(
            embeddings["participant"].to_pylist(), embeddings["session"].to_pylist(), strict=True)):
        groups.setdefault((person, session if by_session else ""), []).append(number)
    return groups


def _pseudonyms(people: set[str], cohorts: set[str], key: str | None) -> dict[str, list[str]]:
    """What each id is called in each cohort."""
    from data_prep.identity import load_key, pseudonym

    loaded = load_key(key, make=False)
    return {person: [pseudonym(loaded, cohort, person) for cohort in sorted(cohorts)]
            for person in people}


def _count(notes: list[str], number: int, what: str) -> None:
    if number:
        notes.append(f"{number} {what}")


def numbers_of(people: People, name: str, why: str) -> np.ndarray:
    """float64 [n] of a column without missing values.

    Raises
    ------
    DataError
        One is no number; the message says ``why`` that matters.
    """
    values = people.column(name)
    if (found := as_numbers(values)) is not None:
        return found
    word = next(value for value in values.tolist() if as_numbers(np.array([value])) is None)
    raise DataError(f"column {name!r}: {word!r} is no number; {why} (add --missing {word} if it "
                    "stands for nothing)")


def suspected_codes(name: str, values: np.ndarray) -> list[str]:
    """A note for each number that looks like a missing-value code: far from the other numbers, or
    among names of classes."""
    numbers = {value: float(value) for value in np.unique(values).tolist()
               if as_numbers(np.array([value])) is not None}
    middle, far = 0.0, -1.0
    if (of_all := as_numbers(values)) is not None:
        middle = float(np.median(of_all))
        far = FAR * (float(np.median(np.abs(of_all - middle))) or 1.0)
    return [f"{name}: {int((values == value).sum())} values {value} look like a code for missing; "
            f"add --missing {value} if so" for value, number in numbers.items()
            if number in CODES and abs(number - middle) > far]
