"""Crossing a step boundary: count, record, agree, snapshot, save, stop. The order here is what makes recovery exact."""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from orchestrator.errors import ConfigRefusedError, UsageError
from orchestrator.worker import faults, rng
from orchestrator.worker.agreement import Agreed, Agreement, Wish
from orchestrator.worker.context import WorkerContext, park
from orchestrator.worker.data_item import Item, LoopIterator
from orchestrator.worker.group import Group
from orchestrator.worker.guard import Guard
from orchestrator.worker.loops import LoopBook, TrainingLoop
from orchestrator.worker.metrics import Metrics
from orchestrator.worker.report import PeerLostError
from orchestrator.worker.reruns import Reruns
from orchestrator.worker.restore import Source
from orchestrator.worker.save_requests import SaveRequests
from orchestrator.worker.saving import LaunchedSaver, NoSaver, PlainSaver, Saver
from orchestrator.worker.shm import (
    BEAT_NS,
    ORDER_SAVE,
    ORDER_STOP,
    PHASE,
    STEPS_DONE,
    STOP_NOW,
    STOP_PREEMPTED,
    STOP_SAVE,
    Segment,
)
from orchestrator.worker.tracked import RunState
from orchestrator.worker.triggers import Triggers
from orchestrator.worker.user_state import StateCheck

SNAPSHOT_BUDGET = 0.003  # share of the time that copies to memory may take
SNAPSHOT_MOST = 0.01
PROGRESS_EVERY_S = 0.5
LEAVE_TIMEOUT_S = 60.0
IDLE_STEPS = 100  # a loop that has not trained for so many steps may be stopped in between
_LEAVE_STEPS = 20
_SMOOTHING = 0.2

IDLE, BODY, BOUNDARY, STAGING = range(4)  # phases, as the beat page shows them


