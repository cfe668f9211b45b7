"""What the worker asks of a way to spread a model over ranks. Adapters: `none.py`, `ddp.py`."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

import torch
from torch import nn

from orchestrator.errors import UsageError

ForwardCallback = Callable[[nn.Module], None]


class Strategy(Protocol):
    """One instance serves a whole worker: it remembers every module it wrapped, so one call reaches all of them."""

    name: str

    def wrap(self, module: nn.Module, device: torch.device, **options: Any) -> nn.Module:
        """Move `module` to `device` and make its gradients an average over ranks. Collective: all ranks, same order.

        `options` go to the wrapper. A module without a parameter that requires a gradient comes back unwrapped.
        Raises UsageError for an option that no wrapper knows.
        """
        ...

    def set_share(self, weight: float | None) -> None:
        """Weight of this rank's gradients in the sum over ranks, n_r / B. None: equal shares, 1 / world size.

        Holds from the next backward pass on, until set again. Weight 0 counts as a gradient of zero even where the
        rank's own gradient is not finite (the mean over no samples is NaN).
        """
        ...

    def set_sync(self, sync: bool) -> None:
        """Whether the next forward and backward passes exchange gradients. Off for all microbatches but the last."""
        ...

    def exchanged(self, parameters: Iterable[nn.Parameter] | None = None) -> bool:
        """False if a gradient that was accumulated since the last exchange was never exchanged with the other ranks.

        An optimizer step on it would let the ranks' parameters drift apart. `parameters`: look only at the wrapped
        modules that hold one of these. Costs nothing while everything was exchanged.
        """
        ...

    def share_buffers(self) -> None:
        """Give every rank rank 0's module buffers, as the next training forward would. Collective."""
        ...

    def on_forward(self, callback: ForwardCallback, also: nn.Module | None = None) -> None:
        """Call `callback(module)` right after each training-mode forward of every wrapped module, present and future.

        `also`: a module made from a wrapped one, such as `torch.compile`'s, to be listened to as well. Safe to repeat.
        """
        ...


def check_options(options: dict[str, Any], known: Iterable[str]) -> None:
    """Raise UsageError naming the options of `prepare` that are not `known`."""
    unknown = sorted(set(options) - set(known))
    if unknown:
        raise UsageError(
            f"`prepare` was given {', '.join(unknown)}, which torch's DistributedDataParallel does not know; "
            f"it takes {', '.join(sorted(known))}."
        )


class ForwardListeners:
    """Callbacks for training-mode forwards of any number of modules; a module that dies takes its hook along."""

    def __init__(self) -> None:
        self._callbacks: list[ForwardCallback] = []
        self._heard: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def add(self, callback: ForwardCallback) -> None:
        """Call `callback(module)` from now on, after those added before. Safe to repeat."""
        if callback not in self._callbacks:
            self._callbacks.append(callback)

    def listen(self, module: nn.Module) -> None:
        """Listen to `module`. Safe to repeat."""
        if module in self._heard:
            return
        self._heard.add(module)
        callbacks = self._callbacks
        target = weakref.ref(module)

        def heard(called: nn.Module, args: Any, output: Any) -> None:
            # A deep copy (an EMA shadow) carries this hook along and is not what was wrapped. Under torch.compile
            # Python side effects would split the graph: the compiled module is listened to from outside.
            if called.training and called is target() and not torch.compiler.is_compiling():
                for callback in callbacks:
                    callback(called)

        module.register_forward_hook(heard)
