"""The brain of a run: events in, actions out. Pure: no clock, no I/O; `now` comes with every event.

`Machine.step` never blocks and never raises for what the world does: an event that makes no sense in a state is
ignored. Orders come before what is written about them. How an attempt ends (drain, elect, salvage, decide) is in
`aftermath.py`; how a group starts and a run ends in `core.py`; which state may follow which in `state.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

from orchestrator.control import records
from orchestrator.control.actions import Action, AskWorkers, ReleaseSegments
from orchestrator.control.aftermath import Aftermath
from orchestrator.control.consistency import required_pieces
from orchestrator.control.events import (
    AgentJoined,
    AgentLost,
    Committed,
    ErrorInfo,
    Event,
    GroupStarted,
    OffersIn,
    Progress,
    Salvaged,
    SaveRequested,
    SaveStaged,
    ShardLost,
    ShardPersisted,
    StopRequested,
    Tick,
    WorkerFailed,
    WorkerFinished,
    WorkerStepped,
    WorkerStopped,
)
from orchestrator.control.failures import refusal_code
from orchestrator.control.state import ALIVE, ENDING_ATTEMPT, WAITING, Attempt, MachineView, State
from orchestrator.errors import EXIT_COMPLETED, EXIT_FAILED

_ANY_ATTEMPT = (ShardPersisted, ShardLost, Committed)  # a save outlives its attempt; its paths name the attempt


class Machine(Aftermath):
    """One run, from the first agent to `Finish`. Give it every event in order; do what it answers, in order.

    Every event's `now` must not be smaller than the one before. After `Finish` it answers nothing more.
    """

    def step(self, event: Event, now: float) -> tuple[Action, ...]:
        """Take one event, return what to do. Send a `Tick` at `next_deadline()` if nothing else happens before."""
        if self.state is State.FINISHED:
            return ()
        self._event = event
        if self._gather_by is None and self._attempt is None:
            self._gather_by = now + self.config.start_timeout_s
        if self._is_stale(event):
            return ()
        handler = _HANDLERS.get(type(event))
        if handler is None:
            raise TypeError(f"{event!r} is no event of ours (state {self.state.value})")
        handler(self, event, now)
        self._after(now)
        out = (*self._orders, *self._said, *(() if self._last is None else (self._last,)))
        self._orders, self._said = [], []
        return out

    def next_deadline(self) -> float | None:
        """When to send a Tick. 0.0 as long as the machine was never told the time."""
        if self.state is State.FINISHED:
            return None
        if self._gather_by is None and self._attempt is None:
            return 0.0
        candidates = (self._state_deadline(), self._book.deadline())
        return min((deadline for deadline in candidates if deadline is not None), default=None)

    def view(self) -> MachineView:
        """What a console shows."""
        number = self._attempt.number if self._attempt is not None else 0
        restarts = max(0, number - self.config.first_attempt)
        return MachineView(self.state, number, self._newest_step(), restarts, self._book.committed_step, self._why)

    def hold_per_rank(self) -> None:
        """The script tracks values that differ between ranks: from now on a state without every rank's is not whole."""
        self._required = required_pieces(self.config.world_size, True)

    def _is_stale(self, event: Event) -> bool:
        """The one place where what an older attempt or the workers of a lost agent say is dropped."""
        number = getattr(event, "attempt", None)
        if number is None or isinstance(event, _ANY_ATTEMPT):
            return False
        attempt = self._attempt
        if attempt is None or number != attempt.number:
            return True
        if not attempt.lost:
            return False
        agent = getattr(event, "agent", None) or attempt.home.get(getattr(event, "rank", -1))
        return agent in attempt.lost

    def _state_deadline(self) -> float | None:
        if self.state is State.GATHERING:
            return self._gather_by
        if self.state is State.BACKOFF:
            return self._until if self._commit_by is None else self._commit_by
        if self.state is State.STARTING and self._attempt is not None:
            by = self._attempt.started_at + self.config.start_timeout_s
            return by if self._stop is None else min(by, self._grace_by)
        if self.state is State.STOPPING:
            return self._grace_by
        if self.state in ENDING_ATTEMPT and self._drainage is not None:
            return self._drainage.deadline
        return self._ending.deadline if self._ending is not None else None

    # agents

    def _agent_joined(self, event: AgentJoined, now: float) -> None:
        self._agents[event.agent] = event
        if self.state in WAITING:
            self._try_start(now)

    def _agent_lost(self, event: AgentLost, now: float) -> None:
        if self._agents.pop(event.agent, None) is None:
            return
        for choice in self._sources.agent_lost(event.agent):
            self._tell(f"the state of step {choice.step} in memory went with {event.agent}", "warning")
        attempt = self._attempt
        if attempt is not None:
            attempt.lost.add(event.agent)
        shares_lost = self._book.agent_lost(event.agent)
        if self.state in WAITING:
            self._tell(f"{event.agent} was lost: {event.why}", "warning")
            self._try_start(now)
        elif attempt is not None and event.agent in attempt.agents:
            if self.state is State.COMPLETING:
                self._lost_while_completing(event, shares_lost, now)
            else:
                self._ranks_lost(event, attempt.ranks_on(event.agent), now)

    def _ranks_lost(self, event: AgentLost, ranks: list[int], now: float) -> None:
        attempt = cast(Attempt, self._attempt)
        self._tell(f"{event.agent} was lost with ranks {ranks}: {event.why}", "warning")
        for rank in ranks:
            self._note_failure(records.lost_agent(attempt.number, rank, attempt.reached, event.at), now)
        if self.state in ENDING_ATTEMPT:
            self._drain_agent_lost(event.agent, now)
        elif ranks:
            self._drain(now)

    def _lost_while_completing(self, event: AgentLost, shares_lost: bool, now: float) -> None:
        """Every rank has finished, but what one staged is gone: go back to the newest state there is and end again."""
        attempt = cast(Attempt, self._attempt)
        if not shares_lost or self._killed or not attempt.out:
            return
        ranks = [rank for rank, home in sorted(attempt.home.items()) if home == event.agent]
        for rank in ranks:
            attempt.finished.pop(rank, None)
            attempt.stopped.pop(rank, None)
        self._ending = None
        self._ranks_lost(event, ranks, now)

    # a group's life

    def _group_started(self, event: GroupStarted, now: float) -> None:
        attempt = cast(Attempt, self._attempt)
        attempt.groups[event.agent] = event
        if event.resume_step is not None and attempt.resume is None and not attempt.stepped:
            attempt.resume_step = attempt.reached = event.resume_step
            self._book.rewound(event.resume_step)
        if self.state is not State.STARTING or attempt.groups.keys() != attempt.agents:
            return
        self._go(State.RUNNING)
        stored = self._book.committed_step is not None or bool(event.resume_step)
        self._said.append(records.group_started(attempt, self._agents, attempt.resume_step, stored))
        if self._outage is not None:
            self._outage.add("start", now - attempt.started_at)
        for name in self._wishes:
            self._order(AskWorkers(attempt.number, "save", name))
        if self._stop is not None:
            self._ask_to_stop(now)

    def _worker_stepped(self, event: WorkerStepped, now: float) -> None:
        attempt = cast(Attempt, self._attempt)
        if attempt.resume is None and event.step < (self._book.committed_step or 0):
            attempt.resume_step = event.step - 1  # the newest checkpoint was damaged, and the shell went further back
            attempt.reached = event.step
            self._book.rewound(event.step - 1)
        self._may_release = True
        attempt.stepped.setdefault(event.rank, event)
        attempt.saw(event.step)
        if self.state in ALIVE and len(attempt.stepped) == attempt.world_size:
            self._recovered(attempt)

    def _recovered(self, attempt: Attempt) -> None:
        outage, self._outage = self._outage, None
        if outage is None:
            return
        workers = [stepped.phases for stepped in attempt.stepped.values()]
        last = max(stepped.at for stepped in attempt.stepped.values())
        fields = outage.report(attempt.resume_step, last, workers)
        self._record("recovered", **fields)

    def _progress(self, event: Progress, now: float) -> None:
        cast(Attempt, self._attempt).saw(event.step)

    def _worker_finished(self, event: WorkerFinished, now: float) -> None:
        attempt = cast(Attempt, self._attempt)
        attempt.finished[event.rank] = event.step
        attempt.why_finished = attempt.why_finished or event.why
        attempt.saw(event.step)
        self._maybe_all_out(attempt, now)

    def _worker_stopped(self, event: WorkerStopped, now: float) -> None:
        attempt = cast(Attempt, self._attempt)
        attempt.stopped[event.rank] = event.step
        attempt.saw(event.step)
        self._maybe_all_out(attempt, now)

    def _maybe_all_out(self, attempt: Attempt, now: float) -> None:
        if not attempt.out or self.state not in ALIVE:
            return
        if attempt.stopped:
            step = max(attempt.stopped.values())
            self._end("stopped", self._stop_code(), step, f"{self._stop_why()}; every rank left at step {step}", now)
            return
        step = max(attempt.finished.values())
        self._end("completed", EXIT_COMPLETED, step, attempt.why_finished or f"the script ended at step {step}", now)

    # failures

    def _worker_failed(self, event: WorkerFailed, now: float) -> None:
        attempt = cast(Attempt, self._attempt)
        if attempt.has_left(event.rank) or event.rank not in attempt.home:
            return
        late = event.rank in attempt.failures
        self._note_failure(event, now)
        if self.state in ALIVE:
            if refusal_code(event) is not None and not attempt.trained:
                self._refused(event, now)
            else:
                self._drain(now)
        elif self.state in ENDING_ATTEMPT and not late:
            self._failed_while_draining(event)

    def _start_overdue(self, now: float) -> None:
        attempt = cast(Attempt, self._attempt)
        if now < attempt.started_at + self.config.start_timeout_s:
            self._grace_over(now)
            return
        missing = sorted(attempt.agents - attempt.groups.keys())
        text = f"{', '.join(missing)} did not start its workers within {self.config.start_timeout_s:g} s"
        for agent in missing:
            for rank in attempt.ranks_on(agent):
                error = ErrorInfo("StartTimeout", text)
                self._note_failure(WorkerFailed(attempt.number, rank, "hang", attempt.resume_step, now, error), now)
        self._drain(now)

    # requests

    def _save_requested(self, event: SaveRequested, now: float) -> None:
        if self._stop is not None or self.state is State.COMPLETING:
            self._tell("no checkpoint on request: the run is ending, and its last state is saved anyway", "warning")
            return
        if event.name in self._wishes:
            return
        self._wishes.append(event.name)
        if self.state is State.RUNNING:
            self._order(AskWorkers(cast(Attempt, self._attempt).number, "save", event.name))

    def _stop_requested(self, event: StopRequested, now: float) -> None:
        if self._stop is not None:
            return
        self._stop = event
        self._grace_by = now + self.config.grace_s
        if self.state is State.COMPLETING:
            return  # it ends anyway, as soon as what is on its way is saved; a second Ctrl-C does not wait for that
        if not event.save:
            self._kill()
            self._finish("stopped", self._stop_code(), self._newest_step(), f"{self._stop_why()}, without saving")
        elif self.state in WAITING or (self.state is State.STARTING and not cast(Attempt, self._attempt).trained):
            self._stop_at_once(now)
        elif self.state is State.STARTING or self.state is State.RUNNING:
            self._ask_to_stop(now)

    def _ask_to_stop(self, now: float) -> None:
        """Put the order before the workers; they leave at a boundary they agree on."""
        attempt = cast(Attempt, self._attempt)
        if self.state is State.STARTING:
            return  # asked as soon as every agent has forked
        self._go(State.STOPPING)
        self._order(AskWorkers(attempt.number, "stop", self._stop_reason()))
        self._tell(f"{self._stop_why()}: saving at the next step boundary, then leaving")
        self._maybe_all_out(attempt, now)

    def _grace_over(self, now: float) -> None:
        attempt = cast(Attempt, self._attempt)
        inside = sorted(set(attempt.home) - attempt.finished.keys() - attempt.stopped.keys())
        text = f"ranks {inside} did not leave within {self.config.grace_s:g} s"
        self._tell(f"{text}; saving what they hold, then killing them", "warning")
        self._drain(now)

    # saves

    def _save_staged(self, event: SaveStaged, now: float) -> None:
        attempt = cast(Attempt, self._attempt)
        attempt.saw(event.step)
        whole = self._book.stage(event, now)
        if whole and event.reason == "requested" and event.name in self._wishes:
            self._wishes.remove(event.name)

    def _shard_persisted(self, event: ShardPersisted, now: float) -> None:
        self._book.shard(event, now)

    def _shard_lost(self, event: ShardLost, now: float) -> None:
        self._book.shard_lost(event)

    def _committed(self, event: Committed, now: float) -> None:
        if event.superseded:
            self._kill()
            why = f"another driver took over this run, so step {event.step} was not committed: {event.why}".rstrip(": ")
            self._finish("failed", EXIT_FAILED, self._newest_step(), f"{why}; look at it with `orchestrator status`")
        elif self._book.committed(event):
            self._may_release = True
            if self.state in WAITING:
                self._try_start(now)

    # time

    def _tick(self, event: Tick, now: float) -> None:
        if self._book.expire(now) and self.state is State.BACKOFF:
            self._try_start(now)
        deadline = self._state_deadline()
        if deadline is None or now < deadline:
            return
        overdue: dict[State, Callable[[float], None]] = {
            State.GATHERING: self._gather_overdue,
            State.BACKOFF: self._backoff_over,
            State.STARTING: self._start_overdue,
            State.STOPPING: self._grace_over,
            State.DRAINING: self._drain_overdue,
            State.SALVAGING: self._salvage_overdue,
            State.COMPLETING: self._ending_overdue,
        }
        if self.state in overdue:
            overdue[self.state](now)

    def _after(self, now: float) -> None:
        """What follows from any event: the next commit, segments nobody needs any more, the end of the run."""
        if self.state is State.FINISHED:
            return
        self._said.extend(self._book.take_news())
        commit = self._book.next_commit(now)
        if commit is not None:
            self._order(commit)
        if self.state in ALIVE and self._may_release:
            self._release(cast(Attempt, self._attempt))
        if self.state is State.COMPLETING and not self._book.pending:
            self._finish_ending()

    def _release(self, attempt: Attempt) -> None:
        """Free the memory of earlier attempts, once this one has restored and something newer replaces it."""
        if not attempt.restored:
            return
        self._may_release = False
        upto = self._sources.release(self._book, attempt.number)
        if upto > self._released:
            self._released = upto
            self._order(ReleaseSegments(upto))


_HANDLERS: dict[type, Callable[[Any, Any, float], None]] = {
    AgentJoined: Machine._agent_joined,
    AgentLost: Machine._agent_lost,
    GroupStarted: Machine._group_started,
    WorkerStepped: Machine._worker_stepped,
    Progress: Machine._progress,
    WorkerFailed: Machine._worker_failed,
    WorkerFinished: Machine._worker_finished,
    WorkerStopped: Machine._worker_stopped,
    OffersIn: Machine._offers_in,
    Salvaged: Machine._salvaged,
    SaveStaged: Machine._save_staged,
    ShardPersisted: Machine._shard_persisted,
    ShardLost: Machine._shard_lost,
    Committed: Machine._committed,
    SaveRequested: Machine._save_requested,
    StopRequested: Machine._stop_requested,
    Tick: Machine._tick,
}
