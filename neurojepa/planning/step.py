"""A training step on tensors without contents: what it would launch, move and keep.

The model is built without memory and runs on shapes alone, so that even ``huge`` takes seconds.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from neurojepa.config import RootConfig
from neurojepa.feed.format import Grid
from neurojepa.feed.loader import Batch
from neurojepa.methods import METHODS
from neurojepa.model.averaged import Averaged
from neurojepa.model.build import build_model
from neurojepa.model.flops import tokens_per_volume
from neurojepa.objective.anatomy import TISSUES
from neurojepa.objective.views import Views, anatomy_for, build_views
from neurojepa.planning.kernels import Kernel, Recorder

Label = Callable[[Views], Views]  # what attaches the labels of a supervised method

# Bytes for each trained weight that the engine moves after the backward, in bf16 with fp32 sums:
# gradients into the bucket and out of it as fp32, their norm and clipping, AdamW, new weights.
UPDATE_BYTES = {"to the bucket": 4, "to fp32": 6, "norm": 4, "clipping": 8, "AdamW": 28,
                "new weights": 6}
EMA_BYTES = {"average": 12, "publication": 6}  # of each weight of the encoder


def hollow_model(config: RootConfig, grid: Grid) -> Averaged:
    """The model with parameters of the right shapes on the meta device."""
    with torch.device("meta"):
        return build_model(config, grid)


def step_kernels(config: RootConfig, grid: Grid, label: Label | None = None) -> list[Kernel]:
    """Every kernel of a micro-step of one rank in bf16, and of the update after it.

    Phases are views, target, forward, backward and update.

    Parameters
    ----------
    label : of methods that learn from labels.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    recorder = Recorder()
    anatomy = anatomy_for(config, grid, torch.device("cpu"))  # it has contents, and is kept
    model = hollow_model(config, grid).bfloat16()  # the type in which torch knows grouped_mm
    with FakeTensorMode(allow_non_fake_inputs=True):
        model = model.to_empty(device="cpu")
        for layer in model.modules():  # as the engine leaves them
            for name, buffer in layer.named_buffers(recurse=False):
                layer._buffers[name] = buffer.float()
        with recorder.during("views"):
            build_views(_batch(2, grid), config, grid, config.train.seed, *anatomy)
        for kernel in recorder.kernels:  # two scans stand for a micro-batch
            for sizes in (kernel.reads, kernel.writes):
                sizes |= {key: size * config.train.micro_batch / 2 for key, size in sizes.items()}
        views = hollow_views(config, grid, label)
        # what the target's forward may hide: see network.py
        model.target.register_forward_pre_hook(lambda *_: setattr(recorder, "phase", "target"))
        model.target.register_forward_hook(lambda *_: setattr(recorder, "phase", "forward"))
        with recorder.during("forward"):
            loss, _ = model(views, 0.0)
        with recorder.during("backward"):
            loss.backward()
    return recorder.kernels + _update(model)


def hollow_views(config: RootConfig, grid: Grid, label: Label | None = None) -> Views:
    """A micro-batch of the right shapes; call it where tensors hold nothing."""
    B, N, M = config.train.micro_batch, tokens_per_volume(config, grid), num_masks(config)
    T = round(N * config.objective.masks.target_share)
    index = torch.int64
    tokens, share = torch.empty(B, N, config.model.patch_voxels**3), torch.empty(B, N)
    valid, modality = torch.empty(B, N, dtype=torch.bool), torch.empty(B, dtype=index)
    views = Views(
        tokens_BNP=tokens, coords_BN3=torch.empty(B, N, 3), foreground_BN=share, valid_BN=valid,
        context_BMC=torch.empty(B, M, N - T, dtype=index),
        target_BMT=torch.empty(B, M, T, dtype=index), modality_B=modality, weight_B=torch.empty(B),
        target_tokens_BNP=tokens, target_foreground_BN=share, target_valid_BN=valid,
        target_modality_B=modality,
        tissue_BNK=torch.empty(B, N, 1 + len(TISSUES) if config.objective.tissue else 0),
        all_scanned=True)  # as nearly every batch
    return label(views) if label else views


def num_masks(config: RootConfig) -> int:
    """Masks of a scan."""
    by_scale = METHODS[config.objective.method].masks == "blocks"
    return len(config.objective.masks.scales) if by_scale else 1


def _batch(scans: int, grid: Grid) -> Batch:
    return Batch(voxels=torch.empty(scans, *grid.shape, dtype=torch.uint8),
                 modality=torch.empty(scans, dtype=torch.int64),
                 position=torch.empty(scans, dtype=torch.int64), weight=torch.empty(scans),
                 scan_ids=[""] * scans)


def _update(model: nn.Module) -> list[Kernel]:
    """What the engine does after the backward; a kernel for each tensor where it works so."""
    trained = [p.numel() for p in model.parameters() if p.requires_grad]
    averaged = [p.numel() for name, p in model.named_parameters()
                if p.requires_grad and name.startswith("encoder.")]
    by_tensor = {"to the bucket"}
    rows = [(name, size, trained) for name, size in UPDATE_BYTES.items()]
    rows += [(name, size, averaged) for name, size in EMA_BYTES.items()]
    nothing = Kernel(phase="update", kind="update", precise=True, fuses=False, flops=0.0,
                     reads={}, writes={})
    return [replace(nothing, reads={(-1, 0): float(size * count)})
            for name, size, counts in rows
            for count in (counts if name in by_tensor else [sum(counts)])]
