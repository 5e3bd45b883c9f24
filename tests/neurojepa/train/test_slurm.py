"""Ranks by srun, without a launcher of ours."""

from __future__ import annotations

import pytest

from neurojepa.errors import ConfigError
from neurojepa.train.slurm import first_node, slurm_ranks

TASK = {"SLURM_STEP_NUM_TASKS": "16", "SLURM_PROCID": "9", "SLURM_LOCALID": "1",
        "SLURM_STEP_NODELIST": "gpu[07-08]", "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0"}


def test_a_task_is_a_rank() -> None:
    ranks = slurm_ranks(TASK, "env")
    assert ranks == {"RANK": "9", "LOCAL_RANK": "1", "WORLD_SIZE": "16", "MASTER_ADDR": "gpu07",
                     "MASTER_PORT": "27110"}
    other = slurm_ranks({**TASK, "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, "env")
    assert {key: other[key] for key in ("MASTER_ADDR", "MASTER_PORT")} == {
        "MASTER_ADDR": "gpu07", "MASTER_PORT": "27110"}
    assert slurm_ranks({**TASK, "SLURM_STEP_ID": "1"}, "env")["MASTER_PORT"] == "27111"
    own = slurm_ranks({**TASK, "MASTER_ADDR": "10.0.0.7", "MASTER_PORT": "29500"}, "env")
    assert (own["MASTER_ADDR"], own["MASTER_PORT"]) == ("10.0.0.7", "29500")


@pytest.mark.parametrize("environment", [
    {}, {**TASK, "RANK": "3"}, {**TASK, "SLURM_STEP_NUM_TASKS": "1"},
    {"SLURM_PROCID": "0", "SLURM_NTASKS": "16", "SLURM_JOB_ID": "1"}])  # the batch script itself
def test_elsewhere_nothing_changes(environment: dict[str, str]) -> None:
    assert slurm_ranks(environment, "env") == {}


@pytest.mark.parametrize(("launcher", "gone", "says"), [
    ("local", "", r"run.launcher = 'local': srun has started 16 tasks, and each"),
    ("env", "SLURM_PROCID", "does not set SLURM_PROCID"),
    ("env", "SLURM_STEP_NODELIST", "does not set SLURM_STEP_NODELIST")])
def test_many_worlds_of_one_are_refused(launcher: str, gone: str, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        slurm_ranks({key: value for key, value in TASK.items() if key != gone}, launcher)


@pytest.mark.parametrize(("nodes", "first"), [
    ("node1", "node1"), ("a,b", "a"), ("gpu[07-09,12],login1", "gpu07"), ("n[3]", "n3"),
    ("r1n[001,5]-ib", "r1n001-ib"), ("host-a.site,host-b.site", "host-a.site")])
def test_the_first_of_a_list_of_nodes(nodes: str, first: str) -> None:
    assert first_node(nodes) == first
