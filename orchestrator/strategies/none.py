"""Strategy `none`: one rank, or ranks that do not share gradients. The module itself, on its device."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from orchestrator.strategies.base import ForwardCallback, ForwardListeners, check_options


@cache
def ddp_options() -> frozenset[str]:
    """Names of the options that torch's DistributedDataParallel takes beside the module."""
    return frozenset(inspect.signature(DistributedDataParallel.__init__).parameters) - {"self", "module"}


class NoneStrategy:
    """Nothing is exchanged. Options of DDP are accepted, so that a script runs unchanged on one rank and on many."""

    name = "none"

    def __init__(self) -> None:
        self._listeners = ForwardListeners()

    def wrap(self, module: nn.Module, device: torch.device, **options: Any) -> nn.Module:
        """Return `module`, moved to `device`. Raises UsageError for an option that DDP does not know."""
        check_options(options, ddp_options())
        module = module.to(device)
        self._listeners.listen(module)
        return module

    def set_share(self, weight: float | None) -> None:
        """Nothing is averaged, so nothing is weighted."""

    def set_sync(self, sync: bool) -> None:
        """Nothing is exchanged in any case."""

    def exchanged(self, parameters: Iterable[nn.Parameter] | None = None) -> bool:
        """True: no gradient here is owed to another rank."""
        return True

    def share_buffers(self) -> None:
        """Every rank's buffers are its own."""

    def on_forward(self, callback: ForwardCallback, also: nn.Module | None = None) -> None:
        """Call `callback(module)` after each training-mode forward of a wrapped module, and of `also`."""
        self._listeners.add(callback)
        if also is not None:
            self._listeners.listen(also)
