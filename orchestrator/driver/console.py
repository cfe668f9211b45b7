"""What the driver tells a person: the port that consoles implement. Pure; adapters are in `orchestrator.ui`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

from orchestrator.control.events import ErrorInfo


class ConsolePort(Protocol):
    """See `orchestrator.ui.console.Console`, which says more."""

    def header(self, facts: Mapping[str, Any]) -> None: ...

    def event(self, name: str, fields: Mapping[str, Any]) -> None: ...

    def progress(self, step: int, **known: Any) -> None: ...

    def failure(self, text: str, error: ErrorInfo | None = None) -> None: ...

    def rank0(self, line: str) -> None: ...

    def notice(self, text: str, level: str = "info") -> None: ...

    def summary(self, facts: Mapping[str, Any]) -> None: ...

    def close(self) -> None: ...
