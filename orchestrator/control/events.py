"""What can happen to a run: everything the state machine is told. Pure data.

Every event that speaks of workers carries the `attempt` it belongs to; the machine drops what an older attempt says in
one place. Times are not part of events: the shell hands `now` (seconds, monotonic) to the machine beside the event;
`at` fields are moments on the same clock, measured closer to the fact.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from orchestrator.control.consistency import Offer


@dataclass(frozen=True)
class ErrorInfo:
    """A Python exception as a rank reported it. `frame`: the innermost frame of the user's code, "file.py:31 in fn".

    `secondary` is true for exceptions that only tell of another rank's death (a lost gloo or NCCL connection).
    `setup` is true if the exception came before `init()` returned or while the group was being formed.
    `unseen` is true if the script formed its group without us: how far it had got is not known.
    """

    type: str
    message: str
    traceback: str = ""
    frame: str = ""
    secondary: bool = False
    setup: bool = False
    unseen: bool = False
    log_path: str = ""
    exit_code: int | None = None  # a refusal (UsageError 2, ConfigRefused 78) raised by our own API: never retried


@dataclass(frozen=True)
class AgentJoined:
    """An agent is ready: its zygote is warm. `slots` is how many ranks it may host."""

    agent: str
    node: str
    slots: int


@dataclass(frozen=True)
class AgentLost:
    """An agent died or stopped answering; its workers and its shared memory are gone."""

    agent: str
    why: str
    at: float


@dataclass(frozen=True)
class GroupStarted:
    """All workers of one agent were forked and handed their specification. `workers`: rank → pid.

    `resume_step` is the step the shell really found to go on from, where it had to look (a start from storage); None if
    the machine named the source itself or the run is fresh.
    """

    attempt: int
    agent: str
    workers: tuple[tuple[int, int], ...]
    resume_step: int | None = None


@dataclass(frozen=True)
class WorkerStepped:
    """A rank finished its first new step of this attempt (sent once an attempt), or reached the end without any step.

    `phases` are seconds spent since the fork: connect, build, restore, first_step.
    """

    attempt: int
    rank: int
    step: int
    at: float
    phases: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Progress:
    """A heartbeat as the agent samples it (about 2 Hz a rank): the rank's last resume point."""

    attempt: int
    rank: int
    step: int


@dataclass(frozen=True)
class WorkerFailed:
    """A rank died or reported an uncaught exception (it then waits, parked, and may still be salvaged: `alive`).

    `cause`: "signal:9", "exit:3", "exception", "hang", "oom", "node_lost", "preempted".
    """

    attempt: int
    rank: int
    cause: str
    step: int
    at: float
    error: ErrorInfo | None = None
    alive: bool = False


@dataclass(frozen=True)
class WorkerFinished:
    """The rank's script ended normally, and its share of the final state is staged. `trained`: steps of this launch."""

    attempt: int
    rank: int
    step: int
    trained: int = 0
    why: str = ""


@dataclass(frozen=True)
class WorkerStopped:
    """The rank left at an agreed boundary because a stop was asked for; what had to be saved is staged."""

    attempt: int
    rank: int
    step: int


@dataclass(frozen=True)
class OffersIn:
    """One agent's answer to `Drain`: what its live workers, records and segments can supply.

    `settled` is true when every local survivor has either said that it is clean, or died, or will never be clean.
    An agent may answer several times; the last answer counts.
    """

    attempt: int
    agent: str
    offers: tuple[Offer, ...]
    settled: bool


@dataclass(frozen=True)
class Salvaged:
    """An agent's answer to `Salvage`: the elected survivors have (or have not) written their state."""

    attempt: int
    agent: str
    election: int
    ok: bool
    why: str = ""


@dataclass(frozen=True)
class SaveStaged:
    """A rank staged its share of (attempt, step) for storage. `world_size` shares make a save."""

    attempt: int
    rank: int
    step: int
    world_size: int
    reason: str
    name: str = ""


@dataclass(frozen=True)
class ShardPersisted:
    """The saver wrote one share to storage. `shard`: the report that the committer needs (file, digests, table, head).

    Exception-triggered saves arrive with `shares` = how many files make them whole (salvage is written by few ranks).
    """

    attempt: int
    step: int
    rank: int
    shares: int
    reason: str
    shard: dict[str, Any]
    name: str = ""


@dataclass(frozen=True)
class ShardLost:
    """A share could not be persisted (disk full, agent gone): the save it belongs to is dropped whole.

    Without a `reason` every save of (attempt, step) that is not complete yet is meant.
    """

    attempt: int
    step: int
    rank: int
    why: str
    reason: str = ""
    name: str = ""


@dataclass(frozen=True)
class Committed:
    """The committer's answer to `Commit`."""

    attempt: int
    step: int
    ok: bool
    why: str = ""
    superseded: bool = False
    reason: str = ""
    name: str = ""


@dataclass(frozen=True)
class SaveRequested:
    """A person, a signal or `orchestrator save` asks for a checkpoint at the next resume point."""

    name: str = ""


@dataclass(frozen=True)
class StopRequested:
    """Stop at the next boundary. `kind`: "platform" (exit 75), "person" (76), "request" (`orchestrator stop`: 76)."""

    kind: Literal["platform", "person", "request"]
    save: bool = True


@dataclass(frozen=True)
class Tick:
    """Time passed; deadlines are checked. The shell sends one at `Machine.next_deadline()`."""


Event = (
    AgentJoined
    | AgentLost
    | GroupStarted
    | WorkerStepped
    | Progress
    | WorkerFailed
    | WorkerFinished
    | WorkerStopped
    | OffersIn
    | Salvaged
    | SaveStaged
    | ShardPersisted
    | ShardLost
    | Committed
    | SaveRequested
    | StopRequested
    | Tick
)
