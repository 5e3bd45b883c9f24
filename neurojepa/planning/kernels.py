"""What a training step asks of a device, counted kernel by kernel without one.

The step runs on tensors without contents.  Every operation of torch is noted with its FLOPs, the
bytes that it reads and those that it writes; views cost nothing.  A kernel then takes the largest
of FLOPs / rate, bytes / bandwidth and the cost of a launch (a roofline, Williams et al. 2009).

    eager   one kernel for each operation
    fused   pointwise operations and reductions that follow one another are one kernel; what only
            passes between them is neither written nor read.  Matrix products, attention, sorts and
            sums over rows stay kernels of their own

It tells where the time goes and what a change will bring.  It is no measurement.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from neurojepa.model.flops import Device

# What a kernel is taken to reach of a data sheet's matrix rate and bandwidth.  This is assumed, not
# measured: 800 of an H100's 989 TFLOP/s and 2.8 of its 3.35 TB/s.  FlashAttention-2 reaches 35 %
# of that peak (Shah et al. 2024); our sequences are short.
PRODUCT_SHARE, ATTENTION_SHARE, COPY_SHARE = 0.81, 0.27, 0.84
PRECISE_SHARE = 0.4  # float32 products in TF32, whose peak is half as high; bf16 runs allow it
LAUNCH_S = 4e-6  # assumed too: kernels that follow one another in a queue

_VIEWS = {
    "view", "_unsafe_view", "expand", "permute", "transpose", "t", "slice", "select", "unsqueeze",
    "squeeze", "alias", "detach", "as_strided", "split", "unbind", "view_as_complex",
    "view_as_real", "_reshape_alias", "lift_fresh", "_conj", "split_with_sizes", "diagonal",
    "unfold", "empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided",
    "device", "is_pinned", "dtype", "layout"}
_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "convolution_backward",
             "_linear_pointwise"}
_GATHERS = {"index", "gather", "index_select"}
_MOVES = {"cat", "stack", "clone", "_to_copy", "copy", "zeros", "zeros_like", "fill", "full",
          "arange", "constant_pad_nd", "slice_backward", "select_backward", "flip", "repeat",
          "scalar_tensor", "ones", "ones_like", "full_like", "new_zeros", "new_full",
          "new_ones", "zero", "where", "gelu", "gelu_backward", "threshold_backward",
          "floor_divide"}
_REDUCTIONS = {"sum", "mean", "amax", "amin", "any", "all", "var_mean", "native_layer_norm",
               "native_layer_norm_backward", "native_group_norm", "native_group_norm_backward",
               "_softmax", "_softmax_backward_data", "_log_softmax", "_log_softmax_backward_data",
               "linalg_vector_norm", "max", "min", "diff", "trace"}


@dataclass(kw_only=True)
class Kernel:
    """An operation; reads and writes are bytes by the version of a storage."""

    phase: str
    kind: str
    precise: bool  # no input is of 16 bits
    fuses: bool
    flops: float
    reads: dict[tuple[int, int], float]
    writes: dict[tuple[int, int], float]

    @property
    def bytes(self) -> float:
        return sum(self.reads.values()) + sum(self.writes.values())


@dataclass(frozen=True)
class Rates:
    """What kernels reach on a device: FLOP/s of bf16 and float32 products, bytes/s, launch."""

    products: float
    precise: float
    attention: float
    bandwidth: float
    launch_s: float = LAUNCH_S

    @classmethod
    def of(cls, device: Device) -> Rates:
        """What is usual for a device of that data sheet."""
        return cls(device.flops * PRODUCT_SHARE, device.flops * PRECISE_SHARE,
                   device.flops * ATTENTION_SHARE, device.bandwidth * COPY_SHARE)

    def seconds(self, kernel: Kernel) -> float:
        rate = (self.attention if kernel.kind == "attention"
                else self.precise if kernel.precise else self.products)
        return max(kernel.flops / rate, kernel.bytes / self.bandwidth, self.launch_s)


class Recorder(TorchDispatchMode):
    """Notes the operations that run below it, by ``phase``; its tensors should hold nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.phase = ""
        self.kernels: list[Kernel] = []
        self._versions: dict[int, int] = defaultdict(int)
        self._kept: list[Any] = []  # lest an address is used again

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """Operations inside belong to a phase."""
        self.phase = phase
        with self:
            yield

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (),
                           kwargs: Any = None) -> Any:
        name = func._overloadpacket.__name__
        inputs = _tensors((args, kwargs))
        reads = self._sizes(inputs)
        out = func(*args, **(kwargs or {}))
        outputs = _tensors(out)
        base = name.rstrip("_")
        if base in _VIEWS or not outputs:
            return out
        if base in _GATHERS:  # of the source only what is taken
            source = self._key(inputs[0])
            reads[source] = min(reads[source], sum(map(_bytes, outputs)))
        if name.endswith("_"):
            for tensor in outputs:
                self._versions[tensor.untyped_storage()._cdata] += 1
        self.kernels.append(Kernel(
            phase=self.phase, kind=_kind(base, func),
            precise=not any(t.dtype in (torch.bfloat16, torch.float16) for t in inputs),
            fuses=_fuses(base, func, args), flops=_flops(func, base, args, kwargs, out),
            reads=reads, writes=self._sizes(outputs)))
        return out

    def _key(self, tensor: Tensor) -> tuple[int, int]:
        storage = tensor.untyped_storage()
        self._kept.append(storage)
        return storage._cdata, self._versions[storage._cdata]

    def _sizes(self, tensors: list[Tensor]) -> dict[tuple[int, int], float]:
        found: dict[tuple[int, int], float] = {}
        for tensor in tensors:
            key = self._key(tensor)
            whole = float(tensor.untyped_storage().nbytes())
            found[key] = min(found.get(key, 0.0) + _bytes(tensor), max(whole, _bytes(tensor)))
        return found


