"""Export a run's weights for use, load them, check the checkpoints they come from.

    python -m neurojepa.weights export RUN --out DIR [--step N] [--feed FEED]
    python -m neurojepa.weights convert CHECKPOINT --out DIR [--config FILE] [--feed FEED]
    python -m neurojepa.weights card DIR [--results FILE] [--licence NAME] [--about FILE]
    python -m neurojepa.weights verify RUN

DIR gets model.safetensors (fp32: encoder, its EMA ``target``, predictor, code, router biases),
pooling.safetensors (what embeddings compare tokens with, from split train of the run's feed),
seen.json (hashes of the people and scans of that split, so that nobody is tested who taught),
README.md (the model card, model_card.py) and, last, config.json (resolved config without paths,
grid, step, feed, hashes of the files).  ``card`` completes the model card.

``convert`` writes such a folder of a checkpoint of the official code (convert.py), with
conversion.json and conversion.txt: what became of every tensor.

``neurojepa code`` writes such a folder with code.safetensors, a session code, beside the encoder.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
import torch

from neurojepa.config import RootConfig, validate
from neurojepa.convert import Converted, convert, left_out_of, text_of
from neurojepa.downstream.pooling import Places
from neurojepa.errors import CheckpointError, ConfigError, DataError, run_command
from neurojepa.feed.format import Feed, Grid, grid_from_record, open_feed
from neurojepa.model.averaged import Averaged
from neurojepa.model.build import build_model
from neurojepa.model.session_code import SessionCode
from neurojepa.model_card import card, complete_card, describe_feed, read_record
from neurojepa.official_checkpoint import PARTS
from neurojepa.storage import exists, join, read_bytes, sha256, write_bytes

CODE = "code.safetensors"
SHIPPED = Path(__file__).parent / "pretrained"  # weights that come with the package, by name


@dataclass(frozen=True)
class Weights:
    """A model with what it was trained on.  ``model`` is in evaluation mode, on the CPU, fp32."""

    model: Averaged
    config: RootConfig
    grid: Grid
    step: int
    places: Places | None = None  # what embeddings compare tokens with; None in early exports
    feed: str | None = None  # fingerprint of the feed it was trained on
    seen: frozenset[str] | None = None  # hashes of people and scans of its split train, if known


def export(run_dir: str, out: str, step: int | None = None, compare_with: Feed | None = None
           ) -> int:
    """Write the weights of a committed checkpoint (default: the latest); returns its step.

    Parameters
    ----------
    compare_with
        Feed whose split train says what tokens are like at each place of the brain.  Without it,
        embeddings are compared with the feed that is embedded.

    Raises
    ------
    CheckpointError
        The run has no committed checkpoint, or not that step, or it is damaged.
    ConfigError
        ``compare_with`` is on another grid.
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
              "sha256": sha256(data),
              "parameters": sum(tensor.numel() for name, tensor in tensors.items()
                                if name.startswith("encoder."))}
    config = validate(record["config"], where=run_dir)
    # places on the machine that trained are nobody's concern
    record["config"]["data"]["feed"], record["config"]["run"]["dir"] = record["feed"], "run"
    if config.objective.regions:
        record["config"]["objective"]["regions"] = Path(config.objective.regions).name
    write_bytes(join(out, "model.safetensors"), data)
    if compare_with is not None:
        record["seen"] = _write_seen(out, compare_with)
        record["data"] = describe_feed(compare_with)
    if compare_with is not None and config.objective.method != "cnn":  # which has no tokens
        record["pooling"] = _write_pooling(out, config, grid_from_record(record["grid"]),
                                           tensors, compare_with)
    write_bytes(join(out, "README.md"), card(record).encode())
    write_bytes(join(out, "config.json"), json.dumps(record, indent=1).encode())
    return step


