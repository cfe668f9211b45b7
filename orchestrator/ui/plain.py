"""Plain lines, for files, pipes and CI: ours carry a prefix, rank 0's are untouched."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TextIO

from orchestrator.control.events import ErrorInfo
from orchestrator.ui import lines
from orchestrator.ui.lines import Facts, Line, Progress
from orchestrator.ui.sink import Sink

PREFIX = "orchestrator | "
_PROGRESS_EVERY_S = 10.0


class PlainConsole:
    """See `Console`. Progress appears at most every 10 s, and whenever another tenth of the steps is done."""

    def __init__(self, stream: TextIO, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        self._sink = Sink(stream)
        self._quiet = quiet
        self._clock = clock
        self._shown_at: float | None = None
        self._shown_tenth = 0

    def header(self, facts: Facts) -> None:
        if not self._quiet:
            self._say(lines.header(facts))

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        line = lines.event(name, fields)
        if line is not None and (not self._quiet or line.level == "warning"):
            self._say([line])

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
        state = Progress(step, total, samples_per_s, metrics, eta_s, last_checkpoint_step, restarts, lost_s)
        if not self._quiet and self._is_due(state):
            self._show(lines.progress(state))

    def _is_due(self, state: Progress) -> bool:
        now = self._clock()
        tenth = 10 * state.step // state.total if state.total else 0
        if self._shown_at is not None and now - self._shown_at < _PROGRESS_EVERY_S and tenth <= self._shown_tenth:
            return False
        self._shown_at, self._shown_tenth = now, max(tenth, self._shown_tenth)
        return True

    def _show(self, text: str) -> None:
        self._say([Line(text)])

    def failure(self, text: str, error: ErrorInfo | None = None) -> None:
        self._say(lines.failure(text, error))

    def rank0(self, line: str) -> None:
        self._sink.write(line.removesuffix("\n") + "\n")

    def notice(self, text: str, level: str = "info") -> None:
        if not self._quiet or level in ("warning", "error"):
            self._say([Line(part, level) for part in text.splitlines()])

    def summary(self, facts: Facts) -> None:
        if not self._quiet or facts.get("outcome") == "failed":
            self._say(lines.summary(facts))

    def close(self) -> None:
        return

    def _say(self, said: Iterable[Line]) -> None:
        mark = {"warning": "warning: "}
        self._sink.write("".join(f"{PREFIX}{mark.get(line.level, '')}{line.text}\n" for line in said))
