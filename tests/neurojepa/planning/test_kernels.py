"""The count of kernels against cases worked by hand, and against the count of FLOPs."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from neurojepa.methods import METHODS
from neurojepa.model.flops import DEVICES, step_flops
from neurojepa.objective.anatomy import priors_on
from neurojepa.objective.views import make_views
from neurojepa.planning.kernels import Kernel, Rates, Recorder, fused, tabulate
from neurojepa.planning.step import step_kernels
from tests.helpers.batches import GRID, make_batch, make_config

MB = 2**20


def counted(function: Callable[[Tensor], object], *shape: int
            ) -> list[Kernel]:
    x = torch.zeros(*shape)
    recorder = Recorder()
    with recorder.during("forward"):
        function(x)
    return recorder.kernels


def sizes(kernels: list[Kernel]) -> list[float]:
    return [kernel.bytes / MB for kernel in kernels]


def test_a_chain_of_pointwise_operations_is_one_kernel() -> None:
    kernels = counted(lambda x: F.relu(x * 2 + 1), 512, 512)  # 1 MiB
    assert sizes(kernels) == [2, 2, 2]
    assert sizes(fused(kernels)) == [2]  # read once, written once


def test_what_is_read_twice_is_written() -> None:
    def two_ends(x: Tensor) -> None:
        y = x + 1
        torch.mm(y, y)  # a kernel of its own needs y

    kernels = counted(two_ends, 512, 512)
    assert sizes(kernels) == [2, 2]  # mm reads y once
    assert sizes(fused(kernels)) == [2, 2]


def test_a_product_keeps_its_neighbours_apart() -> None:
    w = torch.zeros(512, 512)
    kernels = counted(lambda x: F.relu((x * 2) @ w) * 3, 512, 512)
    joined = fused(kernels)
    assert [kernel.kind for kernel in joined] == ["pointwise", "products", "pointwise"]
    assert sizes(joined) == [2, 3, 2]
    assert joined[1].flops == 2 * 512**3


def test_no_cycle_through_a_product() -> None:
    """x + 1 and what comes after the product both read it: they are no single kernel."""
    def residual(x: Tensor) -> None:
        y = x + 1
        y + y @ y

    joined = fused(counted(residual, 512, 512))
    assert len(joined) == 3


def test_what_waits_for_no_product_joins_what_comes_after_it() -> None:
    w = torch.zeros(512, 512)
    joined = fused(counted(lambda x: (x * 2 + 1) + w @ w, 512, 512))
    assert {kernel.kind: kernel.bytes / MB for kernel in joined} == {
        "products": 2, "pointwise": 3}  # x and the product read, the sum written


def test_what_reads_nothing_is_made_where_it_is_read() -> None:
    def counting(x: Tensor) -> None:
        x * (torch.arange(512) * 2)

    assert sizes(fused(counted(counting, 512, 512))) == [2]
    alone = fused(counted(lambda x: x @ torch.ones(512, 512), 512, 512))
    assert [kernel.kind for kernel in alone] == ["pointwise", "products"]  # a product reads memory


@pytest.mark.parametrize("seed", range(20))
def test_no_group_waits_for_itself(seed: int) -> None:
    """Random graphs: groups can be ordered so that each reads only what is made before it."""
    rng = random.Random(seed)
    kernels = [Kernel(phase="", kind="", precise=False, fuses=rng.random() < 0.8, flops=0.0,
                      reads={(source, 0): 1.0 for source in {
                          -1, *(rng.randrange(i) for _ in range(rng.randrange(3)) if i)}},
                      writes={(i, 0): 1.0}) for i in range(60)]
    groups, made = fused(kernels), {(-1, 0)}
    assert len(groups) < len(kernels)
    while ready := [group for group in groups if made.issuperset(group.reads)]:
        made |= {key for group in ready for key in group.writes}
        groups = [group for group in groups if group not in ready]
    assert not groups


def test_views_and_expanded_axes_cost_nothing() -> None:
    kernels = counted(lambda x: x.view(1024, 256).t().unsqueeze(0) + torch.zeros(1, 1, 1), 512, 512)
    adds = [kernel for kernel in kernels if kernel.bytes > 1000]
    assert sizes(adds) == pytest.approx([2], abs=1e-4)
    expanded = counted(lambda x: x.expand(512, 512) * 1.0, 1, 512)
    assert expanded[0].reads == pytest.approx({next(iter(expanded[0].reads)): 2048.0})


def test_a_gather_reads_what_it_takes() -> None:
    index = torch.zeros(8, dtype=torch.int64)
    (kernel,) = counted(lambda x: x[index], 4096, 64)
    assert kernel.bytes == 8 * 64 * 4 * 2 + 8 * 8


def test_sums_over_rows_are_no_part_of_what_made_them() -> None:
    rows = fused(counted(lambda x: (x * 2).sum(0), 512, 512))
    columns = fused(counted(lambda x: (x * 2).sum(1), 512, 512))
    assert [len(rows), len(columns)] == [2, 1]


def test_a_kernel_takes_the_longest_of_its_three_costs() -> None:
    rates = Rates.of(DEVICES["H100"])
    base = Kernel(phase="", kind="products", precise=False, fuses=False, flops=0.0,
                  reads={(0, 0): 1.0}, writes={})
    launch, copy, product = (tabulate([kernel], rates).total.seconds for kernel in (
        base, Kernel(**{**vars(base), "reads": {(0, 0): 2.8e9}}),
        Kernel(**{**vars(base), "flops": 8e11})))
    assert launch == 4e-6
    assert copy == pytest.approx(1e-3, rel=0.02) and product == pytest.approx(1e-3, rel=0.02)


@pytest.mark.parametrize("method", [name for name in METHODS if name != "cnn"])
def test_matrix_work_of_a_step_is_what_mfu_counts(method: str) -> None:
    config = make_config(objective={"method": method})
    kernels = step_kernels(config, GRID)
    work = sum(kernel.flops for kernel in kernels if kernel.kind in (
        "products", "experts", "attention"))
    scans = config.train.micro_batch
    # attention's backward is counted with what it computes anew; metrics have products too
    assert 1.0 < work / (scans * step_flops(config, GRID)) < 1.2


def test_joining_moves_less_and_computes_the_same() -> None:
    rates = Rates.of(DEVICES["H100"])
    kernels = step_kernels(make_config(), GRID)
    eager, joined = tabulate(kernels, rates), tabulate(fused(kernels), rates)
    assert list(eager.phases) == ["views", "target", "forward", "backward", "update"]
    assert set(joined.phases) == set(eager.phases)
    assert joined.total.bytes < 0.7 * eager.total.bytes
    assert joined.total.kernels < eager.total.kernels
    assert joined.total.flops == pytest.approx(eager.total.flops)
    assert eager.total.seconds == pytest.approx(sum(c.seconds for c in eager.kinds.values()))


def test_counting_leaves_nothing_hollow_behind() -> None:
    """What is read once and kept, such as the template's tissues, has its contents afterwards."""
    config = make_config()
    priors_on.cache_clear()
    step_kernels(config, GRID)
    assert make_views(make_batch(1), config, GRID, 0).tissue_BNK.sum() > 0
