"""JSON beside scans and tables, as converters, scanners and people write it.

What BIDS wants is UTF-8 and strict.  Here Latin-1 and UTF-16, control characters inside strings,
lone backslashes and trailing commas are understood too, and numbers that came as strings or in
lists of one are numbers.
"""

from __future__ import annotations

import json
import re
from typing import Any

from data_prep.delimited import decoded
from data_prep.tables import as_float

Loaded = tuple[dict[str, Any] | None, list[str]]  # what it says, and what had to be mended
NUMBERS = {"RepetitionTime", "EchoTime", "SliceThickness", "MagneticFieldStrength",
           "RadionuclideHalfLife", "InjectedRadioactivity", "BodyWeight", "InjectionStart"}
TEXTS = {"Manufacturer", "ManufacturersModelName", "DeviceSerialNumber", "InstitutionName",
         "TracerName", "Units", "MRAcquisitionType", "InjectedRadioactivityUnits"}
LISTS = {"FrameTimesStart", "FrameDuration", "VolumeTiming"}
_LONGEST_TEXT = 500
_TO_STANDARD = {"ms": 1e-3, "msec": 1e-3, "us": 1e-6, "min": 60.0, "g": 1e-3,
                **dict.fromkeys(("", "s", "sec", "seconds", "t", "tesla", "mm", "kg", "mbq", "bq"),
                                1.0)}
_MEASURE = re.compile(r"\s*([+-]?[\d.,]+(?:e[+-]?\d+)?)\s*([a-z]*)\s*", re.IGNORECASE)
_STRING = re.compile(r'"(?:[^"\\]|\\.)*"', re.DOTALL)
_TRAILING = re.compile(r",(?=\s*[}\]])")
_LONE_BACKSLASH = re.compile(r'\\(?!["\\/bfnrt]|u[0-9a-fA-F]{4})')


def load_json(data: bytes) -> Loaded:
    """The object in a JSON text, and notes on what had to be mended; None where there is none."""
    text, encoding = decoded(data)
    notes = [] if encoding == "utf-8" else [f"is {encoding}, not UTF-8: decoded"]
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        try:
            content = json.loads(_mended(text), strict=False)
            notes.append("is not strict JSON (control characters, backslashes or commas): mended")
        except (ValueError, RecursionError):
            return None, []
    return (content, notes) if isinstance(content, dict) else (None, [])


def _mended(text: str) -> str:
    """Without lone backslashes in strings, and without commas before a closing bracket."""
    pieces, at = [], 0
    for match in _STRING.finditer(text):
        pieces += [_TRAILING.sub("", text[at:match.start()]),
                   _LONE_BACKSLASH.sub(r"\\\\", match[0])]
        at = match.end()
    return "".join([*pieces, _TRAILING.sub("", text[at:])])


def plain_facts(facts: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Facts whose numbers are numbers and whose texts are texts, and the keys whose values are not.

    "2.0", [2.0], "2 s" and "2000 ms" are 2.0; of several different numbers in a list none is
    taken, for it is not told which is the scan's.
    """
    kept, odd = {}, []
    for key, value in facts.items():
        plain: Any = value
        if key in NUMBERS:
            plain = _number(value)
        elif key in TEXTS:
            plain = _text(value)
        elif key in LISTS:  # of what is no list of numbers, preparation says what is wrong
            plain = _numbers(value) or value
        if plain is not None:
            kept[key] = plain
        elif value not in (None, "", [], {}) and str(value).strip().lower() not in ("n/a", "nan"):
            odd.append(key)
    return kept, odd


def _text(value: Any) -> str | None:
    """A line of text; serial numbers may come as numbers."""
    if isinstance(value, list) and len(value) == 1:
        return _text(value[0])
    if isinstance(value, bool) or not isinstance(value, str | int):
        return None
    text = str(value).strip()
    return text if 0 < len(text) <= _LONGEST_TEXT and text.isprintable() else None


def _number(value: Any) -> Any:
    if isinstance(value, bool):
        return None
    if isinstance(value, int | float):
        return value if as_float(value) is not None else None
    if isinstance(value, list):
        found = {_number(each) for each in value}
        return found.pop() if len(found) == 1 else None
    match = _MEASURE.fullmatch(value) if isinstance(value, str) else None
    factor = _TO_STANDARD.get(match[2].lower()) if match else None
    number = as_float(match[1]) if match else None
    return None if number is None or factor is None else number * factor


def _numbers(value: Any) -> list[Any] | None:
    if isinstance(value, str):
        value = [each for each in re.split(r"[\s;,\[\]]+", value) if each]
    found = [_number(each) for each in (value if isinstance(value, list) else [value])]
    return found if found and None not in found else None
