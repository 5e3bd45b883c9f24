"""What ranks send each other in a step, and how long that takes on a network.

Bytes follow from ZeRO's stages (Rajbhandari et al. 2020) and from how the engine is set
(reduction.py); weights are gathered in their own type, and the target's too.  A ring passes
(N - 1) / N of a tensor through every rank's link for a reduce-scatter or an all-gather, and twice
that for an all-reduce.  Where ranks fill several hosts the slower of NVLink and the hosts' ports
counts.  Latency is counted by message and, between hosts, by their number's logarithm, as of trees.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Assumed, as are the latencies below: no run on many GPUs has checked them.
OVERLAP = 0.9  # of what is computed beside a message, that hides it: both want the memory
PARTS = 4  # of the encoder's blocks, whose target's weights are gathered one after the other
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


@dataclass(frozen=True, kw_only=True)
class Message:
    """A collective of a step: ``elements`` of ``width`` bytes, in so many pieces.

    It travels beside the backward, beside the views of the next batch, beside these and the
    target's forward, or while all ranks wait.
    """

    name: str
    collective: Literal["all_reduce", "reduce_scatter", "all_gather"]
    elements: float
    width: int
    pieces: int
    beside: Literal["backward", "views", "target", "nothing"]
    last: float = 0.0  # elements of the last piece, which has no backward left to travel beside

    @property
    def bytes(self) -> float:
        """Size of the whole tensor."""
        return self.elements * self.width

    def sent(self, ranks: int) -> float:
        """Bytes that pass through each rank's link."""
        return self._passed(self.elements, ranks)

    def seconds(self, ranks: int, network: Network) -> float:
        """Of all pieces, one after the other."""
        return self._travel(self.elements, self.pieces, ranks, network)

    def last_seconds(self, ranks: int, network: Network) -> float:
        """Of the last piece."""
        return self._travel(self.last, 1, ranks, network)

    def _passed(self, elements: float, ranks: int) -> float:
        passes = 2 if self.collective == "all_reduce" else 1
        return passes * elements * self.width * (ranks - 1) / ranks

    def _travel(self, elements: float, pieces: int, ranks: int, network: Network) -> float:
        if ranks == 1:
            return 0.0
        hosts = math.ceil(ranks / network.per_host)
        link = network.within if hosts == 1 else min(network.within, network.between)
        latency = network.latency_s * (1 + math.log2(hosts))
        return self._passed(elements, ranks) / (link * WIRE_SHARE) + pieces * latency


def buckets(arriving: Sequence[int], size: int) -> list[int]:
    """Elements of each piece: as DeepSpeed fills buckets of ``size`` with whole gradients.

    One that is larger than a bucket travels alone.
    """
    found, filled = [], 0
    for elements in arriving:
        if filled and filled + elements > size:
            found.append(filled)
            filled = 0
        filled += elements
    return [*found, filled] if filled else found


def gradients(arriving: Sequence[int], stage: int, bucket: int, *, width: int,
              micro_steps: int) -> Message:
    """The sum of gradients over ranks.

    Parameters
    ----------
    arriving : sizes of the trained weights, in the order in which their gradients come.
    stage : of ZeRO, from ``reduction.stage_run``.
    bucket, width : of ``reduction.Reduction``.
    """
    pieces = buckets(arriving, bucket)
    # stages 2 and 3 reduce in every micro-step, stage 1 once
    times = 1 if stage == 1 else micro_steps
    return Message(
        # DeepSpeed reduces whole buckets below 3, whoever keeps the sums
        name="gradients", collective="reduce_scatter" if stage == 3 else "all_reduce",
        elements=float(sum(arriving) * times), width=width, pieces=len(pieces) * times,
        beside="backward", last=float(pieces[-1]))


def weights(trained: int, averaged: int, stage: int, *, width: int, micro_steps: int,
            gathers: int) -> list[Message]:
    """The gathers of a step.

    Parameters
    ----------
    trained, averaged : weights that are trained, and those of the encoder, which have a target.
    width : bytes of a weight.
    gathers : of ZeRO-3 in a micro-step: a trained block's weights come twice, a target's once.
    """
    if stage == 3:
        # forward and backward of the trained ones, forward of the target; it is sharded likewise
        gathered = (2 * trained + averaged) * micro_steps
        return [Message(name="weights", collective="all_gather", elements=float(gathered),
                        width=width, pieces=gathers * micro_steps, beside="backward",
                        last=float(gathered / (gathers * micro_steps)))]
    # a piece for each group of the optimizer: encoder's parts and the rest, with and without decay
    return [Message(name="target", collective="all_gather", elements=float(averaged), width=width,
                    pieces=2 * PARTS, beside="views"),
            Message(name="weights", collective="all_gather", elements=float(trained), width=width,
                    pieces=2 * PARTS + 2, beside="target")]


def agreements(moe: bool) -> Message:
    """Sums of a few numbers for which all ranks wait: loss, norm, and how often experts and atoms
    were used."""
    return Message(name="agreements", collective="all_reduce", elements=0.0, width=4,
                   pieces=4 if moe else 3, beside="nothing")


@dataclass(frozen=True, kw_only=True)
class Step:
    """Seconds of a step on N ranks."""

    compute_s: float
    exposed_s: float  # communication that nothing hides

    @property
    def efficiency(self) -> float:
        """Share of the speed of so many ranks that need not talk."""
        return self.compute_s / (self.compute_s + self.exposed_s)


def step_on(ranks: int, network: Network, sent: Sequence[Message], *, compute_s: float,
            backward_s: float = 0.0, views_s: float = 0.0, target_s: float = 0.0) -> Step:
    """A step of ``ranks``, each with the same work (weak scaling).

    Parameters
    ----------
    compute_s : of a rank alone.
    backward_s : the part of it that gradients travel beside; 0 without overlap.
    views_s : the part in which the next batch becomes views.
    target_s : the target's forward, which follows; 0 where a method has none.
    """
    def of(beside: str) -> float:
        return sum(message.seconds(ranks, network) for message in sent if message.beside == beside)

    last = max((message.last_seconds(ranks, network) for message in sent), default=0.0)
    reduced = max(of("backward") - OVERLAP * backward_s, last)
    # the target's weights come first, part by part as its blocks need them; the others behind them
    target = max(0.0, *(of("views") * (part + 1) / PARTS
                        - OVERLAP * (views_s + target_s * part / PARTS) for part in range(PARTS)))
    rest = max(of("views") + of("target") - target - OVERLAP * (views_s + target_s), 0.0)
    return Step(compute_s=compute_s, exposed_s=reduced + target + rest + of("nothing"))
