"""What failed first, and whose fault is it? Pure.

One death in a group makes every other rank fail too, a moment later and with louder messages. The *root* is the failure
that is no consequence of another. A failure is the *program's own* if a user exception repeats at the same step on two
attempts in a row: no restart can help there. Signals, lost connections, hangs, lack of memory and lost nodes never are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from orchestrator.control.events import WorkerFailed

SIGNAL_NAMES = {1: "SIGHUP", 2: "SIGINT", 3: "SIGQUIT", 4: "SIGILL", 6: "SIGABRT", 7: "SIGBUS", 8: "SIGFPE",
                9: "SIGKILL", 11: "SIGSEGV", 13: "SIGPIPE", 15: "SIGTERM", 19: "SIGSTOP"}  # fmt: skip


@dataclass(frozen=True)
class Signature:
    """What makes two user exceptions the same one. The rank is left out: which rank is first is chance."""

    step: int
    type: str
    message: str
    frame: str


def is_secondary(failure: WorkerFailed) -> bool:
    """True if the rank only tells that it lost another one."""
    return failure.error is not None and failure.error.secondary


def root_of(failures: Sequence[WorkerFailed]) -> WorkerFailed:
    """The failure that is no consequence of another: the earliest one that is not secondary, else the earliest.

    Raises ValueError if there is none.
    """
    return min(failures, key=lambda failure: (is_secondary(failure), failure.at, failure.rank))


def is_user_exception(failure: WorkerFailed) -> bool:
    """True if the user's own code raised: no lost connection, signal, exit, hang, lack of memory or lost node."""
    return failure.cause == "exception" and failure.error is not None and not failure.error.secondary


def signature(failure: WorkerFailed) -> Signature | None:
    """The identity of a user exception, None for every other failure."""
    if not is_user_exception(failure) or failure.error is None:
        return None
    return Signature(failure.step, failure.error.type, failure.error.message, failure.error.frame)


def signatures(failures: Sequence[WorkerFailed]) -> frozenset[Signature]:
    """The user exceptions of one attempt. All of them: which of two is first may change from attempt to attempt."""
    return frozenset(mark for mark in map(signature, failures) if mark is not None)


def is_programs_own(root: WorkerFailed, previous: frozenset[Signature]) -> bool:
    """True if `root` is a user exception that the attempt before raised too, at the same step."""
    mark = signature(root)
    return mark is not None and mark in previous


def refusal_code(failure: WorkerFailed) -> int | None:
    """The exit code if our own API refused to go on in this worker (2 usage, 78 configuration), else None."""
    return failure.error.exit_code if failure.error is not None and not failure.error.secondary else None


def describe(failure: WorkerFailed) -> str:
    """One clause: rank, what happened, step, and for an exception its text and the user's line.

    A refusal of our own API says by itself what is wrong and what to do.
    """
    if failure.error is not None and refusal_code(failure) is not None:
        where = f"{failure.error.frame.partition(' in ')[0]}: " if failure.error.frame else ""
        return f"{where}{failure.error.message}"
    return f"rank {failure.rank} {_what(failure)} at step {failure.step}{_error_text(failure)}"


def _what(failure: WorkerFailed) -> str:
    kind, _, number = failure.cause.partition(":")
    if kind == "signal":
        name = SIGNAL_NAMES.get(int(number), "")
        return f"was killed by signal {number}" + (f" ({name})" if name else "")
    if kind == "exit":
        return f"exited with code {number}"
    plain = {
        "exception": "lost another rank" if is_secondary(failure) else "raised",
        "hang": "stopped making progress",
        "oom": "ran out of memory",
        "node_lost": "was lost with its node",
        "preempted": "was preempted",
    }
    return plain.get(kind, f"failed ({failure.cause})")


def _error_text(failure: WorkerFailed) -> str:
    if failure.error is None:
        return ""
    frame = f" ({failure.error.frame})" if failure.error.frame else ""
    message = f": {failure.error.message}" if failure.error.message else ""
    return f": {failure.error.type}{message}{frame}"
