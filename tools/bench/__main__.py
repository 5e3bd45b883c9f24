"""python -m tools.bench NAME [--quick] [--official DIR]

Prints what was measured beside its peer and, as the last line, one JSON object.  DIR is a checkout
of the official Neuro-JEPA repository (the folder that holds src/); without it the stand-in that a
benchmark names is measured and the official figures are null.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
from pathlib import Path

import tools.bench
from neurojepa.errors import ConfigError, run_command

HELPERS = {"__main__", "common", "official", "victim"}
NAMES = sorted(module.name for module in pkgutil.iter_modules(tools.bench.__path__)
               if module.name not in HELPERS and not module.name.startswith("_"))


def main(argv: list[str] | None = None) -> int:
    """Run one benchmark."""
    parser = argparse.ArgumentParser(prog="python -m tools.bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("--quick", action="store_true", help="smaller, for a first look")
    parser.add_argument("--official", type=Path, metavar="DIR")
    parser.add_argument("--work", metavar="DIR", help="compare, downstream, explain, quality, "
                        "readout, register, segment, soak: where runs are kept (default: "
                        "build/bench-NAME); codes, people: the folder of compare")
    parser.add_argument("--feed", help="compare, explain: your own packed feed in place of "
                        "synthetic people")
    parser.add_argument("--weights", help="explain, register, segment: exported weights (explain: "
                        "default untrained; the others: add rows that use their tokens)")
    parser.add_argument("--finished", action="store_true", help="compare, downstream: make no more "
                        "runs, only the tables of those that are there")
    parser.add_argument("--dose", choices=("small", "medium", "large"), help="compare: of what "
                        "scanners add to its people (default: medium)")
    parser.add_argument("--budget", type=float, choices=(60, 120, 360), help="compare: CPU seconds "
                        "of training for each way (default: 120)")
    parser.add_argument("--size", choices=("tiny", "small"), help="compare: of the encoder "
                        "(default: tiny; small wants a GPU)")
    parser.add_argument("--rehearse", action="store_true", help="gpu: every stage at a tiny size, "
                        "with or without a GPU")
    parser.add_argument("--faults", type=int, metavar="N", help="soak: how many (default: 60)")
    parser.add_argument("--seed", type=int, metavar="S", help="soak: of the plan (default: 1)")
    parser.add_argument("--minutes", type=float, metavar="M", help="soak: begin no round "
                        "later than this; the same command goes on")
    parser.add_argument("--on", choices=("hosts", "ray"), help="soak: where (default: hosts)")
    arguments = parser.parse_args(argv)
    official = arguments.official
    if official is not None and not (official / "src/neurojepa").is_dir():
        raise ConfigError(f"--official {official}: holds no src/neurojepa; name a checkout of the "
                          "official repository")
    if arguments.work and arguments.name not in ("codes", "compare", "downstream", "explain",
                                                    "people", "quality", "readout", "register",
                                                    "segment", "soak"):
        raise ConfigError(f"--work {arguments.work}: {arguments.name} keeps nothing")
    for option, *owners in (("feed", "compare", "explain"), ("weights", "explain", "register",
                             "segment"),
                            ("finished", "compare", "downstream"), ("dose", "compare"),
                            ("budget", "compare"), ("size", "compare"), ("rehearse", "gpu"),
                            ("faults", "soak"), ("seed", "soak"), ("minutes", "soak"),
                            ("on", "soak")):
        if _given(value := getattr(arguments, option)) and arguments.name not in owners:
            raise ConfigError(f"--{option} {value}: {arguments.name} has no use for it; only "
                              f"{' and '.join(owners)} {'do' if len(owners) > 1 else 'does'}")
    module = importlib.import_module(f"tools.bench.{arguments.name}")
    options = {name: value for name in ("work", "feed", "weights", "finished", "dose", "budget",
                                        "size", "rehearse", "faults", "seed", "minutes", "on")
               if _given(value := getattr(arguments, name))}
    print(json.dumps(module.run(arguments.quick, None if official is None else str(official),
                                **options)))
    return 0


def _given(value: object) -> bool:
    return value is not None and value is not False  # 0 is a seed


if __name__ == "__main__":
    run_command(main)
