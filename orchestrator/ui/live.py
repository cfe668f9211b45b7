"""A terminal: colours, and one status line that is taken away before anything else is written.

Rank 0's output goes to the terminal byte for byte, so the line is kept by hand; rich renders what is ours.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from typing import TextIO

from rich.console import Console as RichConsole
from rich.text import Text

from orchestrator.ui.lines import Line, Progress
from orchestrator.ui.plain import PlainConsole

_REDRAW_EVERY_S = 0.2
_CLEAR = "\r\x1b[2K"
_STYLES = {"info": "", "good": "green", "warning": "yellow", "error": "red"}


class LiveConsole(PlainConsole):
    """See `Console`. Redraws at most five times a second, and never while rank 0 is in the middle of a line."""

    def __init__(self, stream: TextIO, quiet: bool = False, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(stream, quiet, clock)
        self._rich = RichConsole(file=stream, highlight=False, markup=False, emoji=False, force_terminal=True)
        self._lock = threading.RLock()
        self._status = ""
        self._drawn = False

    def _is_due(self, state: Progress) -> bool:
        now = self._clock()
        finished = state.total is not None and state.step >= state.total
        if self._shown_at is not None and now - self._shown_at < _REDRAW_EVERY_S and not finished:
            return False
        self._shown_at = now
        return True

    def _show(self, text: str) -> None:
        with self._lock:
            self._status = text
            self._write("")

    def rank0(self, line: str) -> None:
        self._write(line.removesuffix("\n") + "\n")

    def close(self) -> None:
        with self._lock:
            self._status = ""
            self._write("")

    def _say(self, said: Iterable[Line]) -> None:
        self._write("".join(self._styled(line) for line in said))

    def _styled(self, line: Line) -> str:
        mark = "warning: " if line.level == "warning" else ""
        text = Text.assemble(("| ", "dim cyan"), (mark + line.text, _STYLES.get(line.level, "")))
        with self._rich.capture() as capture:
            self._rich.print(text, soft_wrap=True)
        return capture.get()

    def _write(self, text: str) -> None:
        """Take the status line away, write `text` (whole lines), put the status line back: one write."""
        with self._lock:
            before = _CLEAR if self._drawn else ""
            after = self._status_line()
            self._drawn = bool(after)
            if before or text or after:
                self._sink.write(before + text + after)

    def _status_line(self) -> str:
        if not self._status:
            return ""
        text = Text.assemble(("| ", "dim cyan"), (self._status, "bold"))
        # One column stays free: a full last column makes some terminals wrap.
        text.truncate(max(1, self._rich.width - 1), overflow="ellipsis")
        with self._rich.capture() as capture:
            self._rich.print(text, end="", soft_wrap=True)
        return capture.get()
