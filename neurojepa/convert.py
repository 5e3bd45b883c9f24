"""Official Neuro-JEPA checkpoints as weights of this project, told tensor by tensor.

    checkpoint (.pt, .safetensors) + its config -> one part of it, the encoder -> our names
    -> model.safetensors, conversion.json, conversion.txt, README.md, config.json

A checkpoint of the official trainer holds encoder, target_encoder, predictor, opt and scaler;
released weights are the encoder's tensors alone.  Every tensor of the encoder has to have a place
and every place a tensor of the very shape: what is missing, left over or of another shape is an
error.  ``LEFT_OUT`` says what may be left out, and why.  No pickled object is read.

The network is rebuilt as it was trained (model/official.py), so converted weights give the same
tokens for the same voxels.  Preparation is this project's; ``DIFFERENCES`` says what it changes.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from neurojepa.config import RootConfig, validate
from neurojepa.errors import ConfigError, DataError
from neurojepa.feed.format import TRAINING_GRIDS, Grid
from neurojepa.model.official import OfficialEncoder
from neurojepa.model.sizes import SIZES
from neurojepa.official_checkpoint import (
    digest,
    encoder_of,
    licence_beside,
    locate,
    parts_of,
    read,
)

GRID = TRAINING_GRIDS["1.6mm"]
DIFFERENCES = (
    "Tokens: the same voxels give the same tokens up to rounding (float32). Positions are mistaken "
    "as in the official code, since the weights have learnt with that: it decodes the numbers of "
    "patches along other axes than it counts them, so that {mistaken:.1%} of this grid's patches "
    "are taken for others.",
    "Size: the official code resizes the box of each brain to 100 x 120 x 100 voxels and crops "
    "it; here the box of the template, 1.6 mm a voxel, stands for every brain.",
    "Placement: FLIRT with 12 degrees of freedom there; `--preset paper` is the nearest here, the "
    "default is rigid and keeps head size.",
    "Brain: SynthStrip there, the preset's mask tool here. Outside of the brain is black in both.",
    "Intensity: percentiles 0.5 to 99.5 of the whole volume become 0 to 1 there and with `--preset "
    "paper`; the other presets scale by the brain alone. Voxels are stored in 254 steps.",
    "Not scanned: black there; here a patch of nothing scanned is not read at all.")


@dataclass(frozen=True)
class Source:
    """Where a tensor of ours comes from: official names, and what is done with their tensors."""

    names: tuple[str, ...]
    shape: tuple[int, ...]  # of each of them
    make: Callable[[list[Tensor]], Tensor]
    change: str = "as it is"


@dataclass(frozen=True)
class Converted:
    """An encoder by our names, with what a config.json says of it."""

    tensors: dict[str, Tensor]  # float32
    config: RootConfig
    grid: Grid
    report: dict[str, Any]  # as conversion.json has it


def convert(checkpoint: str, *, config: str | None = None, part: str = "encoder") -> Converted:
    """Read a checkpoint's encoder, every tensor of it.

    Parameters
    ----------
    checkpoint
        A file of tensors, .safetensors or torch's; or a folder with model.safetensors.
    config
        The official config it was trained with, YAML or JSON; default: config.json beside it.
    part
        Of a trainer's checkpoint: encoder, or target_encoder, its moving average.

    Raises
    ------
    ConfigError
        The config is not there or does not say what is needed, or the network is one that this
        project does not build.
    DataError
        The checkpoint cannot be read, needs pickled objects, or does not match the config tensor
        by tensor.
    """
    path = locate(checkpoint)
    facts, where = _read_config(config, path.parent)
    parts = parts_of(read(path), path)
    found, left = encoder_of(parts, part, path)
    tree, grid, scale = _architecture(facts, where, found, path)
    with torch.device("meta"):
        network = OfficialEncoder(tree.model, grid)
    ours = network.state_dict()
    counters = {name: torch.zeros(tensor.shape) for name, tensor in ours.items()
                if name.endswith(".load")}
    sources = {name: _source(name, tuple(tensor.shape), tree.model.patch_voxels, scale)
               for name, tensor in ours.items() if name not in counters}
    _check(sources, found, path, where)
    tensors = {name: source.make([found[each].float() for each in source.names]).contiguous()
               for name, source in sources.items()}
    report = {
        "source": {"file": path.name, "sha256": digest(path), "part": part,
                   "layout": "a trainer's checkpoint" if "encoder" in parts else "tensors alone",
                   **{name: parts[name] for name in ("epoch", "global_step")
                      if isinstance(parts.get(name), int)}},
        "licence": licence_beside(path.parent),
        "mapped": [{"to": name, "from": list(source.names), "shape": list(ours[name].shape),
                    "change": source.change} for name, source in sources.items()],
        "left_out": left,
        "without_source": [{"to": name, "why": "a counter of training, 0"} for name in counters],
        "differences": [each.format(mistaken=network.mistaken()) for each in DIFFERENCES]}
    return Converted(tensors | counters, tree, grid, report)


def text_of(report: dict[str, Any]) -> str:
    """The report as a page of text."""
    source = report["source"]
    lines = [f"{source['file']} (sha256 {source['sha256']}), {source['layout']}, part "
             f"{source['part']}", "", f"Mapped: {len(report['mapped'])} tensors of the model"]
    for each in report["mapped"]:
        names = each["from"][0] + (f" and {len(each['from']) - 1} more"
                                   if len(each["from"]) > 1 else "")
        lines.append(f"  {each['to']} {each['shape']} <- {names} ({each['change']})")
    for title, key, name in (("Left out", "left_out", "name"),
                             ("Without a source", "without_source", "to")):
        lines += ["", f"{title}: {len(report[key])}"]
        lines += [f"  {each[name]}: {each['why']}" for each in report[key]]
    lines += ["", "What differs from the official code", *(f"- {each}"
                                                           for each in report["differences"])]
    return "\n".join(lines) + "\n"


def left_out_of(report: dict[str, Any]) -> str:
    """What was left out, in a line."""
    names = [each["name"] for each in report["left_out"]]
    parts = [name for name in names if not name.endswith("counts")]
    if counters := len(names) - len(parts):
        parts.append(f"{counters} counters of experts")
    return ", ".join(parts) or "nothing"


# ---- what network it is --------------------------------------------------------------------------

def _read_config(given: str | None, folder: Path) -> tuple[dict[str, Any], str]:
    """Section ``model`` of the official config, and where it stands."""
    place = given or str(folder / "config.json")
    if not os.path.isfile(place):
        raise ConfigError(f"{place}: no such file; tensors alone do not tell grid, patches and "
                          "routing: name the official config they were trained with (--config "
                          "FILE, YAML or JSON)")
    try:
        tree = yaml.safe_load(Path(place).read_text())  # JSON is YAML
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{place}: is neither YAML nor JSON "
                          f"({' '.join(str(error).split())})") from error
    model = tree.get("model") if isinstance(tree, dict) else None
    if not isinstance(model, dict):
        raise ConfigError(f"{place}: has no section model, as official configs have")
    return model, place


def _architecture(facts: dict[str, Any], where: str, found: Mapping[str, Tensor],
                  path: Path) -> tuple[RootConfig, Grid, float]:
    """Our config and grid for the network, and the factor of its routing scores.

    Raises
    ------
    ConfigError
        The config does not say it, or it is a network that is not built here.
    DataError
        The checkpoint is of another network than the config says.
    """
    shape, patch = (_triple(facts, key, where) for key in ("img_size", "patch_size"))
    moe = bool(facts.get("use_moe", False))
    for key, value, wanted in (
            ("patch_size", patch, (patch[0],) * 3), ("in_chans", facts.get("in_chans", 1), 1),
            ("use_rope", facts.get("use_rope", False), True),
            ("use_silu", facts.get("use_silu", False), False)):
        if value != wanted:
            raise ConfigError(f"{where}: model.{key} = {value}: such a network is not built here "
                              f"({wanted} is)")
    size = _size(found, path)
    blocks = {int(each[1]) for each in map(re.compile(
        r"blocks\.(\d+)\.mlp\.gate\.gate\.weight").fullmatch, found) if each}
    if bool(blocks) != moe:
        raise DataError(f"{path}: {'has experts' if blocks else 'has no experts'}, {where} says "
                        f"model.use_moe = {moe}; name the config that it was trained with")
    scale = _check_experts(facts.get("moe_params"), size, blocks, where) if moe else 1.0
    grid = GRID if shape == GRID.shape else Grid("x".join(map(str, shape)), shape, GRID.spacing_mm)
    config = validate({
        "data": {"feed": "official"}, "train": {"steps": 1}, "run": {"dir": "run"},
        "model": {"size": size, "official": True, "moe": moe, "head_gate": True,
                  "patch_voxels": patch[0], "token_budget": None},
        "objective": {"sparse": {"code": "identity"}, "tissue_weight": 0}}, where)
    if any(length % patch[0] for length in shape):
        raise ConfigError(f"{where}: model.img_size = {list(shape)} is no multiple of patch_size = "
                          f"{list(patch)}")
    return config, grid, scale


def _triple(facts: dict[str, Any], key: str, where: str) -> tuple[int, int, int]:
    value = facts.get(key)
    value = [value] * 3 if isinstance(value, int) else value
    if (not isinstance(value, list) or len(value) != 3
            or not all(isinstance(each, int) and each > 0 for each in value)):
        raise ConfigError(f"{where}: model.{key} = {value!r}, three numbers are needed")
    x, y, z = value
    return x, y, z


def _size(found: Mapping[str, Tensor], path: Path) -> str:
    """The name of the size with the widths of these tensors."""
    gate = found.get("blocks.0.attn.proj_attn_gate.weight")
    if gate is None or gate.ndim != 2:
        raise DataError(f"{path}: has no blocks.0.attn.proj_attn_gate.weight, so it is no encoder "
                        f"of the official code with rotary positions; it has "
                        f"{', '.join(sorted(found)[:3]) or 'no tensor'}")
    (heads, dim), depth = gate.shape, 1 + max(
        int(name.split(".")[1]) for name in found if re.match(r"blocks\.\d+\.", name))
    for name, size in SIZES.items():
        if (size.dim, size.depth, size.heads) == (dim, depth, heads):
            return name
    raise ConfigError(f"{path}: width {dim}, {depth} blocks, {heads} heads: no such size is built "
                      "here (" + "; ".join(f"{name} {size.dim}, {size.depth}, {size.heads}"
                                           for name, size in SIZES.items()) + ")")


def _check_experts(params: Any, name: str, blocks: set[int], where: str) -> float:
    """The factor of routing scores, where the experts are such as this size has."""
    if not isinstance(params, dict):
        raise ConfigError(f"{where}: model.use_moe without model.moe_params")
    size = SIZES[name]
    odd = list(range(1, size.depth, 2))
    for key, wanted in (("n_shared_experts", size.num_shared), ("score_func", "softmax"),
                        ("n_routed_experts", size.num_experts), ("moe_layer_indices", odd),
                        ("n_activated_experts", size.top_k), ("moe_inter_dim", size.expert_hidden)):
        if params.get(key) != wanted:
            raise ConfigError(f"{where}: model.moe_params.{key} = {params.get(key)}: of size "
                              f"{name} only {wanted} is built here")
    if sorted(blocks) != odd:
        raise DataError(f"{where}: says that blocks {odd} have experts, the checkpoint has them in "
                        f"{sorted(blocks)}")
    scale = params.get("route_scale")
    if isinstance(scale, bool) or not isinstance(scale, int | float) or not 0 < scale < math.inf:
        raise ConfigError(f"{where}: model.moe_params.route_scale = {scale!r}, a finite "
                          "number above 0 is needed")
    return float(scale)


# ---- tensor by tensor ----------------------------------------------------------------------------

# our names with the official ones, below blocks.N
SAME = {"norm1": "norm1", "norm2": "norm2", "attention.qkv": "attn.qkv",
        "attention.proj": "attn.proj", "attention.gate": "attn.proj_attn_gate",
        "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2", "mlp.shared.fc1": "mlp.shared_experts.fc1",
        "mlp.shared.fc2": "mlp.shared_experts.fc2"}
EXPERTS = {"w1": "fc1.weight", "b1": "fc1.bias", "w2": "fc2.weight", "b2": "fc2.bias"}


def _source(name: str, shape: tuple[int, ...], patch: int, scale: float) -> Source:
    """Where our encoder's tensor of this name comes from."""
    if name == "patch.weight":
        return Source(("patch_embed.proj.weight",), (shape[0], 1, patch, patch, patch),
                      lambda found: found[0].flatten(1), "flattened")
    if not name.startswith("blocks."):
        return _as_it_is(name.replace("patch.", "patch_embed.proj."), shape)
    _, number, rest = name.split(".", 2)
    block = f"blocks.{number}."
    if rest == "mlp.router":
        return _as_it_is(f"{block}mlp.gate.gate.weight", shape)
    if rest == "mlp.bias":
        return _as_it_is(f"{block}mlp.gate.bias", shape)
    tensor = rest.removeprefix("mlp.")
    if tensor in EXPERTS:
        factor = scale if tensor in ("w2", "b2") else 1.0
        change = "stacked" + ", transposed" * (tensor[0] == "w") + (
            f", times route_scale {scale:g}" if factor != 1 else "")
        return Source(tuple(f"{block}mlp.experts.{e}.{EXPERTS[tensor]}" for e in range(shape[0])),
                      tuple(reversed(shape[1:])),
                      lambda found: torch.stack([each.T if each.ndim == 2 else each
                                                 for each in found]) * factor, change)
    layer, kind = rest.rsplit(".", 1)
    return _as_it_is(f"{block}{SAME[layer]}.{kind}", shape)


