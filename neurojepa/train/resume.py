"""Whether a run directory's checkpoint may be continued with a given config.

A checkpoint carries the config it was trained with and fingerprints of its inputs.  What
changes the model, the recipe or the samples of a step (all keys that config.py does not mark
``Free``) is refused, with both values, unless
``run.accept_changes`` is set: then the run goes on from its step under the new recipe.  A model
whose parameters are others is refused in any case.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from neurojepa.config import RootConfig, free_keys, validate
from neurojepa.errors import ConfigError
from neurojepa.train.checkpoint import Checkpoint, latest_step, open_checkpoint
from neurojepa.train.engine import TARGET

SHOWN = 5  # parameters that an error names


def check_same_recipe(config: RootConfig) -> None:
    """Refuse a recipe other than that of the latest checkpoint in run.dir, as ``check_same_run``.

    Feed and atlas are not opened, so their content is not compared.
    """
    step = latest_step(config.run.dir)
    if step is not None:
        check_same_run(open_checkpoint(config.run.dir, step), config, {})


def check_same_run(checkpoint: Checkpoint, config: RootConfig,
                   fingerprints: Mapping[str, str]) -> list[str]:
    """Refuse to continue a run with another model, recipe or order of samples.

    Parameters
    ----------
    fingerprints
        Of ``feed``, ``order`` and ``regions`` as they are now; those missing are not compared.

    Returns
    -------
    list of str
        What differs, with both values; not empty only under ``run.accept_changes``.

    Raises
    ------
    ConfigError
        Lists every key that differs, with both values.
    """
    manifest = checkpoint.manifest
    where = f"checkpoint of step {checkpoint.step} in {checkpoint.run_dir}"
    old = _flatten(validate(manifest["config"], where).model_dump(mode="json"))
    new = _flatten(config.model_dump(mode="json"))
    if new["train.steps"] < checkpoint.step:
        raise ConfigError(f"train.steps = {new['train.steps']}: run.dir {checkpoint.run_dir} is at "
                          f"step {checkpoint.step} already; raise it or choose another run.dir")
    compared = new.keys() - free_keys() - {"train.steps"}
    differing = [f"{key}: checkpoint {old[key]!r}, now {new[key]!r}" for key in sorted(compared)
                 if old[key] != new[key]]
    if new["train.steps"] < old["train.steps"]:
        differing.append(f"train.steps: checkpoint {old['train.steps']}, now "
                         f"{new['train.steps']} (it may only grow)")
    differing += [f"{name} fingerprint: checkpoint {manifest.get(name, '')}, now {now}"
                  for name, now in fingerprints.items() if manifest.get(name, "") != now]
    if differing and not config.run.accept_changes:
        raise ConfigError(f"run.dir {checkpoint.run_dir} holds another run: {'; '.join(differing)};"
                          " restore these, choose another run.dir, or set run.accept_changes=true "
                          "to go on with these changes")
    return differing


def check_fits(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Refuse a model whose trained parameters or buffers are not those of the checkpoint.

    Raises
    ------
    ConfigError
        Names those that differ, with both shapes.
    """
    stored = checkpoint.shapes
    stored |= {name: tuple(tensor.shape) for name, tensor in checkpoint.buffers().items()
               if not name.startswith("health.")}
    here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()
            if not name.startswith(TARGET)}
    differing = [f"{name} {_shape(stored, name)} -> {_shape(here, name)}"
                 for name in sorted(stored.keys() | here.keys())
                 if stored.get(name) != here.get(name)]
    if differing:
        more = f" and {len(differing) - SHOWN} more" if len(differing) > SHOWN else ""
        raise ConfigError(f"run.dir {checkpoint.run_dir} holds another model, which cannot be "
                          f"continued: {', '.join(differing[:SHOWN])}{more}; restore model.* and "
                          "objective.* or choose another run.dir")


def _shape(shapes: dict[str, tuple[int, ...]], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "absent"


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        section = isinstance(value, dict) and prefix + key != "data.weights"
        flat.update(_flatten(value, f"{prefix}{key}.") if section else {prefix + key: value})
    return flat
