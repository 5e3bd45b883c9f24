"""The command ``finetune``: its arguments, and what starts it."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from neurojepa.downstream.commands import apply_arguments, positive_argument, table_arguments
from neurojepa.errors import ConfigError

if TYPE_CHECKING:
    from neurojepa.train.world import World


def add_finetune(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the parser of ``finetune``."""
    parser = commands.add_parser("finetune", help="fit the encoder itself to a label, and apply it")
    parts = parser.add_subparsers(dest="part", required=True)
    fit = parts.add_parser("fit", help="fine-tune weights to a label of your table")
    fit.add_argument("feed", metavar="FEED", help="a packed feed, or a folder that embed wrote "
                     "from scans")
    fit.add_argument("--weights", required=True, help="exported weights to begin at")
    fit.add_argument("--out", required=True, help="folder for the model; the same command goes on "
                     "where it was killed")
    table_arguments(fit)
    fit.add_argument("--label", required=True, help="its column to be told")
    positive_argument(fit)
    fit.add_argument("--session", help="its column of visits, where labels change with them")
    fit.add_argument("--modality", nargs="+", help="modalities that are read together where they "
                     "are there (default: all that the weights know)")
    fit.add_argument("--cohort", help="only this cohort of the feed; default: all")
    fit.add_argument("--epochs", type=int, default=20, help="at most (default: 20)")
    fit.add_argument("--allow-seen", action="store_true", help="test people who were in the "
                     "pretraining, too; the report says so")
    fit.add_argument("--ranks", type=int, default=1, help="processes of this machine, each with a "
                     "GPU where there are some (default: 1); torchrun, deepspeed and srun start "
                     "them, too")
    apply = parts.add_parser("apply", help="what a fine-tuned model tells of scans")
    apply_arguments(apply, "M")


def run_finetune(arguments: argparse.Namespace) -> int:
    return (_apply if arguments.part == "apply" else _fit)(arguments)


def _apply(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream.api import load_model
    from neurojepa.downstream.predicted_page import write_predicted

    found = load_model(arguments.model, arguments.device).predict(
        arguments.scans, out=arguments.out, modality=arguments.modality, preset=arguments.preset,
        key=arguments.key)
    without = sum(bool(row["why_not"]) for row in found.rows)
    print(f"{found.task.label}: {len(found.values)} predictions, {without} without a usable scan")
    write_predicted(arguments.out, found, {"model": arguments.model, "scans": arguments.scans})
    return 0


def _fit(arguments: argparse.Namespace) -> int:
    from neurojepa.downstream.finetune_run import Request, tune
    from neurojepa.train.slurm import slurm_ranks

    if arguments.ranks < 1 or arguments.epochs < 1:
        raise ConfigError(f"--ranks {arguments.ranks}, --epochs {arguments.epochs}: take 1 or more")
    os.environ.update(slurm_ranks(os.environ, "env"))
    if arguments.ranks > 1 and "RANK" not in os.environ:
        return _launch(arguments)
    tune(Request(**{name: getattr(arguments, name) for name in Request.__annotations__}), _world())
    return 0


def _launch(arguments: argparse.Namespace) -> int:
    """The same command by several ranks of this machine."""
    from neurojepa.train.launch import launch
    from neurojepa.weights import load

    config = load(arguments.weights).config
    config = config.model_copy(update={"run": config.run.model_copy(
        update={"launcher": "local", "ranks": arguments.ranks})})
    return launch(config, "neurojepa.downstream", arguments.words)


def _world() -> World:
    """Ours among the ranks that a launcher started, or alone, which needs no DeepSpeed."""
    import torch

    from neurojepa.train.world import World, start_world

    if "RANK" in os.environ:
        return start_world()
    return World(rank=0, size=1, device=torch.device("cuda" if torch.cuda.is_available() else
                                                     "cpu"), control=None)
