"""What an agent holds in shared memory for its workers, dead or alive: who can supply which pieces of which step."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from dataclasses import dataclass, field
from typing import Any

from orchestrator.worker.shm import Segment, SlotLabel


@dataclass
class Held:
    """One segment of one rank of one attempt. `kind`: heads, buffers, arena, salvage.

    `share`: (number, count) of the rank among those of its node, by which snapshots are dealt out.
    """

    attempt: int
    rank: int
    kind: str
    segment: Segment
    share: tuple[int, int] = (0, 1)
    _read: dict[int, tuple[int, dict[str, Any]]] = field(default_factory=dict)  # slot → order, facts

    def labels(self) -> list[SlotLabel]:
        """Valid slots of this attempt."""
        return [label for label in self.segment.labels() if label.attempt == self.attempt]

    def facts(self, label: SlotLabel) -> dict[str, Any] | None:
        """What the slot's JSON part says, read once; None if a live writer has gone on to another step since."""
        order, known = self._read.get(label.index, (-1, {}))
        if order == label.order:
            return known
        text = self.segment.meta_of(label)
        if text is None:
            return None
        known = self._facts(text)
        self._read[label.index] = (label.order, known)
        return known

    def facts_at(self, step: int) -> dict[str, Any] | None:
        """The same for the latest slot of `step`, None if there is none."""
        hits = [label for label in self.labels() if label.step == step]
        return self.facts(max(hits, key=lambda label: label.order)) if hits else None

    def _facts(self, text: bytes) -> dict[str, Any]:
        """A snapshot's table of tensors is long, and reading it would be time that a restart waits."""
        if self.kind == "arena" and b'"final": true' not in text:
            return {"final": False}
        facts: dict[str, Any] = json.loads(text)
        return facts


@dataclass(frozen=True)
class Part:
    """A slot that supplies pieces of a state."""

    segment: Segment
    slot: int
    pieces: tuple[str, ...]
    rank: int


