"""The states of a run, which may follow which, and the data that the machine keeps. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from orchestrator.control.consistency import Choice
from orchestrator.control.events import GroupStarted, OffersIn, WorkerFailed, WorkerStepped
from orchestrator.errors import OrchestratorError


class State(Enum):
    """Where a run is. Each value is what `status` shows."""

    GATHERING = "gathering"  # waits for agents with room for every rank
    BACKOFF = "backoff"  # waits before a restart: for its time, or for a commit that the restart should start from
    STARTING = "starting"  # StartGroup is out, not every agent has forked yet
    RUNNING = "running"
    STOPPING = "stopping"  # asked to stop; the ranks leave at the boundary they agree on
    DRAINING = "draining"  # something failed; survivors park and say what they hold
    SALVAGING = "salvaging"  # the elected survivors write their state
    COMPLETING = "completing"  # the outcome is certain; saves in flight are waited for
    FINISHED = "finished"


_ANYWHERE = frozenset({State.COMPLETING, State.FINISHED})
_RESTART = frozenset({State.GATHERING, State.BACKOFF, State.STARTING})

TRANSITIONS: dict[State, frozenset[State]] = {
    State.GATHERING: _ANYWHERE | {State.BACKOFF, State.STARTING},
    State.BACKOFF: _ANYWHERE | {State.GATHERING, State.STARTING},
    State.STARTING: _ANYWHERE | {State.RUNNING, State.STOPPING, State.DRAINING},
    State.RUNNING: _ANYWHERE | {State.STOPPING, State.DRAINING},
    State.STOPPING: _ANYWHERE | {State.DRAINING},
    State.DRAINING: _ANYWHERE | _RESTART | {State.SALVAGING},
    State.SALVAGING: _ANYWHERE | _RESTART,
    State.COMPLETING: frozenset({State.DRAINING, State.FINISHED}),
    State.FINISHED: frozenset(),
}

WAITING = frozenset({State.GATHERING, State.BACKOFF})
ALIVE = frozenset({State.STARTING, State.RUNNING, State.STOPPING})
ENDING_ATTEMPT = frozenset({State.DRAINING, State.SALVAGING})


class IllegalTransitionError(OrchestratorError):
    """A bug in the machine itself; names both states and the event."""


@dataclass(frozen=True)
class MachineConfig:
    """What the machine needs to know of a launch. Times in seconds.

    `per_rank`: ranks hold state of their own. `committed_step`: the newest checkpoint in the commit log, None if there
    is none. `first_attempt` must be above every attempt that earlier drivers used for this run: paths are unique per
    attempt. `save_timeout_s`: how long a save may go without a share arriving before it counts as lost; also how long
    an answer to Commit may take while a restart or the end of the run waits for it.
    """

    world_size: int
    max_restarts: int = 10
    drain_timeout_s: float = 10.0
    start_timeout_s: float = 600.0
    grace_s: float = 25.0
    exception_save: bool = True
    seed: int = 0
    per_rank: bool = False
    committed_step: int | None = None
    first_attempt: int = 1
    save_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.max_restarts < 0 or self.first_attempt < 0:
            raise ValueError(f"world_size must be at least 1, max_restarts and first_attempt at least 0: {self}")


@dataclass(frozen=True)
class MachineView:
    """What a console shows. `step`: the newest step known to be completed; `restarts`: groups after the first."""

    state: State
    attempt: int
    step: int
    restarts: int
    committed_step: int | None
    why: str


@dataclass(frozen=True)
class Ending:
    """An outcome that is certain; only saves in flight are waited for, until `deadline`."""

    outcome: str
    exit_code: int
    step: int
    why: str
    deadline: float


@dataclass
class Attempt:
    """One group of workers, from StartGroup to KillGroup. `reached`: the highest step a rank is known to have done."""

    number: int
    home: dict[int, str]  # rank -> agent
    agents: frozenset[str]
    resume: Choice | None
    resume_step: int
    reached: int
    started_at: float
    world_size: int
    groups: dict[str, GroupStarted] = field(default_factory=dict)
    stepped: dict[int, WorkerStepped] = field(default_factory=dict)
    finished: dict[int, int] = field(default_factory=dict)  # rank -> step
    stopped: dict[int, int] = field(default_factory=dict)
    failures: dict[int, WorkerFailed] = field(default_factory=dict)  # the first of each rank
    heard: dict[int, float] = field(default_factory=dict)  # rank -> when the machine was told of that failure
    answers: dict[str, OffersIn] = field(default_factory=dict)  # agent -> its last answer to Drain
    lost: set[str] = field(default_factory=set)  # agents that died since the start
    said: set[int] = field(default_factory=set)  # ranks whose failure is in the journal
    why_finished: str = ""

    def saw(self, step: int) -> None:
        """Take note that some rank completed `step`."""
        if step > self.reached:
            self.reached = step

    @property
    def trained(self) -> bool:
        """True if some rank completed a step of its own in this attempt."""
        return any(stepped.step > self.resume_step for stepped in self.stepped.values())

    @property
    def out(self) -> bool:
        """True if every rank has left by itself, finished or stopped."""
        return len(self.finished.keys() | self.stopped.keys()) == self.world_size

    @property
    def restored(self) -> bool:
        """True if no rank needs the source any more that the attempt started from."""
        return len(self.stepped.keys() | self.finished.keys() | self.stopped.keys()) == self.world_size

    def ranks_on(self, agent: str) -> list[int]:
        """Ranks of one agent that have not left by themselves, ascending."""
        return [rank for rank, home in sorted(self.home.items()) if home == agent and not self.has_left(rank)]

    def has_left(self, rank: int) -> bool:
        """True if the rank finished or stopped: what happens to its process afterwards is no failure."""
        return rank in self.finished or rank in self.stopped
