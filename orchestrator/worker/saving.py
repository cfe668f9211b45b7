"""Where a rank's state goes at a boundary: the agent's shared memory, storage directly, or nowhere."""

from __future__ import annotations

from typing import Any, Protocol

from orchestrator.worker import faults
from orchestrator.worker.context import WorkerContext
from orchestrator.worker.group import Group
from orchestrator.worker.shm import Segment
from orchestrator.worker.staging import Stager
from orchestrator.worker.tracked import RunState


class Saver(Protocol):
    """What a boundary asks for. Steps are resume points; `head` is the checkpoint head as this rank sees it."""

    in_flight: int  # saves that are not in storage yet

    def record(self, step: int, head: dict[str, Any]) -> None:
        """Keep what a step changes before its first optimizer step."""
        ...

    def candidate(self, step: int) -> None:
        """Rank 0's buffers after a forward pass: those of `step`, if the step at hand completes."""
        ...

    def snapshot(self, step: int, head: dict[str, Any]) -> float:
        """Copy this rank's share to memory. Returns the stall in seconds."""
        ...

    def stage(self, step: int, head: dict[str, Any], reason: str, name: str) -> float:
        """Copy this rank's share to memory for storage; all ranks call it for the same step. Returns the stall."""
        ...

    def stage_whole(self, step: int, head: dict[str, Any], reason: str, name: str) -> None:
        """This rank alone supplies the whole state for a checkpoint."""
        ...

    def write_whole(self, step: int) -> Segment:
        """Everything this rank holds of resume point `step`, in a segment (side thread, main thread parked or
        blocked).
        """
        ...

    def finish(self, step: int, why: str) -> None:
        """The script has ended normally at `step`; all is staged. What this process itself writes is closed."""
        ...


class LaunchedSaver:
    """Under the launcher: shared memory that the agent owns; its saver process writes to storage."""

    def __init__(self, context: WorkerContext, group: Group, tracked: RunState) -> None:
        self._context = context
        self._group = group
        self._stager = Stager(context, group, tracked)

    @property
    def in_flight(self) -> int:
        return self._stager.saves_in_flight

    def record(self, step: int, head: dict[str, Any]) -> None:
        self._stager.record(step, head)

    def candidate(self, step: int) -> None:
        self._stager.record_buffers(step)

    def snapshot(self, step: int, head: dict[str, Any]) -> float:
        done = self._stager.snapshot(step, head, pin=False)
        return done["stall_ms"] / 1e3 if done else 0.0

    def stage(self, step: int, head: dict[str, Any], reason: str, name: str) -> float:
        done = self._stager.snapshot(step, head, pin=True, final=reason == "final")
        if done is None:
            raise AssertionError("two saves in flight leave no slot; staging waits for the first one by agreement")
        self._context.tell(
            {"op": "staged", "step": step, "reason": reason, "name": name, "shares": self._group.world_size, **done}
        )
        faults.at("staged", step)
        return float(done["stall_ms"]) / 1e3

    def stage_whole(self, step: int, head: dict[str, Any], reason: str, name: str) -> None:
        segment = self._stager.write_whole(step, head)
        message = {"op": "staged_whole", "step": step, "reason": reason, "name": name, "bytes": segment.data_bytes(0)}
        self._context.tell(message, (segment.fd,))

    def write_whole(self, step: int) -> Segment:
        return self._stager.write_salvage(step, self._stager.head_at(step) or {})

    def finish(self, step: int, why: str) -> None:
        pass


class PlainSaver:
    """Plain Python with ORCHESTRATOR_STORAGE: this process writes and commits by itself, at the boundary."""

    in_flight = 0

    def __init__(self, group: Group, options: dict[str, Any], tracked: RunState) -> None:
        from orchestrator.worker.plain_writer import PlainWriter

        self._writer = PlainWriter(group, options, tracked)

    def record(self, step: int, head: dict[str, Any]) -> None:
        self._writer.record(step, head)

    def candidate(self, step: int) -> None:
        pass

    def snapshot(self, step: int, head: dict[str, Any]) -> float:
        return 0.0

    def stage(self, step: int, head: dict[str, Any], reason: str, name: str) -> float:
        return self._writer.write(step, head, reason, name)

    def stage_whole(self, step: int, head: dict[str, Any], reason: str, name: str) -> None:
        self._writer.write_alone(step, head, reason, name)

    def write_whole(self, step: int) -> Segment:
        raise AssertionError("nobody salvages a process outside the launcher")

    def finish(self, step: int, why: str) -> None:
        self._writer.close(step, why)

    def keep_recorded(self, reason: str) -> bool:
        """After an exception: commit the last resume point, whose tensors are still there. False: no need."""
        return self._writer.write_recorded(reason)

    def abandon(self) -> None:
        """Let go of the run, which stays unfinished."""
        self._writer.abandon()


class NoSaver:
    """Plain Python without ORCHESTRATOR_STORAGE: nothing is stored."""

    in_flight = 0

    def record(self, step: int, head: dict[str, Any]) -> None:
        pass

    def candidate(self, step: int) -> None:
        pass

    def snapshot(self, step: int, head: dict[str, Any]) -> float:
        return 0.0

    def stage(self, step: int, head: dict[str, Any], reason: str, name: str) -> float:
        return 0.0

    def stage_whole(self, step: int, head: dict[str, Any], reason: str, name: str) -> None:
        pass

    def write_whole(self, step: int) -> Segment:
        raise AssertionError("nobody salvages a process outside the launcher")

    def finish(self, step: int, why: str) -> None:
        pass
