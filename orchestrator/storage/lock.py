"""One live driver a run: a kernel lock on the run's directory, and a note of who holds it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import secrets
import socket
import struct
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from orchestrator.errors import UsageError
from orchestrator.storage.layout import LIVE_FILE, LOCK_FILE
from orchestrator.storage.local import explain

_QUERYABLE = hasattr(fcntl, "F_OFD_GETLK") and struct.calcsize("P") == 8


@dataclass(frozen=True)
class Live:
    """Who drives a run. `started`: seconds since 1970; `address`: the dashboard's or driver's, empty if it has none."""

    pid: int
    host: str
    started: float
    address: str = ""

    def __str__(self) -> str:
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(self.started))
        return f"process {self.pid} on {self.host}, since {since}"


class RunLock:
    """Held from `acquire` to `release`, or to the process's death: the kernel lets go then, whatever killed it.

    The lock keeps two launches of one host (or of a file system that carries locks) apart and gives a clear message.
    It is not what keeps the run's data right: that is the commit log. Do not fork without exec while holding it.
    """

    def __init__(self, directory: str | os.PathLike[str]) -> None:
        self.directory = Path(directory)
        self._descriptor: int | None = None

    def acquire(self, address: str = "") -> Live:
        """Raises UsageError naming the live driver if there is one, StorageError if the lock cannot be made."""
        path = self.directory / LOCK_FILE
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            raise explain(error, path, "write") from error
        try:
            _take(descriptor)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise self._refused() from None
            raise explain(error, path, "lock") from error
        self._descriptor = descriptor
        live = Live(os.getpid(), socket.gethostname(), time.time(), address)
        _replace(self.directory / LIVE_FILE, json.dumps(asdict(live)).encode())
        return live

    def release(self) -> None:
        """Let go. Safe to repeat."""
        if self._descriptor is not None:
            with contextlib.suppress(OSError):  # storage may be gone; without the lock the note does not count
                (self.directory / LIVE_FILE).unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> RunLock:
        if self._descriptor is None:
            self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.release()

    def _refused(self) -> UsageError:
        name, live = self.directory.name, _read_live(self.directory)
        who = str(live) if live else "another process"
        return UsageError(
            f"Run {name!r} is live: {who} drives it. Follow it by `orchestrator status {self.directory}`, end it by "
            f"`orchestrator stop {self.directory}`, or start another run with `--run-name`."
        )


def live_driver(directory: str | os.PathLike[str]) -> Live | None:
    """Who drives this run now; None if nobody does (a note that a killed driver left behind does not count)."""
    path = Path(directory)
    try:
        descriptor = os.open(path / LOCK_FILE, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise explain(error, path / LOCK_FILE, "read") from error
    try:
        held = _is_taken(descriptor)
    except OSError as error:
        raise explain(error, path / LOCK_FILE, "query the lock of") from error
    finally:
        os.close(descriptor)
    return (_read_live(path) or Live(0, "unknown host", 0.0)) if held else None


def _whole_file(kind: int) -> bytes:
    """Linux's struct flock of 64-bit machines: type, whence, start, length (0: to the end), pid (0 for OFD locks)."""
    return struct.pack("@hhqqi4x", kind, os.SEEK_SET, 0, 0, 0)


def _take(descriptor: int) -> None:
    """Take the lock or raise OSError. Open file description locks can be queried without taking them."""
    if _QUERYABLE:
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _whole_file(fcntl.F_WRLCK))
    else:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _is_taken(descriptor: int) -> bool:
    """Whether somebody holds it. Where it can be queried nothing is taken, so that looking never refuses a launch."""
    if _QUERYABLE:
        answer = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _whole_file(fcntl.F_WRLCK))
        return bool(struct.unpack_from("@h", answer)[0] != fcntl.F_UNLCK)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False


def _read_live(directory: Path) -> Live | None:
    try:
        raw = json.loads((directory / LIVE_FILE).read_bytes())
        return Live(int(raw["pid"]), str(raw["host"]), float(raw["started"]), str(raw.get("address", "")))
    except (OSError, ValueError, KeyError, TypeError):
        return None  # written a moment after the lock is taken, or damaged: the lock is what counts


def _replace(path: Path, data: bytes) -> None:
    temporary = path.with_name(f".tmp-{secrets.token_hex(8)}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise explain(error, path, "write") from error
