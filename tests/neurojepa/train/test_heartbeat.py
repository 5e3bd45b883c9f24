"""What a rank tells of itself, and that telling never ends a training."""

from __future__ import annotations

import json
import os
import shutil
import threading
import time
import uuid
from pathlib import Path
from typing import Any

import pytest

from cluster.rundir import RunDir
from neurojepa.errors import DataError
from neurojepa.messages import AGENT, ALONE, Messages
from neurojepa.storage import Patience, is_outage, no_space, read_bytes, write_bytes
from neurojepa.train import heartbeat
from neurojepa.train.heartbeat import Heartbeat, _Host
from tests.helpers.waiting import wait_until


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heartbeat, "BEAT_S", 0.02)
    monkeypatch.setattr(heartbeat, "PUT_S", 0.05)


@pytest.mark.parametrize("where", ["local", "memory"])
def test_a_rank_tells_its_step_and_that_it_still_lives(tmp_path: Path, where: str) -> None:
    run_dir = str(tmp_path) if where == "local" else f"memory://{uuid.uuid4().hex}"
    beats = Heartbeat(run_dir, 3, attempt="a1", world=4)
    beats.beat(7)

    def row() -> dict[str, Any]:
        try:
            if where == "local":
                return json.loads(read_bytes(f"{run_dir}/heartbeat/rank-3.json"))
            return json.loads(read_bytes(f"{run_dir}/heartbeat/host-3.json"))["ranks"][0]
        except DataError:
            return {"seen": 0, "time": 0, "step": -1}

    wait_until(lambda: row()["step"] == 7 and row()["seen"] > row()["time"] + 0.1)
    assert {key: row()[key] for key in ("rank", "attempt", "world", "state")} == {
        "rank": 3, "attempt": "a1", "world": 4, "state": "step"}
    beats.close()
    last = row()
    time.sleep(0.1)
    assert row() == last


def test_before_its_first_step_it_says_nothing(tmp_path: Path) -> None:
    beats = Heartbeat(str(tmp_path), 0)
    time.sleep(0.1)
    beats.close()
    assert not (tmp_path / "heartbeat").exists()


def test_one_rank_of_a_host_writes_to_an_object_store_for_all() -> None:
    run_dir = RunDir(f"memory://{uuid.uuid4().hex}")
    ranks = [Heartbeat(run_dir.uri, rank, attempt=run_dir.uri, world=3) for rank in range(3)]
    for rank, beats in enumerate(ranks):
        beats.beat(5)
        wait_until(lambda first=rank == 0: not first or run_dir.heartbeats())
    wait_until(lambda: [beat.step for beat in run_dir.heartbeats()] == [5, 5, 5])
    assert run_dir.names("heartbeat") == ["host-0.json"]
    write_bytes(f"{run_dir.uri}/heartbeat/rank-3.json", json.dumps(  # of an older version
        {"rank": 3, "host": "a", "pid": 1, "step": 9, "time": 5.0, "attempt": "old"}).encode())
    assert len(run_dir.heartbeats()) == 3
    for beats in reversed(ranks):
        beats.close()


def test_under_an_agent_it_sends_each_step_and_what_it_does(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    agent = Messages(str(tmp_path / "agent"))
    monkeypatch.setenv(AGENT, agent.path)
    patience = Patience(300)
    beats = Heartbeat(str(tmp_path), 1, device="cuda:1", patiences=[patience])
    assert agent.listen()
    heard: list[dict[str, Any]] = []

    def said(state: str) -> bool:
        heard.extend(agent.heard())
        return any(row["state"] == state for row in heard)

    wait_until(lambda: said("starting"))
    beats.compiling()
    wait_until(lambda: said("compiling"))
    beats.beat(7)
    wait_until(lambda: said("step"))
    for state in ("checkpoint", "evaluation"):
        with beats.doing(state):
            wait_until(lambda state=state: said(state))
    assert not (tmp_path / "heartbeat").exists()
    (tmp_path / f"agent{ALONE}").touch()  # its supervisor is gone
    beats.beat(7)
    assert json.loads((tmp_path / "heartbeat" / "rank-1.json").read_text())["step"] == 7
    (tmp_path / f"agent{ALONE}").unlink()
    shutil.rmtree(tmp_path / "heartbeat")
    beats.beat(8)
    beats.close()
    heard.clear()
    heard.extend(agent.heard())
    last = heard[-1]
    assert (last["step"], last["state"], last["device"], last["rank"]) == (8, "step", "cuda:1", 1)
    assert last["step_s"] > 0 and not (tmp_path / "heartbeat").exists()


def test_waiting_for_a_store_is_told_for_as_long_as_it_is_asked(tmp_path: Path) -> None:
    patience, back = Patience(300), threading.Event()
    beats = Heartbeat(str(tmp_path), 0, patiences=[Patience(1), patience])
    beats.beat(1)
    path = tmp_path / "heartbeat" / "rank-0.json"

    def work() -> int:
        if not back.is_set():
            raise ConnectionResetError("gone")
        return 5

    answers: list[int] = []
    asking = threading.Thread(target=lambda: answers.append(patience(work)), daemon=True)
    asking.start()
    wait_until(lambda: json.loads(path.read_text())["state"] == "waiting for store")
    assert 250 < json.loads(path.read_text())["wait_left_s"] <= 300
    back.set()
    asking.join(10)
    assert answers == [5] and patience.left_s is None
    wait_until(lambda: json.loads(path.read_text())["state"] == "step")
    beats.close()


def test_a_cleared_tmp_does_not_spoil_the_end_of_a_training() -> None:
    host = _Host(f"memory://run {os.getpid()}")
    os.unlink(host._messages.path)
    host.close()


def test_what_cannot_be_written_is_said_once(tmp_path: Path,
                                             capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "heartbeat").write_text("in the way")
    beats = Heartbeat(str(tmp_path), 0)
    for step in range(20):
        beats.beat(step)
    beats.close()
    assert capsys.readouterr().err.count("cannot be written") == 1
    (tmp_path / "heartbeat").unlink()
    beats = Heartbeat(str(tmp_path), 0)
    beats.beat(1)
    shutil.rmtree(tmp_path / "heartbeat")
    wait_until(lambda: (tmp_path / "heartbeat" / "rank-0.json").exists())  # written again
    beats.close()


def test_what_a_store_will_never_do_is_no_outage(s3: Any) -> None:
    for uri in ("s3://Bad_Bucket!/x", "s3://Ab/x"):
        with pytest.raises(DataError, match=uri.split("/")[2]) as caught:
            read_bytes(uri)
        assert not is_outage(caught.value)
    from botocore.exceptions import EndpointConnectionError, NoCredentialsError

    for error, out in ((NoCredentialsError(), False),
                       (EndpointConnectionError(endpoint_url="x"), True)):
        assert is_outage(error) is out


def test_a_full_disk_is_told_from_an_outage() -> None:
    error = DataError("x")
    error.__cause__ = OSError(28, "No space left on device")
    assert no_space(error) and not is_outage(error)
    assert not no_space(DataError("x")) and not no_space(OSError(5, "I/O error"))
