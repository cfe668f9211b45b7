"""What agents say, as JSON, into the machine's events. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from orchestrator.control import events
from orchestrator.control.consistency import Offer, Tier
from orchestrator.control.events import ErrorInfo, Event

_KINDS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        events.GroupStarted,
        events.WorkerStepped,
        events.Progress,
        events.WorkerFailed,
        events.WorkerFinished,
        events.WorkerStopped,
        events.OffersIn,
        events.Salvaged,
        events.SaveStaged,
        events.ShardPersisted,
        events.ShardLost,
    )
}


def to_event(message: dict[str, Any]) -> Event | None:
    """The machine's event, or None for what only the console or the shell is told."""
    kind = _KINDS.get(message["event"])
    if kind is None:
        return None
    known = {field.name for field in fields(kind)}
    values = {name: _convert(name, value) for name, value in message.items() if name in known}
    made: Event = kind(**values)
    return made


def _convert(name: str, value: Any) -> Any:
    convert = _CONVERTERS.get(name)
    return convert(value) if convert is not None and value is not None else value


def _offer(item: dict[str, Any]) -> Offer:
    return Offer(
        Tier[item["tier"]], item["step"], item["agent"], item["holder"], frozenset(item["pieces"]),
        attempt=item["attempt"],
    )


_CONVERTERS: dict[str, Callable[[Any], Any]] = {
    "workers": lambda pairs: tuple((rank, pid) for rank, pid in pairs),
    "offers": lambda items: tuple(map(_offer, items)),
    "error": lambda item: ErrorInfo(**item),
}
