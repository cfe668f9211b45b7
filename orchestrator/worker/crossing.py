"""Crossing a step boundary: count, record, agree, snapshot, save, stop. The order here is what makes recovery exact."""

from __future__ import annotations

import time

from orchestrator.errors import UsageError
from orchestrator.worker import faults, rng
from orchestrator.worker.agreement import Wish
from orchestrator.worker.context import park
from orchestrator.worker.data_item import Item, LoopIterator
from orchestrator.worker.leaving import Leaving
from orchestrator.worker.loops import TrainingLoop
from orchestrator.worker.shm import BEAT_NS


class Crossing(Leaving):
    """What happens at a boundary. `Run` is this plus the user's names."""

    def loop_begins(self, loop: TrainingLoop) -> None:
        """Before the first step of a loop: everything is built, and this is a state to come back to."""
        self._loop = loop
        if self.tracked.is_empty:
            raise UsageError(
                "Nothing is tracked, so nothing could be saved or restored: call `run.track(model=model, "
                "optimizer=optimizer)` "
                "before the loop."
            )
        config = loop.source.config()
        if config.get("kind") != "steps":
            self._config[loop.name] = config
        self.undo_reruns(loop)
        self.tell_facts(loop)
        if self.guard.resume_step < 0 and not (loop.record.done and self._awaited()):
            self._mark_resume_point()
        self._epoch_before = max(self._epoch_before, self.epoch_reached)
        self.agreement.every_step = loop.source.length is None and self.group.world_size > 1

    def agree_on_next(self, loop: TrainingLoop, iterator: LoopIterator) -> bool:
        """Whether all ranks have another item; the first one to run dry ends the loop for all."""
        own = iterator.has_next()
        if not self.agreement.every_step:
            return own
        agreed = self._agree_now({Wish.DRY: int(not own)})
        if self.finishing and self._item is not None and self._item.last_micro:
            self._mark_finished(loop)
            return False
        return not agreed[Wish.DRY]

    def step_begins(self, loop: TrainingLoop, item: Item) -> None:
        """Everything random in the body is a function of (seed, loop, index, rank) from here on."""
        if self._item is None:
            self._refuse_untracked()
        self._item = item
        self._forwards = 0 if item.micro == 0 else self._forwards
        if loop.record.outer < 0:
            self.epoch = item.epoch
        if self.options["step_rng"]:
            rng.seed_step(self.seed, loop.rng_key, loop.record.index, self.group.rank)
        if loop.accumulate_forwards > 1:
            self._strategy.set_sync(False)
        else:
            self._strategy.set_sync(item.last_micro)
        share = None if item.weight[0] * self.group.world_size == item.weight[1] else item.share
        if share != self._share:
            self._share = share
            self._strategy.set_share(share)
        self._step_started = time.monotonic()
        if self.context is not None:
            words = self.context.beat.words
            words[BEAT_NS] = time.monotonic_ns()
        faults.at("step", self.step)

    def boundary(self, loop: TrainingLoop, item: Item) -> bool:
        """Cross it. False if the ranks agreed to leave the loop."""
        stepped = self._count()
        if self.context is not None and self.context.poisoned:
            park()
        faults.at("boundary", self.step)
        now = time.monotonic()
        self._time_step(now)
        agreed = None if self.agreement.every_step else self.agreement.at_boundary(lambda: self._wishes(now))
        if agreed is not None:
            self._take(agreed, fresh=self.group.control is None)
        if stepped and self._due_by_step():
            self.saves.due_now()
            self._agree_now({})
        leaving = self.finishing and item.last_micro
        if leaving:
            self._mark_finished(loop)
        if stepped:
            self._save_or_snapshot()
        self._report(now)
        self._stop_if_agreed(stepped, item)
        return not leaving
