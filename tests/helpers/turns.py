"""A world of few threads that run one at a time, and an object store whose every request is a turn.

``Turns(seed)`` draws whose turn it is, who stands still for a while (as a stopped process does) and
who is killed, so one seed is one interleaving, always the same.  Time passes with turns only.
"""

from __future__ import annotations

import hashlib
import random
import threading
from collections.abc import Callable
from typing import Any

from fsspec.spec import AbstractFileSystem


class Killed(BaseException):
    """Ends an actor at its turn, as SIGKILL would: nothing of it is run any more."""


class Turns:
    """Runs actors to their end, one turn at a time."""

    SECONDS = 0.5  # that pass with each turn

    def __init__(self, seed: int, pause_share: float = 0.03, kill_share: float = 0.01) -> None:
        self._draw = random.Random(seed)
        self._pause_share, self._kill_share = pause_share, kill_share
        self._actors: dict[str, threading.Semaphore] = {}
        self._wakes: dict[str, float] = {}
        self._killed: set[str] = set()
        self._back = threading.Semaphore(0)
        self._errors: list[BaseException] = []
        self.now = 0.0
        self.kills = 0

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self._wakes[threading.current_thread().name] = self.now + seconds
        self.turn()

    def turn(self) -> None:
        """Wait until it is this actor's turn; others: at once."""
        name = threading.current_thread().name
        if name not in self._actors:
            return
        self._back.release()
        self._actors[name].acquire()
        if name in self._killed:
            raise Killed

    def start(self, name: str, work: Callable[[], None]) -> None:
        def run() -> None:
            self._actors[name].acquire()
            try:
                work()
            except Killed:
                pass
            except BaseException as error:
                self._errors.append(error)
            finally:
                del self._actors[name]
                self._back.release()

        self._actors[name] = threading.Semaphore(0)
        self._wakes[name] = 0.0
        threading.Thread(target=run, name=name, daemon=True).start()

    def run(self, on_kill: Callable[[], None], most_kills: int, most_turns: int = 20_000) -> None:
        """Give turns until all actors have ended; the first error of an actor is raised."""
        for _ in range(most_turns):
            if not self._actors:
                break
            awake = [name for name in sorted(self._actors) if self._wakes[name] <= self.now]
            self.now += self.SECONDS
            if not awake:
                continue
            name, fate = self._draw.choice(awake), self._draw.random()
            if fate < self._pause_share:
                self._wakes[name] = self.now + self._draw.uniform(1, 200)
                continue
            if fate < self._pause_share + self._kill_share and self.kills < most_kills:
                self.kills += 1
                self._killed.add(name)
                on_kill()
            self._actors[name].release()
            self._back.acquire()
            if self._errors:
                raise self._errors[0]
        assert not self._actors, f"still at it: {sorted(self._actors)}"


class TurnStore(AbstractFileSystem):
    """An object store like S3: whole objects, ETags, conditional PUTs.  turns://bucket/key"""

    protocol = ("turns", "s3")
    cachable = False
    turns: Turns
    objects: dict[str, bytes]
    changed: Callable[[str], None]  # told of each object that was written or removed

    def _now(self, path: str) -> str:
        self.turns.turn()
        return str(self._strip_protocol(path))

    def pipe_file(self, path: str, value: bytes, mode: str = "overwrite", IfMatch: str = "",
                  **kwargs: Any) -> None:
        key = self._now(path)
        there = self.objects.get(key)
        if mode == "create" and there is not None:
            raise FileExistsError(key)
        if IfMatch and (there is None or IfMatch != etag(there)):
            error = OSError("precondition failed")
            error.response = {"Error": {"Code": "PreconditionFailed"}}  # type: ignore[attr-defined]
            raise error
        self.objects[key] = value
        type(self).changed(key)

    def cat_file(self, path: str, start: int | None = None, end: int | None = None,
                 **kwargs: Any) -> bytes:
        key = self._now(path)
        if key not in self.objects:
            raise FileNotFoundError(key)
        return self.objects[key][start:end]

    def info(self, path: str, **kwargs: Any) -> dict[str, Any]:
        key = self._now(path)
        if key in self.objects:
            return {"name": key, "size": len(self.objects[key]), "type": "file",
                    "ETag": etag(self.objects[key])}
        if any(name.startswith(f"{key}/") for name in self.objects):
            return {"name": key, "size": 0, "type": "directory"}
        raise FileNotFoundError(key)

    def exists(self, path: str, **kwargs: Any) -> bool:
        key = self._now(path)
        return any(name == key or name.startswith(f"{key}/") for name in self.objects)

    def ls(self, path: str, detail: bool = True, **kwargs: Any) -> list[Any]:
        root = self._now(path).rstrip("/") + "/"
        found = sorted({root + name[len(root):].partition("/")[0] for name in self.objects
                        if name.startswith(root)})
        if not found:
            raise FileNotFoundError(path)
        return [{"name": name, "size": 0, "type": "file"} for name in found] if detail else found

    def rm(self, path: str, recursive: bool = False, maxdepth: int | None = None) -> None:
        key = str(self._strip_protocol(path))
        for name in sorted(self.objects):
            if name == key or name.startswith(f"{key}/"):
                self.turns.turn()  # S3 removes one object after another
                self.objects.pop(name, None)
                type(self).changed(name)


def etag(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
