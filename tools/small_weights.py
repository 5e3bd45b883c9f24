"""Make the small weights that the package ships: synthetic people -> run -> weights with a card.

    python -m tools.small_weights [--work DIR] [--out DIR]

People and recipe are those of the shared code in ``python -m tools.bench compare``, so the work
folder of that serves here too (build/bench-compare/full).  What is finished is not done again.
Half an hour of CPU time: people 20 minutes, training 3, places and probes the rest.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from neurojepa.errors import run_command
from tools.bench._people import Cohort, make_people
from tools.bench._runs import command, write_recipe

NAME = "synthetic-tiny"
OUT = f"neurojepa/pretrained/{NAME}"
STEPS, RATE, SEED = 510, 1e-3, 0
RECIPE: dict[str, Any] = {"objective.masks": {"scales": [[500, 0.0, 0.001]]},
                          "objective.sparse.visible": 1.0}  # so that scans have atoms, too
LABELS = ("age", "sex", "diagnosis")
ABOUT = """**Made from synthetic people alone, to try the commands with.** The network has seen no
real scan. It learnt for two CPU minutes from 500 people whose heads are mixtures of seven label
maps, and is tested on 500 people made from three others. The label maps are those that SynthSeg
was trained with (B. Billot et al., github.com/BBillot/SynthSeg, Apache-2.0); where they are not at
hand, anatomies made from the MNI152 template take their place. Preparation was skipped and its
errors drawn instead. The weights know T1w, T2w and FLAIR. As the table below shows, probes tell no
more from them than from the same network untrained: do not use them in a study.

They are a run of `python -m tools.bench compare` ("shared code", seed 0);
`python -m tools.small_weights` trains by the same recipe on the same people."""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.small_weights", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("build/small-weights"), metavar="DIR",
                        help="where people and run are kept (default: build/small-weights)")
    parser.add_argument("--out", default=OUT, metavar="DIR", help="of the weights (default: "
                        f"{OUT})")
    arguments = parser.parse_args(argv)
    work, out = arguments.work.resolve(), str(Path(arguments.out).resolve())
    feed = make_people(Cohort(), work, len(os.sched_getaffinity(0)))
    folder = work / NAME
    write_recipe(folder, feed, steps=STEPS, rate=RATE, seed=SEED, overrides=RECIPE)
    command(folder / "log.txt", "neurojepa.pretrain", "--config", str(folder / "recipe.yaml"))
    command(folder / "export.txt", "neurojepa.weights", "export", str(folder / "run"), "--out", out)
    finish(out, feed, folder)
    return 0


def finish(out: str, feed: str, folder: Path) -> None:
    """Probe the exported weights and complete their card; ``folder`` keeps the probes' page."""
    command(folder / "probe.txt", "neurojepa", "probe", "--weights", out, "--feed", feed,
            "--modality", "T1w", "--labels", *LABELS, "--out", str(folder / "probe"))
    (folder / "about.md").write_text(ABOUT)
    command(folder / "card.txt", "neurojepa.weights", "card", out, "--licence", "apache-2.0",
            "--results", str(folder / "probe" / "results.json"), "--about",
            str(folder / "about.md"))


if __name__ == "__main__":
    run_command(main)
