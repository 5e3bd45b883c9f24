"""What columns are called and what their values say, whatever the cohort: ages, sexes, missing.

    role            of a column by its name: Age, age_at_scan, "Gender (1=m, 2=f)" ...
    Meaning         of a column: its unit, and the words for its codes
    years           an age in any of the spellings that tables have, to years
    sex             F or M of a word
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

from data_prep.tables import MISSING, as_float

DAYS_A_YEAR = 365.25
OLDEST = 120.0
_A_YEAR = {"years": 1.0, "months": 12.0, "weeks": DAYS_A_YEAR / 7, "days": DAYS_A_YEAR}
_UNITS = {**dict.fromkeys(("y", "yr", "yrs", "year", "years", "a", "annum", "yo"), "years"),
          **dict.fromkeys(("mo", "mos", "mon", "mth", "mths", "month", "months", "m"), "months"),
          **dict.fromkeys(("w", "wk", "wks", "week", "weeks"), "weeks"),
          **dict.fromkeys(("d", "day", "days"), "days")}
_SEXES = {**dict.fromkeys(("f", "female", "w", "woman", "women", "girl", "weiblich", "femme"), "F"),
          **dict.fromkeys(("m", "male", "man", "men", "boy", "maennlich", "männlich", "homme"),
                          "M")}
# words beside "age" that leave it the age at the scan; onset, birth, mental ... do not
_BESIDE_AGE = {"at", "of", "in", "the", "and", "first", "scan", "scanning", "mri", "mr", "imaging",
               "session", "visit", "baseline", "bl", "time", "test", "testing",
               "exam", "interview", "acquisition", "acq", "data", "collection",
               "participant", "subject", "patient", "person", "current",
               "recruitment", "enrollment", "enrolment", "inclusion", "study", "y",
               *(word for word in _UNITS if len(word) > 1)}
_NO_AGES = {"scan_age"}  # of infants, weeks from conception (dHCP)
_UNITS_BY_NAME = {"interview_age": "months"}  # NDA's own column, in all its tables
_ROLES = {
    "participant_id": ("participant_id", "participant", "participantid", "subject_id", "subject",
                       "subjectid", "sub_id", "sub", "subj_id", "subj", "ptid", "patient_id",
                       "patient", "src_subject_id", "record_id", "id"),
    "session_id": ("session_id", "session", "sessionid", "ses", "ses_id", "visit_id", "visit",
                   "timepoint", "redcap_event_name", "eventname"),
    "sex": ("sex", "gender", "biological_sex", "sex_at_birth", "birth_sex", "ptgender", "sex_id",
            "sex_code", "gender_id", "gender_code", "participant_sex", "subject_sex",
            "patient_sex", "participant_gender"),
    "site": ("site", "site_id", "siteid", "scan_site", "scanning_site", "center", "centre",
             "study_site", "acquisition_site", "site_name"),
    "family_id": ("family_id", "familyid", "family", "fam_id", "famid", "rel_family_id"),
    "split_group": ("split_group",),
}
_BY_NAME = {name: role for role, names in _ROLES.items() for name in names}
_RANK = {name: rank for names in _ROLES.values() for rank, name in enumerate(names)}
_SPOKEN = re.compile(r"\(([^)]*=[^)]*)\)|\[([^\]]*=[^\]]*)\]")
_CONCEPTION = re.compile(r"(?i)post[- ]?menstrual|gestation|conception|\bPM[AW]\b|\bGA\b")
_PIECE = re.compile(r"(\d+(?:[.,]\d+)?)\s*([a-zäöü]+)\.?")
_CODE = re.compile(r"\s*([\w.+-]+)\s*[=:]\s*([^,;/]+)")


def plain(name: str) -> str:
    """A column's name in lower case with underscores: AgeAtScan, "age at scan" -> age_at_scan."""
    apart = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    return re.sub(r"[^0-9a-zäöüß]+", "_", apart.lower()).strip("_")


def role(column: str) -> tuple[str, int] | None:
    """What a column of people is, and its rank among those of the role; None: something else.

    >>> role("Gender"), role("age_at_scan"), role("age_of_onset")
    (('sex', 1), ('age', 4), None)
    """
    bare = re.sub(r"\s*[\[(].*", "", column) or column
    names = plain(bare), plain(bare).replace("_", "")
    for name in names:
        if name in _BY_NAME:
            return _BY_NAME[name], _RANK[name]
    words = names[0].split("_")
    if names[0] == "age":
        return "age", 0
    if "age" in words and names[0] not in _NO_AGES and set(words) - {"age"} <= _BESIDE_AGE:
        return "age", 1 + len(words)
    if names[1] in ("ageyears", "agemonths", "ageweeks", "agedays"):
        return "age", 3
    return None


def roles(columns: list[str]) -> dict[str, str]:
    """Column by role: of several of one role the best named."""
    best: dict[str, tuple[int, str]] = {}
    for column in columns:
        if found := role(column):
            name, rank = found
            if name not in best or rank < best[name][0]:
                best[name] = rank, column
    return {name: column for name, (_, column) in best.items()}


# ---- units and codes -----------------------------------------------------------------------------

def unit_of(text: str) -> str | None:
    """years, months, weeks or days, where a text names one of them: "months", "Age in weeks".

    "" where it names an age counted from conception, of which the age since birth is not known.
    """
    if _CONCEPTION.search(text):
        return ""
    whole = _UNITS.get(text.strip().strip(".()[]").lower())
    if whole:
        return whole
    measures = re.sub(r"\d[- ]?[a-z]+", "", text.lower())  # "within 3 months of ..." is no unit
    found = {_UNITS[word] for word in re.findall(r"[a-z]+", measures)
             if len(word) > 1 and word in _UNITS}
    return found.pop() if len(found) == 1 else None