def write_converted(converted: Converted, out: str, *, licence: str | None = None,
                    compare_with: Feed | None = None) -> None:
    """Write an official encoder as weights.

    Parameters
    ----------
    licence
        Of the checkpoint; default: what a README.md beside it says.
    compare_with
        As of ``export``.

    Raises
    ------
    ConfigError
        ``compare_with`` is on another grid.
    """
    from safetensors.torch import save

    report, grid = converted.report, converted.grid
    # embeddings come from the target, whichever part was asked for
    tensors = {f"{side}.{name}": tensor.clone() for side in ("encoder", "target")
               for name, tensor in converted.tensors.items()}
    data = save(tensors)
    record = {"step": report["source"].get("global_step", 0), "grid": asdict(grid), "feed": None,
              "config": converted.config.model_dump(mode="json"), "sha256": sha256(data),
              "parameters": sum(tensor.numel() for tensor in converted.tensors.values()),
              "official": {"source": report["source"], "differences": report["differences"],
                           "mapped": len(report["mapped"]),
                           "left_out": left_out_of(report)}}
    if licence or report["licence"]:
        record["licence"] = licence or report["licence"]
    if compare_with is not None:
        record["pooling"] = _write_pooling(out, converted.config, grid, tensors, compare_with)
    write_bytes(join(out, "model.safetensors"), data)
    write_bytes(join(out, "conversion.json"), json.dumps(report, indent=1).encode())
    write_bytes(join(out, "conversion.txt"), text_of(report).encode())
    write_bytes(join(out, "README.md"), card(record).encode())
    write_bytes(join(out, "config.json"), json.dumps(record, indent=1).encode())


def _write_pooling(out: str, config: RootConfig, grid: Grid, tensors: dict[str, torch.Tensor],
                   feed: Feed) -> dict[str, Any]:
    """Fit what embeddings compare tokens with, and write it; returns the record of it."""
    from safetensors.torch import save

    from neurojepa.downstream.embed import fit_places, teaching_rows

    if not np.array_equal(grid.affine, feed.grid.affine):
        raise ConfigError(f"--feed {feed.uri} is packed at grid {feed.grid.name}, the run was "
                          f"trained at {grid.name}; pack the archive with --grid {grid.name}")
    model = build_model(config, grid)
    model.load_state_dict(tensors, strict=True)
    rows = teaching_rows(feed)
    count = Counter(feed.index["modality"].take(rows).to_pylist())
    print(f"{feed.uri}: learning what is usual at each place of the brain from "
          + ", ".join(f"{number} {name}" for name, number in sorted(count.items())) + " of split "
          "train", flush=True)
    data = save(fit_places(model, config, feed, rows).tensors())
    write_bytes(join(out, "pooling.safetensors"), data)
    return {"feed": feed.fingerprint, "scans": dict(count), "sha256": sha256(data)}


def _write_seen(out: str, feed: Feed) -> dict[str, Any]:
    """Write hashes of the people and scans that taught; returns the record of it."""
    train = feed.index.filter(pc.equal(feed.index["split"], "train"))
    names = {name for column in ("participant", "scan_id")
             for name in train[column].to_pylist()}
    data = json.dumps(sorted(map(hashed, names))).encode()
    write_bytes(join(out, "seen.json"), data)
    return {"feed": feed.fingerprint, "sha256": sha256(data)}