@dataclass
class Holdings:
    """All segments of a node, newest attempt last. Agents on other nodes use it from other threads.

    `lock` is for who uses a part's descriptor: without it another thread may close it in between.
    """

    agent: str
    items: list[Held] = field(default_factory=list)
    fetched: dict[str, list[Part]] = field(default_factory=dict)
    lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def add(self, attempt: int, rank: int, kind: str, segment: Segment, share: tuple[int, int] = (0, 1)) -> None:
        """Keep a segment; it replaces an older one of the same rank and kind in the same attempt."""
        with self.lock:
            for old in [h for h in self.items if (h.attempt, h.rank, h.kind) == (attempt, rank, kind)]:
                self._drop(old)
            self.items.append(Held(attempt, rank, kind, segment, share))

    def keep_fetched(self, holder: str, parts: list[Part]) -> None:
        """Keep what another node supplied under that holder's name, in place of an earlier step's."""
        with self.lock:
            for part in self.fetched.pop(holder, []):
                close(part.segment)
            self.fetched[holder] = parts

    def release(self, attempt: int) -> None:
        """Free everything of this attempt and earlier ones. Jobs of the saver have descriptors of their own."""
        with self.lock:
            for held in [held for held in self.items if held.attempt <= attempt]:
                self._drop(held)
            for holder in [h for h in self.fetched if _attempt_of(h) <= attempt]:
                for part in self.fetched.pop(holder):
                    close(part.segment)

    def _drop(self, held: Held) -> None:
        self.items.remove(held)
        close(held.segment)

    def of(self, attempt: int, rank: int, kind: str) -> Segment | None:
        """The segment of a rank, if it has one."""
        held = self._held(attempt, rank, kind)
        return held.segment if held is not None else None

    def _held(self, attempt: int, rank: int, kind: str) -> Held | None:
        with self.lock:
            hits = [h for h in self.items if (h.attempt, h.rank, h.kind) == (attempt, rank, kind)]
        return hits[-1] if hits else None

    # -- offers ---------------------------------------------------------------------------------------------------

    def offers(self, attempt: int, live: dict[int, int]) -> list[dict[str, Any]]:
        """What this node can supply at the end of `attempt`. `live`: clean survivors, rank → step.

        As JSON of `control.consistency.Offer`; tiers by name. A boundary record counts as live where a survivor is.
        """
        found = [self._live(attempt, rank, step) for rank, step in live.items()]
        ranks = sorted({held.rank for held in self.items if held.attempt == attempt})
        for rank in ranks:
            found += self._heads(attempt, rank, set(live.values()))
            found += self._arena(attempt, rank)
        return found

    def holder(self, attempt: int, rank: int, kind: str) -> str:
        return f"{self.agent}/a{attempt}/rank-{rank}/{kind}"

    def _offer(self, tier: str, step: int, attempt: int, rank: int, kind: str, pieces: list[str]) -> dict[str, Any]:
        holder = self.holder(attempt, rank, kind)
        return {"tier": tier, "step": step, "agent": self.agent, "holder": holder, "pieces": pieces, "attempt": attempt}

    def _live(self, attempt: int, rank: int, step: int) -> dict[str, Any]:
        return self._offer("LIVE", step, attempt, rank, "salvage", ["all", f"rank:{rank}"])

    def _heads(self, attempt: int, rank: int, live_steps: set[int]) -> list[dict[str, Any]]:
        heads = self._held(attempt, rank, "heads")
        if heads is None:
            return []
        found = []
        for label in heads.labels():
            meta = heads.facts(label)
            if meta is None or self._lacks_buffers(attempt, label.step, meta):
                continue
            if not self._speaks_for_main(attempt, rank, label.step):
                continue
            tier = "LIVE" if label.step in live_steps else "MEMORY"
            found.append(self._offer(tier, label.step, attempt, rank, "heads", ["head"]))
        return found

    def _lacks_buffers(self, attempt: int, step: int, meta: dict[str, Any]) -> bool:
        """Only rank 0's buffers count; without its record of this step a head is half a state."""
        if not meta["buffers"]:
            return False
        buffers = self.of(attempt, 0, "buffers")
        return buffers is None or buffers.find(attempt, step) is None

    def _speaks_for_main(self, attempt: int, rank: int, step: int) -> bool:
        """rank 0's `run.state` counts. Another rank's record stands in for it only where both were equal so far."""
        if rank == 0:
            return True
        main, mine = self._held(attempt, 0, "heads"), self._held(attempt, rank, "heads")
        if main is None or mine is None or main.segment.find(attempt, step) is not None:
            return False
        theirs, own = main.facts_at(step - 1), mine.facts_at(step - 1)
        if theirs is None or own is None:
            return False
        return bool(theirs["head"]["user"] == own["head"]["user"])

    def _arena(self, attempt: int, rank: int) -> list[dict[str, Any]]:
        arena = self._held(attempt, rank, "arena")
        if arena is None:
            return []
        number, count = arena.share
        pieces = [f"share:{number}/{count}", f"rank:{rank}", *(["head"] if rank == 0 else [])]
        found = []
        for label in arena.labels():
            facts = arena.facts(label)
            if facts is not None and not facts["final"]:
                found.append(self._offer("MEMORY", label.step, attempt, rank, "arena", pieces))
        return found

    # -- parts ----------------------------------------------------------------------------------------------------

    def parts(self, holder: str, step: int, pieces: list[str]) -> list[Part]:
        """The slots behind an offer of this node (or fetched from another). Raises KeyError if they are gone."""
        with self.lock:
            if holder in self.fetched:
                return self._fetched_parts(holder, step)
            return self._own_parts(holder, step, pieces)

    def _fetched_parts(self, holder: str, step: int) -> list[Part]:
        parts, attempt = self.fetched[holder], _attempt_of(holder)
        if any(part.segment.find(attempt, step) != part.slot for part in parts):
            raise KeyError(f"step {step} of {holder} was not brought here; what is here is an earlier transfer's")
        return parts

    def _own_parts(self, holder: str, step: int, pieces: list[str]) -> list[Part]:
        attempt, rank, kind = _attempt_of(holder), int(holder.split("/")[2][5:]), holder.split("/")[3]
        if kind == "heads":
            return self._head_parts(attempt, rank, step)
        segment = self.of(attempt, rank, kind)
        slot = segment.find(attempt, step) if segment is not None else None
        if segment is None or slot is None:
            raise KeyError(f"{holder} does not hold step {step} any more")
        return [Part(segment, slot, tuple(pieces), rank)]

    def _head_parts(self, attempt: int, rank: int, step: int) -> list[Part]:
        heads = self.of(attempt, rank, "heads")
        slot = heads.find(attempt, step) if heads is not None else None
        if heads is None or slot is None:
            raise KeyError(f"the record of rank {rank} does not hold step {step} any more")
        parts = [Part(heads, slot, ("head",), rank)]
        buffers = self.of(attempt, 0, "buffers")
        slot = buffers.find(attempt, step) if buffers is not None else None
        if buffers is not None and slot is not None:
            parts.append(Part(buffers, slot, ("buffers",), 0))
        return parts


def _attempt_of(holder: str) -> int:
    return int(holder.split("/")[1][1:])


def label_at(segment: Segment, slot: int, step: int) -> SlotLabel | None:
    """The label of a slot, if it is valid and that of `step`."""
    return next((label for label in segment.labels() if (label.index, label.step) == (slot, step)), None)


def close(segment: Segment) -> None:
    """Give the descriptor back; the mapping goes with the last view of it."""
    with contextlib.suppress(OSError):
        os.close(segment.fd)
