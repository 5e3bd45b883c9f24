"""Names that are legal and that careless code takes for something else."""

from __future__ import annotations

import unicodedata

ODD_NAMES = {
    "brackets": "MPRAGE [ND]", "range": "a[0-9]", "open": "half [", "star": "T1 *GRE*",
    "question": "why?", "hash": "run #1", "percent": "100%25 %s", "chain": "ab::c",
    "blanks": " two  blanks ", "braces": "{0..9}", "amp": "a&b=c;d+e", "quote": "it's \"x\"",
    "nfc": unicodedata.normalize("NFC", "Müller Å"),
    "nfd": unicodedata.normalize("NFD", "Müller Å"), "long": "x" * 200, "tilde": "~root",
    "hangul": "뇌 영상",
}
