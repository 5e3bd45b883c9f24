"""Pretrain a sparse JEPA on a feed; the same command continues an interrupted run.

    python -m neurojepa.pretrain --config configs/demo.yaml data.feed=FEED run.dir=runs/a
    deepspeed --num_gpus 2 --module neurojepa.pretrain --config configs/demo.yaml ...
    srun --ntasks 16 python -m neurojepa.pretrain --config configs/demo.yaml ...
    python -m neurojepa.pretrain --config ... run.launcher=local run.ranks=2
    python -m neurojepa.pretrain --config ... --dry-run --gpus 64     # what it will cost

Exit status: 0 finished, 2 bad input (one line says what), 75 stopped by SIGTERM or SIGUSR1 after
a checkpoint.
"""

from __future__ import annotations

import argparse
import atexit
import gc
import os
import sys

from neurojepa.config import RootConfig, load_config
from neurojepa.errors import ConfigError, run_command

PLANNED = ("gpus", "device", "mfu", "network", "fit")  # what --dry-run can be asked


def main(argv: list[str] | None = None) -> int:
    """Run, or start the ranks that do; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m neurojepa.pretrain", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="recipe: a YAML file, or the name of one "
                        "that comes with the package, for example demo")
    parser.add_argument("--local_rank", help="given by the deepspeed launcher; not used")
    parser.add_argument("--dry-run", action="store_true",
                        help="print model size, compute, memory, time and exit; reads no voxels")
    plan = parser.add_argument_group("only with --dry-run", argument_default=argparse.SUPPRESS)
    plan.add_argument("--gpus", type=int, metavar="N",
                      help="ranks to plan for (default: run.ranks)")
    plan.add_argument("--device", help="to plan for (default: h100)")
    plan.add_argument("--mfu", type=float, metavar="SHARE",
                      help="of the device's bf16 peak that is reached (default: 0.4)")
    plan.add_argument("--network", metavar="NAME", help="nvlink, infiniband-400g or efa: how the "
                      "step scales on it to 1,024 GPUs, by count")
    plan.add_argument("--fit", action="store_true",
                      help="the largest train.micro_batch that fits the device")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value",
                        help="values that differ from the recipe, for example train.steps=100")
    arguments = parser.parse_intermixed_args(argv)
    planned = {name: getattr(arguments, name) for name in PLANNED if name in arguments}
    if planned and not arguments.dry_run:
        given = ", ".join(f"--{name}" for name in planned)
        raise ConfigError(f"{given}: only for --dry-run; add that to plan, or leave out {given} to "
                          "train")
    config = load_config(arguments.config, arguments.overrides)
    if config.model.official:
        raise ConfigError("model.official: this network is there for converted weights and is not "
                          "trained; leave the key out")
    if arguments.dry_run:
        from neurojepa.dry_run import dry_run

        return dry_run(config, **planned)
    from neurojepa.train.slurm import slurm_ranks

    os.environ.update(slurm_ranks(os.environ, config.run.launcher))
    if already_finished(config):
        from neurojepa.train.resume import check_same_recipe

        check_same_recipe(config)
        if os.environ.get("RANK", "0") == "0":
            print(f"{config.run.dir}: already finished at step {config.train.steps}; choose "
                  "another run.dir or raise train.steps")
        return 0
    if config.run.launcher != "env" and "RANK" not in os.environ:
        from neurojepa.train.launch import launch

        return launch(config, "neurojepa.pretrain", argv)
    from neurojepa.train.loop import train
    from neurojepa.train.world import leave_world

    gc.enable()
    status = train(config)
    leave_world()
    return status


def already_finished(config: RootConfig) -> bool:
    """Whether the last event of training in run.dir is the end of this many steps."""
    from neurojepa.storage import Patience, join, read_rows

    events = join(config.run.dir, "events.jsonl")
    rows = [row for row in Patience(config.data.retry_s)(lambda: read_rows(events))
            if row.get("event") in ("start", "resume", "stop", "finish")]
    return bool(rows) and rows[-1]["event"] == "finish" and \
        rows[-1]["step"] == config.train.steps


def command() -> None:
    """The console script, and ``python -m neurojepa.pretrain``."""
    # Half a million objects stay from import to exit: to look for cycles among them takes seconds.
    gc.disable()
    atexit.register(gc.freeze)
    run_command(main, teardown=False)


if __name__ == "__main__":
    command()
