"""How a command ends."""

from __future__ import annotations

import pytest

from neurojepa.errors import run_command


def test_a_pipe_that_breaks_elsewhere_is_not_taken_for_a_reader_who_left() -> None:
    def main() -> int:
        raise BrokenPipeError("to a worker")

    with pytest.raises(BrokenPipeError, match="to a worker"):
        run_command(main)
