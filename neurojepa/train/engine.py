"""The DeepSpeed engine: sharded training, and access to the fragments a rank owns.

In go a model with an ``encoder`` and a frozen ``target`` of the same shape, losses and rates; out
come steps.  ZeRO keeps fp32 masters and Adam moments in flat tensors, one per parameter group,
split over ranks.  A **fragment** is the part of one parameter that lies in this rank's flats:
checkpoints are written and read by fragments, at any world size and ZeRO stage.

The EMA of the encoder is kept the same way: one fp32 copy of each encoder flat, updated
elementwise on the owner, then published (cast and gathered) into ``target``.  Under
``train.offload`` flats and EMA lie in host memory, and so does their arithmetic.  What is gathered
arrives later: see gathers.py.

All private attributes of DeepSpeed are touched in this file alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from neurojepa.config import RootConfig
from neurojepa.errors import ConfigError
from neurojepa.planning.network import PARTS
from neurojepa.planning.reduction import Reduction, stage_run
from neurojepa.train.compiling import REGIONS
from neurojepa.train.gathers import Gathers, part_of
from neurojepa.train.health import Guard
from neurojepa.train.world import World, bounded_groups

KNOWN_VERSION = "0.19."
MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_KEYS = ("master", *MOMENTS, "ema")
SOURCE, TARGET = "encoder.", "target."
WIRE = {4: "fp32", 2: "bf16"}  # by bytes
OFFLOADED = {"none": (), "optimizer": ("optimizer",), "all": ("optimizer", "param")}


@dataclass(frozen=True, kw_only=True)
class Fragment:
    """Elements [start, start + length) of a parameter, and where this rank keeps them."""

    name: str
    shape: tuple[int, ...]
    start: int
    length: int
    flat: int  # number of the flat tensor
    offset: int  # of the first element inside it


class Engine:
    """A model under ZeRO 1, 2 or 3, with its EMA target.

    Parameters
    ----------
    model : nn.Module
        Built alike on every rank; has ``encoder`` and ``target`` (frozen) of the same parameters.
    config : RootConfig
    world : World
    micro_steps : int
        Micro-steps accumulated per step.
    way : Reduction
        How gradients are summed over ranks.
    """

    def __init__(self, model: nn.Module, config: RootConfig, world: World,
                 micro_steps: int, way: Reduction) -> None:
        import deepspeed
        from deepspeed.utils import set_z3_leaf_modules

        if not deepspeed.__version__.startswith(KNOWN_VERSION):
            raise ConfigError(f"deepspeed {deepspeed.__version__}: this version of neurojepa knows "
                              f"where {KNOWN_VERSION}* keeps its state; install deepspeed 0.19.8")
        self.world = world
        # of bf16 inputs (the router's) its products are exact; the others' sums are metrics, spread
        torch.backends.cuda.matmul.allow_tf32 = config.train.dtype == "bf16"
        optimizer = torch.optim.AdamW(param_groups(model, config.optim.weight_decay),
                                      lr=config.optim.lr, betas=config.optim.betas, fused=True)
        if config.train.zero == 3:
            # gathered whole, before they run: so they can be compiled, with no hooks inside
            set_z3_leaf_modules(model, list(REGIONS))
        with bounded_groups(), _nothing_compiled():
            self._engine: Any = deepspeed.initialize(
                model=model, optimizer=optimizer,
                config=deepspeed_config(config, world_size=world.size,
                                        micro_steps=micro_steps, way=way))[0]
        self._zero: Any = self._engine.optimizer
        self._micro_steps = micro_steps
        self._stage3 = config.train.zero == 3
        self._flats: list[Tensor] = (self._zero.fp32_partitioned_groups_flat if self._stage3
                                     else self._zero.single_partition_of_fp32_groups)
        self._groups = self._zero.fp16_groups if self._stage3 else self._zero.bit16_groups
        if self._stage3:  # as it begins: no order is known, and it is never told of a step's end
            self._outside = copy(self._zero.parameter_offload.param_coordinator)
        self._names = {id(p): name for name, p in self.module.named_parameters()}
        self._params = dict(self.module.named_parameters())
        self.fragments = list(self._fragments_3() if self._stage3 else self._fragments_12())
        self._clip, self._offload = config.optim.grad_clip, config.train.offload != "none"
        self._ema = {i: self._flats[i].detach().clone() for i, group in enumerate(self._groups)
                     if self._names[id(group[0])].startswith(SOURCE)}
        self.guard = Guard(config.train.health.spike_deviations, world)
        self._watch_norms()
        self._targets = {} if self._stage3 else {i: self._laid_out(i) for i in self._ema}
        self._gathers = Gathers(self.module, self._send_weights)
        if way.overlap and not self._stage3:
            self._reduce_without_waiting()
        self._publish()

    # ---- a step ----------------------------------------------------------------------------------

    @property
    def module(self) -> nn.Module:
        """The model itself (its parameters are sharded under ZeRO-3)."""
        return self._engine.module

    def forward(self, *inputs: Any) -> Any:
        """The model's outputs for one micro-batch."""
        return self._engine(*inputs)

    @contextmanager
    def aside(self) -> Iterator[None]:
        """Around a forward of parts of the module that belongs to no step, as a look at latents.

        Under ZeRO-3 it gathers weights for itself: told of modules that come out of order,
        DeepSpeed would forget the order it knows, and ranks would compare it anew.
        """
        if not self._stage3:
            yield
            return
        offload = self._zero.parameter_offload
        steps, offload.param_coordinator = offload.param_coordinator, self._outside
        try:
            yield
        finally:
            offload.param_coordinator = steps

    def backward(self, loss: Tensor) -> None:
        """Accumulate gradients; they are averaged over ranks and micro-steps."""
        self.guard.add(loss)
        self._engine.backward(loss)

    def step(self, lr: float, flags: Sequence[bool] = ()) -> bool:
        """End a micro-step; at the last one clip and update, and agree on flags (``guard.agreed``).

        Returns
        -------
        bool
            False between boundaries, and where the guard or a gradient that is not finite on any
            rank forbids the step: then no rank has changed anything.
        """
        if self._engine.is_gradient_accumulation_boundary():
            self.guard.end_step(self._micro_steps, flags)
        for group in self._zero.optimizer.param_groups:
            group["lr"] = lr
        with self._weights_later():
            self._engine.step()
        return self._engine.was_step_applied()

    @contextmanager
    def _weights_later(self) -> Iterator[None]:
        """Keep DeepSpeed from gathering weights at the end of its step, while all ranks wait.

        ``update_ema`` sends them on their way behind the target's, which are needed first; the
        encoder's next forward waits for them.
        """
        if self._stage3:
            yield
            return
        from deepspeed.runtime.zero import stage_1_and_2 as below_3

        def later(**_: Any) -> None:
            self._gathers.updated = True

        gather, below_3.all_gather_dp_groups = below_3.all_gather_dp_groups, later
        try:
            yield
        finally:
            below_3.all_gather_dp_groups = gather

    def _send_weights(self) -> list[dist.Work]:
        if self.world.size == 1:
            return []
        parts = self._zero.parallel_partitioned_bit16_groups
        return [self._gather(i, whole, parts[i][self.world.rank])
                for i, whole in enumerate(self._zero.bit16_groups_flat)]

    def _gather(self, i: int, whole: Tensor, own: Tensor) -> dist.Work:
        work: dist.Work = dist.all_gather_into_tensor(
            whole, own, group=self._zero.real_dp_process_group[i], async_op=True)
        return work

    def _reduce_without_waiting(self) -> None:
        """Where gradients travel beside the backward, let the device wait for them at its end, and
        not the host, which has the next batch to send."""
        zero = self._zero
        if zero.reduction_stream is None:  # a CPU's
            return
        epilogue = zero.independent_gradient_partition_epilogue

        def ended() -> None:
            zero.reduce_ipg_grads()
            torch.cuda.current_stream().wait_stream(zero.reduction_stream)
            zero.overlap_comm = False  # nothing is left to reduce, nor to wait for
            epilogue()
            zero.overlap_comm = True

        zero.independent_gradient_partition_epilogue = ended

    def _watch_norms(self) -> None:
        """Show each step's gradient norm to the guard.

        Where that says inf, DeepSpeed's own skip drops the step, on all ranks.  Its look at the
        norm is the only read of a step that the host waits for; others told no more, and so are
        left out.
        """
        norm = self._offloaded_norm() if self._offload else self._norm  # gradients on the host
        if self._stage3:
            self._zero._get_norm_groups = lambda: [self.guard.judge(norm())]
            return
        self._zero.scaled_global_norm = lambda: self.guard.judge(norm())
        if not self._offload:
            self._zero.check_overflow = lambda **_: None
            self._zero.unscale_and_clip_grads = self._clip_gradients

    def _offloaded_norm(self) -> Callable[[], Tensor]:
        """DeepSpeed's own norm."""
        if not self._stage3:
            norm: Callable[[], Tensor] = self._zero.scaled_global_norm
            return norm
        from deepspeed.runtime.utils import combine_grad_norm_groups

        groups = self._zero._get_norm_groups
        return lambda: combine_grad_norm_groups(groups())

    def _norm(self) -> Tensor:
        """Of the gradients of all ranks, float32, in a few kernels and one message."""
        gradients = [gradient for group in self._zero.averaged_gradients.values()
                     for gradient in group]
        square = torch.zeros((), dtype=torch.float64, device=self.world.device)
        if gradients:
            norms = torch._foreach_norm(gradients, 2, torch.float64)
            square += torch.stack(list(norms)).square().sum()
        return self.world.sum_(square).sqrt().float()

    def _clip_gradients(self, gradients: list[Tensor], norm: Tensor) -> None:
        """As DeepSpeed does, but without asking for each group whether the norm is finite."""
        scale = 1 / torch.clamp((norm + 1e-6) / self._clip, min=1.0)
        torch._foreach_mul_(gradients, scale)

    def grad_norm(self) -> Tensor | float:
        """Norm of the last step's whole gradient before clipping; inf where it was skipped.

        It may still be on the device.
        """
        return self._engine.get_global_grad_norm()

    @torch.no_grad()
    def update_ema(self, momentum: float) -> None:
        """target = momentum * target + (1 - momentum) * encoder, in fp32 on the owned parts."""
        flats = [self._flats[i].detach() for i in self._ema]
        torch._foreach_lerp_(list(self._ema.values()), flats, 1 - momentum)
        self._publish()
        self._gathers.send_weights()

    @torch.no_grad()
    def _publish(self) -> None:
        self._gathers.await_target()
        for i, ema in self._ema.items():
            if self._stage3:
                self._publish_sharded(i, ema)
            else:
                self._publish_replicated(i, ema)

    def _publish_sharded(self, i: int, ema: Tensor) -> None:
        targets, parts = [], []
        for param in self._groups[i]:
            _, offset, length = self._zero.grad_position[self._zero.get_param_id(param)]
            # the same shape is partitioned the same way: no communication
            target: Any = self._target(param)
            targets.append(target.ds_tensor)
            parts.append(ema.narrow(0, offset, length))
        torch._foreach_copy_(targets, parts)

    def _publish_replicated(self, i: int, ema: Tensor) -> None:
        whole = self._targets[i]
        own = whole.narrow(0, self.world.rank * ema.numel(), ema.numel())
        own.copy_(ema)
        if self.world.size > 1:
            part = part_of(self._names[id(self._groups[i][0])], self.module)
            self._gathers.target[part].append(self._gather(i, whole, own))

    @torch.no_grad()
    def _laid_out(self, i: int) -> Tensor:
        """The flat that the target's weights of a group become views of, as the encoder's are."""
        flat = torch.empty_like(self._zero.bit16_groups_flat[i])
        # offsets are padded for alignment, so not the running sum of sizes
        for param, offset in zip(self._zero.round_robin_bit16_groups[i],
                                 self._zero.round_robin_bit16_offsets[i], strict=True):
            target = self._target(param)
            target.data = flat.narrow(0, offset, target.numel()).view_as(target)
        return flat

    def _target(self, param: nn.Parameter) -> nn.Parameter:
        return self._params[TARGET + self._names[id(param)].removeprefix(SOURCE)]

    # ---- fragments -------------------------------------------------------------------------------

    def _fragments_12(self) -> Iterator[Fragment]:
        for i, group in enumerate(self._groups):
            for param in group:
                mapping = param._hp_mapping
                if mapping is not None:
                    here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
                    yield Fragment(
                        name=self._names[id(param)], shape=tuple(param.shape), start=here.start,
                        length=here.numel, flat=i, offset=there.start)

    def _fragments_3(self) -> Iterator[Fragment]:
        for i, group in enumerate(self._groups):
            for param in group:
                _, offset, size = self._zero.grad_position[self._zero.get_param_id(param)]
                start = size * self.world.rank
                length = min(param.ds_numel - start, size)  # the rest is uninitialised padding
                if length > 0:
                    yield Fragment(name=self._names[id(param)], shape=tuple(param.ds_shape),
                                   start=start, length=length, flat=i, offset=offset)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Of all trained parameters, whoever holds them, in the same order on every rank."""
        return {self._names[id(param)]: tuple(param.ds_shape if self._stage3 else param.shape)
                for group in self._groups for param in group}

    def tensors(self, fragment: Fragment) -> dict[str, Tensor]:
        """Views of a fragment's state: master, exp_avg, exp_avg_sq and, for the encoder, ema."""
        state = self._state(fragment.flat)
        flats = {"master": self._flats[fragment.flat].detach(),
                 **{key: state[key] for key in MOMENTS}}
        if fragment.flat in self._ema:
            flats["ema"] = self._ema[fragment.flat]
        return {key: flat.narrow(0, fragment.offset, fragment.length)
                for key, flat in flats.items()}

    @property
    def adam_step(self) -> int:
        """Updates made so far (skipped steps do not count)."""
        return int(self._state(0)["step"].item())

    def _state(self, i: int) -> dict[str, Tensor]:
        state = self._zero.optimizer.state[self._flats[i]]
        if not state:  # torch fills it at the first step
            flat = self._flats[i]
            state["step"] = torch.zeros((), dtype=torch.float32, device=flat.device)
            state.update({key: torch.zeros_like(flat) for key in MOMENTS})
        return state

    def buffers(self) -> dict[str, Tensor]:
        """Persistent buffers (router bias, atom usage) and the guard's, alike on every rank."""
        params = set(self._params)
        return {name: tensor for name, tensor in self.module.state_dict().items()
                if name not in params and not name.startswith(TARGET)} | self.guard.tensors()

    @torch.no_grad()
    def load(self, read: Callable[[Fragment, str], Tensor], buffers: dict[str, Tensor],
             adam_step: int) -> None:
        """Set the whole state, in place.  Collective; only between steps.

        Parameters
        ----------
        read : callable
            ``read(fragment, key)`` returns the fragment's values of master, exp_avg, ...
        buffers : dict
            As from ``buffers``.
        adam_step : int
        """
        self._gathers.await_weights()
        for fragment in self.fragments:
            for key, tensor in self.tensors(fragment).items():
                tensor.copy_(read(fragment, key))
        for i in range(len(self._flats)):
            self._state(i)["step"].fill_(float(adam_step))
        for name, tensor in self.buffers().items():
            tensor.copy_(buffers[name])
        if self._stage3:
            self._zero._partition_all_parameters()
            for i in range(len(self._flats)):
                self._zero._reassign_or_swap_out_partitioned_parameters(i)
        else:
            self._zero._lazy_init_hp_params_optimizer_state()
            self._zero.update_lp_params()
        self._publish()

    def close(self) -> None:
        """Give DeepSpeed's hooks and buffers back."""
        self._gathers.close()
        self._engine.destroy()