def hashed(name: str) -> str:
    """How ``Weights.seen`` holds a pseudonym or a scan's id."""
    return sha256(f"neurojepa seen {name}".encode())[:16]


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

    Parameters
    ----------
    uri : a folder here or on any store that fsspec knows (s3://..., hf://PEOPLE/NAME), or the name
        of weights that come with the package, such as synthetic-tiny

    Raises
    ------
    DataError
        Not an export, damaged, or of an architecture this version does not build.
    """
    from safetensors.torch import load as load_tensors

    uri = place_of(uri)
    try:
        record = read_record(join(uri, "config.json"), "of an export", "sha256")
    except DataError as error:
        raise DataError(f"{uri}: no exported weights here ({error}); make them with: "
                        "python -m neurojepa.weights export RUN --out DIR, or take those that come "
                        f"with the package: {', '.join(shipped())}") from error
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
    pooling, seen, code = (_companion(uri, record, *each) for each in (
        ("pooling", "pooling.safetensors"), ("seen", "seen.json"), ("code", CODE)))
    if code:
        model.session_code = SessionCode.from_tensors(load_tensors(code))
    return Weights(model.eval(), config, grid, record["step"],
                   Places.from_tensors(load_tensors(pooling)) if pooling else None,
                   record["feed"], frozenset(json.loads(seen)) if seen else None)


def shipped() -> list[str]:
    """Names of the weights that come with the package."""
    return sorted(folder.name for folder in SHIPPED.iterdir() if folder.is_dir())


def place_of(uri: str) -> str:
    """Where weights lie; a folder of that name counts before those that are shipped."""
    if uri in shipped() and not exists(join(uri, "config.json")):
        return str(SHIPPED / uri)
    return uri


def _companion(uri: str, record: dict[str, Any], name: str, file: str) -> bytes | None:
    """A file beside the weights, or None where they were exported without."""
    if name not in record:
        return None
    data = read_bytes(join(uri, file))
    if sha256(data) != record[name]["sha256"]:
        raise DataError(f"{join(uri, file)}: does not match the sha256 in config.json; export "
                        "again")
    return data


def untrained(config: RootConfig, grid: Grid) -> Weights:
    """The same architecture at its random initialisation (seeded by train.seed)."""
    return Weights(build_model(config, grid).eval(), config, grid, 0, seen=frozenset())


def _feed_of(run_dir: str, given: str | None) -> Feed | None:
    """The feed that ``given`` names, or that of the run, if it can still be opened."""
    if given:
        return open_feed(given)
    from neurojepa.train.checkpoint import latest_step, open_checkpoint

    step = latest_step(run_dir)
    if step is None:
        return None  # export says so
    uri = open_checkpoint(run_dir, step).manifest["config"]["data"]["feed"]
    try:
        return open_feed(uri)
    except DataError as error:
        print(f"exported without what embeddings are compared with: {error}; they will be compared "
              "with the scans embedded beside them; to mend it, export again with --feed FEED")
        return None


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="neurojepa.weights", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("export", help="write a run's weights for use")
    command.add_argument("run", help="run directory (path or URI)")
    command.add_argument("--out", required=True, help="where to write them")
    command.add_argument("--step", type=int, help="a committed step; default: the latest")
    command.add_argument("--feed", help="whose split train embeddings are compared with; default: "
                         "the run's")
    command = commands.add_parser("convert", help="write an official checkpoint's encoder for use")
    command.add_argument("checkpoint", help="file of the official code (.pt, .safetensors), or "
                         "folder with model.safetensors")
    command.add_argument("--out", required=True, help="where to write the weights")
    command.add_argument("--config", metavar="FILE", help="official config it was trained with; "
                         "default: config.json beside it")
    command.add_argument("--part", choices=PARTS, default=PARTS[0], help="of a trainer's "
                         "checkpoint: the encoder, which official tasks read (default), or its "
                         "moving average")
    command.add_argument("--licence", metavar="NAME", help="of the checkpoint; default: what a "
                         "README.md beside it says")
    command.add_argument("--feed", help="whose split train embeddings are compared with")
    command = commands.add_parser("card", help="complete the model card of exported weights")
    command.add_argument("weights", metavar="DIR", help="that export wrote (path or URI)")
    command.add_argument("--results", metavar="FILE", help="results.json of probe --feed with "
                         "these weights")
    command.add_argument("--licence", metavar="NAME", help="such as apache-2.0")
    command.add_argument("--about", metavar="FILE", help="text of your own, which comes first")
    command = commands.add_parser("verify", help="check a run's checkpoints; exit 1 if damaged")
    command.add_argument("run", help="run directory (path or URI)")
    arguments = parser.parse_args(argv)
    if arguments.command == "verify":
        return verify(arguments.run)
    if arguments.command == "card":
        complete_card(arguments.weights, results=arguments.results, licence=arguments.licence,
                      about=arguments.about)
        print(f"read {join(arguments.weights, 'README.md')}")
        return 0
    if arguments.command == "convert":
        return _convert(arguments)
    step = export(arguments.run, arguments.out, arguments.step,
                  _feed_of(arguments.run, arguments.feed))
    print(f"exported step {step} of {arguments.run} to {arguments.out}")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    given = [arguments.checkpoint, *([arguments.config] if arguments.config else [])]
    if Path(arguments.out).resolve() in {(path if path.is_dir() else path.parent).resolve()
                                         for path in map(Path, given)}:
        raise ConfigError(f"--out {arguments.out}: is the folder of the checkpoint or of its "
                          "config, whose files would be written over; name another")
    found = convert(arguments.checkpoint, config=arguments.config, part=arguments.part)
    write_converted(found, arguments.out, licence=arguments.licence,
                    compare_with=open_feed(arguments.feed) if arguments.feed else None)
    report = found.report
    print(f"{arguments.checkpoint}: {len(report['mapped'])} tensors mapped, none missing; left "
          f"out: {left_out_of(report)}\nwrote weights to {arguments.out}; every tensor and what "
          f"differs from the official code: {join(arguments.out, 'conversion.txt')}")
    return 0


if __name__ == "__main__":
    run_command(main)
