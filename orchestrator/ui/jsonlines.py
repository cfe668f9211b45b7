"""One JSON object a line, for machines. Journal events appear as they are recorded; ours use names of their own.

Names beside the journal's: `header`, `progress`, `failure`, `output` (rank 0), `notice`, `summary`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TextIO

from orchestrator.control.events import ErrorInfo
from orchestrator.ui.lines import Facts, Progress
from orchestrator.ui.sink import Sink

_PROGRESS_EVERY_S = 1.0


class JsonConsole:
    """See `Console`. `quiet` leaves out header, progress and notices of level "info"."""

    def __init__(
        self,
        stream: TextIO,
        quiet: bool = False,
        clock: Callable[[], float] = time.monotonic,
        wall_clock: Callable[[], float] = time.time,
    ) -> None:
        self._sink = Sink(stream)
        self._quiet = quiet
        self._clock = clock
        self._wall_clock = wall_clock
        self._shown_at: float | None = None

    def header(self, facts: Facts) -> None:
        if not self._quiet:
            self._put("header", facts)

    def event(self, name: str, fields: Mapping[str, Any]) -> None:
        self._put(name, fields)

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
        now = self._clock()
        if self._quiet or (self._shown_at is not None and now - self._shown_at < _PROGRESS_EVERY_S):
            return
        self._shown_at = now
        state = Progress(step, total, samples_per_s, dict(metrics or {}), eta_s, last_checkpoint_step, restarts, lost_s)
        self._put("progress", asdict(state))

    def failure(self, text: str, error: ErrorInfo | None = None) -> None:
        self._put("failure", {"text": text, "error": asdict(error) if error else None})

    def rank0(self, line: str) -> None:
        self._put("output", {"rank": 0, "line": line.removesuffix("\n")})

    def notice(self, text: str, level: str = "info") -> None:
        if not self._quiet or level in ("warning", "error"):
            self._put("notice", {"level": level, "text": text})

    def summary(self, facts: Facts) -> None:
        self._put("summary", facts)

    def close(self) -> None:
        return

    def _put(self, name: str, fields: Mapping[str, Any]) -> None:
        record = {"ts": self._wall_clock(), "event": name, **fields}
        self._sink.write(json.dumps(plain(record), allow_nan=False) + "\n")


def plain(value: Any) -> Any:
    """The value as JSON can hold it: NaN and infinities become their names, unknown types their text."""
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [plain(inner) for inner in value]
    return str(value)
