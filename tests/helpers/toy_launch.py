"""A launcher of toy ranks for a supervisor; as a program, a supervisor of them that can be killed.

    python -m tests.helpers.toy_launch CONFIG [toy.step_s=0.1 ...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import yaml

from cluster.agents import AgentLauncher
from cluster.rundir import RunDir
from cluster.supervise import Supervisor


def toy_launcher(arguments: list[str], ranks: int = 2) -> AgentLauncher:
    return AgentLauncher(arguments, ranks, module="tests.helpers.toy_rank")


if __name__ == "__main__":
    tree = yaml.safe_load(Path(sys.argv[1]).read_text())
    run_dir = RunDir(tree["run"]["dir"])
    sys.exit(Supervisor(toy_launcher(["--config", *sys.argv[1:]]), run_dir).run())
