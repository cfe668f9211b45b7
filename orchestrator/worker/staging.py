"""What a rank leaves in the agent's shared memory: boundary records, buffers, snapshots of its share, whole copies."""

from __future__ import annotations

import json
import time
from typing import Any

import torch

from orchestrator.storage.segment import deal
from orchestrator.worker import faults
from orchestrator.worker.context import WorkerContext
from orchestrator.worker.copying import CopyPlan, Named, slot_meta
from orchestrator.worker.group import Group
from orchestrator.worker.shm import Segment
from orchestrator.worker.tracked import RunState

RECORD_SLOTS = 4  # a label is written at most two steps ahead of the slowest survivor
ARENA_SLOTS = 3  # one being written out, one newest, one being filled
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
        self._buffer_versions: int = -1
        self._arena: Segment | None = None
        self._plan: CopyPlan | None = None
        self._owners: tuple[list[str], dict[str, int]] = ([], {})

    # -- boundary record ------------------------------------------------------------------------------------------

    def record(self, step: int, head: dict[str, Any]) -> None:
        """The JSON half of resume point `step`, and on rank 0 its buffers, unless the candidate is still right."""
        meta = slot_meta("[]", head, **self._labels(step), buffers=len(self._state.buffers()))
        if self._heads is None or len(meta) > self._heads.meta_cap:
            self._heads = self._new_segment("heads", RECORD_SLOTS, 2 * len(meta) + _SLACK, 0)
        slot = step % RECORD_SLOTS
        self._heads.begin(slot)
        self._heads.complete(slot, self._context.attempt, step, meta, 0)
        self.record_buffers(step)

    def record_buffers(self, step: int) -> None:
        """Write rank 0's module buffers as those of `step`, if they are not there already."""
        if self._group.rank != 0:
            return
        buffers = self._state.live_buffers()
        if not buffers:
            return
        versions = sum(tensor._version for _, tensor in buffers)
        segment = self._buffer_segment(buffers)
        if versions == self._buffer_versions and segment.find(self._context.attempt, step) is not None:
            return
        plan = self._buffer_plan
        if plan is None:
            raise AssertionError("a buffer segment comes with its plan")
        slot = step % RECORD_SLOTS
        segment.begin(slot)
        plan.copy(segment, slot)
        meta = slot_meta(plan.table_json, {}, **self._labels(step))
        segment.complete(slot, self._context.attempt, step, meta, plan.data_bytes)
        self._buffer_versions = versions

    def _buffer_segment(self, buffers: Named) -> Segment:
        if self._buffers is None or self._buffer_plan is None or not self._buffer_plan.fits(buffers):
            self._buffer_plan = CopyPlan(buffers)
            meta_bytes = len(self._buffer_plan.table_json) + _SLACK
            self._buffers = self._new_segment("buffers", RECORD_SLOTS, meta_bytes, self._buffer_plan.data_bytes)
        return self._buffers

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
            arena = self._new_segment("arena", ARENA_SLOTS, 2 * meta_bytes + _SLACK, data_bytes)
            self._arena = arena
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

    def write_whole(self, step: int, head: dict[str, Any], with_buffers: bool) -> Segment:
        """Everything this rank holds, in a fresh segment of one slot."""
        tensors = [*self._state.replicated(), *self._state.per_rank()]
        if with_buffers:
            tensors += self._state.buffers()
        plan = CopyPlan(tensors)
        meta = slot_meta(plan.table_json, head, **self._labels(step), **self._trees())
        segment = Segment.create("whole", 1, len(meta), plan.data_bytes)
        plan.copy(segment, 0)
        segment.complete(0, self._context.attempt, step, meta, plan.data_bytes)
        return segment

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

    def _new_segment(self, kind: str, slots: int, meta_bytes: int, data_bytes: int) -> Segment:
        segment = Segment.create(kind, slots, meta_bytes, data_bytes)
        self._context.tell({"op": "segment", "kind": kind}, (segment.fd,))
        return segment
