"""Reading what rank 0 prints from its log as it grows."""

from __future__ import annotations

import contextlib
import os

MAX_CHUNK_BYTES = 256 * 1024


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
    """Follows one file; whole lines only, until it is told to take the rest."""

    def __init__(self) -> None:
        self._fd = -1
        self._partial = b""

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
        data = self._partial + os.read(self._fd, MAX_CHUNK_BYTES)
        *whole, self._partial = data.split(b"\n")
        if rest and self._partial:
            whole.append(self._partial)
            self._partial = b""
        return [line.decode("utf-8", "backslashreplace") for line in whole]

    def close(self) -> None:
        """Stop following."""
        if self._fd >= 0:
            os.close(self._fd)
        self._fd, self._partial = -1, b""
