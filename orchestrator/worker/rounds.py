"""What ranks agree on, and the saves and copies that follow from it."""

from __future__ import annotations

import math
import time

from orchestrator.errors import UsageError
from orchestrator.worker.agreement import Agreed, Wish
from orchestrator.worker.shm import ORDER_SAVE, ORDER_STOP, STOP_PREEMPTED, STOP_SAVE
from orchestrator.worker.tracking import Tracking

SNAPSHOT_BUDGET = 0.003  # share of the time that copies to memory may take
SNAPSHOT_MOST = 0.01


class Rounds(Tracking):
    """Adds agreement and saving."""

    _stop_agreed = 0

    def _wishes(self, now: float) -> dict[Wish, int]:
        words = self.context.beat.words if self.context is not None else None
        time_is_up = self.group.rank == 0 and self.triggers.by_time(now - self._last_save, max(self._copy_s, 0.001))
        orders = words[ORDER_SAVE] if words is not None else 0
        return self.saves.wishes(orders, self.saver.in_flight > 0, time_is_up) | {
            Wish.STAYING: 1,
            Wish.STEP_US: int(self._step_s * 1e6),
            Wish.COPY_US: int(self._copy_s * 1e6),
            Wish.FINISH: int(bool(self.finish_reason)),
            Wish.STOP: words[ORDER_STOP] if words is not None else 0,
        }

    def _agree_now(self, more: dict[Wish, int]) -> Agreed:
        """A blocking round of all wishes and `more`."""
        agreed = self.agreement.now(self._wishes(time.monotonic()) | more)
        self._take(agreed, fresh=True)
        return agreed

    def _take(self, agreed: Agreed, fresh: bool) -> None:
        """Turn what was agreed on into what every rank does at this or the next resume point."""
        if agreed[Wish.LEAVING]:
            raise UsageError(
                f"Another rank left the loop by `break`, or ended its script, before step {self.step}, while rank "
                f"{self.group.rank} went on; one rank's wish to end is `run.finish(reason)`."
            )
        self.saves.take(agreed, fresh)
        self._stop_agreed = max(self._stop_agreed, agreed[Wish.STOP])
        self.finishing = self.finishing or bool(agreed[Wish.FINISH])
        if agreed[Wish.STEP_US] > 0 and agreed[Wish.COPY_US] > 0:
            self._snapshot_stride = snapshot_stride(agreed[Wish.COPY_US] / 1e6, agreed[Wish.STEP_US] / 1e6)

    def _due_by_step(self) -> bool:
        before, self._epoch_before = self._epoch_before, self.epoch_reached
        return self.triggers.by_step(self.step, self.epoch_reached, before)

    @property
    def epoch_reached(self) -> int:
        """Epochs completed so far, as the running loop's cursor has it."""
        cursor = self._loop.record.cursor if self._loop is not None else None
        return max(self.epoch, (cursor or {}).get("epoch", 0))

    # -- saving ---------------------------------------------------------------------------------------------------

    def _save_or_snapshot(self) -> None:
        together = self._saves_together
        if self._stop_agreed in (STOP_SAVE, STOP_PREEMPTED):
            self._stage(self._stop_reason, "")
        elif self.saves.due(together) and not self.saves.busy:
            self._stage(*self.saves.begin(together))
        elif self.step % self._snapshot_stride == 0:
            self._copied(self.saver.snapshot(self.step, self.head()))
        self._save_alone()

    def _save_alone(self) -> None:
        """What rank 0 saves by itself."""
        for name in self.saves.alone(self._saves_together):
            self.saver.stage_whole(self.step, self.head(waits=True), "requested", name)

    @property
    def _stop_reason(self) -> str:
        return "preemption" if self._stop_agreed == STOP_PREEMPTED else "stop"

    @property
    def _saves_together(self) -> bool:
        """Whether a checkpoint takes all ranks, because each holds something of its own."""
        readers = any(record.reader is not None for record in self.book.records.values())
        return self.group.world_size > 1 and (self.tracked.holds_per_rank or readers)

    def _copied(self, stall_s: float) -> None:
        """Learn what a copy costs: the first one also makes plans and takes memory, and a busy machine makes
        outliers.
        """
        self._copies += 1
        if self._copies <= 2 or self._copy_s == 0.0:
            self._copy_s = stall_s
        else:
            self._copy_s = min(stall_s, 0.8 * self._copy_s + 0.2 * min(stall_s, 3 * self._copy_s))

    def _stage(self, reason: str, name: str) -> None:
        self._copied(self.saver.stage(self.step, self.head(waits=True), reason, name))
        self.saves.staged(self.agreement.pending)
        self._last_save = time.monotonic()

    def request_save(self, name: str) -> None:
        """`run.save`: exact at the next resume point if rank 0 asks, else at the next agreed one."""
        from orchestrator.storage.layout import check_save_name

        if name:
            check_save_name(name)
        self.saves.call(name)


def snapshot_stride(copy_s: float, step_s: float) -> int:
    """Steps between copies to memory: within SNAPSHOT_BUDGET, or once a second if that takes no more than 1 %."""
    cheap = math.ceil(copy_s / (SNAPSHOT_BUDGET * step_s))
    dear = math.ceil(copy_s / (SNAPSHOT_MOST * step_s))
    return max(1, dear, min(cheap, math.ceil(1.0 / step_s)))
