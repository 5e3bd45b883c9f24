"""The pretrain command: runs alone, refuses what cannot work, stops on request, continues."""

from __future__ import annotations

import signal
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from neurojepa.config import RootConfig, dump_config
from neurojepa.errors import ConfigError
from neurojepa.pretrain import main
from neurojepa.storage import read_rows
from neurojepa.train.checkpoint import committed_steps, latest_step, open_checkpoint
from tests.helpers.feeds import tiny_config, write_feed
from tests.helpers.launches import start_pretrain, write_config
from tests.helpers.worker import job, run_module, run_ranks


@pytest.fixture(scope="module")
def feed(tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_feed(str(tmp_path_factory.mktemp("pretrain") / "feed"))


@pytest.mark.slow(24)
def test_a_stopped_run_continues_as_if_nothing_had_happened(feed: str, tmp_path: Path) -> None:
    config = tiny_config(feed, tmp_path / "run", steps=40, checkpoint_every=100, log_every=50)
    path = write_config(config, tmp_path)
    process = start_pretrain("--config", path)
    beat = tmp_path / "run" / "heartbeat" / "rank-0.json"
    while not beat.exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 75 and "run again to continue" in output
    stop = read_rows(str(tmp_path / "run" / "events.jsonl"))[-1]
    assert stop["event"] == "stop" and 0 < stop["step"] < 40

    again = start_pretrain("--config", path, "train.log_every=7")
    straight = start_pretrain("--config", path, f"run.dir={tmp_path / 'straight'}")
    for each in (again, straight):
        output, errors = each.communicate(timeout=300)
        assert each.returncode == 0, errors
        assert "volumes/s" in output and "finished at step 40" in output
    ends = []
    for name in ("run", "straight"):
        rows = read_rows(str(tmp_path / name / "metrics.jsonl"))
        assert [row["step"] for row in rows] == list(range(1, 41))
        events = read_rows(str(tmp_path / name / "events.jsonl"))
        ends.append(([row["loss"] for row in rows], [row["dead_atoms"] for row in rows],
                     events[-1]["state_sha256"]))
        assert list((tmp_path / name / "tensorboard").glob("events.out*"))
        assert (tmp_path / name / "config.yaml").exists()
    assert ends[0] == ends[1]


@pytest.mark.slow(14)
def test_a_live_run_is_refused_to_others_and_stopped_from_elsewhere(
        feed: str, tmp_path: Path, run_cli) -> None:
    config = tiny_config(feed, tmp_path / "run", steps=9999, checkpoint_every=9999, log_every=50)
    path = write_config(config, tmp_path)
    first = start_pretrain("--config", path)
    try:
        beat = tmp_path / "run" / "heartbeat" / "rank-0.json"
        while not beat.exists() and first.poll() is None:
            time.sleep(0.01)
        other = run_cli("-m", "neurojepa.pretrain", "--config", path)
        assert other.returncode == 2 and f"(process {first.pid}, since " in other.stderr
        stop = run_cli("-m", "cluster", "stop", str(tmp_path / "run"))
        assert stop.returncode == 0, stop.stderr
        assert f"asked the training on {socket.gethostname()} (process {first.pid}" in stop.stdout
        first.communicate(timeout=300)
    finally:
        first.kill()
    assert first.returncode == 75
    events = read_rows(str(tmp_path / "run" / "events.jsonl"))
    assert [row["event"] for row in events] == ["start", "checkpoint", "stop"]
    assert events[-1]["reason"] == "operator"
    assert latest_step(str(tmp_path / "run")) == events[-1]["step"]


@pytest.mark.slow(13)
def test_finished_refused_and_extended(feed: str, tmp_path: Path,
                                       capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(feed, tmp_path / "run", steps=3)
    path = write_config(config, tmp_path)
    process = start_pretrain("--config", path)
    assert process.wait(timeout=300) == 0
    assert main(["--config", path]) == 0
    assert "already finished at step 3" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=r"train.seed: checkpoint 0, now 1"):
        main(["--config", path, "train.seed=1"])

    refused = start_pretrain("--config", path, "optim.lr=0.01", "train.steps=4")
    assert "optim.lr: checkpoint 0.0005, now 0.01" in refused.communicate(timeout=300)[1]
    assert refused.returncode == 2
    extended = start_pretrain("--config", path, "train.steps=4")  # a run has one owner at a time
    assert extended.wait(timeout=300) == 0
    rows = read_rows(str(tmp_path / "run" / "metrics.jsonl"))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]


