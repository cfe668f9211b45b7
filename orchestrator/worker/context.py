"""What a forked worker knows about its group, handed over by the agent. Plain Python has no context."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

from orchestrator.worker import wire
from orchestrator.worker.shm import POISON, BeatPage


@dataclass
class WorkerContext:
    """One rank of one attempt. `options` is the part of the RunSpec that workers need, as JSON."""

    attempt: int
    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    run_name: str
    log_path: str
    store_host: str
    store_port: int
    options: dict[str, Any]
    resume: dict[str, Any] | None
    segments: list[int]
    sock: socket.socket
    beat: BeatPage
    faults: list[dict[str, Any]] = field(default_factory=list)
    forked_at: float = 0.0
    phases: dict[str, float] = field(default_factory=dict)

    def tell(self, message: wire.Message, descriptors: tuple[int, ...] = ()) -> None:
        """Send to the agent. A lost agent is not this caller's business: the side thread ends the process."""
        with contextlib.suppress(OSError):
            wire.send(self.sock, message, descriptors)

    @property
    def poisoned(self) -> bool:
        """Whether the group of this attempt is being torn down: no state may change any more."""
        return self.beat.words[POISON] >= self.attempt

    def mark(self, phase: str) -> None:
        """Book the time since the last mark under `phase` (seconds)."""
        now = time.monotonic()
        self.phases[phase] = self.phases.get(phase, 0.0) + now - self.forked_at
        self.forked_at = now


CURRENT: WorkerContext | None = None


def park() -> None:
    """Stand still until the agent ends this process; the interpreter lock is free meanwhile."""
    context = CURRENT
    if context is not None:
        from orchestrator.worker.shm import PARKED

        context.beat.words[PARKED] = 1
    while True:
        threading.Event().wait(3600)
