"""Whether a run directory's checkpoint may be continued with a given config.

A checkpoint carries the config it was trained with and fingerprints of feed and order.  What
changes the model, the recipe or the samples of a step is refused, with both values.
"""

from __future__ import annotations

from typing import Any

from neurojepa.config import RootConfig, validate
from neurojepa.errors import ConfigError
from neurojepa.train.checkpoint import Checkpoint, latest_step, open_checkpoint

# What may differ when a run continues: none of it changes which samples a step sees or its maths,
# but for the cooldown, which is decided late.
FREE = ("data.feed", "data.prefetch_batches", "data.read_threads", "data.retry_s",
        "data.replace_damaged", "data.max_damaged_share", "model.activation_checkpointing",
        "train.health.", "train.zero", "train.micro_batch", "train.checkpoint_every",
        "train.keep_last", "train.milestone_every", "train.log_every", "train.probe_every",
        "optim.cooldown_steps", "run.")


def check_same_recipe(config: RootConfig) -> None:
    """Refuse a recipe other than that of the latest checkpoint in run.dir, as ``check_same_run``.

    The feed is not opened, so its content is not compared.
    """
    step = latest_step(config.run.dir)
    if step is not None:
        found = open_checkpoint(config.run.dir, step)
        check_same_run(found, config, found.manifest["feed"], found.manifest["order"])


def check_same_run(checkpoint: Checkpoint, config: RootConfig, feed: str, order: str) -> None:
    """Refuse to continue a run with another model, recipe or order of samples.

    Raises
    ------
    ConfigError
        Lists every key that differs, with both values.
    """
    manifest = checkpoint.manifest
    where = f"checkpoint of step {checkpoint.step} in {checkpoint.run_dir}"
    old = _flatten(validate(manifest["config"], where).model_dump(mode="json"))
    new = _flatten(config.model_dump(mode="json"))
    differing = [f"{key}: checkpoint {old[key]!r}, now {new[key]!r}" for key in sorted(new)
                 if old[key] != new[key] and not key.startswith(FREE) and key != "train.steps"]
    if new["train.steps"] < old["train.steps"]:
        differing.append(f"train.steps: checkpoint {old['train.steps']}, now "
                         f"{new['train.steps']} (it may only grow)")
    for name, now in (("feed", feed), ("order", order)):
        if manifest[name] != now:
            differing.append(f"{name} fingerprint: checkpoint {manifest[name]}, now {now}")
    if differing:
        raise ConfigError(f"run.dir {checkpoint.run_dir} holds another run: {'; '.join(differing)};"
                          " restore these or choose another run.dir")


def _flatten(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        section = isinstance(value, dict) and prefix + key != "data.weights"
        flat.update(_flatten(value, f"{prefix}{key}.") if section else {prefix + key: value})
    return flat
