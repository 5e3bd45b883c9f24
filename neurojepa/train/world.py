"""The processes of a run: who we are, which device is ours, and how ranks agree.

A launcher (deepspeed, torchrun, our own) puts RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and
MASTER_PORT into the environment; without them we are a world of one.  Tensors travel by NCCL on
CUDA and by gloo on the CPU; what is agreed on the host goes by the store at which ranks meet
(control.py), so that no rank has a connection to each other one.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import socket
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from neurojepa.ports import free_port
from neurojepa.train.control import Control, allow_connections

T = TypeVar("T")

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # of malloc.h
COLLECTIVE_TIMEOUT = timedelta(minutes=10)  # a peer that is silent this long is lost
_WORLDS = itertools.count()  # that this process was in; each has its own messages


@dataclass(frozen=True, kw_only=True)
class World:
    """This process among the ranks of the run."""

    rank: int
    size: int
    device: torch.device
    control: Control | None  # None in a world of one

    def settle(self, item: Any, verdict: Callable[[list[Any]], T]) -> T:
        """What rank 0 makes of everyone's item, on every rank; see ``Control.settle``."""
        return verdict([item]) if self.control is None else self.control.settle(item, verdict)

    def gather(self, item: Any) -> list[Any]:
        """Everyone's item, in rank order, on every rank.  Host only; small and rare."""
        return self.settle(item, lambda items: items)

    def leave(self) -> None:
        """Be through together; nothing may be settled afterwards by a process that ends."""
        if self.control is not None:
            self.settle(None, lambda _: None)
            self.control.leave()

    def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum over ranks in place, on the device."""
        if self.size > 1:
            dist.all_reduce(tensor)
        return tensor


def start_world(deterministic: bool = False) -> World:
    """Join the process group described by the environment, or found a world of one."""
    cuda = torch.cuda.is_available()
    if not cuda:
        keep_memory()
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
        if "OMP_NUM_THREADS" not in os.environ:  # ranks share the cores; sums stay in one order
            torch.set_num_threads(1)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        os.environ.setdefault("NCCL_ALGO", "Ring")
        torch.use_deterministic_algorithms(True)
    if "RANK" not in os.environ:
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1",
                          MASTER_PORT=str(free_port()))
    if interface := interface_to_use(os.environ):
        os.environ["GLOO_SOCKET_IFNAME"] = interface
    local = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    if os.environ["RANK"] == "0":
        allow_connections(int(os.environ["WORLD_SIZE"]))
    import deepspeed
    import deepspeed.ops

    # On the CPU DeepSpeed would compile this op (minutes, needs a compiler); gloo does its work.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("WARNING")
    # DeepSpeed 0.19 calls collectives by their older names; torch 2.11 has no others.
    warnings.filterwarnings("ignore", message=r"`torch.distributed\.\w+_tensor` is deprecated")
    with bounded_groups():
        deepspeed.init_distributed("nccl" if cuda else "gloo", auto_mpi_discovery=False,
                                   verbose=False, timeout=COLLECTIVE_TIMEOUT)
    world = World(rank=dist.get_rank(), size=dist.get_world_size(), device=device,
                  control=_control() if dist.get_world_size() > 1 else None)
    world.settle(None, lambda _: None)  # nobody ends by an error while another one still joins
    return world


def _control() -> Control:
    """A connection of our own: a wait in torch's would hold up NCCL's watchdog."""
    torchs: Any = dist.distributed_c10d._get_default_store()
    own = PrefixStore(f"neurojepa/{next(_WORLDS)}", torchs.clone())
    return Control(own, dist.get_rank(), dist.get_world_size(), COLLECTIVE_TIMEOUT)


def interface_to_use(environment: Mapping[str, str]) -> str | None:
    """The interface on the way to the master, where gloo would take one that leads nowhere.

    Gloo listens at the address of this host's name.  Where that is loopback (Debian writes
    127.0.1.1 into /etc/hosts), ranks on other hosts cannot connect, and the start hangs.  None
    where the name is good, all ranks are here, or the user has chosen.
    """
    master = environment.get("MASTER_ADDR", "")
    if environment.get("GLOO_SOCKET_IFNAME") or not master:
        return None
    try:
        master = socket.gethostbyname(master)
        own = socket.gethostbyname(socket.gethostname())
    except OSError:
        own = "127.0.0.1"  # no name is no better
    if master.startswith("127.") or not own.startswith("127."):
        return None
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((master, 9))  # sends nothing; the kernel chooses the route
        except OSError:
            return None
        address = probe.getsockname()[0]
    return next((name for name, addresses in psutil.net_if_addrs().items()
                 if any(each.address == address for each in addresses)), None)


def keep_memory() -> None:
    """Let glibc keep the memory that is freed; other C libraries stay as they are.

    A step on the CPU frees and asks again for gigabytes.  To return them to the system and to get
    fresh pages costs more than a tenth of a step.
    """
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(_M_MMAP_MAX, 0)
        libc.mallopt(_M_TRIM_THRESHOLD, -1)


def leave_world() -> None:
    """Leave the process group at the end of a process, when all ranks do."""
    dist.destroy_process_group()


@contextmanager
def bounded_groups() -> Iterator[None]:
    """Give process groups made inside our timeout; ZeRO clones groups with torch's 30 minutes."""
    new_group = dist.new_group

    def bounded(*args: Any, **kwargs: Any) -> Any:
        kwargs.setdefault("timeout", COLLECTIVE_TIMEOUT)
        return new_group(*args, **kwargs)

    dist.new_group = bounded
    try:
        yield
    finally:
        dist.new_group = new_group
