"""What is chosen for the sum of gradients, by ranks, stage, network and device."""

from __future__ import annotations

import pytest

from neurojepa.config import RootConfig, validate
from neurojepa.model.flops import DEVICES, Device
from neurojepa.planning.network import NETWORKS, gradients
from neurojepa.planning.reduction import (
    BEARABLE,
    BUCKETS,
    USUAL_BUCKET,
    Reduction,
    arriving,
    choose_reduction,
    exposed_share,
)
from neurojepa.planning.step import hollow_model
from tests.helpers.batches import GRID, make_config

H100 = DEVICES["H100"]
SLOW = H100._replace(flops=1e9)  # a backward of seconds hides everything
FAST = H100._replace(flops=1e18)


def config_of(network: str = "efa", **train: object) -> RootConfig:
    tree = make_config().model_dump(mode="json")
    tree["train"] |= train
    tree["run"]["network"] = network
    return validate(tree, "tests")


def chosen(device: Device | None, ranks: int = 64, micro_steps: int = 1, **changes: object
           ) -> Reduction:
    config = config_of(**changes)  # type: ignore[arg-type]
    return choose_reduction(config, GRID, hollow_model(config, GRID), ranks=ranks,
                            micro_steps=micro_steps, device=device)


def test_fp32_stays_where_it_hides_and_bf16_is_taken_where_it_does_not() -> None:
    assert chosen(SLOW).width == 4 and chosen(SLOW).overlap
    assert chosen(FAST).width == 2
    assert chosen(FAST, dtype="fp32").width == 4


def test_where_nothing_is_known_nothing_is_chosen() -> None:
    assert chosen(None) == Reduction(overlap=True, bucket=USUAL_BUCKET)
    assert chosen(None, ranks=1) == chosen(FAST, ranks=1) == Reduction(
        overlap=False, bucket=USUAL_BUCKET)
    assert chosen(None, ranks=1, zero=3).overlap
    assert chosen(FAST, dtype="fp32", offload="optimizer") == Reduction(
        overlap=False, bucket=USUAL_BUCKET)


@pytest.mark.parametrize(("network", "micro_steps"), [
    ("nvlink", 1), ("infiniband-400g", 1), ("infiniband-400g", 4), ("efa", 1)])
def test_no_other_bucket_costs_less(network: str, micro_steps: int) -> None:
    """A backward that hides nothing: then latency and bytes of all pieces are the cost."""
    config = config_of(network)
    model = hollow_model(config, GRID)
    way = choose_reduction(config, GRID, model, ranks=64, micro_steps=micro_steps, device=FAST)

    def seconds(bucket: int) -> float:
        return gradients(arriving(model), 2, bucket, width=2, micro_steps=micro_steps).seconds(
            64, NETWORKS[network])

    assert seconds(way.bucket) == min(map(seconds, BUCKETS))


def test_large_models_stay_fp32_beside_the_backward() -> None:
    """Base at 64 scans on 64 GPUs: what fp32 costs is below the limit, by the same arithmetic."""
    tree = config_of("infiniband-400g", micro_batch=64, global_batch=4096).model_dump(mode="json")
    tree["model"] |= {"size": "base"}
    config = validate(tree, "tests")
    model = hollow_model(config, GRID)
    way = choose_reduction(config, GRID, model, ranks=64, micro_steps=1, device=H100)
    assert way.width == 4
    sent = gradients(arriving(model), 2, way.bucket, width=4, micro_steps=1)
    assert exposed_share(sent, 64, "infiniband-400g", step_s=0.06, backward_s=0.03) < BEARABLE
