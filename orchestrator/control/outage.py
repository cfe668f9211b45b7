"""The end of an attempt: gather what survivors hold, elect who writes it; and what the whole outage cost. Pure."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass, field

from orchestrator.control.consistency import Choice, Offer, choose
from orchestrator.control.events import OffersIn, Salvaged, WorkerFailed


@dataclass
class Drainage:
    """The answers to one Drain, and the elections held on them.

    A holder that could not write its state when elected is out for good, so that elections come to an end.
    """

    attempt: int
    began_at: float
    deadline: float
    released: int  # memory of attempts up to this one was freed; an answer may have been on its way meanwhile
    answers: dict[str, OffersIn] = field(default_factory=dict)
    banned: set[str] = field(default_factory=set)
    settled_at: float = 0.0
    election: int = 0
    elected: Choice | None = None
    written: set[str] = field(default_factory=set)

    def missing(self, agents: Set[str]) -> list[str]:
        """Agents whose survivors have not all said what they hold."""
        return sorted(agent for agent in agents if agent not in self.answers or not self.answers[agent].settled)

    def offers(self) -> list[Offer]:
        """Everything on offer that may be elected."""
        return [
            offer
            for answer in self.answers.values()
            for offer in answer.offers
            if offer.holder not in self.banned and (offer.attempt or self.attempt) > self.released
        ]

    def choose(self, required: frozenset[str]) -> Choice | None:
        """The newest step that is covered now."""
        return choose(self.offers(), required, self.attempt)

    def elect(self, choice: Choice, deadline: float) -> int:
        """Hold the election that `choice` won; returns its number."""
        self.election += 1
        self.elected = choice
        self.written = set()
        self.deadline = deadline
        return self.election

    def still_stands(self) -> bool:
        """False if a newer answer took back what the elected were to write."""
        if self.elected is None:
            return False
        on_offer = {(offer.holder, offer.step) for offer in self.offers()}
        open_picks = (offer for offer, _ in self.elected.picks if offer.agent not in self.written)
        return all((offer.holder, offer.step) in on_offer for offer in open_picks)

    def salvaged(self, event: Salvaged) -> bool:
        """Take an agent's answer to the current election. False if the election must be repeated."""
        if event.ok:
            self.written.add(event.agent)
            return True
        self.ban(event.agent)
        return False

    def ban(self, agent: str) -> None:
        """What this agent was elected to write cannot be had."""
        if self.elected is not None:
            self.banned |= {offer.holder for offer, _ in self.elected.picks if offer.agent == agent}

    def unwritten(self) -> list[str]:
        """Elected agents that have not answered yet."""
        return sorted(self.elected.agents - self.written) if self.elected is not None else []


@dataclass
class Outage:
    """From the first failure until every rank finished a new step, over as many attempts as that takes. Seconds."""

    root: WorkerFailed
    heard_at: float
    reached: int
    phases: dict[str, float] = field(default_factory=dict)

    def add(self, phase: str, seconds: float) -> None:
        """Add to a phase; repeated attempts add up."""
        self.phases[phase] = self.phases.get(phase, 0.0) + max(0.0, seconds)

    def report(self, resume_step: int, last_step_at: float, workers: list[dict[str, float]]) -> dict[str, object]:
        """The fields of CONTRACT's `recovered`. A worker's phase counts as long as the slowest rank took for it."""
        phases = dict(self.phases)
        for name in sorted({name for phases_of_one in workers for name in phases_of_one}):
            phases[name] = max(phases_of_one.get(name, 0.0) for phases_of_one in workers)
        return {
            "cause": self.root.cause,
            "detect_s": max(0.0, self.heard_at - self.root.at),
            "recovery_s": max(0.0, last_step_at - self.root.at),
            "phases": phases,
            "lost_steps": max(0, self.reached - resume_step),
            "resume_step": resume_step,
        }
