"""Tracked state as boundaries see it: what is recorded at each, what betrays a write, what is the same on every rank."""

from __future__ import annotations

import zlib
from collections.abc import Set as AbstractSet
from typing import Any

import torch

from orchestrator.worker.state import TrackedState
from orchestrator.worker.state_items import ObjectItem, Tree
from orchestrator.worker.state_optimizers import OptimizerItem


class RunState(TrackedState):
    """`TrackedState` plus what a step boundary asks of it."""

    @property
    def is_empty(self) -> bool:
        return not self._items

    @property
    def holds_per_rank(self) -> bool:
        """Whether some values differ between ranks."""
        return bool(self._per_rank)

    def recorded(self) -> tuple[dict[str, Tree], dict[str, Tree]]:
        """What a step may change before its first optimizer step: (replicated, this rank's own) trees.

        Whole trees of small objects; of optimizers the hyperparameters, which scripts set at the top of a step.
        """
        trees: dict[str, Tree] = dict(self.small())
        for name, item in self._items.items():
            if isinstance(item, OptimizerItem):
                groups = item._value.param_groups
                trees[name] = {"$hyper": [item._hyper_tree(index, group)[0] for index, group in enumerate(groups)]}
        return self.split(trees)

    def mutable_versions(self) -> tuple[int, int]:
        """As the base, with the tensors of tracked objects (an EMA's shadow). Their identity says nothing: a
        `state_dict` may make them anew at each call.
        """
        total, tokens = super().mutable_versions()
        for item in self._items.values():
            if isinstance(item, ObjectItem):
                total += sum(tensor._version for _, tensor in item.tensors())
        return total, tokens

    def carries_gradients(self, stepped: AbstractSet[int], before: dict[int, int]) -> bool:
        """Whether an optimizer that did not step in this iteration accumulated gradients in it: then the boundary is no
        place to come back to, because they would be missing. `before`: what `gradient_marks` said at the last boundary.
        """
        return any(
            id(optimizer) not in stepped and self._gradient_mark(optimizer) != before.get(id(optimizer), 0)
            for optimizer in self.optimizers.values()
        )

    def gradient_marks(self) -> dict[int, int]:
        """A number per optimizer that moves when its gradients do; 0 if it holds none. Asked only with several optimizers."""
        if len(self.optimizers) < 2:
            return {}
        return {id(optimizer): self._gradient_mark(optimizer) for optimizer in self.optimizers.values()}

    @staticmethod
    def _gradient_mark(optimizer: Any) -> int:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        return sum(gradient._version + 1 for gradient in gradients)

    def digest(self, synced: AbstractSet[int]) -> int:
        """63 bits of names, shapes and first values of what is replicated. `synced`: ids of parameters and buffers that
        the strategy has broadcast already; they need no comparison.
        """
        value = zlib.crc32(self.fingerprint().encode())
        for name, tensor in self.replicated():
            if id(tensor) not in synced and tensor.numel():
                raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                value = zlib.crc32(raw.numpy(), zlib.crc32(name.encode(), value))
        return value
