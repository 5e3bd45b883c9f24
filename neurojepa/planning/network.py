"""What ranks send each other in a step, and how long that takes on a network.

Bytes follow from ZeRO's stages (Rajbhandari et al. 2020) and from how the engine is set: gradients
are summed as fp32, weights are gathered in their own type, and the target's too.  A ring passes
(N - 1) / N of a tensor through every rank's link for a reduce-scatter or an all-gather, and twice
that for an all-reduce.  Where ranks fill several hosts the slower of NVLink and the hosts' ports
counts.  Latency is counted by message and, between hosts, by their number's logarithm, as of trees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from neurojepa.train.engine import REDUCED_AT_ONCE

# Assumed, as are the latencies below: no run on many GPUs has checked them.
OVERLAP = 0.9  # of the backward, that hides communication: both want the memory's bandwidth
WIRE_SHARE = 0.8  # of a link's data sheet that collectives reach


@dataclass(frozen=True)
class Network:
    """Bytes a second in one direction, by data sheet, and a message's seconds."""

    within: float  # a GPU's links to its neighbours in the host
    between: float  # all ports of a host: a ring for each port carries its part of a tensor
    per_host: int  # GPUs
    latency_s: float


NETWORKS = {
    "nvlink": Network(450e9, 450e9, 8, 5e-6),  # all GPUs within one NVLink domain
    "infiniband-400g": Network(450e9, 8 * 50e9, 8, 15e-6),  # a port for each of 8 GPUs
    "efa": Network(450e9, 400e9, 8, 30e-6),  # 3.2 Tb/s a host
}


@dataclass(frozen=True)
class Message:
    """A collective of a step: ``elements`` of ``width`` bytes, in so many pieces."""

    name: str
    collective: str  # all_reduce | reduce_scatter | all_gather
    elements: float
    width: int
    pieces: int
    hides: bool  # if it may overlap: behind the backward or the forward
    behind_views: bool = False  # or while the next batch becomes views

    @property
    def bytes(self) -> float:
        """Size of the whole tensor."""
        return self.elements * self.width

    def sent(self, ranks: int) -> float:
        """Bytes that pass through each rank's link."""
        passes = 2 if self.collective == "all_reduce" else 1
        return passes * self.bytes * (ranks - 1) / ranks

    def seconds(self, ranks: int, network: Network) -> float:
        if ranks == 1:
            return 0.0
        hosts = math.ceil(ranks / network.per_host)
        link = network.within if hosts == 1 else min(network.within, network.between)
        latency = network.latency_s * (1 + math.log2(hosts))
        return self.sent(ranks) / (link * WIRE_SHARE) + self.pieces * latency


def messages(trained: int, averaged: int, stage: int, *, width: int, micro_steps: int,
             gathers: int) -> list[Message]:
    """The collectives of a step.

    Parameters
    ----------
    trained, averaged : weights that are trained, and those of the encoder, which have a target.
    stage : of ZeRO, from ``engine.stage_run``.
    width : bytes of a weight.
    gathers : of ZeRO-3 in a micro-step: a trained block's weights come twice, a target's once.
    """
    buckets = math.ceil(trained / REDUCED_AT_ONCE)
    # DeepSpeed reduces whole buckets below 3, whoever keeps the sums
    reduced = "reduce_scatter" if stage == 3 else "all_reduce"
    # stages 2 and 3 reduce in every micro-step, stage 1 once
    times = 1 if stage == 1 else micro_steps
    found = [Message("gradients", reduced, float(trained * times), 4, buckets * times, True)]
    if stage == 3:
        # forward and backward of the trained ones, forward of the target; it is sharded likewise
        gathered = (2 * trained + averaged) * micro_steps
        return [*found, Message("weights", "all_gather", float(gathered), width,
                                gathers * micro_steps, True)]
    return [*found, Message("weights", "all_gather", float(trained), width, 2, False),
            Message("target", "all_gather", float(averaged), width, 2, False, behind_views=True)]


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of a step on N ranks."""

    compute_s: float
    exposed_s: float  # communication that nothing hides

    @property
    def efficiency(self) -> float:
        """Share of the speed of so many ranks that need not talk."""
        return self.compute_s / (self.compute_s + self.exposed_s)


def step_on(ranks: int, network: Network, sent: list[Message], *, compute_s: float,
            hiding_s: float = 0.0, views_s: float = 0.0) -> Step:
    """A step of ``ranks``, each with the same work (weak scaling).

    Parameters
    ----------
    compute_s : of a rank alone.
    hiding_s : the part of it that communication runs beside; 0 without overlap.
    views_s : the part in which the next batch becomes views.
    """
    seconds = {message: message.seconds(ranks, network) for message in sent}
    beside = sum(seconds[message] for message in sent if message.hides)
    after = sum(seconds[message] for message in sent
                if not (message.hides or message.behind_views))
    early = sum(seconds[message] for message in sent if message.behind_views)
    after += max(early - OVERLAP * views_s, 0.0)
    # a last piece has nothing left to hide behind
    last = max((seconds[message] / message.pieces for message in sent if message.hides),
               default=0.0)
    return Step(compute_s=compute_s, exposed_s=max(beside - OVERLAP * hiding_s, last) + after)
