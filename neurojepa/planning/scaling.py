"""The part of the dry run about many GPUs: what each sends, and what is left of the speed."""

from __future__ import annotations

from neurojepa.config import RootConfig
from neurojepa.errors import ConfigError
from neurojepa.feed.format import Grid
from neurojepa.model.flops import Device, step_flops
from neurojepa.model.moe import moe_layers
from neurojepa.planning.kernels import Rates, fused, tabulate
from neurojepa.planning.network import (
    NETWORKS,
    Message,
    agreements,
    gradients,
    step_on,
    weights,
)
from neurojepa.planning.reduction import Reduction, arriving, choose_reduction, stage_run
from neurojepa.planning.step import Label, hollow_model, step_kernels
from neurojepa.train.compiling import REGIONS

RANKS = (8, 64, 512, 1024)


def render_scaling(config: RootConfig, grid: Grid, device: Device, network: str, *,
                   micro_steps: int, label: Label | None = None) -> list[str]:
    """Lines on compute, communication and weak scaling by count: nothing is measured.

    Parameters
    ----------
    network : a name in ``NETWORKS``.
    micro_steps : of each rank in a step.

    Raises
    ------
    ConfigError
        An unknown network.
    """
    if network not in NETWORKS:
        raise ConfigError(f"--network {network}: not known; one of {', '.join(NETWORKS)}")
    config = config.model_copy(update={"run": config.run.model_copy(update={"network": network})})
    train, model = config.train, hollow_model(config, grid)
    compiled = train.compile == "auto"
    kernels = step_kernels(config, grid, label)
    phases = tabulate(fused(kernels) if compiled else kernels, Rates.of(device)).phases
    micro_s = sum(cost.seconds for name, cost in phases.items() if name != "update")
    update_s = phases["update"].seconds
    scans = train.micro_batch * micro_steps
    mfu = step_flops(config, grid) * scans / device.flops / (micro_steps * micro_s + update_s)
    backward_s = phases["backward"].seconds * (
        micro_steps if stage_run(train.zero, train.dtype) > 1 else 1)
    lines = [
        f"by count, {'' if compiled else 'not '}compiled: a rank's {scans} scans take "
        f"{1e3 * micro_steps * micro_s:.1f} ms and the update "
        f"{1e3 * update_s:.1f} ms, an MFU of {mfu:.0%}",
        f"weak scaling with run.network={network}, {scans} scans a rank",
        f"  {'ranks':>6}{'compute ms':>12}{'exposed ms':>12}{'efficiency':>12}"
        "   gradients"]
    for ranks in RANKS:
        way = choose_reduction(config, grid, model, ranks=ranks,
                               micro_steps=micro_steps, device=device)
        sent = messages_of(config, grid, micro_steps, way)
        step = step_on(ranks, NETWORKS[network], sent,
                       # state is split over ranks, and so is most of the update
                       compute_s=micro_steps * micro_s + update_s / ranks,
                       backward_s=backward_s if way.overlap else 0.0,
                       views_s=phases["views"].seconds, target_s=phases["target"].seconds)
        lines.append(f"  {ranks:>6}{1e3 * step.compute_s:12.1f}{1e3 * step.exposed_s:12.1f}"
                     f"{step.efficiency:12.1%}   {way}")
    return [*lines, "sent by each rank in a step, GB: " + ", ".join(
        f"{message.name} {message.sent(RANKS[-1]) / 1e9:.2f} ({message.collective}, "
        f"{8 * message.width} bit)" for message in sent if message.elements)]


def messages_of(config: RootConfig, grid: Grid, micro_steps: int, way: Reduction) -> list[Message]:
    """What the ranks of a run send each other in a step."""
    train, model = config.train, hollow_model(config, grid)
    blocks = [name for name, module in model.named_modules() if isinstance(module, REGIONS)]
    stage = stage_run(train.zero, train.dtype)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return [
        gradients(arriving(model), stage, way.bucket, width=way.width, micro_steps=micro_steps),
        *weights(trained, sum(p.numel() for p in model.encoder.parameters()), stage,
                 width=2 if train.dtype == "bf16" else 4, micro_steps=micro_steps,
                 gathers=sum(1 if name.startswith("target.") else 2 for name in blocks)),
        agreements(moe=bool(moe_layers(model)))]
