"""Where a rank stands: its step, its loops, its last resume point, and what it tells of them."""

from __future__ import annotations

import json
import time
from typing import Any

from orchestrator.worker.agreement import Agreement
from orchestrator.worker.context import WorkerContext
from orchestrator.worker.data_item import Item
from orchestrator.worker.group import Group
from orchestrator.worker.guard import Guard
from orchestrator.worker.loops import LoopBook, TrainingLoop
from orchestrator.worker.metrics import Metrics
from orchestrator.worker.reruns import Reruns
from orchestrator.worker.restore import Source
from orchestrator.worker.save_requests import SaveRequests
from orchestrator.worker.saving import LaunchedSaver, NoSaver, PlainSaver, Saver
from orchestrator.worker.shm import STEPS_DONE, Segment
from orchestrator.worker.tracked import RunState
from orchestrator.worker.triggers import Triggers
from orchestrator.worker.user_state import StateCheck

PROGRESS_EVERY_S = 0.5
_SMOOTHING = 0.2


class Standing:
    """State of a rank between boundaries. The rooms around it (tracking, rounds, leaving, crossing) act on it."""

    metrics: Metrics
    seed: int

    def __init__(
        self, context: WorkerContext | None, group: Group, options: dict[str, Any], source: Source | None
    ) -> None:
        self.context, self.group, self.options, self.source = context, group, options, source
        head = source.head if source is not None else {}
        self.step: int = head.get("step", 0)
        self.epoch: int = head.get("epoch", 0)
        self.samples: int = head.get("samples", 0)
        self.state: dict[str, Any] = head.get("user", {})
        own = head.get("per_rank", {}).get(str(group.rank), {})
        self.book = LoopBook.restore(head, own.get("readers", {}))
        self._config: dict[str, Any] = head.get("config", {})
        self._first_step = self.step
        self.tracked = RunState(group.rank)
        self.guard = Guard(context, self.tracked.mutable_versions)
        self.reruns = Reruns(self.tracked, lambda: self.state)
        self._user_at_start = json.dumps(self.state)  # `self.state` is the user's to change
        self.agreement = Agreement(group.control)
        self.triggers = Triggers.of(options["save_every"], options["save_at"])
        self.saver: Saver = _saver(context, group, options, self.tracked)
        # A run that was told to finish is complete: what comes after the loop it left has nothing to do, ever again.
        self.finishing = any(record.done == "finish" for record in self.book.records.values())
        self.finish_reason = ""
        self.saves = SaveRequests(group, 0)  # the page is this process's own: an order that came before `init` counts
        self._state_check = StateCheck()
        self._idle = 0
        self._item: Item | None = None
        self._loop: TrainingLoop | None = None
        self._forwards = 0
        self._share: float | None = None
        self._last_save = time.monotonic()
        self._last_progress = 0.0
        self._stepped_told = False
        self._step_started = 0.0
        self._step_s = 0.0
        self._snapshot_stride = 1
        self._copy_s = 0.0
        self._copies = 0
        self._epoch_before = self.epoch
        self._gradient_marks: dict[int, int] = {}
        self._strategy: Any = None

    def head(self, waits: bool = False) -> dict[str, Any]:
        """The JSON half of the state at this boundary; with metrics that a device still computes only if it `waits`."""
        small, own_small = self.tracked.recorded()
        own: dict[str, Any] = {"tracked": own_small}
        readers = {name: record.reader for name, record in self.book.records.items() if record.reader is not None}
        if readers:
            own["readers"] = readers
        head = {
            "step": self.step,
            "epoch": self.epoch,
            "samples": self.samples,
            "seed": self.seed,
            "user": self._state_check(self.state),
            "loops": {name: record.to_json() for name, record in self.book.records.items()},
            "small": small,
            "per_rank": {str(self.group.rank): own} if own["tracked"] or readers else {},
            "config": self._config,
            "strategy": self._strategy.name,
            "metrics": self.metrics.latest() if waits else self.metrics.at_hand(),
        }
        return head

    def _tell_first_step(self) -> None:
        context = self.context
        if context is None:
            return
        self._stepped_told = True
        context.mark("first_step")
        context.tell({"op": "stepped", "step": self.step, "at": time.monotonic(), "phases": context.phases})
        if self.source is not None:
            self.source.forget()  # whatever it holds is tracked by now, see `_refuse_untracked`

    def _time_step(self, now: float) -> None:
        took = now - self._step_started
        self._step_s = took if self._step_s == 0.0 else (1 - _SMOOTHING) * self._step_s + _SMOOTHING * took

    def _report(self, now: float) -> None:
        context = self.context
        if context is None or now - self._last_progress < PROGRESS_EVERY_S:
            return
        self._last_progress = now
        loop = self._loop
        index, length = self._place_in_loop(loop)
        context.tell(
            {
                "op": "progress",
                "step": self.step,
                "index": index,
                "total": length,
                "samples": self.samples,
                "epoch": self.epoch,
                "step_s": self._step_s,
                "metrics": self.metrics.latest(),
            }
        )

    def _place_in_loop(self, loop: TrainingLoop | None) -> tuple[int, int | None]:
        """Batches done and batches in all; over all epochs where `run.epochs` is around the loop."""
        if loop is None:
            return 0, None
        index: int = (loop.record.cursor or {}).get("index", 0)
        length = loop.source.length
        if length is None or loop.record.outer < 0:
            return index, length
        return loop.record.outer * length + index, length * self.book.outer_total

    def tell_facts(self, loop: TrainingLoop) -> None:
        """What only the script knows of the launch: the console prints it once."""
        if self.context is not None and self.group.rank == 0:
            facts = {
                "op": "facts",
                "loop": loop.name,
                "global_batch": loop.source.global_batch_text,
                "accumulate": getattr(getattr(loop.source, "settings", None), "accumulate", 1),
                "seed": self.seed,
                "step": self.step,
                "total": loop.source.length,
                "strategy": self._strategy.name,
                "tracked": self.tracked.names,
                "per_rank": self.tracked.holds_per_rank or loop.source.length is None,
            }
            self.context.tell(facts)

    def notice(self, text: str) -> None:
        """Tell the user something once, from rank 0."""
        if self.group.rank != 0:
            return
        if self.context is not None:
            self.context.tell({"op": "notice", "text": text})
        else:
            print(f"orchestrator: {text}", flush=True)

    def _mark_resume_point(self) -> None:
        self.saver.record(self.step, self.head())
        self.guard.resume_point(self.step)
        if self.context is not None:
            self.context.beat.words[STEPS_DONE] = self.step - self._first_step
            if not self._stepped_told and self.step > self._first_step:
                self._tell_first_step()

    # -- resume points --------------------------------------------------------------------------------------------

    def _count(self) -> bool:
        """Whether this boundary is a resume point; if so, it is recorded as one."""
        stepped = self.guard.stepped
        counts = self._counts
        carried = counts and len(stepped) > 0 and self.tracked.carries_gradients(stepped, self._gradient_marks)
        self.guard.stepped = set()
        if counts:
            self._gradient_marks = self.tracked.gradient_marks()
        if not counts:
            return False
        self.step += 1
        if carried:
            return False
        self._mark_resume_point()
        return True

    @property
    def _counts(self) -> bool:
        """Whether what has happened since the last boundary makes a step."""
        return bool(self.guard.stepped) if self.tracked.optimizers else self.guard.has_written()

    @property
    def salvageable(self) -> bool:
        """Whether there is a resume point to come back to."""
        return self.guard.resume_step >= 0

    def salvage_segment(self) -> Segment:
        """Everything this rank holds of its last resume point."""
        return self.saver.write_whole(self.guard.resume_step)


def _saver(context: WorkerContext | None, group: Group, options: dict[str, Any], tracked: RunState) -> Saver:
    if context is not None:
        return LaunchedSaver(context, group, tracked)
    return PlainSaver(group, options, tracked) if options.get("storage") else NoSaver()
