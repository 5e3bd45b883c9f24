"""The unit of a PET image, from the many ways in which sidecars spell it."""

from __future__ import annotations

import re
from typing import NamedTuple

ACTIVITY, COUNTS, SUV, SUVR = "Bq/mL", "counts", "g/mL", "SUVR"

_WORDS = (  # spelling, after lower case and without spaces, to its short form
    (r"[µμ]", "u"), (r"³", "3"), (r"⁻¹", "-1"), (r"[-_]?per[-_]?", "/"), (r"becquerels?", "bq"),
    (r"curies?", "ci"), (r"kilo", "k"), (r"mega", "m"), (r"giga", "g"), (r"nano", "n"),
    (r"micro", "u"), (r"millilit(?:er|re)s?|mls?\b", "ml"),
    (r"cubiccentimet(?:er|re)s?|cm(?:\^|\*\*)?3|ccs?\b", "ml"),
    (r"cubicmillimet(?:er|re)s?|mm(?:\^|\*\*)?3", "ul"), (r"lit(?:er|re)s?", "l"))
# Bq and mL of a prefix; "m" before Bq is mega: no image is counted in millibecquerels
_BQ = {"bq": 1.0, "kbq": 1e3, "mbq": 1e6, "gbq": 1e9, "nci": 37.0, "uci": 37e3, "mci": 37e6}
_ML = {"ml": 1.0, "l": 1e3, "ul": 1e-3}
_DENSITY = re.compile(rf"({'|'.join(_BQ)})[/*.]?(?:({'|'.join(_ML)})(?:\^|\*\*)?(-1)?)?")
_SUV = {"suv", "suvbw", "suvbwg/ml", "suvlbm", "suvbsa", "g/ml", "gml", "gml-1", "g*ml-1",
        "g/mlsuv", "suvg/ml", "standardizeduptakevalue", "standardiseduptakevalue"}
_SUVR = {"suvr", "suvratio", "ratio", "unitlesssuvr", "suvrratio", "standardizeduptakevalueratio",
         "standardiseduptakevalueratio"}
_COUNTS = {"count", "counts", "cnts", "propcnts", "propcounts", "cps", "counts/s", "counts/sec",
           "cnts/s", "counts/second", "proportionaltocounts"}


class Unit(NamedTuple):
    """What an image counts in, and what its values times ``factor`` count in."""

    name: str  # ACTIVITY, COUNTS, SUV or SUVR
    factor: float


def unit_of(text: object) -> Unit | None:
    """The unit that a spelling means; None where it is none of those on which a ratio rests.

    >>> unit_of("kBq/cc")
    Unit(name='Bq/mL', factor=1000.0)
    """
    if isinstance(text, list | tuple) and len(text) == 1:
        text = text[0]
    plain = re.sub(r"[\s\[\](){}]", "", str(text or "").lower())
    for spelling, short in _WORDS:
        plain = re.sub(spelling, short, plain)
    for names, unit in ((_SUVR, SUVR), (_SUV, SUV), (_COUNTS, COUNTS)):
        if plain in names or re.sub(r"[^a-z0-9/]", "", plain) in names:
            return Unit(unit, 1.0)
    found = _DENSITY.fullmatch(plain)
    if not found or (found[3] and "/" in plain) or not found[2]:
        return None
    return Unit(ACTIVITY, _BQ[found[1]] / _ML[found[2]])
