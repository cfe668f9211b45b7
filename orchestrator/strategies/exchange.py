"""One wrapped module's gradient exchange: weighted by the ranks' shares, and watched for what was never exchanged."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

GradientFuture = torch.futures.Future[torch.Tensor]
CommHook = Callable[[Any, dist.GradBucket], GradientFuture]


class Exchange:
    """State of one DDP wrapper that survives between forward, backward and optimizer step. Never copied with it."""

    def __init__(self) -> None:
        self.weight: float | None = None
        self.inner: tuple[CommHook, Any] | None = None
        self.registered = False
        self.parameters: list[nn.Parameter] = []
        self._armed = [False, False]
        self._local = [False, False]

    def reduce(self, group: dist.ProcessGroup, bucket: dist.GradBucket) -> GradientFuture:
        """Sum of weight_r * g_r over the ranks of `group`: a comm hook of DDP.

        With equal weights bitwise what DDP does without a hook: it too multiplies by 1 / W before it sums.
        A hook of the user divides by the world size itself, hence the factor handed to it.
        """
        buffer = bucket.buffer()
        world_size = group.size()
        if self.inner is not None:
            if self.weight is not None:
                _scale(buffer, self.weight * world_size)
            hook, state = self.inner
            return hook(state, bucket)
        _scale(buffer, 1 / world_size if self.weight is None else self.weight)
        work = dist.all_reduce(buffer, group=group, async_op=True)
        return work.get_future().then(lambda done: done.value()[0])

    def watch(self, parameters: list[nn.Parameter], repeats: bool) -> None:
        """Notice gradients that arrive without an exchange, on the first and the last of `parameters`.

        `repeats`: gradients may arrive several times in one backward pass (re-entrant checkpoints, allowed only with
        a static graph), so that an arrival says nothing about the end of the exchange.
        """
        self.parameters = parameters
        for probe, parameter in enumerate((parameters[0], parameters[-1])):
            parameter.register_post_accumulate_grad_hook(self._arrival(probe, repeats))

    def _arrival(self, probe: int, repeats: bool) -> Callable[[torch.Tensor], None]:
        armed, local = self._armed, self._local

        def arrived(parameter: torch.Tensor) -> None:
            local[probe] = not armed[probe]
            if not repeats:
                armed[probe] = False

        return arrived

    def forward_begins(self, sync: bool) -> None:
        """A forward pass through the wrapper: the backward pass after it exchanges iff `sync`."""
        self._armed[:] = (sync, sync)

    @property
    def exchanged(self) -> bool:
        """False if the wrapped parameters hold a gradient that the other ranks never got."""
        if not any(self._local):
            return True
        if any(parameter.grad is not None for parameter in self.parameters):
            return False
        self._local[:] = (False, False)
        return True


def _scale(buffer: torch.Tensor, factor: float) -> None:
    if factor == 0:
        buffer.zero_()
    elif factor != 1:
        buffer.mul_(factor)
