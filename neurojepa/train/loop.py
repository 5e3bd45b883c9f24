"""The training loop: batches -> views -> loss -> step -> EMA, router bias, metrics, checkpoint.

``train(config)`` runs in every rank.  It continues from the run directory's latest checkpoint, or
starts; all state is the checkpoint and the number of steps done, since samples, masks, augmentation
and rates are pure functions of the step.  SIGTERM or SIGUSR1 at any rank ends the run at the next
step boundary with a checkpoint and status 75 ("try again"), as batch systems expect.
"""

from __future__ import annotations

import signal
import time
from dataclasses import asdict
from typing import Any

import torch

from neurojepa.config import RootConfig, dump_config
from neurojepa.errors import ConfigError
from neurojepa.feed.format import join, open_feed, write_bytes
from neurojepa.feed.loader import Loader
from neurojepa.model.jepa import build_model
from neurojepa.model.moe import moe_layers, update_router_bias
from neurojepa.objective.views import make_views
from neurojepa.train import checkpoint
from neurojepa.train.engine import Engine
from neurojepa.train.health import Health
from neurojepa.train.metrics import Heartbeat, Metrics
from neurojepa.train.resume import check_same_run
from neurojepa.train.saver import Saver
from neurojepa.train.schedule import rates_at
from neurojepa.train.world import World, start_world

REQUEUE = 75  # EX_TEMPFAIL: stopped on request, run again to continue


def train(config: RootConfig) -> int:
    """Train to ``train.steps`` as one rank of the run.

    Returns
    -------
    int
        0 when finished, ``REQUEUE`` when stopped by a signal.

    Raises
    ------
    ConfigError, DataError, CheckpointError
        See ``Run``; the run directory is as before.
    """
    world = start_world(config.run.deterministic)
    run = Run(config, world)
    try:
        return run.to_end()
    finally:
        run.close()


