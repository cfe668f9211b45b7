"""Restart or give up? A decision returns its reason. Pure: no clock, and chance comes from a seed."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace

from orchestrator.control.events import WorkerFailed
from orchestrator.control.failures import (
    Signature,
    describe,
    is_programs_own,
    is_user_exception,
    refusal_code,
    signatures,
)
from orchestrator.errors import EXIT_FAILED


@dataclass(frozen=True)
class RestartPolicy:
    """How often and how soon a group is restarted.

    `max_restarts` failures of one cause without progress are restarted; the next one ends the run. The first failure
    without progress restarts at once, the n-th waits `base_s * 2**(n-2)` seconds, at most `cap_s`, each stretched by up
    to `jitter` (a fraction) so that runs which failed together do not come back together.
    """

    max_restarts: int = 10
    base_s: float = 0.5
    cap_s: float = 30.0
    jitter: float = 0.25
    seed: int = 0

    def delay_s(self, failures: int) -> float:
        """Seconds to wait before restarting after `failures` (1, 2, ...) failures without progress."""
        if failures <= 1:
            return 0.0
        plain = min(self.cap_s, self.base_s * 2.0 ** min(failures - 2, 32))
        digest = hashlib.sha256(f"{self.seed}/{failures}".encode()).digest()
        return plain * (1.0 + self.jitter * int.from_bytes(digest[:4], "big") / 2**32)


@dataclass(frozen=True)
class FailureHistory:
    """What the next decision needs to know of the earlier ones.

    `reached` is the highest step the run ever completed, `counts` the failures without progress since then, per cause;
    `previous` holds the user exceptions of the attempt before.
    """

    reached: int | None = None
    counts: tuple[tuple[str, int], ...] = ()
    previous: frozenset[Signature] = field(default_factory=frozenset)

    @property
    def without_progress(self) -> int:
        """Failures of any cause since the run last got further."""
        return sum(count for _, count in self.counts)


@dataclass(frozen=True)
class Attempted:
    """One failed attempt: its `root` and all `failures`.

    `reached`: the highest step it is known to have completed; `trained`: whether this launch made any step at all, in
    this attempt or an earlier one.
    """

    root: WorkerFailed
    failures: tuple[WorkerFailed, ...]
    reached: int
    trained: bool


@dataclass(frozen=True)
class Restart:
    """Go on after `delay_s` seconds."""

    delay_s: float
    why: str


@dataclass(frozen=True)
class GiveUp:
    """End the run with `exit_code`. `why` names the root cause first."""

    exit_code: int
    why: str


def decide(
    policy: RestartPolicy, history: FailureHistory, attempted: Attempted
) -> tuple[Restart | GiveUp, FailureHistory]:
    """What to do after a failed attempt, why, and what to remember."""
    root = attempted.root
    after = _remember(history, attempted, root)
    refused = _refuse(policy, history, after, attempted, root)
    if refused is not None:
        return refused, after
    failures = after.without_progress
    delay_s = policy.delay_s(failures)
    if failures == 1:
        return Restart(delay_s, f"{describe(root)}; restarting at once"), after
    why = f"{describe(root)}; failure {failures} without progress, restarting in {delay_s:.1f} s"
    return Restart(delay_s, why), after


def _remember(history: FailureHistory, attempted: Attempted, root: WorkerFailed) -> FailureHistory:
    progressed = history.reached is None or attempted.reached > history.reached
    counts = {} if progressed else dict(history.counts)
    counts[root.cause] = counts.get(root.cause, 0) + 1
    reached = attempted.reached if history.reached is None else max(history.reached, attempted.reached)
    return replace(
        history, reached=reached, counts=tuple(sorted(counts.items())), previous=signatures(attempted.failures)
    )


def _refuse(
    policy: RestartPolicy, before: FailureHistory, after: FailureHistory, attempted: Attempted, root: WorkerFailed
) -> GiveUp | None:
    code = refusal_code(root)
    if code is not None:
        return GiveUp(code, describe(root))
    unseen = root.error is not None and root.error.unseen
    if is_user_exception(root) and not attempted.trained and not unseen:
        why = f"{describe(root)}; it came before the first step of this launch, so it is not retried"
        return GiveUp(EXIT_FAILED, why)
    if is_programs_own(root, before.previous):
        why = f"{describe(root)}; the attempt before raised the same at the same step, so it is the program's own"
        return GiveUp(EXIT_FAILED, why)
    count = dict(after.counts)[root.cause]
    if count > policy.max_restarts:
        times = "once" if count == 1 else f"{count} times"
        why = (
            f"{describe(root)}; it happened {times} without progress in between (--max-restarts {policy.max_restarts})"
        )
        return GiveUp(EXIT_FAILED, why)
    return None
