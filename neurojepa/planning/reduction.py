"""How gradients are summed over ranks: chosen by what it costs, for the plan and the engine alike.

    overlap   pieces travel while the backward still runs
    bucket    elements of a piece: few large ones pay latency seldom, but the last one, for which
              no backward is left to hide behind, is the longer
    width     bytes of an element on the way: fp32, unless that costs more than ``BEARABLE``; else
              bf16, where each rank's sum over micro-steps is still fp32
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from neurojepa.config import RootConfig
from neurojepa.feed.format import Grid
from neurojepa.methods import METHODS
from neurojepa.model.flops import Device
from neurojepa.planning.network import NETWORKS, Message, gradients, step_on

BEARABLE = 0.02  # of a step
BUCKETS = (5_000_000, 10_000_000, 20_000_000, 40_000_000)  # elements; DeepSpeed's default is 500 M
USUAL_BUCKET = 20_000_000
REACHED = 0.5  # of a device's peak, assumed: rather too much, so that a backward hides too little


@dataclass(frozen=True, kw_only=True)
class Reduction:
    """What the engine sets."""

    overlap: bool
    bucket: int
    width: int = 4

    def __str__(self) -> str:
        return (f"{8 * self.width} bit, by {self.bucket / 1e6:g} M"
                + (", beside the backward" if self.overlap else ""))


def stage_run(zero: int, dtype: str) -> int:
    """The stage of ZeRO that is run where ``zero`` is asked for.

    Stage 1 with bf16 and fp32 accumulation silently becomes another optimizer class, whose state
    lies elsewhere.  Stage 2 has the same numbers and also splits the gradients.
    """
    return 2 if zero == 1 and dtype == "bf16" else zero


def arriving(model: nn.Module) -> list[int]:
    """Sizes of the trained weights in about the order in which a backward has their gradients."""
    return [p.numel() for p in model.parameters() if p.requires_grad][::-1]


def choose_reduction(config: RootConfig, grid: Grid, model: nn.Module, *, ranks: int,
                     micro_steps: int, device: Device | None) -> Reduction:
    """The cheapest way to sum over so many ranks on ``run.network``.

    Parameters
    ----------
    device : None where it is not known, as a CPU; then nothing is chosen by cost.
    """
    train = config.train
    stage = stage_run(train.zero, train.dtype)
    # DeepSpeed copies what is offloaded as it comes; under stage 3 it overlaps at any size
    overlap = stage == 3 or (ranks > 1 and train.offload == "none")
    if device is None or ranks == 1 or not overlap:
        return Reduction(overlap=overlap, bucket=USUAL_BUCKET)
    forward, trained = METHODS[config.objective.method].load().flops(config, grid)
    micro_s = train.micro_batch / (REACHED * device.flops)
    step_s = micro_steps * micro_s * (forward + 2 * trained)
    backward_s = micro_s * 2 * trained * (micro_steps if stage > 1 else 1)

    sizes = arriving(model)

    def cost(way: Reduction) -> float:
        sent = gradients(sizes, stage, way.bucket, width=way.width, micro_steps=micro_steps)
        return exposed_share(sent, ranks, config.run.network, step_s=step_s, backward_s=backward_s)

    best = {}
    for width in (4, 2) if train.dtype == "bf16" else (4,):
        # of what is alike to a thousandth the largest: it gives the host the least to do
        best[width] = min((Reduction(overlap=True, bucket=bucket, width=width)
                           for bucket in BUCKETS),
                          key=lambda way: (round(cost(way), 3), -way.bucket))
    return best[4] if cost(best[4]) < BEARABLE or 2 not in best else best[2]


def exposed_share(sent: Message, ranks: int, network: str, *, step_s: float,
                  backward_s: float) -> float:
    """What a message costs that travels beside the backward, of the step's computation."""
    step = step_on(ranks, NETWORKS[network], [sent], compute_s=step_s, backward_s=backward_s)
    return step.exposed_s / step_s