@pytest.mark.slow(7)
def test_a_run_goes_on_under_a_changed_recipe_if_that_is_accepted(feed: str,
                                                                  tmp_path: Path) -> None:
    config = tiny_config(feed, tmp_path / "run", steps=4)
    tree = config.model_dump()

    def as_job(name: str, accept: bool = True, **sections: dict[str, Any]) -> dict[str, Any]:
        run = {"dir": str(tmp_path / "run"), "accept_changes": accept}
        path = tmp_path / f"{name}.yaml"
        path.write_text(dump_config(RootConfig.model_validate(
            tree | {key: {**tree[key], **values} for key, values in sections.items()}
            | {"run": run})))
        return {"config": str(path)}

    other = {"data": {"feed": write_feed(str(tmp_path / "other"), 10, seed=1)},
             "objective": {"sparse": {"l1": 0.1, "l1_warmup_steps": 0}}, "optim": {"lr": 1e-4},
             "train": {"steps": 8, "global_batch": 6}}
    (process,) = run_ranks([
        as_job("first"),
        as_job("refused", accept=False, **other) | {"expect": "set run.accept_changes=true"},
        as_job("unfit", model={"size": "small"}) | {"expect": "holds another model"},
        as_job("changed", **other), as_job("again", **other)], tmp_path)
    assert process.returncode == 0, process.stdout
    rows = read_rows(str(tmp_path / "run" / "metrics.jsonl"))
    assert [row["step"] for row in rows] == list(range(1, 9))
    events = read_rows(str(tmp_path / "run" / "events.jsonl"))
    (accepted,) = (row for row in events if row["event"] == "accepted")
    assert accepted["step"] == 4 and {change.partition(":")[0] for change in accepted["changes"]} \
        == {"objective.sparse.l1", "objective.sparse.l1_warmup_steps", "optim.lr",
            "train.global_batch", "feed fingerprint", "order fingerprint"}
    end = open_checkpoint(str(tmp_path / "run"), 8)
    assert end.manifest["adam_step"] == 8  # the moments went on
    assert end.buffers()["health.applied"] == 4  # losses are compared with those since the change


def test_bad_input_is_one_line_and_status_2(feed: str, tmp_path: Path) -> None:
    path = write_config(tiny_config(feed, tmp_path / "run"), tmp_path)
    cases = {
        ("--config", str(tmp_path / "no.yaml")): "no.yaml",
        ("--config", path, "train.step=3"): "did you mean 'steps'",
        ("--config", path, f"data.feed={tmp_path / 'nofeed'}"): "no committed feed",
    }
    processes = {message: start_pretrain(*arguments) for arguments, message in cases.items()}
    for message, process in processes.items():
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 2
        lines = [line for line in errors.splitlines() if line.startswith("error:")]
        assert len(lines) == 1 and message in lines[0] and "Traceback" not in errors
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_more_ranks_than_scans_in_a_step(feed: str, tmp_path: Path) -> None:
    path = write_config(tiny_config(feed, tmp_path / "run", global_batch=1), tmp_path)
    for process in run_module("neurojepa.pretrain", ["--config", path, "--local_rank=0"], 2):
        assert process.returncode == 2
        assert "train.global_batch = 1: this run has 2 ranks" in process.stdout


@pytest.mark.slow(5)
def test_a_checkpoint_that_cannot_be_written_ends_all_ranks(feed: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").write_text("a file where a folder belongs")
    config = tiny_config(feed, tmp_path / "run")
    for process in run_ranks([job(config, tmp_path)], tmp_path, ranks=2):
        assert process.returncode == 2
        assert "error: checkpoint not written: rank 0" in process.stdout
    assert not (tmp_path / "run" / "latest").exists()


@pytest.mark.slow(5)
def test_a_run_that_only_skips_is_stopped(feed: str, tmp_path: Path) -> None:
    config = tiny_config(feed, tmp_path / "run", steps=60)
    process = start_pretrain("--config", write_config(config, tmp_path), "optim.lr=1.0e+30",
                    "optim.warmup_steps=0")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert "training diverged: more than 5 of 20 steps up to step 7 were dropped" in errors
    events = read_rows(str(tmp_path / "run" / "events.jsonl"))
    assert [row["event"] for row in events] == ["start", *["skip"] * 6, "diverged"]
    assert events[-1]["reason"] == "before the first checkpoint"  # none was made of a broken state


@pytest.mark.slow(10)
def test_feed_and_run_directory_in_an_object_store(s3: Any, tmp_path: Path) -> None:
    config = tiny_config(write_feed(f"{s3.uri}/feed"), f"{s3.uri}/runs/a", steps=3)
    path = write_config(config, tmp_path)
    for steps in (3, 5):
        process = start_pretrain("--config", path, f"train.steps={steps}")
        output, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert f"finished at step {steps}" in output
    rows = read_rows(f"{s3.uri}/runs/a/metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5]
    assert committed_steps(f"{s3.uri}/runs/a") == [4, 5]
    assert latest_step(f"{s3.uri}/runs/a") == 5
    events = [row["event"] for row in read_rows(f"{s3.uri}/runs/a/events.jsonl")
              if row["event"] != "store_retry"]  # a store may fail for a moment
    assert events == ["start", "checkpoint", "finish", "resume", "checkpoint", "checkpoint",
                      "finish"]


@pytest.mark.parametrize("main, status, said", [
    ("lambda: print('done')", 0, "done\n"),
    ("lambda: print('done') or 75", 75, "done\n"),
    ("lambda: open_feed('missing')", 2, "error: missing: no committed feed here"),
])
def test_what_libraries_do_while_python_ends_cannot_spoil_a_status(
        run_cli: Any, main: str, status: int, said: str) -> None:
    code = ("import atexit, os\nfrom neurojepa.errors import run_command\n"
            "from neurojepa.feed.format import open_feed\n"
            f"atexit.register(os.abort)\nrun_command({main}, teardown=False)")
    done = run_cli("-c", code)
    assert done.returncode == status and (done.stdout + done.stderr).startswith(said)
