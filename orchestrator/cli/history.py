"""What a run's journal says, added up: state, step, attempts, checkpoints, failures and their cost. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from typing import Any

Event = Mapping[str, Any]
_RECENT_FAILURES = 5


@dataclass
class History:
    """A run so far. Times are seconds since the epoch; `started_at` is the current launch's."""

    script: str = ""
    first_started_at: float | None = None
    started_at: float | None = None
    launches: int = 0
    attempt: int = 0
    world_size: int | None = None
    step: int | None = None
    phase: str = "new"
    restarts: int = 0
    recovery_s: float = 0.0
    lost_steps: int = 0
    checkpoint: Event | None = None
    rejected: int = 0
    failures: list[Event] = field(default_factory=list)
    finished: Event | None = None
    log_dir: str | None = None
    last_event_at: float | None = None


def add_up(events: Iterable[Event]) -> History:
    """The history that these events, in order, tell. Unknown events only move the last sign of life."""
    history = History()
    for event in events:
        history.last_event_at = when(event)
        attempt = event.get("attempt")
        if isinstance(attempt, int) and attempt > history.attempt:
            history.attempt = attempt
        handler = _HANDLERS.get(str(event.get("event")))
        if handler:
            handler(history, event)
    return history


def when(event: Event) -> float | None:
    """`ts` as seconds since the epoch, whether it was written as a number or as ISO 8601."""
    stamp = event.get("ts")
    if isinstance(stamp, (int, float)):
        return float(stamp)
    try:
        moment = datetime.fromisoformat(str(stamp).replace("Z", "+00:00"))
    except ValueError:
        return None
    return (moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp()


def _started(history: History, event: Event) -> None:
    history.started_at = when(event)
    history.first_started_at = history.first_started_at or history.started_at
    history.launches += 1
    history.finished = None
    history.phase = "starting"
    spec = event.get("spec")
    if isinstance(spec, Mapping):
        history.script = str(spec.get("script", ""))
        history.log_dir = spec.get("log_dir")


def _group(history: History, event: Event) -> None:
    history.world_size = event.get("world_size")
    history.phase = "recovering" if history.phase == "recovering" else "running"
    _reached(history, event.get("resume_step"))


def _failed(history: History, event: Event) -> None:
    history.phase = "recovering"
    if event.get("root"):
        history.failures = [*history.failures, event][-_RECENT_FAILURES:]
    _reached(history, event.get("step"))


def _recovered(history: History, event: Event) -> None:
    history.phase = "running"
    history.restarts += 1
    history.recovery_s += float(event.get("recovery_s") or 0.0)
    history.lost_steps += int(event.get("lost_steps") or 0)
    _reached(history, event.get("resume_step"))


def _committed(history: History, event: Event) -> None:
    history.checkpoint = event
    _reached(history, event.get("step"))


def _rejected(history: History, event: Event) -> None:
    history.rejected += 1


def _snapshot(history: History, event: Event) -> None:
    _reached(history, event.get("step"))


def _finished(history: History, event: Event) -> None:
    history.finished = event
    history.phase = str(event.get("outcome", "finished"))
    _reached(history, event.get("step"))


def _reached(history: History, step: object) -> None:
    if isinstance(step, int) and (history.step is None or step > history.step):
        history.step = step


_HANDLERS = {
    "run_started": _started,
    "group_started": _group,
    "worker_failed": _failed,
    "recovered": _recovered,
    "checkpoint_committed": _committed,
    "checkpoint_rejected": _rejected,
    "snapshot": _snapshot,
    "run_finished": _finished,
}
