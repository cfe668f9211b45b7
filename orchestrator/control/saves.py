"""The save book: which saves are on their way to storage, and which may be committed next. Pure.

A save is whole when all its shares are in storage. One commit is in flight at a time, in step order. A save whose
shares can never all arrive is dropped as a whole, and told. A save that is staged survives the end of its attempt,
because the agents own the memory it lies in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from orchestrator.control.actions import Action, Commit, Record, Tell
from orchestrator.control.consistency import Choice
from orchestrator.control.events import Committed, SaveStaged, ShardLost, ShardPersisted

REPLACEABLE = frozenset({"periodic", "exception"})  # a newer checkpoint makes up for one of these
_REMEMBERED = 256


class SaveKey(NamedTuple):
    """What tells one save from another; ordered as saves are committed."""

    step: int
    attempt: int
    reason: str
    name: str


@dataclass
class Save:
    """One save on its way. `shares` is 0 as long as nobody has said how many files make it whole."""

    key: SaveKey
    shares: int
    touched_at: float
    staged: set[int] = field(default_factory=set)
    shards: dict[int, ShardPersisted] = field(default_factory=dict)
    agents: frozenset[str] = frozenset()  # whose memory it is written from, if it is a choice that is persisted

    @property
    def whole(self) -> bool:
        """True if every share is in storage."""
        return 0 < self.shares <= len(self.shards)

    @property
    def fully_staged(self) -> bool:
        """True if nothing more is needed of the workers."""
        return bool(self.agents) or (self.shares > 0 and len(self.staged | self.shards.keys()) >= self.shares)


class SaveBook:
    """All saves that are not settled yet. Methods put what is to be told into `take_news`."""

    def __init__(self, timeout_s: float, committed_step: int | None) -> None:
        self.committed_step = committed_step
        self.lost: dict[SaveKey, str] = {}  # lost, not merely overtaken: newest last
        self._timeout_s = timeout_s
        self._open: dict[SaveKey, Save] = {}
        self._settled: dict[SaveKey, None] = {}
        self._in_flight: Save | None = None
        self._ended: int | None = None  # attempts up to this one stage nothing any more
        self._homes: dict[int, Mapping[int, str]] = {}  # attempt -> rank -> agent
        self._news: list[Action] = []

    # what is known

    @property
    def pending(self) -> bool:
        """True if some save may still be committed."""
        return bool(self._open)

    @property
    def newest_whole(self) -> int | None:
        """The newest step that is in storage as a whole and only waits for its commit, or None."""
        return max((save.key.step for save in self._open.values() if save.whole), default=None)

    @property
    def newest_staged(self) -> int | None:
        """The newest step that is on its way and needs no worker any more, or None."""
        return max((save.key.step for save in self._open.values() if save.fully_staged), default=None)

    def persists(self, choice: Choice) -> bool:
        """True if a save on its way is written from the memory that `choice` names."""
        return any(save.agents and key.step == choice.step for key, save in self._open.items())

    @property
    def oldest_attempt(self) -> int | None:
        """The oldest attempt whose memory a save on its way is written from, or None."""
        return min((key.attempt for key in self._open), default=None)

    def knows(self, step: int, attempt: int, reason: str) -> bool:
        """True if a save without a name was ever begun under this key, so that another one would be taken for it."""
        key = SaveKey(step, attempt, reason, "")
        return key in self._open or key in self._settled

    def deadline(self) -> float | None:
        """When the next save counts as lost unless a share of it arrives."""
        touched = (save.touched_at for save in self._open.values() if save is not self._in_flight)
        oldest = min(touched, default=None)
        return None if oldest is None else oldest + self._timeout_s

    def take_news(self) -> list[Action]:
        """What to record and tell since the last call."""
        news, self._news = self._news, []
        return news

    # what happens

    def stage(self, event: SaveStaged, now: float) -> bool:
        """A rank put its share into shared memory. True if no worker is needed for this save any more."""
        key = SaveKey(event.step, event.attempt, event.reason, event.name)
        save = self._entry(key, event.world_size, now)
        if save is not None:
            save.staged.add(event.rank)
        return save is not None and save.fully_staged

    def persist(self, choice: Choice, attempt: int, reason: str, now: float) -> None:
        """The agents were asked to write the segments of `choice` to storage."""
        save = self._entry(SaveKey(choice.step, attempt, reason, ""), 0, now, persisting=True)
        if save is not None:
            save.agents = choice.agents

    def shard(self, event: ShardPersisted, now: float) -> None:
        """One share reached storage. Safe to repeat."""
        save = self._entry(SaveKey(event.step, event.attempt, event.reason, event.name), event.shares, now)
        if save is not None:
            save.shards.setdefault(event.rank, event)

    def shard_lost(self, event: ShardLost) -> None:
        """One share will never reach storage."""
        for save in list(self._open.values()):
            key = save.key
            same = (key.step, key.attempt) == (event.step, event.attempt)
            if same and (not event.reason or (key.reason, key.name) == (event.reason, event.name)) and not save.whole:
                self._drop(save, f"the share of rank {event.rank} was lost: {event.why}")

    def begin_attempt(self, attempt: int, home: Mapping[int, str]) -> None:
        """Remember on which agent each rank of `attempt` stages its shares."""
        needed = {save.key.attempt for save in self._open.values()}
        self._homes = {number: homes for number, homes in self._homes.items() if number in needed}
        self._homes[attempt] = home

    def agent_lost(self, agent: str) -> bool:
        """An agent's memory is gone: drop what was still to be written from it. True if something was dropped."""
        gone = [save for save in self._open.values() if not save.whole and self._waits_for(save, agent)]
        for save in gone:
            self._drop(save, f"{agent} was lost before its share was written")
        return bool(gone)

    def _waits_for(self, save: Save, agent: str) -> bool:
        if save.agents:
            return agent in save.agents
        home = self._homes.get(save.key.attempt, {})
        return any(home.get(rank) == agent for rank in range(save.shares) if rank not in save.shards)

    def end_attempt(self, attempt: int) -> None:
        """No worker of `attempt` will stage anything more."""
        self._ended = attempt
        for save in list(self._open.values()):
            if save.key.attempt == attempt and not save.fully_staged:
                self._drop(save, "the attempt ended before every rank had staged its share", lost=False)

    def leave_line(self, step: int) -> None:
        """The run goes on from `step`: newer states that an earlier attempt computed are no part of it any more."""
        for save in list(self._open.values()):
            if save.key.step > step and save is not self._in_flight:
                self._drop(save, f"the run went on from step {step}", lost=False)

    def rewound(self, step: int) -> None:
        """The newest checkpoint turned out to be at `step` (a newer one is damaged)."""
        if self.committed_step is not None and self.committed_step > step:
            self.committed_step = step

    def expire(self, now: float) -> bool:
        """Drop what no share has reached for too long, naming the ranks that are missing. True if something was."""
        before = len(self._open)
        for save in list(self._open.values()):
            if save is not self._in_flight and now >= save.touched_at + self._timeout_s:
                missing = sorted(set(range(save.shares)) - save.shards.keys())
                who = f"ranks {missing}" if missing else ", ".join(sorted(save.agents)) or "older saves"
                self._drop(save, f"nothing came for {self._timeout_s:g} s; missing: {who}")
        return len(self._open) < before

    def give_up(self, why: str) -> None:
        """The run ends: whatever is not committed is lost."""
        for save in list(self._open.values()):
            self._drop(save, why)

    def next_commit(self, now: float) -> Commit | None:
        """The save to commit now, or None. An older save that nothing newer can replace is waited for."""
        if self._in_flight is not None or not self._open:
            return None
        for key in sorted(self._open, key=lambda key: (key.step, key.attempt, key.reason == "final", key)):
            save = self._open[key]
            if save.whole:
                self._in_flight = save
                save.touched_at = now
                shards = tuple(save.shards[rank] for rank in sorted(save.shards))
                return Commit(key.attempt, key.step, key.reason, key.name, shards)
            if key.reason not in REPLACEABLE or key.name:
                return None
        return None

    def committed(self, event: Committed) -> bool:
        """The committer's answer. Returns False if nobody asked (a repeated answer)."""
        save = self._in_flight
        if save is None or (save.key.step, save.key.attempt) != (event.step, event.attempt):
            return False
        if event.reason and (save.key.reason, save.key.name) != (event.reason, event.name):
            return False
        self._in_flight = None
        if not event.ok:
            self._drop(save, f"it could not be committed: {event.why}")
            return True
        self._settle(save.key)
        self.committed_step = save.key.step
        for other in list(self._open.values()):
            same = other.key.step == save.key.step and other.key.reason in REPLACEABLE and not other.key.name
            if other.key.step < save.key.step or same:
                self._drop(other, f"step {save.key.step} was committed before it was whole", lost=False)
        return True

    # in the house

    def _entry(self, key: SaveKey, shares: int, now: float, persisting: bool = False) -> Save | None:
        if key in self._settled:
            return None
        save = self._open.get(key)
        if save is None:
            ended = self._ended is not None and key.attempt <= self._ended and not persisting
            if ended or (self.committed_step is not None and key.step < self.committed_step):
                return None
            save = self._open[key] = Save(key, shares, now)
        save.shares = shares or save.shares
        save.touched_at = now
        return save

    def _settle(self, key: SaveKey) -> None:
        self._open.pop(key, None)
        self._settled[key] = None
        if len(self._settled) > _REMEMBERED:
            del self._settled[next(iter(self._settled))]

    def _drop(self, save: Save, why: str, lost: bool = True) -> None:
        self._settle(save.key)
        step, attempt, reason, name = save.key
        if lost:
            self.lost[save.key] = why
        self._news.append(
            Record("save_dropped", {"attempt": attempt, "step": step, "reason": reason, "name": name, "why": why})
        )
        text = f"the {reason} checkpoint at step {step} was dropped: {why}"
        self._news.append(Tell(text, level="warning" if lost else "info"))
