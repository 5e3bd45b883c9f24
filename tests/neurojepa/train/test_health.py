"""Spikes, rollbacks and collapse: what is dropped, where a run goes back to, when it stops."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from neurojepa.config import HealthConfig, RootConfig
from neurojepa.errors import DataError
from neurojepa.storage import read_rows
from neurojepa.train.checkpoint import Checkpoint, committed_steps, open_checkpoint
from neurojepa.train.health import ARMED, WINDOW, Damage, Guard, Health
from neurojepa.train.world import World
from tests.helpers.feeds import tiny_config, write_feed
from tests.helpers.worker import job, run_ranks

ALONE = World(rank=0, size=1, device=torch.device("cpu"), control=None)


# ---- the guard -----------------------------------------------------------------------------------

def feed_guard(guard: Guard, loss: float, norm: float) -> bool:
    """One step of two micro-steps; true if it may count."""
    for _ in range(2):
        guard.add(torch.tensor(loss))
    guard.end_step(micro_steps=2)
    return bool(guard.judge(torch.tensor(norm)).isfinite())


def steady(guard: Guard, steps: int) -> Guard:
    for step in range(steps):
        assert feed_guard(guard, 1.0 + 0.01 * (step % 5), 2.0 + 0.1 * (step % 7))
    return guard


def test_a_spike_is_one_only_after_enough_steps_and_says_why() -> None:
    assert feed_guard(steady(Guard(10, ALONE), ARMED - 1), 100.0, 2.0)
    guard = steady(Guard(10, ALONE), ARMED)
    assert not feed_guard(guard, 100.0, 2.0)
    assert guard.why()["reason"] == "loss spike" and guard.why()["loss"] == 100.0
    assert 1.2 < guard.why()["loss_limit"] < 1.5
    assert not feed_guard(guard, 1.0, 50.0)
    assert guard.why()["reason"] == "gradient spike" and guard.why()["grad_norm"] == 50.0
    assert feed_guard(guard, 1.2, 3.5)  # near the median is no spike, however small the spread


@pytest.mark.parametrize(("loss", "norm", "reason"), [
    (float("nan"), 1.0, "loss not finite"), (1.0, float("inf"), "gradient not finite"),
    (float("inf"), float("nan"), "loss not finite, gradient not finite")])
@pytest.mark.parametrize("deviations", [0.0, 10.0])
def test_what_is_not_finite_never_counts(loss: float, norm: float, reason: str,
                                         deviations: float) -> None:
    guard = Guard(deviations, ALONE)
    assert not feed_guard(guard, loss, norm)
    assert guard.why()["reason"] == reason
    assert feed_guard(guard, 1.0, 1.0)


def test_zero_deviations_let_spikes_pass() -> None:
    assert feed_guard(steady(Guard(0, ALONE), ARMED), 1e6, 1e6)


def test_dropped_steps_do_not_widen_the_limits() -> None:
    guard = steady(Guard(10, ALONE), WINDOW + 20)
    before = {name: tensor.clone() for name, tensor in guard.tensors().items()}
    for _ in range(50):
        assert not feed_guard(guard, 100.0, 2.0)
    assert all(before[name].equal(tensor) for name, tensor in guard.tensors().items())
    for step in range(WINDOW):  # a slow rise is followed
        assert feed_guard(guard, 1.02 + 0.004 * step, 2.0)


def test_the_window_is_the_median_and_mad_of_the_last_steps() -> None:
    values = torch.rand(3 * WINDOW, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    guard = Guard(4, ALONE)
    for value in values.tolist():
        assert feed_guard(guard, value, 1.0)
    feed_guard(guard, 0.5, 1.0)
    last = values[-WINDOW:].float().double()
    median = last.median()
    assert guard.why()["loss_limit"] == pytest.approx(
        float(median + 4 * 1.4826 * (last - median).abs().median()), abs=1e-6)


def test_a_restored_guard_decides_alike() -> None:
    guard, other = steady(Guard(10, ALONE), 70), Guard(10, ALONE)
    for name, tensor in other.tensors().items():
        tensor.copy_(guard.tensors()[name])
    for loss in (1.0, 1.26, 1.31, 5.0, 1.1):
        assert feed_guard(guard, loss, 2.0) == feed_guard(other, loss, 2.0)
        assert guard.why() == other.why()


# ---- the counts ----------------------------------------------------------------------------------

def test_many_drops_in_few_steps_send_back_and_a_checkpoint_counts_as_progress() -> None:
    health = Health(HealthConfig(max_skips=2, max_rollbacks=2))
    skips = {1, 15, 30, 31, 32}
    assert next(s for s in range(1, 40) if health.must_go_back(s, s not in skips)) == 31
    record = {"skipped": 1, "recent": [1]}
    assert health.go_back(None) == "before the first checkpoint"
    assert health.go_back(record) is None and health.skipped == 1
    health.progressed()
    assert health.go_back(record) is None and health.go_back(record) is None
    assert health.go_back(record) == "again after 2 rollbacks to the same checkpoint"


def test_collapse_needs_low_figures_in_several_flushes_in_a_row() -> None:
    health = Health(HealthConfig(min_target_std=0.1, min_effective_rank=2))
    good, low = {"target_std": 0.5, "effective_rank": 9.0}, {"target_std": 0.5,
                                                             "effective_rank": 1.5}
    rows = [low, low, good, low, low, low]
    found = [health.collapse({"step": step, **row}) for step, row in enumerate(rows, 1)]
    assert found == [None] * 5 + [low]
    health = Health(HealthConfig())
    assert not any(health.collapse({"step": 1, **low, "target_std": 0.0}) for _ in range(9))


def test_damage_is_told_once_per_scan_and_bounded() -> None:
    damage = Damage(max_share=0.01)
    assert [r["scan_id"] for r in damage.new([{"scan_id": s} for s in "bab"])] == ["a", "b"]
    assert damage.new([{"scan_id": "a"}]) == []
    damage.new([{"scan_id": "c"}])
    damage.check(10)  # three are borne
    damage.new([{"scan_id": "d"}])
    damage.check(1000)
    with pytest.raises(DataError, match=r"4 of 100 samples.*max_damaged_share = 0\.01"):
        damage.check(100)


# ---- whole runs with faults ----------------------------------------------------------------------

@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("health")
    write_feed(str(path / "feed"))
    return path


def config_of(folder: Path, name: str, **train: Any) -> RootConfig:
    return tiny_config(str(folder / "feed"), folder / name, **train)


def events(folder: Path, run: str, name: str) -> list[dict[str, Any]]:
    return [row for row in read_rows(str(folder / run / "events.jsonl")) if row["event"] == name]


def losses(folder: Path, run: str) -> list[float]:
    return [row["loss"] for row in read_rows(str(folder / run / "metrics.jsonl"))]


def final(folder: Path, run: str) -> Checkpoint:
    return open_checkpoint(str(folder / run), committed_steps(str(folder / run))[-1])


def success(processes: list[Any]) -> str:
    for process in processes:
        assert process.returncode == 0, process.stdout
    return processes[0].stdout


@pytest.mark.slow(33)
def test_a_spike_on_one_rank_is_dropped_on_all_and_shifts_nothing(folder: Path) -> None:
    train = {"steps": 38, "checkpoint_every": 50, "log_every": 1}
    jobs = [job(config_of(folder, "calm", **train), folder)]
    jobs += [job(config_of(folder, f"spiked{zero}", zero=zero, **train), folder,
                 spike=[[36], 1, 1e4]) for zero in (1, 3)]
    success(run_ranks(jobs, folder, ranks=2))
    calm = losses(folder, "calm")
    for run in ("spiked1", "spiked3"):
        (skip,) = events(folder, run, "skip")
        assert skip["step"] == 37 and skip["reason"] == "loss spike, gradient spike"
        assert skip["loss"] > 100 > skip["loss_limit"]
        assert skip["positions"] == [4 * 36, 4 * 37]
        assert final(folder, run).manifest["adam_step"] == 37
        assert losses(folder, run)[:36] == pytest.approx(calm[:36], abs=1e-5)
        assert losses(folder, run)[37:] == pytest.approx(calm[37:], abs=0.05)  # the same samples
    assert not events(folder, "calm", "skip") and not events(folder, "calm", "collapse")
    limits = HealthConfig()
    for row in read_rows(str(folder / "calm/metrics.jsonl")):  # far from a false alarm
        assert row["target_std"] > 5 * limits.min_target_std
        assert row["effective_rank"] > 1.5 * limits.min_effective_rank


BAD = [*range(6, 12), *range(18, 22)]  # steps whose samples cannot be learned from

# calls in which a run dies: before a rollback, its rows cut, its weights back but no batch yet
DEATHS = (["Run._go_back", 1], ["Metrics.rewind", 2], ["Loader.seek", 4])


@pytest.fixture(scope="module")
def rolled(folder: Path) -> tuple[Path, str]:
    """Runs that go back twice, undisturbed or killed in three places; and hopeless ones."""
    train: dict[str, Any] = {"steps": 18, "health": {"max_skips": 3}}
    jobs = [job(config_of(folder, "straight", **train), folder, poison=[BAD, 0])]
    jobs += [job(config_of(folder, f"killed{number}", **train), folder, poison=[BAD, 0], die=place)
             for number, place in enumerate(DEATHS)]
    jobs += [job(config_of(folder, "hopeless", **train), folder,
                 poison=[list(range(6, 100)), 0], expect="training diverged")]
    jobs += [job(config_of(folder, "collapsing", steps=40), folder, collapse=12,
                 expect="the representation collapsed")]
    return folder, success(run_ranks(jobs, folder))


@pytest.mark.slow(18)
def test_many_drops_roll_back_and_step_over_the_window(rolled: tuple[Path, str]) -> None:
    folder, _ = rolled
    first, second = events(folder, "straight", "rollback")
    assert (first["step"], first["to"], first["positions"]) == (10, 4, [16, 40])
    assert (second["step"], second["to"], second["positions"]) == (14, 12, [72, 80])
    assert final(folder, "straight").manifest["skipped_windows"] == [[4, 6], [12, 2]]
    rows = read_rows(str(folder / "straight/metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 19))


@pytest.mark.slow(5)
def test_a_kill_inside_a_rollback_leaves_no_trace(rolled: tuple[Path, str]) -> None:
    folder, _ = rolled
    for run in (f"killed{number}" for number in range(len(DEATHS))):
        assert len(events(folder, run, "resume")) == 1, run
        assert losses(folder, run) == losses(folder, "straight"), run
        assert final(folder, run).state_sha256() == final(folder, "straight").state_sha256(), run
        assert (final(folder, run).manifest["skipped_windows"]
                == final(folder, "straight").manifest["skipped_windows"])


@pytest.mark.slow(14)
def test_sigkill_inside_a_rollback_leaves_no_trace(rolled: tuple[Path, str]) -> None:
    folder, _ = rolled
    config = config_of(folder, "sigkilled", steps=18, health={"max_skips": 3})
    (killed,) = run_ranks([job(config, folder, poison=[BAD, 0], kill=["Metrics.rewind", 1])],
                          folder)
    assert killed.returncode == -9 and len(events(folder, "sigkilled", "rollback")) == 1
    success(run_ranks([job(config, folder, poison=[BAD, 0])], folder))
    assert losses(folder, "sigkilled") == losses(folder, "straight")
    assert (final(folder, "sigkilled").state_sha256()
            == final(folder, "straight").state_sha256())


@pytest.mark.slow(5)
def test_rollbacks_to_one_checkpoint_end_at_some_point(rolled: tuple[Path, str]) -> None:
    folder, output = rolled
    assert len(events(folder, "hopeless", "rollback")) == 3
    (last,) = events(folder, "hopeless", "diverged")
    assert last["reason"] == "again after 3 rollbacks to the same checkpoint"
    assert final(folder, "hopeless").step == 4  # the last good state is still there
    assert "lower optim.lr" in output


@pytest.mark.slow(5)
def test_collapsed_targets_stop_the_run(rolled: tuple[Path, str]) -> None:
    folder, output = rolled
    (event,) = events(folder, "collapsing", "collapse")
    assert event["target_std"] < 0.02 and 12 < event["step"] <= 24
    assert "target_std" in output
