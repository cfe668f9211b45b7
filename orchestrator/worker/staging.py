"""What a rank leaves in the agent's shared memory: boundary records, buffers, snapshots of its share, whole copies."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from orchestrator.storage.segment import deal
from orchestrator.worker import faults
from orchestrator.worker.context import WorkerContext, park
from orchestrator.worker.copying import CopyPlan, Named, slot_meta
from orchestrator.worker.group import Group
from orchestrator.worker.shm import Segment
from orchestrator.worker.tracked import RunState

RECORD_SLOTS = 4  # a label is written at most two steps ahead of the slowest survivor
ARENA_SLOTS = 3  # one being written out, one newest, one being filled
WHOLE_SEGMENTS = 3  # saves of the script's own that may be on their way to storage
_SLACK = 4096


def nbytes(tensors: Named) -> int:
    return sum(tensor.numel() * tensor.element_size() for _, tensor in tensors)


class Stager:
    """Fills this rank's segments. Only the main thread calls it, except `write_whole`, which takes what it is given."""

    def __init__(self, context: WorkerContext, group: Group, state: RunState) -> None:
        self._context = context
        self._group = group
        self._state = state
        self._heads: Segment | None = None
        self._buffers: Segment | None = None
        self._buffer_plan: CopyPlan | None = None
        self._buffer_marks: list[tuple[int, int]] = []
        self._wholes: list[Segment] = []
        self._arena: Segment | None = None
        self._plan: CopyPlan | None = None
        self._owners: tuple[list[str], dict[str, int]] = ([], {})

    # -- boundary record ------------------------------------------------------------------------------------------

    def record(self, step: int, head: dict[str, Any]) -> None:
        """The JSON half of resume point `step`, and on rank 0 its buffers, unless the candidate is still right."""
        meta = slot_meta("[]", head, **self._labels(step), buffers=len(self._state.buffers()))
        heads = self._heads
        if heads is None or len(meta) > heads.meta_cap:
            heads = _grown("heads", heads, 2 * len(meta) + _SLACK, 0)
        slot = step % RECORD_SLOTS
        heads.begin(slot)
        heads.complete(slot, self._context.attempt, step, meta, 0)
        self._heads = self._announced("heads", heads, self._heads)
        self.record_buffers(step)

    def record_buffers(self, step: int) -> None:
        """Write rank 0's module buffers as those of `step`, if they are not there already."""
        if self._group.rank != 0:
            return
        buffers = self._state.live_buffers()
        if not buffers:
            return
        marks = [(tensor.data_ptr(), tensor._version) for _, tensor in buffers]
        known = self._buffers is not None and self._buffers.find(self._context.attempt, step) is not None
        if known and marks == self._buffer_marks:
            return
        # Every tensor, every step: no version betrays what batch norm's kernels and writes by `.data` do to one.
        plan = self._buffer_plan
        if plan is None or not plan.fits(buffers):
            plan = self._buffer_plan = CopyPlan(buffers)
        segment, slot = self._buffer_segment(plan), step % RECORD_SLOTS
        segment.begin(slot)
        plan.copy(segment, slot)
        meta = slot_meta(plan.table_json, {}, **self._labels(step))
        segment.complete(slot, self._context.attempt, step, meta, plan.data_bytes)
        self._buffer_marks = marks
        self._buffers = self._announced("buffers", segment, self._buffers)

    def _buffer_segment(self, plan: CopyPlan) -> Segment:
        segment, meta_bytes = self._buffers, len(plan.table_json) + _SLACK
        if segment is not None and meta_bytes <= segment.meta_cap and plan.data_bytes <= segment.data_cap:
            return segment
        return _grown("buffers", segment, meta_bytes, plan.data_bytes)

    # -- snapshots of this rank's share ---------------------------------------------------------------------------

    @property
    def saves_in_flight(self) -> int:
        """Slots that the saver has not written out yet."""
        return self._arena.pinned if self._arena is not None else 0

    def snapshot(self, step: int, head: dict[str, Any], pin: bool, final: bool = False) -> dict[str, Any] | None:
        """Copy this rank's share of resume point `step`. Returns slot, bytes and the stall, or None if no slot is free.

        `final` marks the state after the script's end: no state to go on from, although its step may be an earlier
        one's.
        """
        started = time.perf_counter()
        share = self._share()
        if self._plan is None or not self._plan.fits(share):
            self._plan = self._new_plan(share)
        meta = slot_meta(self._plan.table_json, head, **self._labels(step), **self._trees(), final=final)
        arena = self._arena_for(len(meta), self._plan.data_bytes)
        slot = arena.free_slot()
        if slot is None:
            return None
        arena.begin(slot)
        self._plan.copy(arena, slot)
        faults.at("copying" if pin else "snapshot", step)
        arena.complete(slot, self._context.attempt, step, meta, self._plan.data_bytes, pin)
        self._arena = self._announced("arena", arena, self._arena)
        stall_s = time.perf_counter() - started
        return {"slot": slot, "bytes": self._plan.data_bytes, "stall_ms": round(stall_s * 1e3, 3)}

    def _new_plan(self, share: Named) -> CopyPlan:
        """Tensors of the same names that are other objects: some optimizer makes its state anew, so look every time."""
        plan = CopyPlan(share)
        if self._plan is not None and self._plan.table == plan.table:
            self._state.replaces_tensors = True
        return plan

    def _trees(self) -> dict[str, Any]:
        """The structure of all tracked state: replicated, and under `own_trees` this rank's."""
        shared, own = self._state.split(self._state.trees())
        return {"trees": shared, "own_trees": {str(self._group.rank): own} if own else {}}

    def _arena_for(self, meta_bytes: int, data_bytes: int) -> Segment:
        arena = self._arena
        if arena is None or meta_bytes > arena.meta_cap or data_bytes > arena.data_cap:
            return Segment.create("arena", ARENA_SLOTS, 2 * meta_bytes + _SLACK, data_bytes)
        return arena

    def _share(self) -> list[tuple[str, torch.Tensor]]:
        """Buffers are rank 0's; other replicated tensors are dealt out over the node's ranks; per-rank ones are its
        own.
        """
        replicated, own = self._state.replicated(), self._state.per_rank()
        names = [name for name, _ in replicated]
        if names != self._owners[0]:
            sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in replicated}
            self._owners = (names, deal(sizes, self._group.local_world_size))
        owners = self._owners[1]
        mine = [pair for pair in replicated if owners[pair[0]] == self._group.local_rank]
        buffers = self._state.buffers() if self._group.rank == 0 else []
        return [*mine, *buffers, *own]

    # -- whole copies ---------------------------------------------------------------------------------------------

    def write_salvage(self, step: int, head: dict[str, Any]) -> Segment:
        """Everything this rank holds but buffers, in a fresh segment of one slot."""
        plan = CopyPlan([*self._state.replicated(), *self._state.per_rank()])
        meta = slot_meta(plan.table_json, head, **self._labels(step), **self._trees())
        segment = Segment.create("salvage", 1, len(meta), plan.data_bytes)
        plan.copy(segment, 0)
        segment.complete(0, self._context.attempt, step, meta, plan.data_bytes)
        return segment

    def write_whole(self, step: int, head: dict[str, Any]) -> Segment:
        """Everything this rank holds, pinned in a segment of one slot. Which step is saved must not depend on how fast
        storage is, so it waits if the saver still has WHOLE_SEGMENTS to write.
        """
        plan = CopyPlan([*self._state.replicated(), *self._state.per_rank(), *self._state.buffers()])
        meta = slot_meta(plan.table_json, head, **self._labels(step), **self._trees())
        whole = self._free_whole(len(meta), plan.data_bytes)
        whole.begin(0)
        plan.copy(whole, 0)
        whole.complete(0, self._context.attempt, step, meta, plan.data_bytes, pin=True)
        return whole

    def _free_whole(self, meta_bytes: int, data_bytes: int) -> Segment:
        while True:
            free = [segment for segment in self._wholes if not segment.is_pinned(0)]
            for segment in free:
                if meta_bytes <= segment.meta_cap and data_bytes <= segment.data_cap:
                    return segment
                self._wholes.remove(segment)
                segment.close()
            if len(self._wholes) < WHOLE_SEGMENTS:
                self._wholes.append(Segment.create("whole", 1, 2 * meta_bytes + _SLACK, data_bytes))
                return self._wholes[-1]
            if self._context.poisoned:
                park()
            time.sleep(0.001)

    def head_at(self, step: int) -> dict[str, Any] | None:
        """The head recorded for resume point `step`, if it is still there."""
        slot = self._heads.find(self._context.attempt, step) if self._heads is not None else None
        if self._heads is None or slot is None:
            return None
        head: dict[str, Any] = json.loads(self._heads.meta(slot))["head"]
        return head

    def _labels(self, step: int) -> dict[str, int]:
        context = self._context
        return {
            "attempt": context.attempt,
            "step": step,
            "rank": context.rank,
            "world_size": context.world_size,
            "local_rank": context.local_rank,
            "local_world_size": context.local_world_size,
        }

    def _announced(self, kind: str, segment: Segment, known: Segment | None) -> Segment:
        """Hand a new segment to the agent. Only a valid one: there it replaces the one that it grew out of."""
        if segment is not known:
            self._context.tell({"op": "segment", "kind": kind}, (segment.fd,))
            segment.close()
        return segment


def _grown(kind: str, older: Segment | None, meta_bytes: int, data_bytes: int) -> Segment:
    """A segment of boundary records with room for so much, and with all that the older one holds."""
    if older is None:
        return Segment.create(kind, RECORD_SLOTS, meta_bytes, data_bytes)
    room = (max(meta_bytes, older.meta_cap), max(data_bytes, older.data_cap))
    segment = Segment.create(kind, RECORD_SLOTS, *room)
    segment.take_over(older)
    return segment
