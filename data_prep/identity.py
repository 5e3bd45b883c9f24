"""Pseudonyms: HMAC-SHA256 of (cohort, original id) under the site's own key.

The key is the only way from an original id to its pseudonym.  It lies in one file of mode 0600
and is never written anywhere else, printed or logged; who loses it can no longer add to, or
withdraw from, what was made with it.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from neurojepa.errors import ConfigError

KEY_VARIABLE = "NEUROJEPA_KEY_FILE"
DEFAULT_KEY_FILE = "~/.config/neurojepa/pseudonym.key"
_SHORTEST_KEY = 16  # bytes


def load_key(path: str | None, make: bool = True) -> bytes:
    """The site's key from ``path``, else $NEUROJEPA_KEY_FILE, else the default place.

    A file named by ``path`` must exist; the other two are made on first use (and say so), unless
    ``make`` is false.

    Raises
    ------
    ConfigError
        The file is missing, too short, or readable by other users.
    """
    file = Path(path or os.environ.get(KEY_VARIABLE) or DEFAULT_KEY_FILE).expanduser()
    if not file.exists():
        if path or not make:
            raise ConfigError(f"{file}: no such key; name the key file of this site by --key or "
                              f"{KEY_VARIABLE} (index makes one at {DEFAULT_KEY_FILE})")
        _make_key(file)
    try:
        mode = file.stat().st_mode
        key = file.read_bytes().strip()
    except OSError as error:
        raise ConfigError(f"{file}: the key cannot be read ({error.strerror})") from error
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        raise ConfigError(f"{file}: other users can read this key; run: chmod 600 {file}")
    if len(key) < _SHORTEST_KEY:
        raise ConfigError(f"{file}: {len(key)} bytes are too few for a key; at least "
                          f"{_SHORTEST_KEY} are needed")
    return key


def _make_key(file: Path) -> None:
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        descriptor = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w") as stream:
            stream.write(secrets.token_hex(32) + "\n")
    except FileExistsError:
        return  # another process was first; its key is the site's
    except OSError as error:
        raise ConfigError(f"{file}: the key cannot be made ({error.strerror}); name a writable "
                          f"place in {KEY_VARIABLE}") from error
    print(f"made a new pseudonym key at {file}: keep it safe and private, all pseudonyms and "
          "splits depend on it")


def pseudonym(key: bytes, cohort: str, original: str) -> str:
    """16 hexadecimal digits that stand for a person (or a group of people) of a cohort."""
    return hmac.new(key, f"{cohort}|{original}".encode(), hashlib.sha256).hexdigest()[:16]
