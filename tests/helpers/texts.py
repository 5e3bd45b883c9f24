"""What a text says beside its hashes and pictures, in which any few letters can come up."""

from __future__ import annotations

import re


def without_hashes(text: str) -> str:
    """The text without hexadecimal runs of 16 or more and without the data of pictures."""
    return re.sub(r"[0-9a-f]{16,}|data:image/[^'\")]*", "", text)
