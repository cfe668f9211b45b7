"""Tracked modules: live parameters and persistent buffers under the names the user's own module gives them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from orchestrator.storage.codec import flatten, tensor_names, unflatten
from orchestrator.worker.state_items import (
    Fetched,
    Named,
    Tree,
    as_stored,
    copy_in_place,
    from_stored,
    plain_value,
    shape_text,
    storable,
    tensor_kind,
)


def unwrapped(module: nn.Module) -> nn.Module:
    """The user's module inside DDP's and torch.compile's wrappers."""
    while True:
        if isinstance(module, (DistributedDataParallel, DataParallel)):
            inner = module._modules["module"]
        elif type(module).__name__ == "OptimizedModule":  # by name: importing torch._dynamo costs a second
            inner = module._modules["_orig_mod"]
        else:
            return module
        if inner is None:
            return module
        module = inner


def walk(module: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Every submodule with the prefix of its names ("", "encoder.", …), wrappers at any depth left out.

    A module that is reachable by two names comes twice.
    """
    module = unwrapped(module)
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            yield from walk(child, f"{prefix}{name}.")


def named_live(module: nn.Module) -> Iterator[tuple[str, torch.Tensor, bool]]:
    """(name, live tensor, is a buffer) of all parameters and persistent buffers, shared ones under each name."""
    for prefix, part in walk(module):
        for name, parameter in part._parameters.items():
            if parameter is not None:
                yield prefix + name, parameter, False
        for name, buffer in part._buffers.items():
            if buffer is not None and name not in part._non_persistent_buffers_set:
                yield prefix + name, buffer, True


def _held(module: nn.Module) -> set[int] | None:
    """Ids of the live tensors that the module's own `state_dict` holds; None if it holds others (quantized weights)."""
    values = module.state_dict(keep_vars=True)
    live = {id(tensor) for _, tensor, _ in named_live(module)}
    held = {id(value) for key, value in values.items() if key.rpartition(".")[2] != "_extra_state"}
    return held if held <= live else None


def _extra(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for prefix, part in walk(module):
        if type(part).get_extra_state is not nn.Module.get_extra_state:
            yield f"{prefix}_extra_state", part


def is_plain_module(value: Any) -> bool:
    """Whether `value` is a module that `ModuleItem` can hold."""
    return isinstance(value, nn.Module) and _held(value) is not None


class Names:
    """Over all tracked modules: under which name a tensor is held, and what a parameter is called."""

    def __init__(self) -> None:
        self.version = 0
        self.first: dict[int, str] = {}  # id of a held tensor → the full name it is held under
        self.modules: dict[str, nn.Module] = {}
        self._parameters: dict[int, tuple[str, str]] = {}

    def parameters(self, fresh: bool = False) -> dict[int, tuple[str, str]]:
        """Id of a parameter → (name of the first tracked module that has it, its name in there)."""
        if fresh:
            self._parameters = {}
            for module_name, module in self.modules.items():
                for name, tensor, buffer in named_live(module):
                    if not buffer:
                        self._parameters.setdefault(id(tensor), (module_name, name))
        return self._parameters

    def changed(self, at: str) -> None:
        """The module at `at` had tensors replaced, so names that lead there say nothing any more."""
        self.version += 1
        self.first = {key: full for key, full in self.first.items() if not full.startswith(f"{at}.")}

    def copy(self) -> tuple[dict[int, str], dict[str, nn.Module]]:
        return dict(self.first), dict(self.modules)

    def reset(self, saved: tuple[dict[int, str], dict[str, nn.Module]]) -> None:
        """Back to what `copy` returned."""
        self.first, self.modules = saved
        self.parameters(fresh=True)


class ModuleItem:
    """A module. Tensors that it shares with itself or with a module tracked before are held once, under their first
    name; `aliases` in its tree has the others."""

    small = False

    def __init__(self, name: str, at: str, module: nn.Module, names: Names) -> None:
        self.name, self.at, self._module = name, at, module
        self._names = names
        self._holds = _held(module) or set()
        self._slots: list[tuple[dict[str, Any], str, Any]] = []
        self._sizes: list[tuple[dict[str, Any], int]] = []
        self._refresh()
        self._extra_tree()  # refuse now what could not be saved later

    def _current(self) -> bool:
        if self._version != self._names.version:
            return False
        return all(holder.get(key) is value for holder, key, value in self._slots) and all(
            len(holder) == size for holder, size in self._sizes
        )

    def _refresh(self) -> None:
        self._slots, self._sizes = [], []
        self._version = self._names.version
        self._has_extra = any(True for _ in _extra(self._module))
        for _, part in walk(self._module):
            for holder in (part._parameters, part._buffers):
                self._slots += [(holder, key, value) for key, value in holder.items()]
            self._sizes += [(holder, len(holder)) for holder in (part._parameters, part._buffers, part._modules)]
        self._parameters: Named = []
        self._buffers: Named = []
        self._aliases: dict[str, str] = {}
        for name, tensor, buffer in named_live(self._module):
            if id(tensor) in self._holds:
                self._add(name, tensor, buffer)

    def _add(self, name: str, tensor: torch.Tensor, buffer: bool) -> None:
        full = f"{self.at}.{name}"
        first = self._names.first.setdefault(id(tensor), full)
        if first != full:
            self._aliases[name] = first
        else:
            (self._buffers if buffer else self._parameters).append((full, storable(tensor, full)))

    def _checked(self) -> None:
        if self._current():
            return
        if self._version == self._names.version:
            self._names.changed(self.at)
        self._holds = _held(self._module) or set()
        self._refresh()

    def tensors(self) -> Named:
        self._checked()
        return [*self._parameters, *self._extra_tensors()]

    def buffers(self) -> Named:
        self._checked()
        return self._buffers

    def _extra_tree(self) -> tuple[dict[str, Any], Named]:
        trees, tensors = {}, []
        for name, part in _extra(self._module) if self._has_extra else ():
            tree, found = flatten(part.get_extra_state(), f"{self.at}.{name}", tensor_kind, plain=plain_value)
            trees[name] = tree
            tensors += [(full, as_stored(value, full)) for full, value in found.items()]
        return trees, tensors

    def _extra_tensors(self) -> Named:
        return self._extra_tree()[1]

    def tree(self) -> Tree:
        self._checked()
        cut = len(self.at) + 1
        shapes = {full[cut:]: list(tensor.shape) for full, tensor in (*self._parameters, *self._buffers)}
        tree: Tree = {"kind": "module", "at": self.at, "tensors": shapes}
        if self._aliases:
            tree["aliases"] = dict(self._aliases)
        extra = self._extra_tree()[0]
        if extra:
            tree["extra"] = extra
        return tree

    def _targets(self, tree: Tree) -> Iterator[tuple[str, torch.Tensor, str | None]]:
        """(own name, live tensor, full stored name or None if the checkpoint does not have it)."""
        cut = len(self.at) + 1
        aliases = tree.get("aliases", {})
        for full, live in (*self._parameters, *self._buffers):
            name = full[cut:]
            stored = f"{tree['at']}.{name}" if name in tree["tensors"] else aliases.get(name)
            yield name, live, stored

    def check(self, tree: Tree, partial: bool) -> list[str]:
        self._checked()
        problems, used = [], set()
        for name, live, stored in self._targets(tree):
            if stored is None:
                problems += [] if partial else [f"{self.name}.{name}: not in the checkpoint"]
                continue
            used.add(stored)
            shape = tree["tensors"].get(stored[len(tree["at"]) + 1 :])  # None: held by another module
            if shape is not None and shape != list(live.shape):
                there, here = shape_text(shape), shape_text(live.shape)
                problems.append(f"{self.name}.{name}: {there} in the checkpoint, {here} here")
        if not partial:
            left = [
                name for name in tree["tensors"] if f"{tree['at']}.{name}" not in used and name not in self._aliases
            ]
            problems += [f"{self.name}.{name}: only in the checkpoint" for name in left]
        return problems

    def wanted(self, tree: Tree) -> list[str]:
        names = [stored for _, _, stored in self._targets(tree) if stored is not None]
        return [*names, *tensor_names(tree.get("extra", {}))]

    def restore(self, tree: Tree, tensors: Fetched) -> list[str]:
        pairs = [(live, tensors[stored]) for _, live, stored in self._targets(tree) if stored is not None]
        copy_in_place(pairs)
        stored_extra = tree.get("extra", {})
        for name, part in _extra(self._module):
            if name in stored_extra:
                part.set_extra_state(unflatten(stored_extra[name], tensors, from_stored))
        changed = [(live.dtype, stored.dtype) for live, stored in pairs if live.dtype != stored.dtype]
        if not changed:
            return []
        here, there = (str(dtype).removeprefix("torch.") for dtype in changed[0])
        return [f"{len(changed)} tensors of `{self.name}` are {there} in the checkpoint and were converted to {here}."]
