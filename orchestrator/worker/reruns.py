"""Code before a loop runs again when a script goes on in the middle of that loop; what it did to the state is undone.

A script that starts anew runs from its top: `track` restores, loops that are done yield nothing, and the code between
two loops or at the top of an epoch meets a state on which it has acted before. Resetting a head or halving a learning
rate twice would be a silent wrong result, so where the loop goes on the checkpoint's state counts again.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from orchestrator.worker.tracked import RunState


class Reruns:
    """What hyperparameters, small objects and `run.state` were before code ran that runs again on every start."""

    def __init__(self, tracked: RunState, state: Callable[[], dict[str, Any]]) -> None:
        self._tracked, self._state = tracked, state
        self._small: dict[str, str] = {}
        self._user: str | None = None

    def mark(self) -> None:
        """What changes from here on up to the next loop was done by code that runs on every start."""
        self._small, self._user = self._now(), _text(self._state())

    def changed(self) -> list[str]:
        """Names whose hyperparameters or content are not what they were."""
        now = self._now()
        return [name for name, text in self._small.items() if now.get(name) != text]

    def state_changed(self) -> bool:
        """Whether `run.state` is not what it was at `mark`. Before the first loop it is the script's to change."""
        return self._user is not None and _text(self._state()) != self._user

    def _now(self) -> dict[str, str]:
        shared, own = self._tracked.recorded()
        return {name: _text(tree) for name, tree in {**shared, **own}.items()}


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True, default=repr)