class Run:
    """One rank's share of a run: what is built once, and the loop over steps.

    Raises
    ------
    ConfigError
        More ranks than samples per step, or run.dir holds a run of another recipe.
    DataError
        The feed is missing or damaged.
    CheckpointError
        The latest checkpoint is damaged.
    """

    def __init__(self, config: RootConfig, world: World) -> None:
        if config.train.global_batch < world.size:
            raise ConfigError(
                f"train.global_batch = {config.train.global_batch}: this run has {world.size} "
                "ranks, and each needs a scan per step; raise it or start fewer ranks")
        self.config, self.world = config, world
        self._stop = False
        self._handlers = {number: signal.signal(number, self._on_signal)
                          for number in (signal.SIGTERM, signal.SIGUSR1)}
        self.feed = open_feed(config.data.feed)
        done = checkpoint.latest_step(config.run.dir)
        self.step = done or 0
        self.loader = Loader(self.feed, config, world.rank, world.size, self.step)
        self.health = Health()
        restored = self._open(done)
        self.engine = Engine(build_model(config, self.feed.grid), config, world,
                             self.loader.micro_steps)
        self.moe = moe_layers(self.engine.module)
        self._atom_usage: torch.Tensor | None = self.engine.buffers().get("code.usage")
        if restored is not None:
            self.engine.load(restored.read, restored.buffers(), restored.manifest["adam_step"])
            self.health = Health(**restored.manifest["health"])
        self.saver = Saver(config.run.dir, self.engine, world, config.train.keep_last,
                           config.train.milestone_every)
        self.metrics = Metrics(config.run.dir, world, config.train.global_batch, self.step)
        self.heartbeat = Heartbeat(config.run.dir, world.rank)
        if world.rank == 0:
            write_bytes(join(config.run.dir, "config.yaml"), dump_config(config).encode())
        self.metrics.event("resume" if done else "start", self.step, world=world.size,
                           zero=config.train.zero, dtype=config.train.dtype)

    def _open(self, step: int | None) -> checkpoint.Checkpoint | None:
        if step is None:
            return None
        found = checkpoint.open_checkpoint(self.config.run.dir, step)
        check_same_run(found, self.config, self.feed.fingerprint, self.loader.order.fingerprint)
        return found

    def to_end(self) -> int:
        """Train until the last step or a signal."""
        config, micro_batches = self.config.train, iter(self.loader)
        self._say(f"step {self.step}/{config.steps}: {self.loader.order.num_samples} scans, "
                  f"{self.world.size} rank(s), {self.loader.micro_steps} micro-step(s) a step")
        self._began = (time.perf_counter(), self.step)
        while self.step < config.steps:
            self._train_step(micro_batches)
            self.heartbeat.beat(self.step)
            stop, writing = self.world.any(self._stop, self.saver.writing)
            last = self.step == config.steps
            if self.saver.pending and not writing:
                self._committed(self.saver.advance())
            if stop or last or self.step % config.checkpoint_every == 0:
                self._checkpoint()
            if stop or last:
                self._committed(self.saver.finish())
            if last or self.step % config.log_every == 0:
                self.metrics.flush(self.loader.wait_s)
                self._progress()
            if stop and not last:
                self.metrics.event("stop", self.step, reason="signal")
                self._say(f"stopped at step {self.step} by a signal; run again to continue")
                return REQUEUE
        self._finish()
        return 0

    def _train_step(self, micro_batches: Any) -> None:
        config = self.config
        rates = rates_at(self.step, config)
        # DeepSpeed averages over ranks and micro-steps; the loss of a step is per sample.
        scale = self.world.size * self.loader.micro_steps / config.train.global_batch
        applied = False
        for _ in range(self.loader.micro_steps):
            batch = next(micro_batches).to(self.world.device)
            views = make_views(batch, config, self.feed.grid, config.train.seed)
            # fill-up repeats must not count as load of the experts
            views.valid_BN &= views.weight_B[:, None] > 0
            loss, sums = self.engine.forward(views, rates.l1)
            self.engine.backward(loss * scale)
            applied = self.engine.step(rates.lr)
            self.metrics.add(loss, sums)
        if self.moe:
            load = self.world.sum_(torch.stack([layer.load for layer in self.moe]))
            update_router_bias(self.moe, load, config.optim.router_bias_rate if applied else 0.0)
        if (usage := self._atom_usage) is not None:  # alike on all ranks, as buffers must be
            self.world.sum_(usage).div_(self.world.size)
        if applied:
            self.engine.update_ema(rates.ema)
        self.step += 1
        self.metrics.end_step(self.step, {"lr": rates.lr, "l1": rates.l1, "skipped": not applied,
                                          "grad_norm": self.engine.grad_norm()})
        if not applied:
            self.metrics.event("skip", self.step, reason="gradient not finite")
        self.health.observe(self.step, applied)

    def _checkpoint(self) -> None:
        began = time.perf_counter()
        self.metrics.flush(self.loader.wait_s)  # rows first: a committed step has its row
        record = {"config": self.config.model_dump(mode="json"), "feed": self.feed.fingerprint,
                  "grid": asdict(self.feed.grid),
                  "order": self.loader.order.fingerprint, "health": asdict(self.health)}
        self._committed(self.saver.finish())
        self.saver.start(self.step, record)
        self._stalled_s = time.perf_counter() - began
        self._began_saving = began

    def _committed(self, step: int | None) -> None:
        if step is not None:
            self.metrics.event("checkpoint", step, stalled_s=self._stalled_s,
                               seconds=time.perf_counter() - self._began_saving)

    def _finish(self) -> None:
        if self.world.rank == 0:
            state = checkpoint.open_checkpoint(self.config.run.dir, self.step).state_sha256()
            self.metrics.event("finish", self.step, state_sha256=state,
                               skipped=self.health.skipped)
            self._say(f"finished at step {self.step}; state {state[:16]}")
        self.world.gather(None)  # leave together

    def _progress(self) -> None:
        row, (time_began, step_began) = self.metrics.last_row, self._began
        elapsed = time.perf_counter() - time_began
        left = elapsed / (self.step - step_began) * (self.config.train.steps - self.step)
        self._say(f"step {self.step}/{self.config.train.steps}  loss {row['loss']:.5f}  "
                  f"grad {row['grad_norm']:.3f}  lr {row['lr']:.2e}  "
                  f"{row['volumes_per_s']:.1f} volumes/s  data wait {row['data_wait']:.0%}  "
                  f"ETA {int(left) // 60}:{int(left) % 60:02d}")

    def _say(self, text: str) -> None:
        if self.world.rank == 0:
            print(text, flush=True)

    def _on_signal(self, number: int, frame: Any) -> None:
        self._stop = True

    def close(self) -> None:
        """Stop reading ahead, give the device and the signals back."""
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        self.loader.close()
        self.saver.close()
        self.metrics.close()
        self.engine.close()
