"""What an agent holds in shared memory for its workers, dead or alive: who can supply which pieces of which step."""

from __future__ import annotations

import contextlib
import json
import os
from dataclasses import dataclass, field
from typing import Any

from orchestrator.worker.shm import Segment, SlotLabel


@dataclass
class Held:
    """One segment of one rank of one attempt. `kind`: heads, buffers, arena, salvage, whole, fetched."""

    attempt: int
    rank: int
    kind: str
    segment: Segment


@dataclass(frozen=True)
class Part:
    """A slot that supplies pieces of a state."""

    segment: Segment
    slot: int
    pieces: tuple[str, ...]
    rank: int


@dataclass
class Holdings:
    """All segments of a node, newest attempt last."""

    agent: str
    items: list[Held] = field(default_factory=list)
    fetched: dict[str, list[Part]] = field(default_factory=dict)

    def add(self, attempt: int, rank: int, kind: str, segment: Segment) -> None:
        """Keep a segment; it replaces an older one of the same rank and kind in the same attempt."""
        for old in [h for h in self.items if (h.attempt, h.rank, h.kind) == (attempt, rank, kind)]:
            if kind != "whole":
                self._drop(old)
        self.items.append(Held(attempt, rank, kind, segment))

    def release(self, attempt: int) -> None:
        """Free everything of this attempt and earlier ones. The saver has descriptors of its own."""
        for held in [held for held in self.items if held.attempt <= attempt]:
            self._drop(held)
        for holder in [h for h in self.fetched if int(h.split("/")[1][1:]) <= attempt]:
            for part in self.fetched.pop(holder):
                close(part.segment)

    def _drop(self, held: Held) -> None:
        self.items.remove(held)
        close(held.segment)

    def of(self, attempt: int, rank: int, kind: str) -> Segment | None:
        """The segment of a rank, if it has one."""
        hits = [h.segment for h in self.items if (h.attempt, h.rank, h.kind) == (attempt, rank, kind)]
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
        heads = self.of(attempt, rank, "heads")
        if heads is None:
            return []
        found = []
        for label in _of_attempt(heads, attempt):
            meta = json.loads(heads.meta(label.index))
            if self._lacks_buffers(attempt, label.step, meta):
                continue
            if not self._speaks_for_main(attempt, rank, label.step, meta):
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

    def _speaks_for_main(self, attempt: int, rank: int, step: int, meta: dict[str, Any]) -> bool:
        """rank 0's `run.state` counts. Another rank's record stands in for it only where both were equal so far."""
        if rank == 0:
            return True
        main = self.of(attempt, 0, "heads")
        if main is None or main.find(attempt, step) is not None:
            return False
        mine = self.of(attempt, rank, "heads")
        slot, own = main.find(attempt, step - 1), mine.find(attempt, step - 1) if mine else None
        if slot is None or own is None or mine is None:
            return False
        return bool(json.loads(main.meta(slot))["head"]["user"] == json.loads(mine.meta(own))["head"]["user"])

    def _arena(self, attempt: int, rank: int) -> list[dict[str, Any]]:
        arena = self.of(attempt, rank, "arena")
        found = []
        for label in _of_attempt(arena, attempt) if arena is not None else []:
            meta = json.loads(arena.meta(label.index)) if arena is not None else {}
            if meta.get("final"):
                continue
            pieces = [f"share:{meta['local_rank']}/{meta['local_world_size']}", f"rank:{rank}"]
            found.append(
                self._offer("MEMORY", label.step, attempt, rank, "arena", pieces + (["head"] if rank == 0 else []))
            )
        return found

    # -- parts ----------------------------------------------------------------------------------------------------

    def parts(self, holder: str, step: int, pieces: list[str]) -> list[Part]:
        """The slots behind an offer of this node (or fetched from another). Raises KeyError if they are gone."""
        if holder in self.fetched:
            return self.fetched[holder]
        _agent, attempt_text, rank_text, kind = holder.split("/")
        attempt, rank = int(attempt_text[1:]), int(rank_text[5:])
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


def _of_attempt(segment: Segment, attempt: int) -> list[SlotLabel]:
    return [label for label in segment.labels() if label.attempt == attempt]


def close(segment: Segment) -> None:
    """Give the descriptor back; the mapping goes with the last view of it."""
    with contextlib.suppress(OSError):
        os.close(segment.fd)