@contextmanager
def _nothing_compiled() -> Iterator[None]:
    """DeepSpeed looks at an optimizer we do not use, which decorates itself with torch.compile: to
    load the compiler would take most of the time of a start."""
    compiler = torch.compile
    torch.compile = lambda function=None, **_: function or (lambda inner: inner)  # type: ignore
    try:
        yield
    finally:
        torch.compile = compiler


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The encoder's parts and the rest apart (the encoder's flats have an EMA), each with and
    without decay.

    Vectors (norms, biases) and learned tokens are not decayed.
    """
    groups: dict[tuple[int, bool], list[nn.Parameter]] = {}
    for name, param in model.named_parameters():
        if param.requires_grad:
            decays = param.ndim >= 2 and not name.endswith(("bias", "token"))
            part = part_of(name, model) if name.startswith(SOURCE) else PARTS
            groups.setdefault((part, decays), []).append(param)
    return [{"params": params, "weight_decay": weight_decay if decays else 0.0}
            for (_, decays), params in groups.items()]


def deepspeed_config(config: RootConfig, *, world_size: int, micro_steps: int,
                     way: Reduction) -> dict[str, Any]:
    """DeepSpeed's settings; those not obvious were pinned because another value goes wrong."""
    train = config.train
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": micro_steps,
        "train_batch_size": train.micro_batch * micro_steps * world_size,
        "gradient_clipping": config.optim.grad_clip,
        "bf16": {"enabled": train.dtype == "bf16", "check_grad_overflow": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": WIRE[way.width],
        "zero_force_ds_cpu_optimizer": False,  # its own would have to be compiled
        "zero_optimization": {
            **{f"offload_{part}": {"device": "cpu", "pin_memory": torch.cuda.is_available()}
               for part in OFFLOADED[train.offload]},
            "stage": stage_run(train.zero, train.dtype),
            "overlap_comm": way.overlap,
            "reduce_bucket_size": way.bucket,
            "memory_efficient_linear": False,  # it replaces F.linear for the whole process
            "stage3_param_persistence_threshold": 0,  # persistent targets would lag one step
        },
        "steps_per_print": 10**9,
    }
