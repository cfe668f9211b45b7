"""The process group of a run, on whatever it was started by: our launcher, torchrun, or nothing at all."""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from orchestrator.worker import context as context_module
from orchestrator.worker.context import WorkerContext

_TIMEOUT = datetime.timedelta(minutes=30)


@dataclass
class Group:
    """Ranks, device, and a gloo group of our own (`control`) for agreements; None where there is one rank."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    device: torch.device
    store: Any = None
    control: Any = None

    def share(self, key: str, value: str) -> str:
        """Rank 0's `value`, on every rank. Waits for rank 0."""
        if self.store is None or self.world_size == 1:
            return value
        name = f"orchestrator/{key}"
        if self.rank == 0:
            self.store.set(name, f"={value}")  # a store in a file takes an empty value for none
            return value
        return bytes(self.store.get(name)).decode()[1:]


def join() -> Group:
    """Adopt the default process group if there is one, else form it. One rank outside a launcher needs none."""
    context = context_module.CURRENT
    if dist.is_initialized():
        return _adopt(context)
    if context is not None:
        return _form(context)
    if "RANK" in os.environ and "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        device = _device(int(os.environ.get("LOCAL_RANK", "0")))
        store, rank, world_size = next(iter(dist.rendezvous("env://", timeout=_TIMEOUT)))
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=_of_this_start(store), rank=rank, world_size=world_size, timeout=_TIMEOUT
        )
        return _adopt(None)
    return Group(0, 0, 1, 1, _device(0))


def _device(local_rank: int) -> torch.device:
    if not torch.cuda.is_available():
        return torch.device("cpu")
    device = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(device)
    return device


def _adopt(context: WorkerContext | None) -> Group:
    rank, world_size = dist.get_rank(), dist.get_world_size()
    local_rank = context.local_rank if context else int(os.environ.get("LOCAL_RANK", rank))
    local_world = context.local_world_size if context else int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
    store = _of_this_start(dist.distributed_c10d._get_default_store())
    group = Group(rank, local_rank, world_size, local_world, _device(local_rank), store)
    if world_size > 1:
        group.control = _control(store, rank, world_size)
    return group


def _of_this_start(store: Any) -> Any:
    """Keys of this start's own: torchrun's store outlives a group, and the next one would find dead addresses in it."""
    return dist.PrefixStore(f"orchestrator/start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _form(context: WorkerContext) -> Group:
    device = _device(context.local_rank)
    store = dist.TCPStore(context.store_host, context.store_port, None, False, timeout=_TIMEOUT, wait_for_workers=False)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=context.rank, world_size=context.world_size, timeout=_TIMEOUT)
    group = Group(context.rank, context.local_rank, context.world_size, context.local_world_size, device, store)
    if context.world_size > 1:
        group.control = _control(store, context.rank, context.world_size)
    return group


def _control(store: Any, rank: int, world_size: int) -> Any:
    """A gloo group beside the user's: our agreements never meet a collective of the program's."""
    return dist.ProcessGroupGloo(dist.PrefixStore("orchestrator/control", store), rank, world_size, _TIMEOUT)
