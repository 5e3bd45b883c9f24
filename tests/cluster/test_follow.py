"""Growing files of rows: each row once, also after a resume."""

from __future__ import annotations

import json
import random
import threading
from pathlib import Path

import pytest

from cluster import follow
from cluster.follow import Follower, Rows
from neurojepa.storage import append_rows, drop_rows, join, read_range, write_bytes


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks and marks of a few rows."""
    monkeypatch.setattr(follow, "CHUNK_BYTES", 100)
    monkeypatch.setattr(follow, "MARK_BYTES", 60)
    monkeypatch.setattr(follow, "CHECK_BYTES", 40)


def read_by(uri: str) -> tuple[Rows, Follower]:
    rows = Rows()
    return rows, Follower(uri, rows, threading.Lock())


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize("seed", range(20))
def test_what_was_followed_is_what_the_file_holds(tmp_path: Path, seed: int) -> None:
    """Appends, resumes and looks in any order."""
    draw, path, attempt = random.Random(seed), tmp_path / "m.jsonl", 0
    rows, follower = read_by(str(path))
    follower.refresh()
    assert rows.rows == []
    step = 0
    for _ in range(60):
        deed = draw.random()
        if deed < 0.5:
            new = [{"step": step + k, "by": attempt, "x": "y" * draw.randrange(20)}
                   for k in range(1, draw.randrange(2, 9))]
            append_rows(str(path), new)
            step = new[-1]["step"]
        elif deed < 0.65:
            step, attempt = draw.randrange(step + 1), attempt + 1
            kept = step
            drop_rows(str(path), lambda row, kept=kept: row["step"] <= kept)
        else:
            follower.refresh()
            there = path.read_text() if path.exists() else ""
            assert rows.rows == [json.loads(line) for line in there.splitlines()]
            assert follower.count == len(rows.rows)


@pytest.mark.usefixtures("small")
def test_nothing_is_read_twice_and_a_line_in_the_making_is_left(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, read = tmp_path / "m.jsonl", list[int]()

    def counted(uri: str, start: int, end: int) -> bytes | None:
        data = read_range(uri, start, end)
        read.append(len(data or b""))
        return data

    monkeypatch.setattr(follow, "read_range", counted)
    path.write_bytes(b"".join(b'{"step": %d}\n' % step for step in range(1000)) + b'{"st')
    rows, follower = read_by(str(path))
    follower.refresh()
    assert [row["step"] for row in rows.rows] == list(range(1000))
    read.clear()
    with path.open("ab") as file:
        file.write(b'ep": 1000}\nno row\n{"step": 1001}\n')
    follower.refresh()
    assert [row["step"] for row in rows.rows[-2:]] == [1000, 1001]
    assert sum(read) < 100
    path.unlink()
    follower.refresh()
    assert rows.rows == []


def test_a_file_in_an_object_store_is_followed(s3) -> None:
    uri = join(s3.uri, "followed", "m.jsonl")
    rows, follower = read_by(uri)
    follower.refresh()
    append_rows(uri, [{"step": step} for step in range(5)])
    follower.refresh()
    append_rows(uri, [{"step": 5}])
    follower.refresh()
    assert [row["step"] for row in rows.rows] == list(range(6))
    drop_rows(uri, lambda row: row["step"] <= 2)
    follower.refresh()
    assert [row["step"] for row in rows.rows] == [0, 1, 2]


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_a_range_of_an_object(request: pytest.FixtureRequest, tmp_path: Path, kind: str) -> None:
    folder = str(tmp_path) if kind == "local" else request.getfixturevalue("s3").uri
    uri = join(folder, "ranges [1].bin")
    assert read_range(uri, 0, 5) is None
    write_bytes(uri, b"0123456789")
    for start, end in ((0, 4), (3, 10), (8, 50), (10, 50), (99, 120), (4, 4)):
        assert read_range(uri, start, end) == b"0123456789"[start:end]