@dataclass
class Meaning:
    """What a data dictionary, or the column's own name, says of a column."""

    unit: str | None = None  # of an age: a key of _A_YEAR; "" from conception; None: not told
    told_unit: str | None = None  # as it stands there
    levels: dict[str, str] = field(default_factory=dict)  # words by code, codes in lower case

    def word(self, value: str | None) -> str | None:
        """The word for a code, or the value itself; None where the word says that it is missing."""
        if value is None or not self.levels:
            return value
        number = as_float(value)
        keys = [value.lower(), *([f"{number:g}", f"{number:.1f}"] if number is not None else [])]
        word = next((self.levels[key] for key in keys if key in self.levels), value)
        return None if is_missing_word(word) else word


def is_missing_word(word: str) -> bool:
    """Whether a level's word says that nothing is known; "none" says that there is none of it."""
    return word.lower().strip() in MISSING - {"none"} or re.match(
        r"(?i)\W*(missing|unknown|not (available|known|applicable|recorded|reported|done|assessed)"
        r"|n/?a\b|no (data|answer|response)|refus|prefer(red)? not|declined|do(n't| not) know)",
        word) is not None


def meaning(column: str, described: Any) -> Meaning:
    """Of a column, by its name and by its entry in a data dictionary (participants.json)."""
    entry = {str(key).lower(): value for key, value in described.items()
             } if isinstance(described, dict) else {}
    found = Meaning(levels=_levels(entry.get("levels")) or _spoken(column))
    told = str(entry.get("units") or entry.get("unit") or "").strip()
    levels = entry.get("levels")
    texts = [told, *([levels] if isinstance(levels, str) else [str(each) for each in levels]
                     if isinstance(levels, list | dict) and len(levels) == 1 else []),
             *re.findall(r"[\[(]([^)\]]*)[)\]]", column), plain(column).replace("_", " "),
             *(str(entry.get(key) or "") for key in ("longname", "description"))]
    found.told_unit = told or None
    described_text = " ".join(texts[1:])
    for text in texts:
        found.unit = unit_of(text)
        if found.unit is not None:
            break
    if _CONCEPTION.search(described_text) or column.lower() in ("pma", "ga"):
        found.unit = ""
    if found.unit is None and not told:
        found.unit = _UNITS_BY_NAME.get(plain(column), "years")
    return found


def _levels(levels: Any) -> dict[str, str]:
    """{"1": "male"} or {"1": {"Description": "male"}}; a level told by itself is its own word."""
    if not isinstance(levels, dict):
        return {}
    words = {}
    for code, word in levels.items():
        if isinstance(word, dict):
            word = word.get("Description") or word.get("LongName") or code
        text = "" if word is None else str(word).strip()
        words[str(code).strip().lower()] = text or str(code)
    return words


def _spoken(column: str) -> dict[str, str]:
    """Codes in a header: "SEX_ID (1=m, 2=f)"."""
    inside = _SPOKEN.search(column)
    if not inside:
        return {}
    return {code.lower(): word.strip()
            for code, word in _CODE.findall(inside[1] or inside[2])}


# ---- values --------------------------------------------------------------------------------------

def sex(word: str) -> str | None:
    """F or M of a word in a language or two; None of a code, of both ("M/F") or anything else."""
    parts = re.split(r"[^a-zäöü]+", word.strip().lower())
    told = {_SEXES[part] for part in parts if part in _SEXES}
    return told.pop() if len(told) == 1 and parts[0] in _SEXES else None


def years(text: str, unit: str = "years") -> tuple[float | None, str]:
    """An age in years, or None and why.

    ``unit`` holds for bare numbers; "9 months", "P9M", "009M" and "3y 6m" carry their own.

    >>> years("96", "months"), years("P1Y6M")
    ((8.0, ''), (1.5, ''))
    """
    word = text.strip().lower()
    value = as_float(word)
    if value is not None:
        age = value / _A_YEAR[unit]
        if value < 0 or re.fullmatch(r"9{3,}(\.0+)?", word):
            return None, "a code for missing (such as -9)"
    elif (parsed := _spelt(word)) is not None:
        age = parsed
    elif re.fullmatch(r"\D*\d+([.,]\d+)?\s*(-|\u2013|to|bis)\s*\d+([.,]\d+)?\D*", word):
        return None, "a range"
    else:
        return None, "not a number of years (such as 89+)"
    if not 0 <= age <= OLDEST:
        return None, f"not plausible in {unit}" if value is not None else "not plausible"
    return (age if unit == "years" and value is not None else round(age, 4)), ""


def _spelt(word: str) -> float | None:
    """Years of an age with units of its own, ISO 8601, DICOM or in words; None if it is none."""
    iso = re.fullmatch(r"p(?=\d)(?:([\d.,]+)y)?(?:([\d.,]+)m)?(?:([\d.,]+)w)?(?:([\d.,]+)d)?"
                       r"(?:t.*)?", word)
    if iso:
        pieces = [(each, unit) for each, unit in zip(iso.groups(), _A_YEAR, strict=True) if each]
    else:
        rest = re.sub(r"\b(old|of age|and|ca|about)\b|[,.;]\s|\.$", " ", f"{word} ").strip()
        found = _PIECE.findall(rest)
        if not found or _PIECE.sub("", rest).strip() or any(
                unit not in _UNITS for _, unit in found):
            return None
        pieces = [(each, _UNITS[unit]) for each, unit in found]
    if any(as_float(each) is None for each, _ in pieces):
        return None
    return sum((as_float(each) or 0.0) / _A_YEAR[unit] for each, unit in pieces)
