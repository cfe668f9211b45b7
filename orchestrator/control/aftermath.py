"""How an attempt ends: drain, elect, salvage, then restart or give up. Pure; the rest is in machine.py."""

from __future__ import annotations

from typing import cast

from orchestrator.control import records
from orchestrator.control.actions import Drain, Salvage
from orchestrator.control.consistency import Choice, Tier
from orchestrator.control.core import Core
from orchestrator.control.events import OffersIn, Salvaged, WorkerFailed
from orchestrator.control.failures import describe, refusal_code, root_of
from orchestrator.control.outage import Drainage, Outage
from orchestrator.control.policies import Attempted, GiveUp, Restart, decide
from orchestrator.control.state import Attempt, State
from orchestrator.errors import EXIT_FAILED


class Aftermath(Core):
    """From the first failure of an attempt to the decision what comes next."""

    def _note_failure(self, failure: WorkerFailed, now: float) -> None:
        """Keep the first failure of each rank, and when it was heard of."""
        attempt = cast(Attempt, self._attempt)
        attempt.saw(failure.step)
        if failure.rank not in attempt.failures:
            attempt.failures[failure.rank] = failure
            attempt.heard[failure.rank] = now

    def _refused(self, failure: WorkerFailed, now: float) -> None:
        """Our own API refused in the user's script before any step: nothing to save, nothing to retry."""
        self._name_root()
        self._say_failures()
        self._kill()
        code = refusal_code(failure)
        self._end("failed", EXIT_FAILED if code is None else code, self._newest_step(), describe(failure), now)

    # draining

    def _drain(self, now: float) -> None:
        attempt = cast(Attempt, self._attempt)
        self._go(State.DRAINING)
        deadline = now + self.config.drain_timeout_s
        self._drainage = Drainage(attempt.number, now, deadline, self._released, attempt.answers)
        self._order(Drain(attempt.number, self.config.drain_timeout_s))
        self._check_drained(now)

    def _offers_in(self, event: OffersIn, now: float) -> None:
        attempt = cast(Attempt, self._attempt)
        if event.agent not in attempt.agents:
            return
        attempt.answers[event.agent] = event
        if self.state is State.DRAINING:
            self._check_drained(now)
        elif self.state is State.SALVAGING and not cast(Drainage, self._drainage).still_stands():
            self._elect(now)

    def _check_drained(self, now: float) -> None:
        attempt = cast(Attempt, self._attempt)
        if not cast(Drainage, self._drainage).missing(attempt.agents - attempt.lost):
            self._settle(now)

    def _drain_overdue(self, now: float) -> None:
        attempt = cast(Attempt, self._attempt)
        missing = cast(Drainage, self._drainage).missing(attempt.agents - attempt.lost)
        limit = self.config.drain_timeout_s
        text = f"{', '.join(missing)} did not say within {limit:g} s what its ranks hold"
        self._tell(f"{text}; going on with what the others hold", "warning")
        self._settle(now)

    def _drain_agent_lost(self, agent: str, now: float) -> None:
        drainage = cast(Drainage, self._drainage)
        drainage.answers.pop(agent, None)
        if self.state is State.DRAINING:
            self._check_drained(now)
            return
        for failure in cast(Attempt, self._attempt).failures.values():
            self._say_late(failure)
        if drainage.elected is not None and agent in drainage.elected.agents:
            self._elect(now)

    def _failed_while_draining(self, failure: WorkerFailed) -> None:
        if self.state is State.SALVAGING:
            self._say_late(failure)

    def _settle(self, now: float) -> None:
        """Everybody has said what they hold, or time is up: the root cause is known now."""
        attempt, drainage = cast(Attempt, self._attempt), cast(Drainage, self._drainage)
        for offer in drainage.offers():
            if offer.tier is Tier.LIVE:
                attempt.saw(offer.step)
        self._name_root()
        if self._outage is not None:
            self._outage.reached = max(self._outage.reached, attempt.reached)
            self._outage.add("drain", now - drainage.began_at)
        self._elect(now)

    def _name_root(self) -> None:
        attempt = cast(Attempt, self._attempt)
        if self._root is not None or not attempt.failures:
            return
        self._root = root_of(list(attempt.failures.values()))
        if self._outage is None:
            heard = attempt.heard[self._root.rank]
            self._outage = Outage(self._root, heard, attempt.reached)
            self._outage.add("detect", heard - self._root.at)

    # electing and salvaging

    def _elect(self, now: float) -> None:
        """Choose the newest covered step. Repeated whenever one of the elected turns out to be gone."""
        drainage = cast(Drainage, self._drainage)
        choice = drainage.choose(self._required)
        if choice is not None and self._sources.beats(choice.step, self._book.committed_step):
            choice = None
        if choice is None or not choice.needs_salvage:
            self._decide(choice, now)
            return
        if self.state is State.DRAINING:
            drainage.settled_at = now
        self._go(State.SALVAGING)
        number = drainage.elect(choice, now + self.config.drain_timeout_s)
        self._order(Salvage(drainage.attempt, number, choice))
        self._say_failures()

    def _salvaged(self, event: Salvaged, now: float) -> None:
        drainage = self._drainage
        if self.state is not State.SALVAGING or drainage is None or drainage.elected is None:
            return
        if event.election != drainage.election or event.agent not in drainage.elected.agents:
            return
        if not drainage.salvaged(event):
            text = f"{event.agent} could not write what it was elected for ({event.why}); electing again"
            self._tell(text, "warning")
            self._elect(now)
        elif not drainage.unwritten():
            self._decide(drainage.elected, now)

    def _salvage_overdue(self, now: float) -> None:
        drainage = cast(Drainage, self._drainage)
        late = drainage.unwritten()
        self._tell(f"{', '.join(late)} did not write its state within {self.config.drain_timeout_s:g} s", "warning")
        for agent in late:
            drainage.ban(agent)
        self._elect(now)

    # deciding

    def _decide(self, choice: Choice | None, now: float) -> None:
        attempt, drainage = cast(Attempt, self._attempt), cast(Drainage, self._drainage)
        if choice is not None:
            self._sources.add(choice, attempt.number)
        if self._outage is not None and self.state is State.SALVAGING:
            self._outage.add("salvage", now - drainage.settled_at)
        self._kill()
        self._book.end_attempt(attempt.number)
        self._say_failures()
        if self._stop is not None:
            self._end_stopped(attempt.number, now)
            return
        self._trained = self._trained or attempt.trained
        root = cast(WorkerFailed, self._root)
        tried = Attempted(root, tuple(attempt.failures.values()), attempt.reached, self._trained)
        verdict, self._history = decide(self._policy, self._history, tried)
        self._why = verdict.why
        self._said.append(records.root_told(root, len(attempt.failures) - 1, verdict.why))
        if isinstance(verdict, GiveUp):
            self._give_up(verdict, attempt.number, now)
        else:
            self._restart(verdict, attempt.number, now)

    def _restart(self, verdict: Restart, ended: int, now: float) -> None:
        self._until = now + verdict.delay_s
        self._try_start(now)
        if self.config.exception_save:
            self._persist("exception", ended, now)

    def _give_up(self, verdict: GiveUp, ended: int, now: float) -> None:
        if self.config.exception_save:
            self._persist("exception", ended, now)
        source = self._sources.best(self._book.committed_step)
        self._end("failed", verdict.exit_code, source.step, verdict.why, now)

    def _end_stopped(self, ended: int, now: float) -> None:
        self._persist(self._stop_reason(), ended, now)
        source = self._sources.best(self._book.committed_step)
        because = f" ({describe(self._root)} meanwhile)" if self._root is not None else ""
        self._end("stopped", self._stop_code(), source.step, f"{self._stop_why()}{because}", now)

    # saying

    def _say_failures(self) -> None:
        """Record each failure of the attempt, exactly one as root; safe to repeat."""
        for failure in sorted(cast(Attempt, self._attempt).failures.values(), key=lambda failure: failure.at):
            self._say_late(failure)

    def _say_late(self, failure: WorkerFailed) -> None:
        attempt = cast(Attempt, self._attempt)
        if failure.rank in attempt.said:
            return
        attempt.said.add(failure.rank)
        self._name_root()
        self._said.append(records.worker_failed(failure, failure is self._root))