class Crossing:
    """State of a rank between boundaries, and what happens at one. `Run` is this plus the user's names."""

    metrics: Metrics
    seed: int

    def __init__(self, context: WorkerContext | None, group: Group, options: dict[str, Any], source: Source | None) -> None:
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
        self.saves = SaveRequests(group, context.beat.words[ORDER_SAVE] if context is not None else 0)
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

    # -- tracking and restoring -----------------------------------------------------------------------------------

    def _track(self, named: dict[str, Any], per_rank: Sequence[str]) -> None:
        fresh = self.tracked.is_empty
        written = not fresh and self.guard.has_written()
        self.tracked.add(named, set(per_rank))
        if self.context is not None:
            self.context.mark("build")
        if self.source is not None:
            self._restore(list(named), fresh)
        else:
            self._check_same_everywhere()
        if fresh:
            self.tracked.watch(self._before_step, self._after_step)
        if not written:
            self.guard.rebase()
            if self.source is not None and self.guard.resume_step < 0 and not self._awaited():
                self._mark_resume_point()
        if self.context is not None:
            self.context.mark("restore")

    def _restore(self, names: list[str], first: bool) -> None:
        source = self.source
        if source is None:
            raise AssertionError("nothing to restore from")
        trees = dict(source.head.get("tracked", {}))
        trees.update(source.head.get("per_rank", {}).get(str(self.group.rank), {}).get("tracked", {}))
        known = [name for name in names if name in trees]
        strangers = [name for name in names if name not in trees]
        if first and strangers and trees:  # what a later phase tracks may well be new
            raise UsageError(
                f"The checkpoint of step {self.step} holds {', '.join(trees)}, but not {', '.join(strangers)}: it would "
                "start anew in the middle of the run. Track it by its old name, or start a new run with `--run-name`."
            )
        try:
            notices = self.tracked.load(trees, source.fetch, known)
        except ConfigRefusedError as error:
            raise UsageError(str(error)) from None
        for notice in notices:
            self.notice(notice)

    def _awaited(self) -> set[str]:
        """Names that the checkpoint holds and the script has not tracked yet: without them this rank's state is not whole."""
        if self.source is None:
            return set()
        own = self.source.head.get("per_rank", {}).get(str(self.group.rank), {}).get("tracked", {})
        return {*self.source.head.get("tracked", {}), *own} - set(self.tracked.names)

    def undo_reruns(self, loop: TrainingLoop) -> None:
        """Where a loop goes on, or turns out to be done, what code before it did once more to the state is undone."""
        source = self.source
        if source is None or not loop.record.restored or self.step > self._first_step:
            return
        names = self.tracked.names if self.guard.has_written() else self.reruns.changed()
        if names:
            self._restore(names, False)
            self.guard.rebase()
        if self.reruns.state_changed():
            self.state.clear()
            self.state.update(json.loads(self._user_at_start))

    def _check_same_everywhere(self) -> None:
        """Replicated means replicated: a value that differs between ranks would silently become rank 0's."""
        if self.group.control is None:
            return
        digest = self.tracked.digest(self._synced_ids())
        extremes = torch.tensor([digest, -digest], dtype=torch.int64)  # greatest and least: every rank sees a difference
        options = torch.distributed.AllreduceOptions()
        options.reduceOp = torch.distributed.ReduceOp.MAX
        self.group.control.allreduce([extremes], options).wait()
        if extremes.tolist() != [digest, -digest]:
            raise UsageError(
                f"What rank {self.group.rank} tracks is not what other ranks track ({', '.join(self.tracked.names)}): names, "
                "shapes or initial values differ. Build the same on every rank, after `run.prepare(model)`; name what is "
                "meant to differ in `track(…, per_rank=[…])`."
            )

    def _synced_ids(self) -> set[int]:
        """Parameters and buffers of wrapped modules: the wrapper has broadcast rank 0's."""
        if self._strategy.name == "none":
            return set()
        wrapped = [module for module in self.tracked.modules.values() if hasattr(module, "reducer")]
        return {id(tensor) for module in wrapped for tensor in (*module.parameters(), *module.buffers())}

    # -- hooks ----------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer: Any) -> None:
        if self._item is not None and not self._item.last_micro:
            raise UsageError(
                f"optimizer.step() in microbatch {self._item.micro + 1} of a step: gradients are exchanged on the last one. "
                "Guard it: `if run.last_microbatch: optimizer.step(); optimizer.zero_grad()`."
            )
        if not self._strategy.exchanged():
            raise UsageError(
                "optimizer.step() on gradients that were not exchanged between ranks: the body ran fewer forward passes than "
                "`accumulate` says, or backward ran under `no_sync`."
            )
        faults.at("pre_step", self.step, optimizer)
        self.guard.pre_step(optimizer)
        faults.at("mid_step", self.step, optimizer)

    def _after_step(self, optimizer: Any) -> None:
        self.guard.post_step(optimizer)
        faults.at("post_step", self.step, optimizer)

    def _after_forward(self, module: torch.nn.Module) -> None:
        """Nobody can complete this step's reduction before rank 0's backward: now its buffers are the next step's."""
        if not torch.is_grad_enabled():
            return
        faults.at("forward", self.step, module)
        self._forwards += 1
        loop = self._loop
        if loop is not None and loop.accumulate_forwards > 1:
            self._strategy.set_sync((self._forwards + 1) % loop.accumulate_forwards == 0)
        if self.guard.resume_step >= 0:
            self.saver.candidate(self.step + 1)

    # -- loops ----------------------------------------------------------------------------------------------------

    def loop_begins(self, loop: TrainingLoop) -> None:
        """Before the first step of a loop: everything is built, and this is a state to come back to."""
        self._loop = loop
        if self.tracked.is_empty:
            raise UsageError(
                "Nothing is tracked, so nothing could be saved or restored: call `run.track(model=model, optimizer=optimizer)` "
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

    def _refuse_untracked(self) -> None:
        """Before the first step that is trained here: state that nobody tracks would be missing from later checkpoints."""
        if self.source is None or self.step > self._first_step:
            return
        lost = sorted(set(self.source.head.get("tracked", {})) - set(self.tracked.names))
        if lost:
            raise UsageError(
                f"The checkpoint of step {self.step} holds {', '.join(lost)}, which the script does not track: later "
                "checkpoints would lack it. Track it before the loop, or start a new run with `--run-name`."
            )

    def loop_ends(self, loop: TrainingLoop) -> None:
        """What follows a loop draws the same random numbers whether its last step ran in this process or not."""
        self._loop = None
        self._item = None
        rng.seed_all(rng.derive(self.seed, "after", loop.rng_key, loop.record.index))
        self.reruns.mark()

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
            words[BEAT_NS], words[PHASE] = time.monotonic_ns(), BODY
        faults.at("step", self.step)

    def boundary(self, loop: TrainingLoop, item: Item) -> bool:
        """Cross it. False if the ranks agreed to leave the loop."""
        stepped = self._count()
        if self.context is not None and self.context.poisoned:
            park()
        faults.at("boundary", self.step)
        now = time.monotonic()
        self._time_step(now)
        agreed = None if self.agreement.every_step else self.agreement.at_boundary(self._wishes(now))
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

    def _mark_finished(self, loop: TrainingLoop) -> None:
        """The ranks have agreed to finish: no later launch enters this loop again."""
        loop.record.done = "finish"
        if self.guard.is_clean():
            self.saver.record(self.step, self.head())

    def _mark_resume_point(self) -> None:
        self.saver.record(self.step, self.head())
        self.guard.resume_point(self.step)
        if self.context is not None:
            self.context.beat.words[STEPS_DONE] = self.step - self._first_step
            if not self._stepped_told and self.step > self._first_step:
                self._tell_first_step()

    def _tell_first_step(self) -> None:
        context = self.context
        if context is None:
            return
        self._stepped_told = True
        context.mark("first_step")
        context.tell({"op": "stepped", "step": self.step, "at": time.monotonic(), "phases": context.phases})

    def left_by_break(self, where: str = "") -> None:
        """`break`: all ranks must have left at the same step, or the next collective would hang. `where`: the script's line,
        if this is called while the loop is being dropped: then an exception would be lost, and this rank fails at once.
        """
        loop = self._loop
        if loop is None:
            return
        if self._counts:
            loop.advance()
        loop.record.done = "break"
        if not self._count() and self.guard.is_clean():
            self.saver.record(self.step, self.head())
        if self.group.control is not None and not self._all_leave():
            error = UsageError(
                f"Rank {self.group.rank} left the loop by `break`{where and ' at '}{where} in step {self.step} while another "
                "rank went on; one rank's wish to end is `run.finish(reason)`."
            )
            if not where:
                raise error
            self._fail_at_once(error)
        self.loop_ends(loop)

    def _all_leave(self) -> bool:
        deadline_s = max(LEAVE_TIMEOUT_S, _LEAVE_STEPS * self._step_s)
        try:
            return self._same_steps(self.agreement.now(self._leaving, deadline_s))
        except PeerLostError as error:
            if "timed out" not in str(error).lower():
                raise
            return False

    @property
    def _leaving(self) -> dict[Wish, int]:
        return {Wish.LEAVING: 1, Wish.MOST_STEPS: self.step, Wish.LEAST_STEPS: -self.step}

    def _same_steps(self, agreed: Agreed) -> bool:
        """Whether all ranks leave, after equally many steps."""
        return not agreed[Wish.STAYING] and agreed[Wish.MOST_STEPS] == -agreed[Wish.LEAST_STEPS]

    def _fail_at_once(self, error: UsageError) -> NoReturn:
        """As if `error` had ended the script here."""
        if self.context is not None:
            from orchestrator.worker import entry

            entry._failed(self.context, error, "exception")
        print(f"orchestrator: {error}", file=sys.stderr, flush=True)
        os._exit(error.exit_code)

    # -- agreement ------------------------------------------------------------------------------------------------

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

    _stop_agreed = 0

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
        for name in self.saves.alone(together):
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
        """Learn what a copy costs: the first one also makes plans and takes memory, and a busy machine makes outliers."""
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

    def _stop_if_agreed(self, stepped: bool, item: Item) -> None:
        """At a resume point; at once if nothing is to be saved, or if the loop does not train."""
        self._idle = 0 if stepped else self._idle + item.last_micro
        if self._stop_agreed == STOP_NOW or (self._stop_agreed and (stepped or self._stops_idle())):
            self._leave_for_good()

    def _stops_idle(self) -> bool:
        if self._idle < IDLE_STEPS or not self.guard.is_clean():
            return False
        self._stage(self._stop_reason, "")
        return True

    def _leave_for_good(self) -> None:
        """The group agreed to stop here; what had to be saved is staged."""
        if self.context is not None:
            self.context.tell({"op": "stopped", "step": self.step})
            park()

    # -- salvage (called by the side thread) -----------------------------------------------------------------------

    @property
    def salvageable(self) -> bool:
        """Whether there is a resume point to come back to."""
        return self.guard.resume_step >= 0

    def salvage_segment(self) -> Segment:
        """Everything this rank holds of its last resume point."""
        return self.saver.write_whole(self.guard.resume_step)

    # -- telling --------------------------------------------------------------------------------------------------

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

    # -- the end --------------------------------------------------------------------------------------------------

    def _wait_for_all(self) -> None:
        """From here on nobody changes anything."""
        agreed = self.agreement.now(self._leaving)
        if not self._same_steps(agreed):
            theirs = "is still in its loop" if agreed[Wish.STAYING] else "took more or fewer"
            raise UsageError(
                f"The script ended on rank {self.group.rank} after step {self.step} while another rank {theirs}; all ranks "
                "must take the same steps. One rank's wish to end is `run.finish(reason)`."
            )

    def complete(self) -> None:
        """The script has ended normally: stage what is trained as `final`, and say so."""
        if self._loop is not None:  # left by an exception that the script took as its way out
            self.left_by_break()
        trained = self.step - self._first_step
        done_before = self.source is not None and self.source.reason == "final" and trained == 0
        if not self.tracked.is_empty and not done_before:
            self._wait_for_all()
            self.saver.stage(self.step, self.head(waits=True), "final", "")
            self.agreement.now({})  # until the last share is staged, each rank is the others' way back
        said = f"complete at step {self.step}; raise epochs or name a new run" if done_before else ""
        if said and self.context is None:
            self.notice(said)
        self.saver.finish(self.step, self.finish_reason)
        if not self._stepped_told:
            self._tell_first_step()  # a group that had nothing left to train has recovered too
        if self.context is not None:
            why = self.finish_reason or said
            self.context.tell({"op": "finished", "step": self.step, "trained": trained, "why": why, "again": done_before})


def snapshot_stride(copy_s: float, step_s: float) -> int:
    """Steps between copies to memory: within SNAPSHOT_BUDGET, or once a second if that takes no more than 1 %."""
    cheap = math.ceil(copy_s / (SNAPSHOT_BUDGET * step_s))
    dear = math.ceil(copy_s / (SNAPSHOT_MOST * step_s))
    return max(1, dear, min(cheap, math.ceil(1.0 / step_s)))


def _saver(context: WorkerContext | None, group: Group, options: dict[str, Any], tracked: RunState) -> Saver:
    if context is not None:
        return LaunchedSaver(context, group, tracked)
    return PlainSaver(group, options, tracked) if options.get("storage") else NoSaver()