def fused(kernels: list[Kernel]) -> list[Kernel]:
    """The same work with neighbours joined, as a compiler of regions joins them.

    An operation joins those that it reads from where nothing else that waits for them has to come
    first.  What reads nothing is made where it is read.
    """
    kernels = _without_constants(kernels)
    joined = _Groups(kernels)
    maker: dict[tuple[int, int], int] = {}
    for i, kernel in enumerate(kernels):
        sources = {maker[key] for key in kernel.reads if key in maker}
        joined.add(i, sources)
        if kernel.fuses:
            for source in sorted(sources, reverse=True):
                if kernels[source].fuses and kernels[source].phase == kernel.phase:
                    joined.join(source, i)
        maker |= dict.fromkeys(kernel.writes, i)
    members: dict[int, list[int]] = defaultdict(list)
    for i in range(len(kernels)):
        members[joined.of(i)].append(i)
    return [_joined([kernels[i] for i in group], needed)
            for group, needed in zip(members.values(),
                                     _needed(kernels, list(members.values())), strict=True)]


class _Groups:
    """Kernels in groups that can run one after the other: no group waits for itself."""

    def __init__(self, kernels: list[Kernel]) -> None:
        self._parents = list(range(len(kernels)))
        self._above = [0] * len(kernels)  # bits: the groups that come before a group
        self._direct: list[set[int]] = [set() for _ in kernels]

    def of(self, i: int) -> int:
        while self._parents[i] != i:
            self._parents[i] = self._parents[self._parents[i]]
            i = self._parents[i]
        return i

    def add(self, i: int, sources: set[int]) -> None:
        """A new group of one kernel, behind those of its sources."""
        self._direct[i] = {self.of(source) for source in sources}
        for group in self._direct[i]:
            self._above[i] |= self._above[group] | 1 << group

    def join(self, i: int, last: int) -> None:
        """Make one group of two, the later of which is the last of all, where nothing is between.
        """
        first, second = self.of(i), self.of(last)
        if first == second or self._between(first, second) or self._between(second, first):
            return
        both = 1 << first | 1 << second
        above = (self._above[first] | self._above[second]) & ~both
        if second != last or above != self._above[first]:  # those behind have more before them
            for group in range(min(first, second), last):
                if self._above[group] & both:
                    self._above[group] |= above | 1 << first
        self._parents[second], self._above[first] = first, above
        self._direct[first] |= self._direct[second]

    def _between(self, first: int, second: int) -> bool:
        """Whether a way from one group to the other leads through a third one."""
        found = {self.of(group) for group in self._direct[second]} - {first, second}
        return any(self._above[group] >> first & 1 for group in found)


def _without_constants(kernels: list[Kernel]) -> list[Kernel]:
    """Leave out what reads nothing and is read by kernels that fuse alone."""
    alone = {key for kernel in kernels if not kernel.fuses for key in kernel.reads}
    made = {key for kernel in kernels if kernel.fuses and not kernel.reads
            for key in kernel.writes} - alone
    left = [replace(kernel, reads={key: size for key, size in kernel.reads.items()
                                   if key not in made})
            for kernel in kernels if kernel.reads or not made.issuperset(kernel.writes)]
    # what is left may read nothing any more
    return left if len(left) == len(kernels) else _without_constants(left)


