"""One rank of a test: trains configs one after the other in one process (start-up is slow).

    python -m tests.worker JOBS.json      with RANK, WORLD_SIZE, ... in the environment, or alone

JOBS is a list of {"config": path} with, if wanted, "poison": [step, rank], "starve": true (the
first expert gets no tokens), "resave": dir.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from neurojepa.config import RootConfig, dump_config, load_config
from neurojepa.errors import run_command

ROOT = Path(__file__).resolve().parent.parent


def run_ranks(jobs: list[dict[str, Any]], folder: Path, ranks: int = 1,
              timeout: float = 200) -> list[subprocess.CompletedProcess[str]]:
    """Run jobs in ``ranks`` worker processes; returns what each printed and its status."""
    return run_module("tests.worker", [str(_write_jobs(jobs, folder))], ranks, timeout)


def run_module(module: str, arguments: list[str], ranks: int,
               timeout: float = 200) -> list[subprocess.CompletedProcess[str]]:
    """Run a module in ``ranks`` processes with a launcher's environment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    base = {key: value for key, value in os.environ.items() if key != "RANK"}
    base |= {"OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-m", module, *arguments], cwd=ROOT, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            env={**base, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)})
        for rank in range(ranks)]
    try:
        outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            if process.poll() is None:
                process.send_signal(signal.SIGKILL)
                process.wait()
    return [subprocess.CompletedProcess(process.args, process.returncode, output)
            for process, output in zip(processes, outputs, strict=True)]


def job(config: RootConfig, folder: Path, **extra: Any) -> dict[str, Any]:
    """A job of ``run_ranks``; the config is written below ``folder``."""
    path = folder / f"{Path(config.run.dir).name}.yaml"
    path.write_text(dump_config(config))
    return {"config": str(path), **extra}


def _write_jobs(jobs: list[dict[str, Any]], folder: Path) -> Path:
    path = folder / "jobs.json"
    path.write_text(json.dumps(jobs))
    return path


def main() -> int:
    from neurojepa.train import loop

    make_views, build_model = loop.make_views, loop.build_model
    for each in json.loads(Path(sys.argv[1]).read_text()):
        config = load_config(each["config"])
        if each.get("poison"):
            loop.make_views = _poisoned(make_views, config, *each["poison"])
        if each.get("starve"):
            loop.build_model = _starved(build_model)
        if each.get("resave"):
            _resave(config, each["resave"])
        else:
            loop.train(config)
        loop.make_views, loop.build_model = make_views, build_model
    return 0


def _starved(build_model: Any) -> Any:
    """build_model whose routers never choose the first expert."""
    from neurojepa.model.moe import moe_layers

    def build(*arguments: Any) -> Any:
        model = build_model(*arguments)
        for layer in moe_layers(model):
            layer.bias[0] = -100
        return model

    return build


def _poisoned(make_views: Any, config: RootConfig, step: int, rank: int) -> Any:
    """make_views that gives one rank NaN tokens in one step."""

    def views(batch: Any, *arguments: Any) -> Any:
        made = make_views(batch, *arguments)
        if (int(batch.position[0]) // config.train.global_batch == step
                and os.environ["RANK"] == str(rank)):
            made.tokens_BNP.fill_(float("nan"))
        return made

    return views


def _resave(config: RootConfig, folder: str) -> None:
    """Load a run's checkpoint into an engine and write it again from there."""
    from neurojepa.train import checkpoint
    from neurojepa.train.loop import Run
    from neurojepa.train.saver import Saver
    from neurojepa.train.world import start_world

    run = Run(config, start_world())
    old = checkpoint.open_checkpoint(config.run.dir, run.step).manifest
    saver = Saver(folder, run.engine, run.world, keep_last=1, milestone_every=0)
    saver.start(run.step, {key: old[key] for key in ("config", "feed", "order", "health",
                                                   "skipped_windows")})
    saver.finish()
    saver.close()
    run.close()


if __name__ == "__main__":
    run_command(main)