def _as_it_is(name: str, shape: tuple[int, ...]) -> Source:
    return Source((name,), shape, lambda found: found[0])


def _check(sources: dict[str, Source], found: Mapping[str, Tensor], path: Path,
           where: str) -> None:
    """Raise DataError unless every tensor has its place and every place its tensor."""
    wanted = {name: source.shape for source in sources.values() for name in source.names}
    missing = sorted(set(wanted) - set(found))
    extra = sorted(set(found) - set(wanted))
    other = [f"{name} is {tuple(found[name].shape)}, {shape} is needed"
             for name, shape in wanted.items()
             if name in found and tuple(found[name].shape) != shape]
    odd = [f"{name} is of {found[name].dtype}" for name in wanted
           if name in found and not found[name].is_floating_point()]
    broken = [name for name in wanted if name in found and found[name].is_floating_point()
              and not found[name].float().isfinite().all()]
    problems = [f"{title}: {', '.join(names[:3])}" + (f" and {len(names) - 3} more"
                                                     if len(names) > 3 else "")
                for title, names in (("missing", missing), ("of no known use", extra),
                                     ("of another shape", other), ("of another type", odd),
                                     ("not finite", broken))
                if names]
    if problems:
        raise DataError(f"{path}: does not hold the network of {where}; " + "; ".join(problems)
                        + "; nothing was converted")
