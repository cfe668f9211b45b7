"""`run.track`: what is tracked, restoring it, and the hooks that watch its optimizers and forward passes."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from orchestrator.errors import ConfigRefusedError, UsageError
from orchestrator.worker import faults
from orchestrator.worker.context import park
from orchestrator.worker.loops import TrainingLoop
from orchestrator.worker.standing import Standing


class Tracking(Standing):
    """Adds the tracked state to where a rank stands."""

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
            if self.context is not None:
                register_optimizer_step_pre_hook(self._before_any_step)
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
                f"The checkpoint of step {self.step} holds {', '.join(trees)}, but not {', '.join(strangers)}: it "
                "would start anew in the middle of the run. Track it by its old name, or start a new run with "
                "`--run-name`."
            )
        try:
            notices = self.tracked.load(trees, source.fetch, known)
        except ConfigRefusedError as error:
            raise UsageError(str(error)) from None
        for notice in notices:
            self.notice(notice)

    def _awaited(self) -> set[str]:
        """Names that the checkpoint holds and the script has not tracked yet: without them this rank's state is not
        whole.
        """
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
        extremes = torch.tensor(
            [digest, -digest], dtype=torch.int64
        )  # greatest and least: every rank sees a difference
        options = torch.distributed.AllreduceOptions()
        options.reduceOp = torch.distributed.ReduceOp.MAX
        self.group.control.allreduce([extremes], options).wait()
        if extremes.tolist() != [digest, -digest]:
            raise UsageError(
                f"What rank {self.group.rank} tracks is not what other ranks track ({', '.join(self.tracked.names)}): "
                "names, shapes or initial values differ. Build the same on every rank, after `run.prepare(model)`; "
                "name what is meant to differ in `track(…, per_rank=[…])`."
            )

    def _synced_ids(self) -> set[int]:
        """Parameters and buffers of wrapped modules: the wrapper has broadcast rank 0's."""
        if self._strategy.name == "none":
            return set()
        wrapped = [module for module in self.tracked.modules.values() if hasattr(module, "reducer")]
        return {id(tensor) for module in wrapped for tensor in (*module.parameters(), *module.buffers())}

    def _refuse_untracked(self) -> None:
        """Before the first step that is trained here: state that nobody tracks would be missing from later
        checkpoints.
        """
        if self.source is None or self.step > self._first_step:
            return
        lost = sorted(self._awaited())
        if lost:
            raise UsageError(
                f"The checkpoint of step {self.step} holds {', '.join(lost)}, which the script does not track: later "
                "checkpoints would lack it. Track it before the loop, or start a new run with `--run-name`."
            )

    def _before_step(self, optimizer: Any) -> None:
        if self._item is not None and not self._item.last_micro:
            raise UsageError(
                f"optimizer.step() in microbatch {self._item.micro + 1} of a step: gradients are exchanged on the "
                "last one. "
                "Guard it: `if run.last_microbatch: optimizer.step(); optimizer.zero_grad()`."
            )
        if not self._strategy.exchanged():
            raise UsageError(
                "optimizer.step() on gradients that were not exchanged between ranks: the body ran fewer forward "
                "passes than "
                "`accumulate` says, or backward ran under `no_sync`."
            )
        faults.at("pre_step", self.step, optimizer)
        self.guard.pre_step(optimizer)
        faults.at("mid_step", self.step, optimizer)

    def _before_any_step(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """An optimizer that nobody tracks may hold parameters that are tracked, and a side thread may be copying."""
        tracked = self.tracked.optimizers.values()
        if self.context is not None and self.context.poisoned and all(optimizer is not one for one in tracked):
            park()

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
