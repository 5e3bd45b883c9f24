"""A launcher of toy ranks for a supervisor; as a program, a supervisor of them that can be killed.

    python -m tests.helpers.toy_launch CONFIG [toy.step_s=0.1 ...]
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path

import yaml

from cluster.processes import TOKEN
from cluster.rundir import RunDir
from cluster.supervise import Supervisor

# starts toy ranks and passes on the first bad status, as deepspeed's launcher does
LAUNCHER = """
import os, subprocess, sys, time
from tests.helpers import ROOT
world = int(sys.argv[1])
ranks = [subprocess.Popen([sys.executable, "-m", "tests.helpers.toy_rank", *sys.argv[2:]],
                          env={**os.environ, "RANK": str(r), "WORLD_SIZE": str(world)})
         for r in range(world)]
status = 0
while not status and any(p.poll() is None for p in ranks):
    time.sleep(0.05)
    status = next((p.returncode for p in ranks if p.poll()), 0)
for p in ranks:
    if p.poll() is None:
        p.terminate()
    p.wait()
sys.exit((status or max(p.returncode for p in ranks)) & 255)
"""


@dataclass(frozen=True)
class ToyLaunch:
    arguments: list[str]
    ranks: int = 2

    def hosts(self) -> list[str]:
        return []

    def command(self) -> list[str]:
        return [sys.executable, "-c", LAUNCHER, str(self.ranks), *self.arguments]

    def environment(self, token: str, scratch: Path) -> dict[str, str]:
        return {**os.environ, TOKEN: token}


if __name__ == "__main__":
    tree = yaml.safe_load(Path(sys.argv[1]).read_text())
    launch = ToyLaunch(["--config", *sys.argv[1:]])
    sys.exit(Supervisor(launch, RunDir(tree["run"]["dir"])).run())
