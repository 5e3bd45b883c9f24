"""The training loop: batches -> views -> loss -> step -> EMA, router bias, metrics, checkpoint.

``train(config)`` runs in every rank.  It continues from the run directory's latest checkpoint, or
starts; all state is the checkpoint and the number of steps done, since samples, masks, augmentation
and rates are pure functions of the step and of the windows of samples that were stepped over.

SIGTERM or SIGUSR1 at any rank, or the end of its time, ends the run at the next step boundary with
a checkpoint and status 75 ("try again"), as batch systems expect.  Where many steps had to be
dropped, the run goes back to its last checkpoint and steps over the samples since.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from neurojepa.config import RootConfig, dump_config
from neurojepa.errors import ConfigError, LeaseLost
from neurojepa.feed.ahead import Ahead
from neurojepa.feed.format import open_feed
from neurojepa.feed.loader import Loader
from neurojepa.feed.order import Window, first_position
from neurojepa.methods import METHODS
from neurojepa.model.build import build_model
from neurojepa.model.moe import expert_balance, grouped_kernel, moe_layers, update_router_bias
from neurojepa.model.sparse import sparse_code
from neurojepa.objective.anatomy import check_anatomy
from neurojepa.objective.views import make_views
from neurojepa.storage import Patience, join, write_bytes
from neurojepa.train import checkpoint, compiling
from neurojepa.train.device import check_device, reduction_of
from neurojepa.train.engine import Engine
from neurojepa.train.gates import Gates
from neurojepa.train.health import Damage, Health, collapsed, diverged
from neurojepa.train.heartbeat import Heartbeat
from neurojepa.train.hooks import Hook, Progress
from neurojepa.train.metrics import Metrics
from neurojepa.train.ownership import Ownership, owned
from neurojepa.train.pace import Pace
from neurojepa.train.probe import OnlineProbe
from neurojepa.train.resume import check_fits, check_same_run
from neurojepa.train.saver import Saver
from neurojepa.train.schedule import rates_at
from neurojepa.train.stopping import REQUEUE, StopRequest
from neurojepa.train.telemetry import write_environment
from neurojepa.train.world import World, start_world


def train(config: RootConfig) -> int:
    """Train to ``train.steps`` as one rank of the run.

    Returns
    -------
    int
        0 when finished, ``REQUEUE`` when stopped by a signal or the time limit.

    Raises
    ------
    ConfigError, DataError, CheckpointError
        See ``Run``; but for lease/, the run directory is as before.
    LeaseHeld, LeaseLost
        The run directory belongs to someone else.
    NeurojepaError
        The run diverged or collapsed, or the feed failed; its last checkpoint counts.
    """
    world = start_world(config.run.deterministic)
    with owned(config, world) as owner:
        run = Run(config, world, owner)
        try:
            return run.to_end()
        finally:
            run.close()


@dataclass(frozen=True)
class Decision:
    """What every rank does after a step, in this order; the same on all of them."""

    commit: bool  # take the checkpoint that is on its way one stage further
    checkpoint: bool  # begin one of this step
    wait: bool  # until it is committed
    report: bool  # say what any rank met in feed and store
    flush: bool  # write the rows and look at them
    stop: bool  # leave before the last step
    leave: bool = False  # at once, doing nothing of the above


class Run:
    """One rank's share of a run: what is built once, and the loop over steps.

    Raises
    ------
    ConfigError
        More ranks than samples per step, a GPU that cannot do it, or run.dir holds a run of
        another recipe.
    DataError
        The feed is missing or damaged.
    CheckpointError
        The latest checkpoint is damaged.
    """

    def __init__(self, config: RootConfig, world: World,
                 owner: Ownership | None = None) -> None:
        if config.train.global_batch < world.size:
            raise ConfigError(
                f"train.global_batch = {config.train.global_batch}: this run has {world.size} "
                "ranks, and each needs a scan per step; raise it or start fewer ranks")
        self.config, self.world = config, world
        self.owner = owner = owner or Ownership(config.run.dir)
        self.stop = StopRequest(config.run.time_limit_min)
        self.patience = Patience(config.data.retry_s)
        self.heartbeat = Heartbeat(config.run.dir, world.rank, world=world.size,
                                   device=str(world.device), patiences=[self.patience])
        self.feed = self.patience(lambda: open_feed(config.data.feed))
        check_device(config, self.feed.grid, world.device, world.size)
        regions = check_anatomy(config, self.feed.grid)
        self.loader = Loader(self.feed, config, rank=world.rank, world=world.size, first_step=0)
        self.fingerprints = {"feed": self.feed.fingerprint, "regions": regions,
                             "order": self.loader.order.fingerprint}
        method = METHODS[config.objective.method].load()
        self.labels = self.patience(lambda: method.labels(self.feed, config))
        probes = [self.patience(lambda: OnlineProbe(config, self.feed, world))] \
            if config.train.probe_every else []
        (found, changes), model = self._latest(), build_model(config, self.feed.grid)
        if found:
            check_fits(found, model)
        self.heartbeat.patiences.append(self.loader.reader.patience)
        self.build, compiled = compiling.prepare(config, model, world.device)
        if compiled.backend:
            self.heartbeat.compiling()
        way = reduction_of(config, self.feed.grid, model, world, self.loader.micro_steps)
        self.engine = Engine(model, config, world, self.loader.micro_steps, way)
        self.moe = moe_layers(self.engine.module)
        self.code = sparse_code(self.engine.module)
        self.gates = Gates(config, self.feed.grid, world)
        self.health = Health(config.train.health, found.manifest["health"] if found else None)
        self.damage = Damage(config.data.max_damaged_share)
        self.step = self._started_at = self.heartbeat.step = found.step if found else 0
        self.windows: list[Window] = []
        self.began = (time.perf_counter(), self.step)
        self._take_up(found, found.manifest["skipped_windows"] if found else (), changes)
        self.saver = Saver(owner, self.engine, world, keep_last=config.train.keep_last,
                           milestone_every=config.train.milestone_every, patience=self.patience)
        self._saving_since = self._stalled_s = 0.0
        self.metrics = Metrics(config, self.feed.grid, world, self.step, self.patience, owner)
        self.pace = self.heartbeat.pace = Pace(world.device)
        self.heartbeat.attempt = self.saver.attempt
        self.hooks: list[Hook] = [self.heartbeat, *probes, Progress()]
        if world.rank == 0:
            self.patience(self._write_config)
        write_environment(config, world, self.fingerprints)
        experts = grouped_kernel(self.moe[0]) if self.moe else None
        self.metrics.event("resume" if found else "start", self.step, world=world.size,
                           zero=config.train.zero, dtype=config.train.dtype,
                           compiled=compiled.why, experts=experts, sums=str(way))
        if world.device.type == "cuda":
            self.say(f"compiled: {compiled.why}; experts: {experts or 'none'}")
        if changes:
            self.metrics.event("accepted", self.step, changes=changes)

    def _write_config(self) -> None:
        with self.owner.writing():
            write_bytes(join(self.config.run.dir, "config.yaml"),
                        dump_config(self.config).encode())

    def to_end(self) -> int:
        """Train until the last step or a request to stop."""
        steps = self.config.train.steps
        self.say(f"step {self.step}/{steps}: {self.loader.order.num_samples} scans, "
                 f"{self.world.size} rank(s), {self.loader.micro_steps} micro-step(s) a step")
        while self.step < steps:
            applied = self._train_step()  # collective, as is all below but what says otherwise
            for hook in self.hooks:
                hook.after_attempt(self)  # this rank alone
            if self.health.must_go_back(self.step, applied):
                self._go_back()
                continue
            for hook in self.hooks:
                hook.after_step(self)
            decision = self._agree(applied)
            if decision.leave:
                return self._left()
            self._carry_out(decision)
            if decision.stop:
                return self._stopped()
        self._finish()
        return 0

    def _agree(self, applied: bool) -> Decision:
        """What to do after a step, from what ranks knew when they ended it."""
        train = self.config.train
        stop, writing, reports, leave = self.engine.guard.agreed()
        last = self.step == train.steps
        leaving = stop or last
        return Decision(
            commit=self.saver.pending and not writing,
            # a state in trouble is no place to go back to
            checkpoint=leaving or (self.step % train.checkpoint_every == 0 and applied),
            wait=leaving, report=reports or leaving,
            flush=last or self.step % train.log_every == 0, stop=stop and not last, leave=leave)

    def _flags(self) -> tuple[bool, bool, bool, bool]:
        """What this rank knows; it travels with the loss of the step, so agreeing costs nothing.

        What comes up later is agreed on a step later.
        """
        return (bool(self.stop.reason or self.owner.stop), self.saver.writing,
                self.loader.has_reports or bool(self.patience.retries),
                self.owner.lost is not None or self.owner.stop == "now")

    def _carry_out(self, decision: Decision) -> None:
        """Do what was agreed, in the order of its fields."""
        if decision.commit:
            self._committed(self.saver.advance())
        if decision.checkpoint:
            self._checkpoint()
        if decision.wait:
            with self.heartbeat.doing("checkpoint"):
                self._committed(self.saver.finish())
        if decision.report:
            self._report_data()
        if decision.flush:
            self._flush()
            for hook in self.hooks:
                hook.after_flush(self)  # this rank alone

    def _train_step(self) -> bool:
        """One step; returns whether it was applied or, on all ranks, dropped."""
        config = self.config
        rates = rates_at(self.step, config)
        # DeepSpeed averages over ranks and micro-steps; the loss of a step is per sample.
        scale = self.world.size * self.loader.micro_steps / config.train.global_batch
        applied = False
        for _ in range(self.loader.micro_steps):
            self.pace.begin()
            batch = next(self._batches)
            self.pace.fetched()
            views = make_views(batch, config, self.feed.grid, config.train.seed, self.build)
            if self.labels:
                views = self.labels.attach(views, batch.scan_ids)
            loss, sums = self.engine.forward(views.without_fill_up(), rates.l1)
            self.pace.forwarded()
            self.engine.backward(loss * scale)
            self._batches.fetch()  # the device is busy; what comes next waits for it
            applied = self.engine.step(rates.lr, self._flags())
            self.metrics.add(loss, sums)
        with self.engine.aside():
            gates = self.gates.look(self.engine.module, views, self.step + 1)
        balance = {}
        if self.moe:
            load = self.world.sum_(torch.stack([layer.load for layer in self.moe]))
            update_router_bias(self.moe, load, config.optim.router_bias_rate if applied else 0.0)
            balance = expert_balance(load)
        if self.code:
            self.code.update_usage(self.world.sum_(self.code.active), applied)
        if applied:
            self.engine.update_ema(rates.ema)
        self.step += 1
        self.metrics.end_step(self.step, {"lr": rates.lr, "l1": rates.l1, "skipped": not applied,
                                          "grad_norm": self.engine.grad_norm(), **balance,
                                          **gates})
        if not applied:
            begin = first_position(self.step - 1, config.train.global_batch, self.windows)
            self.metrics.event("skip", self.step, **self.engine.guard.why(),
                               positions=[begin, begin + config.train.global_batch])
        return applied

    def _go_back(self) -> None:
        """Take up the last checkpoint and step over the samples since; all ranks together."""
        self._committed(self.saver.finish())
        (found, changes), config = self._latest(), self.config.train
        why = self.health.go_back(found.manifest["health"] if found else None)
        if why or not found:
            self.metrics.event("diverged", self.step, reason=why)
            raise diverged(self.step, why or "", config.health)
        begin = first_position(found.step, config.global_batch, self.windows)
        end = first_position(self.step, config.global_batch, self.windows)
        self.metrics.event("rollback", self.step, to=found.step, positions=[begin, end])
        self.say(f"step {self.step}: too many steps were dropped; back to step {found.step}, "
                  f"stepping over the samples at positions {begin} to {end - 1}")
        self.metrics.rewind(found.step)
        self._take_up(found, [*self.windows, (found.step, self.step - found.step)], changes)

    def _latest(self) -> tuple[checkpoint.Checkpoint | None, list[str]]:
        """The checkpoint to continue from, and the changes of the recipe since.

        Collective: rank 0 reads its root manifest for all.
        """
        run_dir = self.config.run.dir

        def read() -> tuple[int, dict[str, Any]] | None:
            step = checkpoint.latest_step(run_dir)
            return None if step is None else (
                step, checkpoint.open_checkpoint(run_dir, step).manifest)

        # one patience for both: the others wait for rank 0 no longer than for any rank
        if (latest := self.world.settle(None, lambda _: self.patience(read))) is None:
            return None, []
        found = checkpoint.Checkpoint(run_dir, *latest)
        return found, check_same_run(found, self.config, self.fingerprints)

    def _take_up(self, found: checkpoint.Checkpoint | None, windows: Sequence[Window],
                 changes: list[str]) -> None:
        """Stand where a checkpoint (or a new run) does; ``windows`` of samples are passed over."""
        self.step = found.step if found else 0
        self.windows = [(start, shift) for start, shift in windows]
        if found:
            self.engine.load(lambda *what: self.patience(lambda: found.read(*what)),
                             self.patience(found.buffers), found.manifest["adam_step"])
        if changes:  # the new recipe's losses are no spikes of the old one's
            self.engine.guard.forget()
        self.loader.seek(self.step, self.windows)
        self._batches = Ahead(self.loader, self.world.device)
        self.began = (time.perf_counter(), self.step)

    def _report_data(self) -> None:
        """Log what all ranks met in feed and store; collective."""
        damaged, retries = self.loader.take_reports()
        damaged, retries = self.world.settle((damaged, retries + self.patience.take()), _joined)
        for report in self.damage.new(damaged):
            self.metrics.event("damaged", self.step, **report)
        if retries:
            self.metrics.event("store_retry", self.step, tries=len(retries), says=retries[-1])
        read = (self.step - self._started_at) * self.config.train.global_batch
        self.damage.check(read)

    def _flush(self, durable: bool = False) -> None:
        """Write pending rows and look at them; collective."""
        self.metrics.flush(self.loader.wait_s, durable)
        figures = self.health.collapse(self.metrics.last_row)
        if figures and self.step > self.config.optim.warmup_steps:
            self.metrics.event("collapse", self.step, **figures)
            raise collapsed(self.step, figures)

    def _checkpoint(self) -> None:
        with self.heartbeat.doing("checkpoint"):
            self._start_checkpoint()

    def _start_checkpoint(self) -> None:
        began = time.perf_counter()
        self._flush(durable=True)  # rows first: a committed step has its row
        record = {"config": self.config.model_dump(mode="json"), **self.fingerprints,
                  "grid": asdict(self.feed.grid), "health": self.health.record(),
                  "skipped_windows": self.windows}
        self._committed(self.saver.finish())
        self.saver.start(self.step, record)
        self._stalled_s = time.perf_counter() - began
        self._saving_since = began

    def _committed(self, step: int | None) -> None:
        if step is not None:
            seconds = time.perf_counter() - self._saving_since
            self.stop.checkpoint_s = seconds
            self.health.progressed()
            self.metrics.event("checkpoint", step, stalled_s=self._stalled_s, seconds=seconds)

    def _stopped(self) -> int:
        # maybe of another rank
        reason = self.stop.reason or ("operator" if self.owner.stop else "signal")
        self.metrics.event("stop", self.step, reason=reason)
        self.say(f"stopped at step {self.step} by a {reason}; run again to continue")
        self.world.leave()
        return REQUEUE

    def _left(self) -> int:
        """End without a checkpoint: the directory is another owner's, or there is no time."""
        def first(losses: list[str | None]) -> None:
            if lost := next(filter(None, losses), None):
                raise LeaseLost(lost)

        self.world.settle(self.owner.lost and str(self.owner.lost), first)
        self.metrics.event("stop", self.step, reason="operator, without a checkpoint")
        self.say(f"stopped at step {self.step} without a checkpoint; run again to continue")
        self.world.leave()
        return REQUEUE

    def _finish(self) -> None:
        if self.world.rank == 0:
            state = self.patience(lambda: checkpoint.open_checkpoint(
                self.config.run.dir, self.step).state_sha256())
            self.metrics.event("finish", self.step, state_sha256=state,
                               skipped=self.health.skipped)
            self.say(f"finished at step {self.step}; state {state[:16]}")
        self.world.leave()

    def say(self, text: str) -> None:
        """Print on rank 0."""
        if self.world.rank == 0:
            print(text, flush=True)

    def close(self) -> None:
        """Stop reading ahead, give the device and the signals back."""
        self.stop.close()
        self.patience.close()
        self.loader.close()
        self.saver.close()
        for hook in self.hooks:
            hook.close()
        self.metrics.close()
        self.engine.close()


def _joined(reports: list[tuple[list[Any], list[str]]]) -> tuple[list[Any], list[str]]:
    """Damaged samples and retries of all ranks, as lists of each."""
    return ([item for damaged, _ in reports for item in damaged],
            [text for _, retries in reports for text in retries])
