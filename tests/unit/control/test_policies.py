"""Restart or give up: tables."""

from __future__ import annotations

import pytest

from orchestrator.control.events import ErrorInfo, WorkerFailed
from orchestrator.control.policies import Attempted, FailureHistory, GiveUp, Restart, RestartPolicy, decide

USER = ErrorInfo("ValueError", "bad batch", frame="train.py:31 in step")
UNSEEN = ErrorInfo("ValueError", "bad sample", frame="train.py:3 in f", unseen=True)
PLAIN = RestartPolicy(max_restarts=3, base_s=1.0, cap_s=5.0, jitter=0.0)


def attempt(cause: str, reached: int, error: ErrorInfo | None = None, trained: bool = True) -> Attempted:
    root = WorkerFailed(1, 1, cause, reached, 1.0, error)
    return Attempted(root, (root,), reached, trained)


def run(policy: RestartPolicy, attempts: list[Attempted]) -> list[str]:
    """ "0.0" for a restart after that many seconds, "exit 1" for giving up."""
    history, said = FailureHistory(), []
    for one in attempts:
        verdict, history = decide(policy, history, one)
        said.append(f"{verdict.delay_s}" if isinstance(verdict, Restart) else f"exit {verdict.exit_code}")
    return said


@pytest.mark.parametrize(
    ("name", "attempts", "expected"),
    [
        ("the first restart is immediate", [attempt("signal:9", 5)], ["0.0"]),
        ("so is each one after progress", [attempt("signal:9", step) for step in (5, 6, 7)], ["0.0"] * 3),
        (
            "without progress they slow down and end",
            [attempt("signal:9", 5)] * 4,
            ["0.0", "1.0", "2.0", "exit 1"],
        ),
        (
            "getting less far is no progress",
            [attempt("signal:9", 5), attempt("signal:9", 4)],
            ["0.0", "1.0"],
        ),
        (
            "progress clears the account",
            [attempt("signal:9", 5)] * 3 + [attempt("signal:9", 6)] * 4,
            ["0.0", "1.0", "2.0", "0.0", "1.0", "2.0", "exit 1"],
        ),
        (
            "each cause has its own budget, and the delay has a cap",
            [attempt("signal:9", 5)] * 3 + [attempt("oom", 5)] * 4,
            ["0.0", "1.0", "2.0", "4.0", "5.0", "5.0", "exit 1"],
        ),
        (
            "the same exit at the same step costs budget only",
            [attempt("exit:3", 5)] * 2,
            ["0.0", "1.0"],
        ),
        (
            "the same exception at the same step is the program's own",
            [attempt("exception", 5, USER)] * 2,
            ["0.0", "exit 1"],
        ),
        (
            "with something else in between it is not",
            [attempt("exception", 5, USER), attempt("signal:9", 5), attempt("exception", 5, USER)],
            ["0.0", "1.0", "2.0"],
        ),
        (
            "an exception before the first step of the launch is not retried",
            [attempt("exception", 5, USER, trained=False)],
            ["exit 1"],
        ),
        (
            "one in a script of its own ways is, until it repeats",
            [attempt("exception", 0, UNSEEN, trained=False)] * 2,
            ["0.0", "exit 1"],
        ),
        ("a signal before the first step is", [attempt("signal:9", 0, trained=False)], ["0.0"]),
        (
            "a refusal of our own API ends with its code",
            [attempt("exception", 5, ErrorInfo("ConfigRefusedError", "other model", exit_code=78))],
            ["exit 78"],
        ),
    ],
)
def test_decisions(name: str, attempts: list[Attempted], expected: list[str]) -> None:
    assert run(PLAIN, attempts) == expected


def test_no_restarts_allowed() -> None:
    assert run(RestartPolicy(max_restarts=0), [attempt("signal:9", 5)]) == ["exit 1"]


def test_ten_restarts_by_default() -> None:
    assert [said for said in run(RestartPolicy(), [attempt("signal:9", 5)] * 11) if said == "exit 1"] == ["exit 1"]


def test_jitter_comes_from_the_seed_and_stays_within_its_fraction() -> None:
    delays = [RestartPolicy(base_s=1.0, jitter=0.5, seed=seed).delay_s(2) for seed in range(50)]
    assert delays == [RestartPolicy(base_s=1.0, jitter=0.5, seed=seed).delay_s(2) for seed in range(50)]
    assert len(set(delays)) == 50
    assert all(1.0 <= delay <= 1.5 for delay in delays)


def test_reasons_name_the_root_cause_first() -> None:
    verdict, history = decide(PLAIN, FailureHistory(), attempt("exception", 5, USER))
    assert verdict == Restart(
        0.0, "rank 1 raised at step 5: ValueError: bad batch (train.py:31 in step); restarting at once"
    )
    verdict, _ = decide(PLAIN, history, attempt("exception", 5, USER))
    assert verdict == GiveUp(
        1,
        "rank 1 raised at step 5: ValueError: bad batch (train.py:31 in step); the attempt before raised the same at "
        "the same step, so it is the program's own",
    )
