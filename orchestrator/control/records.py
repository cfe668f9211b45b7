"""What the machine writes into the journal and says on the console, in CONTRACT's names. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from orchestrator.control.actions import Record, Tell
from orchestrator.control.events import AgentJoined, WorkerFailed
from orchestrator.control.saves import SaveKey
from orchestrator.control.state import Attempt


def group_started(attempt: Attempt, agents: Mapping[str, AgentJoined], resume_step: int, stored: bool) -> Record:
    """Every agent forked its ranks. `stored`: the start is from a checkpoint in storage."""
    workers = [
        {"rank": rank, "node": agents[name].node if name in agents else name, "pid": pid}
        for name, group in attempt.groups.items()
        for rank, pid in group.workers
    ]
    sources = list(attempt.resume.sources) if attempt.resume is not None else ["storage"] if stored else []
    fields = {
        "attempt": attempt.number,
        "world_size": attempt.world_size,
        "resume_step": resume_step,
        "resume_sources": sources,
        "workers": sorted(workers, key=lambda worker: int(str(worker["rank"]))),
    }
    return Record("group_started", fields)


def worker_failed(failure: WorkerFailed, root: bool) -> Record:
    """One rank's failure; `root` is true for exactly one of an attempt."""
    error = failure.error
    fields = {
        "attempt": failure.attempt,
        "rank": failure.rank,
        "cause": failure.cause,
        "step": failure.step,
        "error": {"type": error.type, "message": error.message} if error is not None else None,
        "root": root,
    }
    return Record("worker_failed", fields)


def root_told(root: WorkerFailed, others: int, why: str) -> Tell:
    """The root cause, once, with what is done about it."""
    more = f" ({others} other rank{'s' if others > 1 else ''} failed with it)" if others else ""
    return Tell(f"{why}{more}", error=root.error, level="error")


def kept_text(step: int | None) -> str:
    """What the next launch continues from."""
    if step is None:
        return "nothing was saved, so the next launch starts from the beginning"
    return f"the checkpoint at step {step} is kept; the next launch continues there"


def lost_text(lost: Iterable[tuple[SaveKey, str]]) -> str:
    """The newest save that was lost, and why."""
    key, why = max(lost, key=lambda pair: pair[0])
    return f"the {key.reason} checkpoint at step {key.step} could not be kept: {why}"


def lost_agent(attempt: int, rank: int, step: int, at: float) -> WorkerFailed:
    """What the loss of an agent means for one of its ranks."""
    return WorkerFailed(attempt, rank, "node_lost", step, at)
