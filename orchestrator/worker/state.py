"""What `run.track` tracks: live tensors by name, a JSON tree for the rest, and the way back. No pickle anywhere.

Names of replicated tensors start with the tracked name (`model.fc1.weight`, `optimizer.state.fc1.weight.exp_avg`);
those of per-rank values with `name@rank`, so that ranks never share one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from orchestrator.errors import ConfigRefusedError, UsageError
from orchestrator.worker.state_items import (
    GeneratorItem,
    Item,
    Named,
    ObjectItem,
    TensorItem,
    Tree,
    is_generator,
)
from orchestrator.worker.state_modules import ModuleItem, Names, is_plain_module
from orchestrator.worker.state_optimizers import OptimizerItem, is_optimizer, watch_step

MAX_PROBLEMS = 20
Fetch = Callable[[list[str]], Mapping[str, torch.Tensor]]
StepCallback = Callable[[Any], None]


@dataclass(frozen=True)
class Flat:
    """Everything tracked at one moment. `tensors` are live references; nothing was copied."""

    tensors: Named
    trees: dict[str, Tree]


class TrackedState:
    """The tracked values of one worker. Not thread-safe against a script that replaces tensors meanwhile."""

    def __init__(self, rank: int = 0) -> None:
        self._rank = rank
        self._items: dict[str, Item] = {}
        self._values: dict[str, Any] = {}
        self._per_rank: set[str] = set()
        self._names = Names()
        self._watched: list[Any] = []
        self._callbacks: list[tuple[StepCallback, StepCallback]] = []

    # -- tracking -------------------------------------------------------------------------------------------------

    def add(self, named: Mapping[str, Any], per_rank: Iterable[str] = ()) -> None:
        """Track values by name. Raises UsageError, and then tracks none of them, for what cannot be held."""
        ranked = {per_rank} if isinstance(per_rank, str) else set(per_rank)
        self._refuse_names(named, ranked)
        # Modules first: an optimizer's parameters are found in them, in whatever order they were named.
        ordered = sorted(named, key=lambda name: not isinstance(named[name], nn.Module))
        saved = self._names.copy()
        self._names.modules.update((name, named[name]) for name in ordered if isinstance(named[name], nn.Module))
        self._names.parameters(fresh=True)
        try:
            ats = {name: f"{name}@{self._rank}" if name in ranked else name for name in ordered}
            items = {name: self._item(name, ats[name], named[name]) for name in ordered}
        except BaseException:
            self._names.reset(saved)
            raise
        self._items.update((name, items[name]) for name in named)
        self._values.update(named)
        self._per_rank |= ranked
        self._watch_new(named)

    def _item(self, name: str, at: str, value: Any) -> Item:
        if is_plain_module(value):
            return ModuleItem(name, at, value, self._names)
        if is_optimizer(value):
            return OptimizerItem(name, at, value, self._names)
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return TensorItem(name, at, value)
        if is_generator(value):
            return GeneratorItem(name, at, value)
        _refuse_value(name, value)
        return ObjectItem(name, at, value)

    def _refuse_names(self, named: Mapping[str, Any], ranked: AbstractSet[str]) -> None:
        for name in named:
            if name in self._items:
                raise UsageError(f"`track({name}=…)`: the name is tracked already; track each value once, by one name.")
        stray = sorted(ranked - set(named))
        if stray:
            raise UsageError(f"`track(per_rank=…)` names {', '.join(stray)}, which this call does not track.")
        known = {id(value): name for name, value in self._values.items()}
        for name, value in named.items():
            other = known.setdefault(id(value), name)
            if other != name and not isinstance(value, (bool, int, float, str, type(None))):
                raise UsageError(f"`track({name}=…)`: this very object is tracked as `{other}` already.")

    @property
    def names(self) -> list[str]:
        """Tracked names, in the order of tracking."""
        return list(self._items)

    @property
    def modules(self) -> dict[str, nn.Module]:
        """Tracked modules as the script passed them, wrappers included."""
        return {name: value for name, value in self._values.items() if isinstance(value, nn.Module)}

    @property
    def optimizers(self) -> dict[str, Any]:
        """Tracked values that step: torch's optimizers and look-alikes."""
        return {name: value for name, value in self._values.items() if _steps(value)}

    # -- live state -----------------------------------------------------------------------------------------------

    def replicated(self) -> Named:
        """Live tensors that are the same on all ranks, module buffers left out. Revalidated, not copied."""
        return [pair for name, item in self._items.items() if name not in self._per_rank for pair in item.tensors()]

    def per_rank(self) -> Named:
        """Live tensors of this rank alone, buffers of per-rank modules included."""
        items = [item for name, item in self._items.items() if name in self._per_rank]
        return [pair for item in items for pair in (*item.tensors(), *item.buffers())]

    def buffers(self) -> Named:
        """Live persistent buffers of replicated modules: rank 0's count, and they go in the boundary record."""
        return [pair for name, item in self._items.items() if name not in self._per_rank for pair in item.buffers()]

    def tensors(self) -> Named:
        """All live tensors: replicated, then buffers, then per-rank."""
        return [*self.replicated(), *self.buffers(), *self.per_rank()]

    def small(self) -> dict[str, Tree]:
        """Trees of what may change between boundaries without an optimizer step: objects and generators."""
        return {name: item.tree() for name, item in self._items.items() if item.small}

    def big(self) -> dict[str, Tree]:
        """Trees of modules, optimizers, tensors: they change with optimizer steps only."""
        return {name: item.tree() for name, item in self._items.items() if not item.small}

    def trees(self) -> dict[str, Tree]:
        """Trees of all tracked values, in the order of tracking."""
        return {name: item.tree() for name, item in self._items.items()}

    def split(self, trees: Mapping[str, Tree]) -> tuple[dict[str, Tree], dict[str, Tree]]:
        """`trees` as (replicated, per-rank), for the `tracked` and `per_rank` parts of a checkpoint head."""
        own = {name: tree for name, tree in trees.items() if name in self._per_rank}
        return {name: tree for name, tree in trees.items() if name not in own}, own

    def snapshot(self) -> Flat:
        """All tensors (live) and trees of this moment."""
        return Flat(self.tensors(), self.trees())

    def mutable_versions(self) -> tuple[int, int]:
        """Changes whenever a parameter, optimizer state or tracked tensor was written by torch or replaced.

        Buffers, objects and generators do not count. numpy arrays keep no count of their writes.
        """
        total = tokens = 0
        for item in self._items.values():
            if not item.small:
                tensors = item.tensors()
                total += sum([tensor._version for _, tensor in tensors])
                tokens += sum([id(tensor) for _, tensor in tensors])
        return total, tokens

    def fingerprint(self) -> str:
        """Hash of names, kinds, shapes and dtypes of the replicated state, equal on ranks that track the same."""
        digest = hashlib.blake2b(digest_size=16)
        for name, item in self._items.items():
            digest.update(f"{name} {type(item).__name__} {name in self._per_rank}\n".encode())
        for name, tensor in (*self.replicated(), *self.buffers()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        return digest.hexdigest()

    # -- restoring ------------------------------------------------------------------------------------------------

    def load(
        self, trees: Mapping[str, Tree], fetch: Fetch, names: Iterable[str] | None = None, partial: bool = False
    ) -> list[str]:
        """Restore tracked values in place from `trees`, with tensors from `fetch(names)`. Returns notices.

        `names`: only these, and no complaint about others in the checkpoint. `partial`: what one side lacks is left
        as it is. `fetch` is called once. Safe to repeat. Raises ConfigRefusedError, with nothing modified, where
        names or shapes differ.
        """
        chosen = list(self._items) if names is None else list(names)
        problems = [] if names is not None or partial else [
            f"{name}: only in the checkpoint" for name in trees if name not in self._items
        ]  # fmt: skip
        for name in chosen:
            problems += self._problems(name, trees.get(name), partial)
        if problems:
            raise ConfigRefusedError(_differences(problems))
        loadable = [name for name in chosen if name in trees]
        wanted = {name: self._items[name].wanted(trees[name]) for name in loadable}
        everything = list(dict.fromkeys(one for some in wanted.values() for one in some))
        fetched = fetch(everything) if everything else {}
        notices = []
        for name in loadable:
            mine = {one: fetched[one] for one in wanted[name]}
            notices += self._items[name].restore(trees[name], mine)
        return notices

    def _problems(self, name: str, tree: Tree | None, partial: bool) -> list[str]:
        if tree is None:
            return [] if partial else [f"{name}: not in the checkpoint"]
        item = self._items[name]
        here = _KINDS[type(item)]
        if tree["kind"] != here:
            return [f"{name}: stored as {tree['kind']}, tracked here as {here}"]
        return item.check(tree, partial)

    # -- steps ----------------------------------------------------------------------------------------------------

    def watch(self, on_pre_step: StepCallback, on_post_step: StepCallback) -> None:
        """Call these around each step of every tracked optimizer, those tracked later included."""
        self._callbacks.append((on_pre_step, on_post_step))
        for optimizer in self._watched:
            watch_step(optimizer, on_pre_step, on_post_step)

    def _watch_new(self, named: Mapping[str, Any]) -> None:
        for value in named.values():
            if _steps(value):
                self._watched.append(value)
                for before, after in self._callbacks:
                    watch_step(value, before, after)


_KINDS: dict[type, str] = {
    ModuleItem: "module",
    OptimizerItem: "optimizer",
    TensorItem: "tensor",
    GeneratorItem: "generator",
    ObjectItem: "object",
}


def _steps(value: Any) -> bool:
    """An optimizer or something like one: schedulers step too, but hold no gradients to clear."""
    if isinstance(value, nn.Module):
        return False
    return callable(getattr(value, "step", None)) and callable(getattr(value, "zero_grad", None))


def _refuse_value(name: str, value: Any) -> None:
    """Raise UsageError for what can be neither referred to nor restored."""
    kind = f"{'an' if type(value).__name__[0] in 'aeiouAEIOU' else 'a'} {type(value).__name__}"
    if isinstance(value, (bool, int, float, complex, str, bytes, type(None), np.generic)):
        what = "a string" if isinstance(value, str) else "None" if value is None else "a number"
        raise UsageError(f'`track({name}={value!r:.40})`: {what} can only be copied; use `run.state["{name}"]`.')
    if isinstance(value, (dict, list, tuple, set)):
        raise UsageError(
            f'`track({name}=…)`: {kind} has no `state_dict`; put JSON values in `run.state["{name}"]` and track '
            "tensors by name."
        )
    missing = [method for method in ("state_dict", "load_state_dict") if not callable(getattr(value, method, None))]
    if missing:
        raise UsageError(
            f"`track({name}=…)`: {kind} has no `{'` and no `'.join(missing)}`, so it could not be restored; add "
            "both, or track its tensors by name."
        )


def _differences(problems: list[str]) -> str:
    shown = problems[:MAX_PROBLEMS]
    more = len(problems) - len(shown)
    lines = "".join(f"\n  {line}" for line in shown) + (f"\n  … and {more} more" if more else "")
    return (
        f"The checkpoint is of another model; nothing was changed. What differs:{lines}\n"
        "Restore the script that wrote it, or start a new run with `--run-name`."
    )
