"""What all ranks decide at the end of a step, from what each of them knows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from neurojepa.train.loop import Decision, Run
from tests.helpers.feeds import tiny_config

NOTHING = {"commit": False, "checkpoint": False, "wait": False, "report": False, "flush": False,
           "stop": False, "leave": False}
LEAVING = {"checkpoint": True, "wait": True, "report": True}


def decide(tmp_path: Path, step: int, applied: bool = True, stop: str = "", pending: bool = False,
           writing: bool = False, reports: bool = False,
           leave: bool = False) -> Decision:
    """A decision of rank 0 where this is what any rank knows; of 8 steps, checkpoints every 4."""
    run: Any = SimpleNamespace(
        config=tiny_config("feed", tmp_path), step=step, saver=SimpleNamespace(pending=pending),
        engine=SimpleNamespace(guard=SimpleNamespace(
            agreed=lambda: [bool(stop), writing, reports, leave])))
    return Run._agree(run, applied)


@pytest.mark.parametrize(("known", "expected"), [
    ({"step": 1}, {}),
    ({"step": 3}, {"flush": True}),
    ({"step": 4}, {"checkpoint": True}),
    ({"step": 4, "applied": False}, {}),  # a state in trouble is no place to go back to
    ({"step": 5, "pending": True}, {"commit": True}),
    ({"step": 5, "pending": True, "writing": True}, {}),
    ({"step": 5, "reports": True}, {"report": True}),
    ({"step": 5, "stop": "signal", "applied": False}, {**LEAVING, "stop": True}),
    ({"step": 5, "leave": True}, {"leave": True}),
    ({"step": 8}, {**LEAVING, "flush": True}),
    ({"step": 8, "stop": "signal"}, {**LEAVING, "flush": True}),  # finished all the same
])
def test_what_is_done_after_a_step(tmp_path: Path, known: dict[str, Any],
                                   expected: dict[str, bool]) -> None:
    assert decide(tmp_path, **known) == Decision(**{**NOTHING, **expected})
