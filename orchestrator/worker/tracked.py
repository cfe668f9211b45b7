"""Tracked state as boundaries see it: what is recorded at each, what betrays a write, what is the same on every
rank.
"""

from __future__ import annotations

import operator
import zlib
from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from typing import Any

import torch

from orchestrator.worker.state import TrackedState
from orchestrator.worker.state_items import Named, ObjectItem, TensorItem, Tree
from orchestrator.worker.state_optimizers import OptimizerItem
from orchestrator.worker.watch import ContentWatch


class RunState(TrackedState):
    """`TrackedState` plus what a step boundary asks of it."""

    def __init__(self, rank: int = 0) -> None:
        super().__init__(rank)
        self.replaces_tensors = False  # some optimizer makes its state anew at every step
        self._versioned: list[torch.Tensor] = []
        self._layout: tuple[Any, ...] = ()
        self._generation = 0
        self._torch_optimizers: list[torch.optim.Optimizer] = []
        self._watches: list[ContentWatch] = []
        self._pointers: list[int] = []
        self._buffer_list: Named = []
        self._buffer_slots: list[tuple[dict[str, Any], str, Any]] | None = None
        self._hyper: dict[str, tuple[list[Any], list[Tree]]] = {}

    def add(self, named: Mapping[str, Any], per_rank: Iterable[str] = ()) -> None:
        super().add(named, per_rank)
        self._torch_optimizers = [o for o in self.optimizers.values() if isinstance(o, torch.optim.Optimizer)]
        self._buffer_slots = None
        seen = {id(watch.item): watch for watch in self._watches}
        items = [item for item in self._items.values() if isinstance(item, (ObjectItem, TensorItem))]
        self._watches = [seen.get(id(item)) or ContentWatch(item) for item in items]

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
                trees[name] = {"$hyper": self._hyper_trees(name, item)}
        return self.split(trees)

    def _hyper_trees(self, name: str, item: OptimizerItem) -> list[Tree]:
        """The groups' hyperparameters; flattened again only if one of them is another object than last time."""
        groups = item._value.param_groups
        values = [value for group in groups for key, value in group.items() if key != "params"]
        known = self._hyper.get(name)
        if known is None or len(known[0]) != len(values) or not all(map(operator.is_, known[0], values)):
            trees = [item._hyper_tree(index, group)[0] for index, group in enumerate(groups)]
            self._hyper[name] = known = (values, trees)
        return known[1]

    def mutable_versions(self, deep: bool = False) -> tuple[int, int]:
        """Changes whenever a parameter, optimizer state or tracked tensor was written or replaced; an EMA's shadow too.

        Every boundary asks, so the list of tensors is kept between calls, as long as no optimizer has grown or
        loaded. `deep` (once a failure) looks whether the tensors still are the very ones.
        """
        states = [(id(o.state), len(o.state)) for o in self._torch_optimizers]  # load_state_dict makes a new dict
        layout = (len(self._items), self._names.version, *states)
        if deep or self.replaces_tensors or layout != self._layout:
            fresh = [tensor for item in self._items.values() if not item.small for _, tensor in item.tensors()]
            same = len(fresh) == len(self._versioned) and all(map(operator.is_, fresh, self._versioned))
            if not same:
                self._generation += 1
                self._versioned = fresh
            self._layout = layout
        pointers = [tensor.data_ptr() for tensor in self._versioned]  # `p.data = …` keeps the version
        changed = pointers != self._pointers
        self._pointers = pointers
        for watch in self._watches:
            changed = (watch.item.holds_tensors and watch.changed()) or changed
        if changed:
            self._generation += 1
        return sum([tensor._version for tensor in self._versioned]), self._generation

    def live_buffers(self) -> Named:
        """`buffers()`, asked at every boundary and forward pass: looked for anew only where one was replaced."""
        if self._buffer_slots is None or not all(holder.get(key) is value for holder, key, value in self._buffer_slots):
            self._buffer_list = self.buffers()
            ids = {id(tensor) for _, tensor in self._buffer_list}
            holders = [part._buffers for module in self.modules.values() for part in module.modules()]
            self._buffer_slots = [(h, key, value) for h in holders for key, value in h.items() if id(value) in ids]
        return self._buffer_list

    def carries_gradients(self, stepped: AbstractSet[int], before: dict[int, int]) -> bool:
        """Whether an optimizer that did not step in this iteration accumulated gradients in it: then the boundary is no
        place to come back to, because they would be missing. `before`: what `gradient_marks` said at the last boundary.
        """
        return any(
            id(optimizer) not in stepped and self._gradient_mark(optimizer) != before.get(id(optimizer), 0)
            for optimizer in self.optimizers.values()
        )

    def gradient_marks(self) -> dict[int, int]:
        """A number per optimizer that moves when its gradients do; 0 if it holds none. Asked only with several
        optimizers.
        """
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
