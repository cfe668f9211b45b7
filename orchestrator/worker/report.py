"""Turning an exception of the user's program into what the driver and the user are told."""

from __future__ import annotations

import os
import sysconfig
import traceback
from types import TracebackType
from typing import Any

from orchestrator.errors import OrchestratorError

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__))) + os.sep
_LIBRARIES = tuple({sysconfig.get_paths()[key] + os.sep for key in ("stdlib", "platstdlib", "purelib", "platlib")})
# What gloo, NCCL and the store say when another rank has gone; such an error is never a root cause.
_LOST_PEER = (
    "connection closed by peer",
    "connection reset by peer",
    "broken pipe",
    "connection refused",
    "connection was closed",
    "socket timeout",
    "timed out waiting",
    "failed to connect",
    "connectfullmesh",
    "gloo/transport",
    "ncclremoteerror",
    "nccl communicator was aborted",
    "remote process exited",
    "dist store",
    "failed to recv",
    "failed to send",
)
MAX_TRACEBACK_CHARACTERS = 20_000


class PeerLostError(RuntimeError):
    """A collective of our own failed because another rank is gone."""


def is_lost_peer(error: BaseException) -> bool:
    """Whether the exception only tells of another rank's end."""
    if isinstance(error, PeerLostError):
        return True
    if not isinstance(error, (RuntimeError, ConnectionError, TimeoutError)):
        return False
    text = str(error).lower()
    module = type(error).__module__
    return any(mark in text for mark in _LOST_PEER) and (
        module.startswith("torch") or type(error) is RuntimeError or "Dist" in type(error).__name__
    )


def cause_of(error: BaseException) -> str:
    """CONTRACT's cause of an uncaught exception: lack of memory is no fault of the program's line that met it."""
    short = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return "oom" if short or "can't allocate memory" in str(error) else "exception"


def describe(error: BaseException, log_path: str = "") -> dict[str, Any]:
    """The fields of `control.events.ErrorInfo` for this exception, our own and runpy's outer frames left out."""
    trace = user_part(error.__traceback__)
    text = "".join(traceback.format_exception(type(error), error, trace))
    return {
        "type": _qualified_name(type(error)),
        "message": str(error)[:4000],
        "traceback": text[-MAX_TRACEBACK_CHARACTERS:],
        "frame": user_frame(error),
        "secondary": is_lost_peer(error),
        "log_path": log_path,
        "exit_code": error.exit_code if isinstance(error, OrchestratorError) and error.exit_code in (2, 78) else None,
    }


def _qualified_name(kind: type[BaseException]) -> str:
    return kind.__name__ if kind.__module__ in ("builtins", "__main__") else f"{kind.__module__}.{kind.__qualname__}"


def user_part(trace: TracebackType | None) -> TracebackType | None:
    """The traceback from the first frame that is not the launcher's own."""
    start = trace
    while start is not None:
        filename = start.tb_frame.f_code.co_filename
        if not filename.startswith((_PACKAGE, "<frozen")):
            return start
        start = start.tb_next
    return trace


def is_user_file(filename: str) -> bool:
    """Code that belongs to the user's program rather than to Python, a library or this package."""
    return not filename.startswith((_PACKAGE, "<", *_LIBRARIES))


def user_frame(error: BaseException) -> str:
    """The innermost frame of the user's own code, "train.py:31 in step"; the innermost of all if there is none."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if is_user_file(frame.filename)]
    if not frames:
        return ""
    frame = own[-1] if own else frames[-1]
    return f"{os.path.basename(frame.filename)}:{frame.lineno} in {frame.name}"
