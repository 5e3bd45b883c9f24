"""Run a benchmark's function in several ranks of one machine and take what rank 0 returns."""

from __future__ import annotations

import importlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

from neurojepa.errors import run_command


def in_ranks(ranks: int, function: str, **arguments: Any) -> Any:
    """``function`` ("module:name") in ``ranks`` processes, started as a training would be.

    Each gets ``arguments`` (JSON); rank 0's result (JSON) comes back.
    """
    from neurojepa.train.launch import _local

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory(prefix="bench-ranks-") as folder:
        job, result = Path(folder) / "job.json", Path(folder) / "result.json"
        job.write_text(json.dumps([function, arguments, str(result)]))
        status = _local(ranks, [sys.executable, "-u", "-m", "tools.bench.ranks", str(job)])
        if status:
            raise RuntimeError(f"{function}: a rank ended with status {status}")
        return json.loads(result.read_text())


def main(path: str) -> None:
    function, arguments, result = json.loads(Path(path).read_text())
    module, _, name = function.partition(":")
    found = getattr(importlib.import_module(module), name)(**arguments)
    if os.environ["RANK"] == "0":
        Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    run_command(lambda: main(sys.argv[1]), teardown=False)
