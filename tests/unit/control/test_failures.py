"""Root causes and whose fault a failure is: tables."""

from __future__ import annotations

import pytest

from orchestrator.control.events import ErrorInfo, WorkerFailed
from orchestrator.control.failures import describe, is_programs_own, refusal_code, root_of, signatures

USER = ErrorInfo("ValueError", "bad batch", frame="train.py:31 in step")
LOST_PEER = ErrorInfo("DistBackendError", "connection closed by peer", secondary=True)
REFUSED = ErrorInfo("UsageError", "prepare first", exit_code=2)


def failed(rank: int, cause: str, at: float, error: ErrorInfo | None = None, step: int = 5) -> WorkerFailed:
    return WorkerFailed(1, rank, cause, step, at, error)


@pytest.mark.parametrize(
    ("name", "failures", "root"),
    [
        ("the only one", [failed(1, "exception", 2.0, LOST_PEER)], 1),
        ("the earliest", [failed(0, "signal:9", 3.0), failed(1, "exit:3", 2.0)], 1),
        ("never a consequence", [failed(0, "exception", 1.0, LOST_PEER), failed(1, "signal:9", 2.0)], 1),
        ("nor before an exception", [failed(0, "exception", 1.0, LOST_PEER), failed(1, "exception", 2.0, USER)], 1),
        ("the lower rank at equal time", [failed(2, "signal:9", 1.0), failed(1, "signal:9", 1.0)], 1),
        (
            "the earliest consequence if there is nothing else",
            [failed(0, "exception", 2.0, LOST_PEER), failed(1, "exception", 1.0, LOST_PEER)],
            1,
        ),
    ],
)
def test_root(name: str, failures: list[WorkerFailed], root: int) -> None:
    assert root_of(failures).rank == root
    assert root_of(failures[::-1]).rank == root


@pytest.mark.parametrize(
    ("name", "before", "now", "own"),
    [
        ("same step, same exception", failed(0, "exception", 1.0, USER), failed(0, "exception", 9.0, USER), True),
        ("on another rank too", failed(0, "exception", 1.0, USER), failed(1, "exception", 9.0, USER), True),
        ("another step", failed(0, "exception", 1.0, USER), failed(0, "exception", 9.0, USER, step=6), False),
        (
            "another message",
            failed(0, "exception", 1.0, USER),
            failed(0, "exception", 9.0, ErrorInfo("ValueError", "other", frame=USER.frame)),
            False,
        ),
        (
            "another line",
            failed(0, "exception", 1.0, USER),
            failed(0, "exception", 9.0, ErrorInfo("ValueError", "bad batch", frame="train.py:32 in step")),
            False,
        ),
        ("a signal", failed(0, "signal:9", 1.0), failed(0, "signal:9", 9.0), False),
        ("an exit", failed(0, "exit:3", 1.0), failed(0, "exit:3", 9.0), False),
        ("a lost peer", failed(0, "exception", 1.0, LOST_PEER), failed(0, "exception", 9.0, LOST_PEER), False),
        ("a hang", failed(0, "hang", 1.0, USER), failed(0, "hang", 9.0, USER), False),
        ("no memory", failed(0, "oom", 1.0, USER), failed(0, "oom", 9.0, USER), False),
        ("a lost node", failed(0, "node_lost", 1.0), failed(0, "node_lost", 9.0), False),
    ],
)
def test_the_programs_own_failure(name: str, before: WorkerFailed, now: WorkerFailed, own: bool) -> None:
    assert is_programs_own(now, signatures([before])) is own


def test_every_user_exception_of_an_attempt_is_remembered() -> None:
    other = ErrorInfo("KeyError", "x", frame="train.py:40 in load")
    before = signatures([failed(0, "exception", 1.0, USER), failed(1, "exception", 1.1, other)])
    assert is_programs_own(failed(1, "exception", 9.0, other), before)


def test_refusals() -> None:
    assert refusal_code(failed(0, "exception", 1.0, REFUSED)) == 2
    assert refusal_code(failed(0, "exception", 1.0, USER)) is None
    assert refusal_code(failed(0, "signal:9", 1.0)) is None


@pytest.mark.parametrize(
    ("failure", "text"),
    [
        (failed(1, "signal:9", 1.0), "rank 1 was killed by signal 9 (SIGKILL) at step 5"),
        (failed(1, "signal:64", 1.0), "rank 1 was killed by signal 64 at step 5"),
        (failed(0, "exit:3", 1.0), "rank 0 exited with code 3 at step 5"),
        (
            failed(0, "exception", 1.0, USER),
            "rank 0 raised at step 5: ValueError: bad batch (train.py:31 in step)",
        ),
        (
            failed(0, "exception", 1.0, LOST_PEER),
            "rank 0 lost another rank at step 5: DistBackendError: connection closed by peer",
        ),
        (failed(2, "node_lost", 1.0), "rank 2 was lost with its node at step 5"),
        (failed(2, "oom", 1.0), "rank 2 ran out of memory at step 5"),
    ],
)
def test_what_a_failure_sounds_like(failure: WorkerFailed, text: str) -> None:
    assert describe(failure) == text
