"""What the driver talks to while a run goes on, and the choice of how it is shown."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, Protocol, TextIO

from orchestrator.control.events import ErrorInfo
from orchestrator.ui.lines import Facts


class Console(Protocol):
    """Everything a person or a machine sees of a run. No method raises for a broken stream; none blocks for long.

    More methods than a port of ours should have: they are the kinds of things a run has to say, and each adapter
    shows every one of them.
    """

    def header(self, facts: Facts) -> None:
        """First contact: run, storage, path, ranks, where, batch, seed, command. May be called again with more."""

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        """A journal event, as it is recorded."""

    def progress(
        self,
        step: int,
        total: int | None = None,
        samples_per_s: float | None = None,
        metrics: Mapping[str, float] | None = None,
        eta_s: float | None = None,
        last_checkpoint_step: int | None = None,
        restarts: int = 0,
        lost_s: float = 0.0,
    ) -> None:
        """How far the run is; may be called at any rate, shown at a bearable one."""

    def failure(self, text: str, error: ErrorInfo | None = None) -> None:
        """A failure, told once: `text` names rank, step and cause; `error` has traceback and log."""

    def rank0(self, line: str) -> None:
        """One line of rank 0's output, passed through as it is."""

    def notice(self, text: str, level: str = "info") -> None:
        """Anything else. `level`: "info", "good", "warning" or "error"."""

    def summary(self, facts: Facts) -> None:
        """The end: see `orchestrator.ui.lines.summary` for the keys."""

    def close(self) -> None:
        """Leave the terminal as it was found. Safe to repeat."""


def make_console(json: bool, quiet: bool, stream: TextIO) -> Console:
    """A live status line on a terminal, plain lines elsewhere, one JSON object a line with `json`."""
    if json:
        from orchestrator.ui.jsonlines import JsonConsole

        return JsonConsole(stream, quiet)
    if stream.isatty() and os.environ.get("TERM", "") not in ("", "dumb"):
        from orchestrator.ui.live import LiveConsole

        return LiveConsole(stream, quiet)
    from orchestrator.ui.plain import PlainConsole

    return PlainConsole(stream, quiet)
