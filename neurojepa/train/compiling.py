"""Compilation by region: every block, the losses and the views become one graph each.

Regions rather than the whole step: blocks of a kind share one graph, ZeRO and recomputation stay
between them, and there is less to compile at a start.  Shapes are static, so that nothing is
compiled again after the first steps; a batch with unscanned parts, which needs masks, once more.

What was compiled is kept in ``run.dir/compiled``, for restarts.  It holds code: only who may start
the run should be able to write there.
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neurojepa.baselines.cnn import Residual
from neurojepa.config import RootConfig
from neurojepa.model.layers import Block
from neurojepa.objective.views import Build, build_views
from neurojepa.storage import local_path

# By type of device; where none is named the step runs as it is.
BACKENDS = {"cuda": "inductor"}
REGIONS = (Block, Residual)
# Graphs of one function: blocks differ by MLP, width, gradient, mask and recomputation.
GRAPHS = 64


@dataclass(frozen=True)
class Choice:
    """Whether to compile, and why (not)."""

    backend: str | None
    why: str


def prepare(config: RootConfig, model: nn.Module, device: torch.device
            ) -> tuple[Build | None, Choice]:
    """Compile what ``train.compile`` and the device allow.

    Returns
    -------
    what makes the views, if compiled, for ``make_views``; and what was chosen
    """
    choice = choose(config, device)
    if choice.backend is None:
        return None, choice
    keep_compiled(config)
    # DeepSpeed gathers ZeRO-3's weights around regions, but inside of losses
    return compile_regions(model, choice.backend, losses=config.train.zero != 3), choice


def choose(config: RootConfig, device: torch.device) -> Choice:
    """What ``train.compile`` comes to on a device."""
    backend = BACKENDS.get(device.type)
    if config.train.compile == "off":
        return Choice(None, "train.compile is off")
    if backend is None:
        return Choice(None, f"nothing to gain on {device.type}")
    missing = _missing(backend)
    if missing:
        return Choice(None, f"{missing}, so steps run uncompiled and slower; install it, or set "
                      "train.compile=off")
    return Choice(backend, f"{backend}, by region")


def _missing(backend: str) -> str:
    if backend != "inductor":
        return ""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    # triton builds a Python extension at the first step, and looks for no other compilers
    compilers = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang"]
    if not any(map(shutil.which, compilers)):
        return f"no C compiler ({', '.join(compilers)}) is on the PATH"
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    if not header.exists():
        return f"{header} of Python's development files is missing"
    return ""


def compile_regions(model: nn.Module, backend: str, losses: bool = True) -> Build:
    """Compile a model's regions in place; returns what makes its views, compiled too."""
    torch._dynamo.config.recompile_limit = GRAPHS

    def region(function: Callable[..., Any]) -> Any:
        return torch.compile(function, fullgraph=True, dynamic=False, backend=backend)

    for module in model.modules():
        if isinstance(module, REGIONS):
            # not module.compile(), which would take in the hooks around it
            module.forward = region(module.forward)  # type: ignore[method-assign]
    apart = getattr(model, "losses", None) if losses else None  # of a method that keeps them so
    if apart is not None:
        model.losses = region(apart)
    built: Build = region(build_views)
    return built


def keep_compiled(config: RootConfig) -> None:
    """Let torch keep what it compiles in the run's directory, if that is on a disk."""
    folder = local_path(config.run.dir)
    if folder is not None:
        for name, part in (("TORCHINDUCTOR_CACHE_DIR", "inductor"), ("TRITON_CACHE_DIR", "triton")):
            os.environ.setdefault(name, str(Path(folder) / "compiled" / part))
    if config.run.deterministic:
        import torch._inductor.config as inductor

        inductor.deterministic = True  # no choice of kernels by their speed of the moment
