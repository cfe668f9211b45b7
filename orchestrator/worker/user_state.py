"""`run.state` holds JSON, and what comes back must be what was put in: checked at every boundary, mostly in C."""

from __future__ import annotations

import json
from typing import Any

from orchestrator.errors import UsageError


class StateCheck:
    """Call with `run.state`; returns it. Raises UsageError naming the first key that would not come back as it is."""

    def __init__(self) -> None:
        self._sound = ""

    def __call__(self, state: Any) -> Any:
        if not isinstance(state, dict):
            raise UsageError(f"run.state is a dict; assign to its keys, not {_what(state)} to itself.")
        try:
            text = json.dumps(state)
            if text == self._sound or json.loads(text) == state:
                self._sound = text
                return state
        except (TypeError, ValueError, RecursionError):
            pass
        why = _problem(state, "run.state", 0)
        if why:
            raise UsageError(why)
        return state


def _problem(value: Any, where: str, depth: int) -> str:
    """Empty for JSON. NaN is unequal to itself but comes back, so the fast way cannot tell."""
    if depth > 100:
        return f"{where[:200]}… is nested too deeply, or holds itself; run.state takes plain JSON values."
    if value is None or isinstance(value, (bool, int, float, str)):
        return ""
    if isinstance(value, list):
        found = (_problem(item, f"{where}[{index}]", depth + 1) for index, item in enumerate(value))
        return next(filter(None, found), "")
    if isinstance(value, dict):
        return next(filter(None, (_item_problem(key, item, where, depth) for key, item in value.items())), "")
    return f"{where} is {_what(value)}; run.state takes JSON values (numbers, strings, lists, dicts). {_advice(value)}"


def _item_problem(key: Any, value: Any, where: str, depth: int) -> str:
    if not isinstance(key, str):
        return (
            f"{where} has the key {key!r:.60} of type {type(key).__name__}, which would come back as a string; use "
            f"{str(key)!r:.60}."
        )
    return _problem(value, f"{where}[{key!r:.60}]", depth + 1)


def _what(value: Any) -> str:
    kind = type(value).__name__
    return f"{'an' if kind[0] in 'aeiouAEIOU' else 'a'} {kind}"


def _advice(value: Any) -> str:
    if isinstance(value, (tuple, set, frozenset)):
        return "Make it a list."
    if callable(getattr(value, "item", None)):
        return "Take a single number by `.item()`; tensors belong in `run.track`."
    return "What has a `state_dict` belongs in `run.track`."
