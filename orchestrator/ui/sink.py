"""A stream that outlives its reader: what cannot be written any more is dropped, and training goes on."""

from __future__ import annotations

import threading
from typing import TextIO


class Sink:
    """Whole pieces of text, one writer at a time. Never raises for a broken stream; safe from any thread."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._lock = threading.RLock()
        self._broken = False

    def write(self, text: str) -> None:
        with self._lock:
            if self._broken:
                return
            try:
                self._put(text)
                self._stream.flush()
            except (OSError, ValueError):
                self._broken = True

    def _put(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = getattr(self._stream, "encoding", None) or "ascii"
            self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
