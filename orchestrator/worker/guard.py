"""Whether this rank's state still is that of its last resume point: the dirty word and who moves it.

A worker is dirty from its first optimizer pre-step hook until the next boundary. The hook sets the word *before* it
looks at the poison, and the side thread looks at the word *after* the poison was set, so one of the two always sees the
other.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from orchestrator.worker.context import WorkerContext, park
from orchestrator.worker.shm import DIRTY, PARKED, RESUME_STEP

STUCK_AFTER_S = 0.3
_POLL_S = 0.0003


class Guard:
    """Follows one rank from resume point to resume point."""

    def __init__(self, context: WorkerContext | None, versions: Callable[[bool], Any]) -> None:
        self._context = context
        self._versions_now = versions
        self._versions: Any = None
        self._main_thread = threading.main_thread().ident
        self.resume_step = -1
        self.dirty = False
        self.stepped: set[int] = set()  # ids of the optimizers that stepped since the last boundary

    def pre_step(self, optimizer: Any) -> None:
        """An optimizer is about to change parameters."""
        if self._context is not None and self._context.poisoned:
            park()  # before the word below: a side thread that copies right now must not see it move
        was_dirty, self.dirty = self.dirty, True
        if self._context is not None:
            self._context.beat.words[DIRTY] = 1
            if self._context.poisoned:
                self.dirty = was_dirty
                self._context.beat.words[DIRTY] = int(was_dirty)
                park()

    def post_step(self, optimizer: Any) -> None:
        """An optimizer has changed its parameters."""
        self.stepped.add(id(optimizer))

    def has_written(self, deep: bool = False) -> bool:
        """Whether any tracked tensor moved since the last resume point, announced or not. `deep`: or was replaced."""
        return bool(self.dirty or self._versions_now(deep) != self._versions)

    def resume_point(self, step: int) -> None:
        """From here on the state is that of `step`, until something writes."""
        self.resume_step = step
        self._versions = self._versions_now(False)
        self.dirty = False
        if self._context is not None:
            self._context.beat.words[RESUME_STEP] = step
            self._context.beat.words[DIRTY] = 0

    def rebase(self) -> None:
        """More is tracked from now on; nothing was written since the last resume point."""
        self._versions = self._versions_now(False)

    def is_clean(self) -> bool:
        """Whether live tensors are, right now, those of `resume_step`."""
        return self.resume_step >= 0 and not self.has_written(deep=True)

    def settle(self, deadline: float) -> bool:
        """Wait (side thread, poison set) until this rank is clean (True), or never will be (False)."""
        watch = _StandstillWatch(self._main_thread)
        while True:
            if self.is_clean():
                return True
            parked = self._context is not None and self._context.beat.words[PARKED]
            if parked or self.resume_step < 0 or watch.stands_still() or time.monotonic() > deadline:
                return self.is_clean()
            time.sleep(_POLL_S)


class _StandstillWatch:
    """Notices that the main thread waits in one place: blocked in a collective that will never end."""

    def __init__(self, thread_id: int | None) -> None:
        self._thread_id = thread_id or 0
        self._seen: Any = None
        self._since = time.monotonic()

    def stands_still(self) -> bool:
        frame = sys._current_frames().get(self._thread_id)
        place = (id(frame), frame.f_lasti if frame else 0, _cpu_ticks())
        now = time.monotonic()
        if place != self._seen:
            self._seen, self._since = place, now
        return now - self._since > STUCK_AFTER_S


def _cpu_ticks() -> bytes:
    """User and system time of the main thread, in clock ticks, as the kernel prints them."""
    pid = os.getpid()
    try:
        with open(f"/proc/self/task/{pid}/stat", "rb") as file:
            return b" ".join(file.read().rsplit(b")", 1)[1].split()[11:13])
    except OSError:
        return b""
