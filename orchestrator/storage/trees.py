"""Trees of tracked values, as in a checkpoint's head: which tensors they need, what plain state they mean. Pure.

A tree says its `kind` ("module", "optimizer", "tensor", "generator", "object") and `at`, the prefix of its tensors'
names: the tracked name, or `<name>@<rank>` for values tracked as `per_rank`. Anything else is a codec tree.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from orchestrator.errors import CheckpointDamagedError
from orchestrator.storage.codec import tensor_names, unflatten

Tree = Any
Convert = Callable[[str, Any], Any]


def all_trees(state: Mapping[str, Any]) -> Iterator[Tree]:
    """Every tracked value's tree in a checkpoint head, those of single ranks too."""
    yield from (state.get("tracked") or {}).values()
    for own in (state.get("per_rank") or {}).values():
        yield from own_trees(own).values()


def own_trees(own: Mapping[str, Any]) -> Mapping[str, Tree]:
    """Trees by tracked name in one rank's part of `per_rank`."""
    trees: Mapping[str, Tree] = own.get("tracked") or {}
    return trees


def referred(tree: Tree) -> Iterator[str]:
    """Full names of the tensors that a tree needs."""
    kind = _kind(tree)
    if kind == "tensor":
        yield tree["at"]
    elif kind == "module":
        yield from (f"{tree['at']}.{name}" for name in tree.get("tensors", {}))
        yield from tree.get("aliases", {}).values()
        yield from tensor_names(tree.get("extra"))
    elif kind == "optimizer":
        yield from (f"{tree['at']}.state.{fqn}.{key}" for fqn, key in _optimizer_state(tree))
        yield from tensor_names([tree.get("plain"), tree.get("loose"), tree.get("groups")])
    else:
        yield from tensor_names(tree)


def aliases(tree: Tree) -> dict[str, str]:
    """Full name → full name of the tensor that is stored, for a module's tensors that are shared with others."""
    if _kind(tree) != "module":
        return {}
    return {f"{tree['at']}.{name}": stored for name, stored in tree.get("aliases", {}).items()}


def plain_state(tree: Tree, tensors: Mapping[str, Any], convert: Convert | None = None) -> Any:
    """What the tracked value's `state_dict()` would be: tensors by the names in the user's own module.

    A tensor for a tensor or array. Optimizers come with parameters by name:
    ``{"state": {name: {…}}, "param_groups": [{…, "params": [name, …]}]}``. Raises CheckpointDamagedError.
    """
    try:
        return _PLAIN.get(_kind(tree), unflatten)(tree, tensors, convert)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointDamagedError(f"The checkpoint's state does not fit its tensors: {error!r:.200}.") from error


def _kind(tree: Tree) -> str:
    kind = tree.get("kind") if isinstance(tree, dict) and "at" in tree else None
    return kind if isinstance(kind, str) and kind in _PLAIN else ""


def _module(tree: Tree, tensors: Mapping[str, Any], convert: Convert | None) -> dict[str, Any]:
    state = {name: tensors[f"{tree['at']}.{name}"] for name in tree["tensors"]}
    state |= {name: tensors[stored] for name, stored in tree.get("aliases", {}).items()}
    return state | {name: unflatten(extra, tensors, convert) for name, extra in tree.get("extra", {}).items()}


def _optimizer(tree: Tree, tensors: Mapping[str, Any], convert: Convert | None) -> dict[str, Any]:
    state: dict[Any, dict[str, Any]] = {}
    for fqn, key in _optimizer_state(tree):
        state.setdefault(fqn, {})[key] = tensors[f"{tree['at']}.state.{fqn}.{key}"]
    for fqn, rest in tree.get("plain", {}).items():
        state.setdefault(fqn, {}).update(unflatten(rest, tensors, convert))
    state.update(unflatten(tree.get("loose", {}), tensors, convert))
    groups = [
        {**unflatten(group["hyper"], tensors, convert), "params": list(group["params"])} for group in tree["groups"]
    ]
    return {"state": state, "param_groups": groups}


def _optimizer_state(tree: Tree) -> Iterator[tuple[str, str]]:
    return ((fqn, key) for keys, fqns in tree.get("state", []) for fqn in fqns for key in keys)


def _tensor(tree: Tree, tensors: Mapping[str, Any], convert: Convert | None) -> Any:
    return tensors[tree["at"]]


def _object(tree: Tree, tensors: Mapping[str, Any], convert: Convert | None) -> Any:
    return unflatten(tree["state"], tensors, convert)


_PLAIN: dict[str, Callable[[Tree, Mapping[str, Any], Convert | None], Any]] = {
    "module": _module,
    "optimizer": _optimizer,
    "tensor": _tensor,
    "generator": _object,
    "object": _object,
}


def plain_states(
    state: Mapping[str, Any], world_size: int, tensors: Mapping[str, Any], convert: Convert | None = None
) -> dict[str, Any]:
    """Tracked name → plain state for a whole checkpoint; {rank: plain state} for what was tracked as `per_rank`."""
    plain: dict[str, Any] = {}
    ranks = {int(rank): own_trees(own) for rank, own in (state.get("per_rank") or {}).items()}
    for name, tree in (state.get("tracked") or {}).items():
        at = tree.get("at", name) if _kind(tree) else name
        if at == name:
            plain[name] = plain_state(tree, tensors, convert)
            continue
        plain[name] = {}
        for rank in range(world_size):
            own = ranks.get(rank, {}).get(name)
            visible = tensors if own is not None else _renamed(tensors, f"{name}@{rank}", at)
            needed = tree if own is None else own
            if all(one in visible for one in referred(needed)):
                plain[name][rank] = plain_state(needed, visible, convert)
    for rank, trees in ranks.items():
        for name, tree in trees.items():
            if name not in (state.get("tracked") or {}):
                plain.setdefault(name, {})[rank] = plain_state(tree, tensors, convert)
    return plain


def _renamed(tensors: Mapping[str, Any], own: str, at: str) -> dict[str, Any]:
    """One rank's tensors under the names that another rank's tree (the only one stored) calls its own by."""
    found = {at + name[len(own) :]: tensor for name, tensor in tensors.items() if name.startswith(own + ".")}
    return found | ({at: tensors[own]} if own in tensors else {})
