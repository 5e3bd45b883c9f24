"""The README's commands do what it says: run here as they stand, or by the test named below."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import ROOT

# Commands that other files run, because they need hosts, a Ray cluster or much time.
ELSEWHERE = {
    "bash tools/demo.sh": "tools/test_demo.py",
    "python -m tools.bench": "tools/test_bench.py",
    "deepspeed --hostfile hosts --module neurojepa.pretrain": "cluster/test_hosts.py",
    "ray job submit -- python -m neurojepa.pretrain": "neurojepa/train/test_ray_launch.py",
}
THIS_RUN = {"bash tools/test.sh", "source .venv/bin/activate"}
# The same commands on fewer people at a coarser scale, with a key that gives every split people.
SMALLER = {"--participants 48": "--participants 15 --spacing-mm 4"}
KEY = "a public key for invented people (2)"


def commands() -> list[str]:
    """Every command of the README's shell blocks, without comments."""
    blocks = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line]


def elsewhere(command: str) -> str | None:
    return next((test for start, test in ELSEWHERE.items() if command.startswith(start)), None)


def test_commands_run_elsewhere_are_shown_and_their_tests_exist() -> None:
    for start, test in ELSEWHERE.items():
        assert any(command.startswith(start) for command in commands()), start
        assert (ROOT / "tests" / test).exists()


@pytest.mark.timeout(600)
def test_the_commands_work_in_the_order_shown(tmp_path: Path) -> None:
    recipe = (ROOT / "configs/demo.yaml").read_text()
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/demo.yaml").write_text(recipe.replace("steps: 100", "steps: 20"))
    key = tmp_path / "key"
    key.write_text(KEY)
    key.chmod(0o600)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "NEUROJEPA_KEY_FILE": str(key),
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    run = 0
    for command in commands():
        if command in THIS_RUN or elsewhere(command):
            continue
        for shown, smaller in SMALLER.items():
            command = command.replace(shown, smaller)
        done = subprocess.run(command.split(), cwd=tmp_path, env=environment, text=True,
                              capture_output=True, timeout=300)
        assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
        run += 1
    assert run >= 10
    assert {"cohort", "scans.parquet", "archive", "feed", "run", "weights", "probe", "atoms"} <= {
        path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "probe/report.html").stat().st_size > 10_000


def test_files_that_the_readme_names_exist() -> None:
    text = (ROOT / "README.md").read_text()
    for name in re.findall(r"`((?:neurojepa|data_prep|configs|tools)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name
