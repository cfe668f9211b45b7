"""What the state machine asks the shell to do. Pure data; the shell executes in order and answers with events."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from orchestrator.control.consistency import Choice
from orchestrator.control.events import ErrorInfo, ShardPersisted


@dataclass(frozen=True)
class StartGroup:
    """Fork and start every rank. `placement`: (rank, agent) pairs, ranks contiguous on each agent.

    `resume` is None for a fresh start (or the newest committed checkpoint if the run has one: the shell looks it up
    when `from_storage` is true), else the salvage or memory segments that together hold the state.
    """

    attempt: int
    placement: tuple[tuple[int, str], ...]
    resume: Choice | None
    from_storage: bool


@dataclass(frozen=True)
class Drain:
    """Set the attempt's poison word on every agent; survivors park and report. Agents answer with OffersIn."""

    attempt: int
    deadline_s: float


@dataclass(frozen=True)
class Salvage:
    """Tell the elected survivors to write their state. Agents named in `choice` answer with Salvaged."""

    attempt: int
    election: int
    choice: Choice


@dataclass(frozen=True)
class KillGroup:
    """SIGKILL every process group of this attempt, without waiting. Idempotent."""

    attempt: int


@dataclass(frozen=True)
class PersistChoice:
    """Write the salvaged (or memory) segments of `choice` to storage in the background; answers are ShardPersisted."""

    attempt: int
    choice: Choice
    reason: str


@dataclass(frozen=True)
class Commit:
    """All shares of a save are there: check coverage, write the manifest, append to the log. Answer: Committed."""

    attempt: int
    step: int
    reason: str
    name: str
    shards: tuple[ShardPersisted, ...]


@dataclass(frozen=True)
class ReleaseSegments:
    """No salvage or snapshot of attempts up to this one is needed any more; agents may free them, not before."""

    attempt: int


@dataclass(frozen=True)
class AskWorkers:
    """Put an order before the workers, to be agreed on at a boundary: "save" or "stop".

    `name`: what the save is to be called, or the reason under which a stop is saved.
    """

    attempt: int
    order: str
    name: str = ""
    save: bool = True


@dataclass(frozen=True)
class Record:
    """Append an event to the journal (CONTRACT: names and fields)."""

    event: str
    fields: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Tell:
    """A failure or decision for the console, told once. `error` carries the root cause's traceback."""

    text: str
    error: ErrorInfo | None = None
    level: str = "info"


@dataclass(frozen=True)
class Finish:
    """The run is over. The shell kills what is left, records `run_finished` and exits."""

    outcome: str
    exit_code: int
    step: int
    why: str


Action = (
    StartGroup
    | Drain
    | Salvage
    | KillGroup
    | PersistChoice
    | Commit
    | ReleaseSegments
    | AskWorkers
    | Record
    | Tell
    | Finish
)
