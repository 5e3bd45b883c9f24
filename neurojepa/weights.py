"""Export a run's weights for use, load them, check the checkpoints they come from.

    python -m neurojepa.weights export RUN --out DIR [--step N]
    python -m neurojepa.weights verify RUN

DIR gets model.safetensors (fp32: encoder, its EMA ``target``, predictor, code, router biases),
README.md (the model card) and, last, config.json (resolved config, grid, step, feed).
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from typing import Any

import torch

from neurojepa.config import RootConfig, validate
from neurojepa.errors import CheckpointError, DataError, run_command
from neurojepa.feed.format import Grid, grid_from_record
from neurojepa.methods import METHODS
from neurojepa.model.averaged import Averaged
from neurojepa.model.build import build_model
from neurojepa.storage import join, read_bytes, sha256, write_bytes


@dataclass(frozen=True)
class Weights:
    """A model with what it was trained on.  ``model`` is in evaluation mode, on the CPU, fp32."""

    model: Averaged
    config: RootConfig
    grid: Grid
    step: int


def export(run_dir: str, out: str, step: int | None = None) -> int:
    """Write the weights of a committed checkpoint (default: the latest); returns its step.

    Raises
    ------
    CheckpointError
        The run has no committed checkpoint, or not that step, or it is damaged.
    """
    from safetensors.torch import save

    from neurojepa.train.checkpoint import latest_step, open_checkpoint

    if step is None:
        step = latest_step(run_dir)
    if step is None:
        raise CheckpointError(f"{run_dir}: no committed checkpoint; train first, or check the path")
    checkpoint = open_checkpoint(run_dir, step)
    buffers = {name: buffer for name, buffer in checkpoint.buffers().items()
               if not name.startswith("health.")}  # the trainer's, not the model's
    tensors = checkpoint.parameters("master") | buffers
    # the target's weights are the EMA; its router biases follow the encoder's
    followed = {name: buffer for name, buffer in buffers.items() if name.startswith("encoder.")}
    tensors |= {"target." + name.removeprefix("encoder."): tensor
                for name, tensor in (checkpoint.parameters("ema") | followed).items()}
    data = save({name: tensor.clone() for name, tensor in tensors.items()})
    record = {"step": step, "grid": checkpoint.manifest["grid"],
              "feed": checkpoint.manifest["feed"], "config": checkpoint.manifest["config"],
              "sha256": sha256(data)}
    write_bytes(join(out, "model.safetensors"), data)
    objective = validate(record["config"], where=run_dir).objective
    about = METHODS[objective.method].describe(objective)
    write_bytes(join(out, "README.md"), _card(record, about, tensors).encode())
    write_bytes(join(out, "config.json"), json.dumps(record, indent=1).encode())
    return step


def verify(run_dir: str) -> int:
    """Read every committed checkpoint of a run against its hashes; returns 0 or 1.

    Raises
    ------
    CheckpointError
        The run has no committed checkpoint.
    """
    from neurojepa.train.checkpoint import committed_steps, latest_step, open_checkpoint

    steps = committed_steps(run_dir)
    if not steps:
        raise CheckpointError(f"{run_dir}: no committed checkpoint; check the path")
    whole = damaged = 0
    for step in steps:
        try:
            problems = open_checkpoint(run_dir, step).problems()
        except CheckpointError as error:  # its manifest
            problems = [str(error)]
        if problems and step not in committed_steps(run_dir):
            print(f"step-{step}: removed by the run meanwhile", flush=True)
            continue
        damaged += bool(problems)
        whole += not problems
        print("\n".join(problems) or f"step-{step}: whole", flush=True)
    print(f"{run_dir}: {whole} checkpoints whole, {damaged} damaged; a restart continues from "
          f"step-{latest_step(run_dir)}")
    return int(damaged > 0)


def load(uri: str) -> Weights:
    """Load exported weights; every tensor must be there and fit.

    Raises
    ------
    DataError
        Not an export, damaged, or of an architecture this version does not build.
    """
    from safetensors.torch import load as load_tensors

    try:
        record = json.loads(read_bytes(join(uri, "config.json")))
    except (DataError, ValueError) as error:
        raise DataError(f"{uri}: no exported weights here ({error}); make them with: "
                        "python -m neurojepa.weights export RUN --out DIR") from error
    data = read_bytes(join(uri, "model.safetensors"))
    if sha256(data) != record["sha256"]:
        raise DataError(f"{join(uri, 'model.safetensors')}: does not match the sha256 in "
                        "config.json; export again")
    grid = grid_from_record(record["grid"])
    config = validate(record["config"], where=join(uri, "config.json"))
    model = build_model(config, grid)
    try:
        model.load_state_dict(load_tensors(data), strict=True)
    except RuntimeError as error:
        raise DataError(f"{uri}: the weights do not fit the architecture in config.json: "
                        f"{' '.join(str(error).split())}") from error
    return Weights(model.eval(), config, grid, record["step"])


def untrained(config: RootConfig, grid: Grid) -> Weights:
    """The same architecture at its random initialisation (seeded by train.seed)."""
    return Weights(build_model(config, grid).eval(), config, grid, 0)


def _card(record: dict[str, Any], method: str, tensors: dict[str, torch.Tensor]) -> str:
    config, grid = record["config"], record["grid"]
    encoder = sum(t.numel() for name, t in tensors.items() if name.startswith("encoder."))
    return f"""# neurojepa weights

- encoder: {config['model']['size']}, {encoder:,} parameters, patch
  {config['model']['patch_voxels']}
  voxels of {grid['spacing_mm']} mm, grid {' x '.join(map(str, grid['shape']))} centred at MNI
  {tuple(grid['centre_mm'])} mm, axes x y z in RAS
- trained for {record['step']} steps of {config['train']['global_batch']} scans; feed
  {record['feed']}; {method}
- use: `neurojepa.weights.load(DIR)`, then `neurojepa.downstream.embed.embed`; an embedding says
  how the target encoder's tokens differ from those of the feed's split train at the same places,
  adjusted for head size
- not a medical device; check on your own scanners and people before drawing conclusions
"""


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="neurojepa.weights", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write a run's weights for use")
    command.add_argument("run", help="run directory (path or URI)")
    command.add_argument("--out", required=True, help="where to write them")
    command.add_argument("--step", type=int, help="a committed step; default: the latest")
    command = commands.add_parser("verify", help="check a run's checkpoints; exit 1 if damaged")
    command.add_argument("run", help="run directory (path or URI)")
    arguments = parser.parse_args(argv)
    if arguments.command == "verify":
        return verify(arguments.run)
    step = export(arguments.run, arguments.out, arguments.step)
    print(f"exported step {step} of {arguments.run} to {arguments.out}")
    return 0


if __name__ == "__main__":
    run_command(main)
