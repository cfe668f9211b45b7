"""Reading what rank 0 prints from its log as it grows."""

from __future__ import annotations

import contextlib
import os
import time

MAX_CHUNK_BYTES = 256 * 1024
SHOW_UPDATE_EVERY_S = 5.0


def open_log(path: str) -> int:
    """A descriptor that appends to a log, for processes to write to. What storage does not take costs the log only."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
    except OSError:
        return os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)


def append(path: str, text: str) -> None:
    """Add to a log what its writer left to us."""
    log = open_log(path)
    try:
        with contextlib.suppress(OSError):
            os.write(log, text.encode("utf-8", "backslashreplace"))
    finally:
        os.close(log)


class OutputTail:
    """Follows one file; whole lines only, until it is told to take the rest.

    What a carriage return overwrites on a terminal, as progress bars do, is shown now and then only.
    """

    def __init__(self) -> None:
        self._fd = -1
        self._partial = b""
        self._updated_at = 0.0

    def follow(self, path: str) -> None:
        """Read `path` from its present end on."""
        self.close()
        with contextlib.suppress(OSError):
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            os.lseek(self._fd, 0, os.SEEK_END)

    def lines(self, rest: bool = False) -> list[str]:
        """Lines that were written since the last call; with `rest`, an unfinished one too."""
        if self._fd < 0:
            return []
        data = self._read()
        if data:
            *whole, self._partial = (self._partial + data).split(b"\n")
            whole = [_standing(line) for line in whole]
            whole += self._update()
            if len(self._partial) > MAX_CHUNK_BYTES:
                whole.append(self._partial)
                self._partial = b""
        else:
            whole = []
        if rest and self._partial:
            whole.append(_standing(self._partial))
            self._partial = b""
        return [line.decode("utf-8", "backslashreplace") for line in whole]

    def _read(self) -> bytes:
        try:
            return os.read(self._fd, MAX_CHUNK_BYTES)
        except OSError:  # the log's file system is away; the console goes without
            return b""

    def _update(self) -> list[bytes]:
        """The newest text of an unfinished line that was overwritten; what was before it is forgotten."""
        text = self._partial.rstrip(b"\r")
        _before, mark, newest = text.rpartition(b"\r")
        if not mark:
            return []
        self._partial = mark + newest + self._partial[len(text) :][:1]
        now = time.monotonic()
        if not newest or now < self._updated_at + SHOW_UPDATE_EVERY_S:
            return []
        self._updated_at = now
        return [newest]

    def close(self) -> None:
        """Stop following."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._partial = -1, b""


def _standing(line: bytes) -> bytes:
    """What stands on a terminal at a line's end: the text after its last carriage return."""
    return line.rstrip(b"\r").rpartition(b"\r")[2]
