"""The official code as a peer: its modules are imported from a checkout and never copied.

Its package has the same name as ours, so ours steps aside while it is imported.
"""

from __future__ import annotations

import contextlib
import copy
import importlib
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

# The three mask scales of its pretraining configuration.
OFFICIAL_SCALES = [
    {"num_blocks": blocks, "spatial_scale": spatial, "depth_scale": (0.0, 1.0),
     "aspect_ratio": (0.75, 1.5), "total_mask_ratio": 0.75}
    for blocks, spatial in ((32, (0.0, 0.2)), (16, (0.2, 0.5)), (4, (0.5, 0.7)))]
# Imported by its utilities, not used in a training step.
_NOT_NEEDED = ("matplotlib.pyplot", "torchmetrics.classification", "torchmetrics.regression",
               "timm.layers")


@dataclass(frozen=True)
class Shape:
    """What must be equal on both sides of a comparison."""

    grid: tuple[int, int, int] = (96, 108, 96)
    patch: int = 12
    dim: int = 768
    depth: int = 12
    heads: int = 12
    predictor_dim: int = 384
    predictor_depth: int = 12
    predictor_heads: int = 12
    moe: bool = True
    num_experts: int = 16
    top_k: int = 6
    num_shared: int = 2
    expert_hidden: int = 384


SHAPES = {
    "base": Shape(),  # its published pretraining shape, experts on
    "small-official": Shape((96, 96, 96), 12, 192, 6, 3, 96, 3, 3, True, 16, 6, 2, 96),
}


def official_modules(checkout: str, *names: str) -> list[Any]:
    """Modules of the official package by their dotted names."""
    ours = {name: module for name, module in sys.modules.items()
            if name.split(".")[0] == "neurojepa"}
    for name in ours:
        del sys.modules[name]
    sys.path.insert(0, str(Path(checkout) / "src"))
    try:
        with _stand_ins():
            return [importlib.import_module(name) for name in names]
    finally:
        sys.path.pop(0)
        for name in [name for name in sys.modules if name.split(".")[0] == "neurojepa"]:
            del sys.modules[name]
        sys.modules.update(ours)


class _Empty(types.ModuleType):
    """A module whose every name is a class that takes anything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {"__init__": lambda self, *args, **kwargs: None})


@contextlib.contextmanager
def _stand_ins() -> Iterator[None]:
    """Empty modules for plotting, metric and image-model libraries that are not installed."""
    made = []
    for name in _NOT_NEEDED:
        parent = name.split(".")[0]
        if importlib.util.find_spec(parent) is not None and parent != "timm":
            continue
        for part in (parent, name):
            if part not in sys.modules:
                module = _Empty(part)
                module.__spec__ = importlib.machinery.ModuleSpec(part, None, is_package=True)
                module.__path__ = []
                sys.modules[part] = module
                made.append(part)
    try:
        yield
    finally:
        for name in made:
            del sys.modules[name]


def official_step(checkout: str, shape: Shape, batch: int, device: str = "cpu",
                  dtype: str = "fp32") -> Callable[[], float]:
    """One training step of the official code on random heads, as a function to be timed.

    Collation with foreground and masks, target and context encoder, predictor, loss, backward,
    clipping, AdamW, expert bias, target update; eager, one process, no loading.
    """
    import torch
    import torch.nn.functional as F

    names = ("loss.jepa_loss", "masks.masking", "models.predictor", "models.utils.moe",
             "models.vision_transformer", "utils.misc", "utils.wrappers")
    loss_, masking, predictor_, moe_, vision, misc, wrappers = official_modules(
        checkout, *(f"neurojepa.{name}" for name in names))
    torch.manual_seed(0)
    norm = partial(torch.nn.LayerNorm, eps=1e-6)
    common = {"img_size": list(shape.grid), "patch_size": [shape.patch] * 3, "use_rope": True,
              "uniform_power": True}
    experts = types.SimpleNamespace(
        moe_type="bias", dim=shape.dim, n_shared_experts=shape.num_shared,
        n_routed_experts=shape.num_experts, n_activated_experts=shape.top_k,
        moe_inter_dim=shape.expert_hidden, score_func="softmax", route_scale=4.0,
        moe_layer_indices=list(range(1, shape.depth, 2))) if shape.moe else None
    encoder = wrappers.MultiSeqWrapper(vision.VisionTransformer(
        in_chans=1, embed_dim=shape.dim, depth=shape.depth, num_heads=shape.heads, mlp_ratio=4,
        qkv_bias=True, norm_layer=norm, use_sdpa=True, use_moe=shape.moe, moe_params=experts,
        **common)).to(device)
    predictor = wrappers.PredictorMultiSeqWrapper(predictor_.vit_predictor(
        embed_dim=shape.dim, predictor_embed_dim=shape.predictor_dim,
        depth=shape.predictor_depth, num_heads=shape.predictor_heads, use_mask_tokens=True,
        num_mask_tokens=3, zero_init_mask_tokens=True, **common)).to(device)
    target = copy.deepcopy(encoder).requires_grad_(False)
    collate = masking.MaskCollator(OFFICIAL_SCALES, shape.grid, (shape.patch,) * 3,
                                   foreground_aware=True)
    trained = [p for module in (encoder, predictor) for p in module.parameters()]
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.04)
    heads = random_heads(shape.grid, batch)

    def step() -> float:
        (volumes, _), context, hidden, foreground = collate(
            [(head, torch.tensor(-1)) for head in heads])
        volumes, foreground = volumes.to(device), foreground.to(device)
        context = [[mask.to(device) for mask in context]]
        hidden = [[mask.to(device) for mask in hidden]]
        with torch.autocast(device, torch.bfloat16, enabled=dtype == "bf16"):
            with torch.no_grad():
                latents = [F.layer_norm(h, h.shape[-1:]) for h in target([volumes])]
            predicted = predictor(encoder([volumes], context)[0], context, hidden)
            loss = loss_.loss_fn(predicted, latents, hidden, 1.0, fg_map=foreground, bg_weight=0.1)
        value = float(loss.item())  # as its trainer does
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if shape.moe:
            moe_.moe_bias_update(encoder, 1e-4, used_ddp=False, bias_clip=0.3,
                                 use_proportional=True)
        misc._update_momentum_encoder(encoder, target, 0.99925)
        return value

    return step


def random_heads(grid: tuple[int, int, int], batch: int) -> Any:
    """float32 [batch, 1, X, Y, Z]: a noisy bright ellipsoid on a dark ground."""
    import torch

    axes = torch.stack(torch.meshgrid(*(torch.linspace(-1, 1, n) for n in grid), indexing="ij"))
    inside = (axes.square().sum(0) < 0.64).float()
    generator = torch.Generator().manual_seed(0)
    return inside * (0.4 + 0.6 * torch.rand(batch, 1, *grid, generator=generator))
