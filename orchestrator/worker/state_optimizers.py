"""Tracked optimizers: state under the names of the parameters it belongs to, hyperparameters in the JSON tree."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch

from orchestrator.errors import UsageError
from orchestrator.storage.codec import flatten, tensor_names, unflatten
from orchestrator.worker.state_items import (
    Fetched,
    Named,
    Tree,
    as_stored,
    from_stored,
    owned,
    plain_value,
    tensor_kind,
)
from orchestrator.worker.state_modules import Names

# What a scheduler or the loop changes while training: a difference to the script says nothing.
_MOVING = {"lr", "initial_lr", "max_lr", "min_lr", "betas", "momentum", "base_momentum", "max_momentum"}
# How a step is computed, not what: the script's word counts.
_LOCAL = {"foreach", "fused", "capturable", "differentiable"}
Slot = tuple[Any, Any, Any]


def is_optimizer(value: Any) -> bool:
    """Whether `OptimizerItem` can hold it: torch's own notion of a state_dict, not one of the class's making."""
    return isinstance(value, torch.optim.Optimizer) and type(value).state_dict is torch.optim.Optimizer.state_dict


class OptimizerItem:
    """An optimizer whose parameters all belong to tracked modules."""

    small = False

    def __init__(self, name: str, at: str, value: torch.optim.Optimizer, names: Names) -> None:
        self.name, self.at, self._value, self._names = name, at, value, names
        self._slots: list[Slot] = []
        self._sizes: list[tuple[Any, int]] = []
        self._volatile = False
        self._script_lr = [_base_lr(group) for group in value.param_groups]
        self._refresh()

    # -- names ----------------------------------------------------------------------------------------------------

    def _owners(self) -> dict[int, str]:
        """Id of each parameter → its name here; with the module's name in front where two would share one."""
        parameters = [parameter for group in self._value.param_groups for parameter in group["params"]]
        known = self._names.parameters()
        if any(id(parameter) not in known for parameter in parameters):
            known = self._names.parameters(fresh=True)  # the model may have grown since it was tracked
        strangers = sum(id(parameter) not in known for parameter in parameters)
        if strangers:
            many = "s" if strangers > 1 else ""
            raise UsageError(
                f"`{self.name}` holds {strangers} parameter{many} of no tracked module; build it "
                "after `run.prepare(model)`, and track the module too."
            )
        names = {id(parameter): known[id(parameter)] for parameter in parameters}
        ambiguous = len({fqn for _, fqn in names.values()}) < len(names)
        return {key: f"{module}.{fqn}" if ambiguous else fqn for key, (module, fqn) in names.items()}

    # -- live tensors ---------------------------------------------------------------------------------------------

    def _current(self) -> bool:
        return (
            not self._volatile
            and self._value.state is self._roots[0]  # load_state_dict makes both anew
            and self._value.param_groups is self._roots[1]
            and all(holder.get(key) is value for holder, key, value in self._slots)
            and all(len(holder) == size for holder, size in self._sizes)
        )

    def _refresh(self) -> None:
        self._slots, self._sizes, self._volatile = [], [], False
        self._tensors: Named = []
        self._roots = (self._value.state, self._value.param_groups)
        names = self._owners()
        self._sizes.append((self._value.param_groups, len(self._value.param_groups)))
        self._sizes.append((self._value.state, len(self._value.state)))
        groups = self._groups(names)
        regular: dict[tuple[str, ...], list[str]] = {}
        plain: dict[str, Any] = {}
        for fqn, state in self._states(names):
            self._sizes.append((state, len(state)))
            keys = tuple(key for key in state if self._direct(fqn, state, key))
            if keys:
                regular.setdefault(keys, []).append(fqn)
            rest = {key: value for key, value in state.items() if key not in keys}
            if rest:
                plain[fqn] = self._flat(rest, f"{self.at}.state.{fqn}")
                self._volatile = True
        loose = {key: value for key, value in self._value.state.items() if not isinstance(key, torch.Tensor)}
        self._tree: Tree = {
            "kind": "optimizer",
            "at": self.at,
            "groups": groups,
            "state": [[list(keys), fqns] for keys, fqns in regular.items()],
            "plain": plain,
            "script_lr": self._script_lr,
        }
        if loose:
            self._tree["loose"] = self._flat(loose, f"{self.at}.loose")
            self._volatile = True

    def _states(self, names: dict[int, str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """State in the order of the parameters: it fills in the order of first gradients, which may differ."""
        for group in self._value.param_groups:
            for parameter in group["params"]:
                if parameter in self._value.state and isinstance(self._value.state[parameter], dict):
                    yield names[id(parameter)], self._value.state[parameter]

    def _direct(self, fqn: str, state: dict[str, Any], key: Any) -> bool:
        value = state[key]
        if not isinstance(value, torch.Tensor) or not isinstance(key, str) or tensor_kind(value) is not True:
            return False
        name = f"{self.at}.state.{fqn}.{key}"
        self._tensors.append((name, as_stored(value, name)))
        self._slots.append((state, key, value))
        return True

    def _flat(self, value: Any, path: str) -> Any:
        tree, found = flatten(value, path, tensor_kind, plain=plain_value)
        self._tensors += [(name, as_stored(tensor, name)) for name, tensor in found.items()]
        return tree

    def _groups(self, names: dict[int, str]) -> list[Tree]:
        groups = []
        for index, group in enumerate(self._value.param_groups):
            self._sizes.append((group["params"], len(group["params"])))
            self._slots += [(group, key, value) for key, value in group.items() if isinstance(value, torch.Tensor)]
            tree, found = self._hyper_tree(index, group)
            self._tensors += [(name, as_stored(tensor, name)) for name, tensor in found.items()]
            groups.append({"hyper": tree, "params": [names[id(one)] for one in group["params"]]})
        return groups

    def _hyper_tree(self, index: int, group: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        hyper = {key: value for key, value in group.items() if key not in ("params", "param_names")}
        return flatten(hyper, f"{self.at}.param_groups.{index}", tensor_kind, plain=plain_value)

    def tensors(self) -> Named:
        if not self._current():
            self._refresh()
        return self._tensors

    def buffers(self) -> Named:
        return []

    def tree(self) -> Tree:
        if not self._current():
            self._refresh()
        # Hyperparameters are plain numbers: no cache could tell that they moved.
        groups = [
            {**known, "hyper": self._hyper_tree(index, group)[0]}
            for index, (known, group) in enumerate(zip(self._tree["groups"], self._value.param_groups, strict=True))
        ]
        return {**self._tree, "groups": groups, "script_lr": self._script_lr}

    # -- restoring ------------------------------------------------------------------------------------------------

    def check(self, tree: Tree, partial: bool) -> list[str]:
        groups, names = self._value.param_groups, self._owners()
        if len(groups) != len(tree["groups"]):
            return [f"{self.name}: {len(tree['groups'])} parameter groups in the checkpoint, {len(groups)} here"]
        problems = []
        for index, (group, stored) in enumerate(zip(groups, tree["groups"], strict=True)):
            here, there = {names[id(one)] for one in group["params"]}, set(stored["params"])
            where = f"{self.name}, parameter group {index}"
            problems += [f"{where}: {fqn} is only in the checkpoint" for fqn in sorted(there - here)]
            problems += [f"{where}: {fqn} is not in the checkpoint" for fqn in sorted(here - there)]
        return [] if partial else problems

    def wanted(self, tree: Tree) -> list[str]:
        names = [f"{tree['at']}.state.{fqn}.{key}" for keys, fqns in tree["state"] for fqn in fqns for key in keys]
        nested = (tree["plain"], tree.get("loose"), [group["hyper"] for group in tree["groups"]])
        return [*names, *tensor_names(list(nested))]

    def restore(self, tree: Tree, tensors: Fetched) -> list[str]:
        names = self._owners()
        state = self._stored_state(tree, tensors)
        notices = self._notices(tree)
        groups = self._value.param_groups
        numbers: dict[str, int] = {}
        for group in groups:
            for parameter in group["params"]:
                numbers.setdefault(names[id(parameter)], len(numbers))
        packed = {
            "state": {numbers[fqn]: value for fqn, value in state.items() if fqn in numbers},
            "param_groups": [
                {**self._hyper(group, stored, tensors), "params": [numbers[names[id(one)]] for one in group["params"]]}
                for group, stored in zip(groups, tree["groups"], strict=True)
            ],
        }
        if "loose" in tree:
            packed["state"].update(unflatten(tree["loose"], tensors, from_stored))
        kept = [{key: value for key, value in group.items() if isinstance(value, torch.Tensor)} for group in groups]
        self._value.load_state_dict(packed)
        self._keep_dtypes(names, state)
        for group, live in zip(self._value.param_groups, kept, strict=True):
            _keep_tensors(group, live)
        self._refresh()
        return notices

    def _stored_state(self, tree: Tree, tensors: Fetched) -> dict[str, dict[str, Any]]:
        state: dict[str, dict[str, Any]] = {}
        for keys, fqns in tree["state"]:
            for fqn in fqns:
                values = {key: owned(tensors[f"{tree['at']}.state.{fqn}.{key}"]) for key in keys}
                state.setdefault(fqn, {}).update(values)
        for fqn, rest in tree["plain"].items():
            state.setdefault(fqn, {}).update(unflatten(rest, tensors, from_stored))
        return state

    def _hyper(self, group: dict[str, Any], stored: Tree, tensors: Fetched) -> dict[str, Any]:
        """The stored hyperparameters; the script's own where the checkpoint has none, or where they only say how."""
        own = {key: value for key, value in group.items() if key != "params"}
        hyper = unflatten(stored["hyper"], tensors, from_stored)
        return {**own, **{key: value for key, value in hyper.items() if key not in _LOCAL or key not in own}}

    def _keep_dtypes(self, names: dict[int, str], state: dict[str, dict[str, Any]]) -> None:
        """`load_state_dict` casts state to the parameter's dtype; float32 moments of bfloat16 weights must stay."""
        for group in self._value.param_groups:
            for parameter in group["params"]:
                live = self._value.state.get(parameter, {})
                for key, stored in state.get(names[id(parameter)], {}).items():
                    now = live.get(key)
                    if isinstance(now, torch.Tensor) and isinstance(stored, torch.Tensor) and now.dtype != stored.dtype:
                        live[key] = stored.to(now.device)

    def _notices(self, tree: Tree) -> list[str]:
        """What the script says otherwise than the checkpoint, each once."""
        lines: list[str] = []
        stored_lrs = tree.get("script_lr", [])
        for stored, here in zip(stored_lrs, self._script_lr, strict=False):
            if stored != here:
                lines.append(_notice("lr", stored, here))
        for group, stored in zip(self._value.param_groups, tree["groups"], strict=True):
            for key, value in stored["hyper"].items():
                own = group.get(key)
                simple = isinstance(own, (bool, int, float)) and isinstance(value, (bool, int, float))
                if simple and key not in _MOVING | _LOCAL and own != value:
                    lines.append(_notice(key, value, own))
        self._script_lr = [*stored_lrs, *self._script_lr[len(stored_lrs) :]]
        return list(dict.fromkeys(lines))


def _notice(key: str, stored: Any, here: Any) -> str:
    return f"The checkpoint's {key} {stored} is used, not the script's {here}; for a new run add `--run-name`."


def _base_lr(group: dict[str, Any]) -> float | None:
    """The script's own learning rate, before any scheduler; None if the optimizer has none."""
    lr = group.get("initial_lr", group.get("lr"))
    return None if lr is None else float(lr)


def _keep_tensors(group: dict[str, Any], live: dict[str, torch.Tensor]) -> None:
    """A learning rate that is a tensor stays the same tensor: compiled steps and the script refer to it."""
    for key, tensor in live.items():
        value = group.get(key)
        if value is not None and value is not tensor:
            with torch.no_grad():
                tensor.copy_(torch.as_tensor(value).reshape(tensor.shape))
            group[key] = tensor


def watch_step(optimizer: Any, before: Callable[[Any], None], after: Callable[[Any], None]) -> None:
    """Call `before(optimizer)` and `after(optimizer)` around every step, whether or not its class fires hooks."""
    hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    if isinstance(optimizer, torch.optim.Optimizer) and hooks is not None and _fires_hooks(optimizer):
        optimizer.register_step_pre_hook(lambda who, args, kwargs: before(who))
        optimizer.register_step_post_hook(lambda who, args, kwargs: after(who))
        return
    step = optimizer.step

    @functools.wraps(step)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        before(self)
        result = step(*args, **kwargs)
        after(self)
        return result

    # A bound method, as schedulers that patch `step` in their turn expect.
    optimizer.step = types.MethodType(watched, optimizer)


def _fires_hooks(optimizer: torch.optim.Optimizer) -> bool:
    """Hooks fire in the class's step; an instance's own step counts only if a scheduler wrapped the class's."""
    own = optimizer.__dict__.get("step")
    return bool(getattr(type(optimizer).step, "hooked", False)) and (
        own is None or hasattr(own, "_wrapped_by_lr_sched")
    )