def _needed(kernels: list[Kernel], groups: list[list[int]]) -> list[set[tuple[int, int]]]:
    """For each group, what is read outside of it, or nowhere: that must be written."""
    group_of = {i: number for number, group in enumerate(groups) for i in group}
    readers: dict[tuple[int, int], set[int]] = defaultdict(set)
    for i, kernel in enumerate(kernels):
        for key in kernel.reads:
            readers[key].add(group_of[i])
    needed: list[set[tuple[int, int]]] = [set() for _ in groups]
    for i, kernel in enumerate(kernels):
        for key in kernel.writes:
            if readers[key] != {group_of[i]}:
                needed[group_of[i]].add(key)
    return needed


def _joined(group: list[Kernel], needed: set[tuple[int, int]]) -> Kernel:
    if len(group) == 1:
        return group[0]
    made = {key for kernel in group for key in kernel.writes}
    reads: dict[tuple[int, int], float] = {}
    writes: dict[tuple[int, int], float] = {}
    for kernel in group:
        for key, size in kernel.reads.items():
            if key not in made:
                reads[key] = max(reads.get(key, 0.0), size)
        writes |= {key: size for key, size in kernel.writes.items() if key in needed}
    largest = max(group, key=lambda kernel: kernel.bytes)
    return Kernel(phase=group[0].phase, kind=largest.kind, precise=largest.precise, fuses=True,
                  flops=sum(kernel.flops for kernel in group), reads=reads, writes=writes)


@dataclass
class Cost:
    """Totals of some kernels."""

    kernels: int = 0
    seconds: float = 0.0
    flops: float = 0.0
    bytes: float = 0.0

    def add(self, kernel: Kernel, rates: Rates) -> None:
        self.kernels += 1
        self.seconds += rates.seconds(kernel)
        self.flops += kernel.flops
        self.bytes += kernel.bytes


@dataclass
class Table:
    """Costs by phase and by kind of operation."""

    total: Cost = field(default_factory=Cost)
    phases: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))
    kinds: dict[str, Cost] = field(default_factory=lambda: defaultdict(Cost))


def tabulate(kernels: Iterable[Kernel], rates: Rates) -> Table:
    """Add up what kernels cost on a device."""
    table = Table()
    for kernel in kernels:
        for cost in (table.total, table.phases[kernel.phase], table.kinds[kernel.kind]):
            cost.add(kernel, rates)
    return table


# ---- one operation -------------------------------------------------------------------------------

def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _bytes(tensor: Tensor) -> float:
    """What has to be moved of a tensor: expanded axes count once."""
    elements = math.prod(length for length, stride in
                         zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return float(elements * tensor.element_size())


def _kind(base: str, func: Any) -> str:
    if base in _PRODUCTS:
        return "products"
    if "grouped_mm" in base:
        return "experts"
    if "attention" in base:
        return "attention"
    if base in _GATHERS or "scatter" in base or "index" in base:
        return "gathers"
    if "norm" in base:
        return "norms"
    if "gelu" in base:
        return "gelu"
    if base in _REDUCTIONS:
        return "reductions"
    if base in ("_to_copy", "copy", "clone", "cat"):
        return "copies and casts"
    if torch.Tag.pointwise in func.tags or base in _MOVES:
        return "pointwise"
    return "sorts and others"


def _fuses(base: str, func: Any, args: Any) -> bool:
    if base == "sum" and len(args) > 1 and args[1]:
        # over all rows: another direction than that of what made it
        first, last = 0, args[0].dim() - 1
        axes = {axis % args[0].dim() for axis in args[1]}
        return first not in axes or last in axes
    return (torch.Tag.pointwise in func.tags or base in _MOVES or base in _GATHERS
            or base in _REDUCTIONS)


def _flops(func: Any, base: str, args: Any, kwargs: Any, out: Any) -> float:
    tensors = _tensors((args, kwargs))
    if "grouped_mm" in base:
        return 2.0 * tensors[0].numel() * tensors[1].shape[-1]
    if "attention" in base:
        backward = "backward" in base
        q, k = tensors[backward], tensors[1 + backward]
        return (10.0 if backward else 4.0) * q.numel() * k.shape[-2]
    if base == "_linear_pointwise":
        return 2.0 * tensors[0].numel() * tensors[1].shape[0]
    if func._overloadpacket in flop_registry:
        counted = flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return float(counted)
    return 0.0
