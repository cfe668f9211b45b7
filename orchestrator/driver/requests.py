"""What other processes ask of a live run (`orchestrator stop`, `save`): small files in the run's directory."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path

from orchestrator.control.events import Event, SaveRequested, StopRequested
from orchestrator.storage.layout import REQUESTS


def take(directory: Path) -> list[Event]:
    """Read and delete the requests that lie there, oldest first; what cannot be read is deleted too."""
    found: list[Event] = []
    place = directory / REQUESTS
    try:
        names = sorted(item.name for item in place.iterdir() if item.suffix == ".json")
    except OSError:
        return found
    for name in names:
        path = place / name
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
            event = _event(json.loads(path.read_text()))
            if event is not None:
                found.append(event)
        with contextlib.suppress(OSError):
            path.unlink()
    return found


def _event(request: dict[str, object]) -> Event | None:
    if request["kind"] == "stop":
        return StopRequested("request", bool(request.get("save", True)))
    if request["kind"] == "save":
        return SaveRequested(str(request.get("name") or ""))
    return None
