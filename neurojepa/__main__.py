"""Use what pretraining made: the tasks on frozen weights, and the weights themselves.

    neurojepa probe --weights DIR --feed FEED --out DIR
    neurojepa weights export RUN --out DIR

``neurojepa TASK --help`` says more about one.  The same as python -m neurojepa.downstream and
python -m neurojepa.weights.
"""

from __future__ import annotations

import argparse
import sys

from neurojepa.errors import run_command

TASKS = ("embed", "probe", "reliability", "survive", "change",
         "transfer", "fuse", "explain", "depart", "finetune", "complete",
         "register", "segment", "atoms")


def main(argv: list[str] | None = None) -> int:
    """Hand the words on to the command that they name; returns its exit status."""
    parser = argparse.ArgumentParser(prog="neurojepa", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=(*TASKS, "weights"))
    words = sys.argv[1:] if argv is None else argv
    task = parser.parse_args(words[:1]).task
    if task == "weights":
        from neurojepa import weights

        return weights.main(words[1:])
    from neurojepa.downstream import __main__ as downstream

    return downstream.main(words)


def command() -> None:
    """The console script."""
    run_command(main)


if __name__ == "__main__":
    command()
