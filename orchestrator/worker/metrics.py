"""`run.log` and `run.mean`: numbers of the user's, over ranks."""

from __future__ import annotations

from typing import Any

import torch

from orchestrator.errors import UsageError
from orchestrator.worker.group import Group
from orchestrator.worker.report import PeerLostError


class Metrics:
    """The latest value of every metric on this rank; the driver takes the mean over ranks."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self._latest: dict[str, Any] = {}

    def log(self, metrics: dict[str, Any]) -> None:
        """Remember values; a tensor is only looked at when it is reported, so nothing waits for a device."""
        for name, value in metrics.items():
            if isinstance(value, torch.Tensor):
                if value.numel() != 1:
                    raise UsageError(f"run.log({name}=…) takes one number, not a tensor of shape {tuple(value.shape)}.")
                # A copy: the script may go on to use the tensor. On a device it is made in the stream's order.
                value = value.detach()
                value = value.clone() if value.device.type != "cpu" else value.item()
            elif not isinstance(value, (int, float)) and not hasattr(value, "__float__"):
                raise UsageError(f"run.log({name}=…) takes a number, not a {type(value).__name__}.")
            self._latest[name] = value

    def latest(self) -> dict[str, float]:
        """All metrics as floats; waits for the device that computes them."""
        return {name: float(value) for name, value in self._latest.items()}

    def at_hand(self) -> dict[str, float]:
        """Those metrics that are known without waiting for a device."""
        return {name: float(value) for name, value in self._latest.items() if not isinstance(value, torch.Tensor)}

    def mean(self, value: Any, weight: float) -> float:
        """sum(weight * value) / sum(weight) over ranks, in float64; 0/0 is nan."""
        number = float(value)
        pair = torch.tensor([number * weight, weight] if weight else [0.0, 0.0], dtype=torch.float64)
        if self._group.control is not None:
            try:
                self._group.control.allreduce([pair]).wait()
            except RuntimeError as error:
                raise PeerLostError(f"run.mean was cut off: {error}") from error
        total, weights = pair.tolist()
        return total / weights if weights else float("nan")
