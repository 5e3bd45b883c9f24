"""Files of a source that are not looked at, and how they are counted: hidden, ignored, no text."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from data_prep.filenames import is_hidden
from neurojepa.errors import DataError
from neurojepa.storage import join, read_if_there

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

IGNORE = ".bidsignore"
HIDDEN = "hidden file (._NAME, .DS_Store, __MACOSX ...): skipped"


class LeftOut:
    """Says of each path below a source whether it is looked at; counts in ``notes`` what is not."""

    def __init__(self, notes: Counter[str]) -> None:
        self.notes = notes
        self._listed: set[str] = set()
        self._ignored: GitIgnoreSpec | None = None

    def obey_bidsignore(self, uri: str) -> None:
        """From now on leave out what the .bidsignore of the source ``uri`` names, if it has one.

        Its lines are patterns as in a .gitignore, of paths below the source.

        Raises
        ------
        DataError
            A line is no such pattern, or the file is not UTF-8.
        """
        from pathspec import GitIgnoreSpec

        place = join(uri, IGNORE)
        try:
            lines = (read_if_there(place) or b"").decode("utf-8-sig").splitlines()
            self._ignored = GitIgnoreSpec.from_lines(lines) if lines else None
        except ValueError as error:
            raise DataError(f"{place}: cannot be understood ({error}); its lines are patterns as "
                            "in a .gitignore") from error

    def looks_at(self, path: str, is_folder: bool = False) -> bool:
        """Whether a file or folder is looked at; what is not is counted."""
        kind = "folder" if is_folder else "file"
        if path == IGNORE:
            return False
        if is_hidden(path):
            why = HIDDEN.replace("file", kind, 1)
        elif not is_folder and self._ignored and self._ignored.match_file(path):
            why = f"file that {IGNORE} names: left out"
        elif not _is_utf8(path):
            why = f"{kind} whose name is not UTF-8: not taken; rename it"
        else:
            return True
        if path.rpartition("/")[0] not in self._listed:
            self.notes[why] += 1
        return False

    def has_listed(self, folder: str) -> None:
        """What is left out directly in this folder has been counted, and is not again."""
        self._listed.add(folder)


def first_hidden(folders: list[str]) -> str:
    """The path of the outermost hidden folder among nested ones; "" for none."""
    return next(("/".join(folders[:number + 1]) for number, name in enumerate(folders)
                 if is_hidden(name)), "")


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes of a local name that are no text
        return False
    return True
