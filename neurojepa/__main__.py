"""``neurojepa COMMAND``: use what pretraining made.  The commands: downstream/__main__.py."""

from __future__ import annotations

from neurojepa.downstream.__main__ import main
from neurojepa.errors import run_command


def command() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    command()
