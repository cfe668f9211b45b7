"""Where the next group can start from: segments that agents still hold, or the commit log. Pure."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from orchestrator.control.consistency import Choice
from orchestrator.control.saves import SaveBook


@dataclass(frozen=True)
class Source:
    """What the next group starts from: `choice` in memory, or storage (a fresh start if nothing was ever committed)."""

    choice: Choice | None
    step: int
    why: str
    fresh: bool = False

    @property
    def sources(self) -> tuple[str, ...]:
        """Tier names in CONTRACT's spelling; none for a fresh start."""
        if self.choice is not None:
            return self.choice.sources
        return () if self.fresh else ("storage",)


@dataclass
class Sources:
    """Choices whose segments are still held, oldest first. A source stays valid until a newer one has proved itself."""

    held: list[Choice] = field(default_factory=list)

    def add(self, choice: Choice, attempt: int) -> Choice:
        """Keep a choice made at the end of `attempt`; returns it labelled with that attempt."""
        labelled = replace(choice, attempt=attempt)
        self.held.append(labelled)
        return labelled

    def newest_held(self) -> Choice | None:
        """The held choice of the highest step; of equals the last one made."""
        return max(self.held, key=lambda choice: (choice.step, choice.attempt), default=None)

    def best(self, committed_step: int | None) -> Source:
        """The newest source. At equal step memory is preferred to storage, because it is faster."""
        choice = self.newest_held()
        if choice is not None and (committed_step is None or choice.step >= committed_step):
            return Source(choice, choice.step, choice.reason)
        if committed_step is not None:
            return Source(None, committed_step, f"the newest checkpoint is step {committed_step}")
        return Source(None, 0, "nothing was saved yet", fresh=True)

    def beats(self, step: int, committed_step: int | None) -> bool:
        """True if what is held or committed is better than salvaging `step` once more."""
        held = any(choice.step >= step for choice in self.held)
        return held or (committed_step is not None and committed_step > step)

    def agent_lost(self, agent: str) -> list[Choice]:
        """Forget the choices that needed this agent's memory; returns them."""
        gone = [choice for choice in self.held if agent in choice.agents]
        self.held = [choice for choice in self.held if agent not in choice.agents]
        return gone

    def release(self, book: SaveBook, current: int) -> int:
        """Forget choices that newer state replaces; returns the attempt up to which no memory is needed any more.

        To be called only once the group of attempt `current` has restored: until then it may be reading any of them.
        """
        while self.held:
            oldest = self.held[0]
            committed = book.committed_step is not None and book.committed_step >= oldest.step
            newer = any(choice.step >= oldest.step for choice in self.held[1:])
            if not (committed or newer) or book.persists(oldest):
                break
            self.held.pop(0)
        needed = [choice.oldest_attempt for choice in self.held]
        if book.oldest_attempt is not None:
            needed.append(book.oldest_attempt)
        return min([current, *needed]) - 1
