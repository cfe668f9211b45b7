"""What every part of the machine uses: its data, how it speaks, how a group starts and how a run ends. Pure."""

from __future__ import annotations

from typing import Any

from orchestrator.control import records
from orchestrator.control.actions import Action, Finish, KillGroup, PersistChoice, Record, StartGroup, Tell
from orchestrator.control.consistency import required_pieces
from orchestrator.control.events import AgentJoined, ErrorInfo, Event, StopRequested, WorkerFailed
from orchestrator.control.outage import Drainage, Outage
from orchestrator.control.policies import FailureHistory, RestartPolicy
from orchestrator.control.saves import SaveBook
from orchestrator.control.sources import Source, Sources
from orchestrator.control.state import TRANSITIONS, Attempt, Ending, IllegalTransitionError, MachineConfig, State
from orchestrator.errors import EXIT_FAILED, EXIT_INTERRUPTED, EXIT_STOPPED

_STOP_WHY = {
    "platform": "the platform asked to stop",
    "person": "a person asked to stop",
    "request": "`orchestrator stop` asked to stop",
}


class Core:
    """The machine's data and the moves that several states share."""

    def __init__(self, config: MachineConfig) -> None:
        self.config = config
        self.state = State.GATHERING
        self._required = required_pieces(config.world_size, config.per_rank)
        self._policy = RestartPolicy(max_restarts=config.max_restarts, seed=config.seed)
        self._history = FailureHistory()
        self._book = SaveBook(config.save_timeout_s, config.committed_step)
        self._sources = Sources()
        self._may_release = False  # something happened that may make held memory superfluous
        self._released = config.first_attempt - 1  # memory of attempts up to this one was freed
        self._agents: dict[str, AgentJoined] = {}
        self._attempt: Attempt | None = None
        self._killed = True  # no group of ours is alive
        self._trained = False  # some rank made a step in this launch
        self._drainage: Drainage | None = None
        self._root: WorkerFailed | None = None
        self._outage: Outage | None = None
        self._wishes: list[str] = []  # names of checkpoints that were asked for and are not staged yet
        self._stop: StopRequested | None = None
        self._ending: Ending | None = None
        self._gather_by: float | None = None
        self._until = 0.0  # no group starts before
        self._commit_by: float | None = None  # a restart waits for a commit until then
        self._grace_by = 0.0
        self._why = "waiting for agents"
        self._event: Event | None = None
        self._orders: list[Action] = []
        self._said: list[Action] = []  # orders go out first: what is written about them costs no recovery time
        self._last: Finish | None = None

    # speaking

    def _order(self, action: Action) -> None:
        self._orders.append(action)

    def _record(self, name: str, **fields: Any) -> None:
        number = self._attempt.number if self._attempt is not None else 0
        self._said.append(Record(name, {"attempt": number, **fields}))

    def _tell(self, text: str, level: str = "info", error: ErrorInfo | None = None) -> None:
        self._said.append(Tell(text, error=error, level=level))

    def _go(self, state: State) -> None:
        if state is self.state:
            return
        if state not in TRANSITIONS[self.state]:
            raise IllegalTransitionError(f"{self.state.value} cannot become {state.value} on {self._event!r}")
        self.state = state

    def _newest_step(self) -> int:
        return self._attempt.reached if self._attempt is not None else self._book.committed_step or 0

    # starting

    def _try_start(self, now: float) -> None:
        """Start the next group, or wait for what it still needs: agents, its time, a commit it should start from."""
        if sum(agent.slots for agent in self._agents.values()) < self.config.world_size:
            if self.state is not State.GATHERING:
                self._gather_by = now + self.config.start_timeout_s
            self._go(State.GATHERING)
            return
        source = self._sources.best(self._book.committed_step)
        if now < self._until or self._waits_for_commit(source, now):
            self._go(State.BACKOFF)
            return
        self._start(source, now)

    def _waits_for_commit(self, source: Source, now: float) -> bool:
        """True while a newer state than `source` lies in storage as a whole and its commit is on the way."""
        whole = self._book.newest_whole
        nothing = source.choice is None and self._book.committed_step is None
        if whole is None or (whole <= source.step and not nothing):
            self._commit_by = None
            return False
        if self._commit_by is None:
            self._commit_by = now + self.config.save_timeout_s
        return True

    def _start(self, source: Source, now: float) -> None:
        first = self._attempt is None
        number = self.config.first_attempt if self._attempt is None else self._attempt.number + 1
        placement = self._place()
        home = dict(placement)
        agents = frozenset(home.values())
        self._attempt = Attempt(
            number, home, agents, source.choice, source.step, source.step, now, self.config.world_size
        )
        self._drainage, self._root, self._killed = None, None, False
        self._book.begin_attempt(number, home)
        self._book.leave_line(source.step)
        self._order(StartGroup(number, placement, source.choice, source.choice is None))
        if not first:
            sources = list(source.sources)
            why = f"{self._why}; {source.why}"
            self._record("restart_decided", resume_step=source.step, resume_sources=sources, why=why)
            where = f"from step {source.step} ({'+'.join(sources)})" if sources else "from the beginning"
            self._tell(f"attempt {number} starts {where}: {source.why}")
        self._go(State.STARTING)

    def _place(self) -> tuple[tuple[int, str], ...]:
        """Ranks in order on agents in the order of their names, so that the same agents get the same ranks again."""
        names = sorted(self._agents, key=lambda name: (len(name), name))
        seats = [name for name in names for _ in range(self._agents[name].slots)]
        return tuple(enumerate(seats[: self.config.world_size]))

    def _gather_overdue(self, now: float) -> None:
        slots = sum(agent.slots for agent in self._agents.values())
        here = ", ".join(f"{agent.agent} on {agent.node} ({agent.slots})" for agent in self._agents.values()) or "none"
        why = (
            f"agents for {self.config.world_size - slots} of {self.config.world_size} ranks did not join within "
            f"{self.config.start_timeout_s:g} s; here: {here}; check the cluster's resources or lower --workers"
        )
        self._end("failed", EXIT_FAILED, self._newest_step(), why, now)

    def _backoff_over(self, now: float) -> None:
        if self._commit_by is not None and now >= self._commit_by:
            why = f"storage has not answered a commit for {self.config.save_timeout_s:g} s; can it be reached?"
            self._end("failed", EXIT_FAILED, self._newest_step(), why, now)
        else:
            self._try_start(now)

    # ending

    def _kill(self) -> None:
        if self._attempt is not None and not self._killed:
            self._killed = True
            self._order(KillGroup(self._attempt.number))

    def _persist(self, reason: str, attempt: int, now: float) -> None:
        """Have the newest held segments written under `attempt`'s paths, unless as new a state is on its way."""
        choice = self._sources.newest_held()
        known = (step for step in (self._book.committed_step, self._book.newest_staged) if step is not None)
        if choice is None or choice.step <= max(known, default=-1):
            return
        if self._book.knows(choice.step, attempt, reason):
            reason = "exception"  # some ranks had staged shares of a save of that name, others had not
        self._order(PersistChoice(attempt, choice, reason))
        self._book.persist(choice, attempt, reason, now)

    def _end(self, outcome: str, code: int, step: int, why: str, now: float) -> None:
        """The outcome is certain. Saves in flight are waited for, then the run is over."""
        if self._attempt is not None:
            self._book.end_attempt(self._attempt.number)
        self._ending = Ending(outcome, code, step, why, now + self.config.save_timeout_s)
        self._why = why
        self._go(State.COMPLETING)

    def _stop_reason(self) -> str:
        return "preemption" if self._stop is not None and self._stop.kind == "platform" else "stop"

    def _stop_code(self) -> int:
        return EXIT_INTERRUPTED if self._stop is not None and self._stop.kind == "platform" else EXIT_STOPPED

    def _stop_why(self) -> str:
        return _STOP_WHY[self._stop.kind] if self._stop is not None else "the workers agreed to stop"

    def _stop_at_once(self, now: float) -> None:
        """No worker holds anything new: end with what is there."""
        self._kill()
        if self._attempt is not None:
            self._persist(self._stop_reason(), self._attempt.number, now)
        source = self._sources.best(self._book.committed_step)
        self._end("stopped", self._stop_code(), source.step, f"{self._stop_why()} while no group was training", now)

    def _ending_overdue(self, now: float) -> None:
        self._book.give_up("the run ended before it was committed")
        self._said.extend(self._book.take_news())
        self._finish_ending()

    def _finish_ending(self) -> None:
        """Every save is settled: is what was promised in storage?"""
        ending = self._ending
        if ending is None:
            return
        step = ending.step if ending.outcome == "completed" else max(ending.step, self._book.committed_step or 0)
        broken = self._broken_promise()
        if broken:
            why = f"{ending.why}, but {broken}; {self._kept()}"
            code = ending.exit_code if ending.outcome == "failed" else EXIT_FAILED
            self._finish("failed", code, step, why)
        else:
            more = f"; {self._kept()}" if ending.outcome == "failed" or self._behind(ending) else ""
            self._finish(ending.outcome, ending.exit_code, step, ending.why + more)

    def _broken_promise(self) -> str:
        """Why state that the last attempt handed over is not in storage, or nothing."""
        number = self._attempt.number if self._attempt is not None else 0
        committed = self._book.committed_step
        newer = [
            (key, why)
            for key, why in self._book.lost.items()
            if key.attempt == number and (committed is None or committed < key.step)
        ]
        return records.lost_text(newer) if newer else ""

    def _behind(self, ending: Ending) -> bool:
        """True if a stop could not save everything: the promise of its exit code is then qualified in words."""
        committed = self._book.committed_step
        return ending.outcome == "stopped" and committed is not None and committed < self._newest_step()

    def _kept(self) -> str:
        return records.kept_text(self._book.committed_step)

    def _finish(self, outcome: str, code: int, step: int, why: str) -> None:
        self._kill()
        self._go(State.FINISHED)
        self._why = why
        self._last = Finish(outcome, code, step, why)
