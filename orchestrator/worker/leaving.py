"""How a rank leaves a loop or the run: `break`, `run.finish`, a stop, the script's end. All ranks leave together."""

from __future__ import annotations

import os
import sys
from typing import NoReturn

from orchestrator.errors import UsageError
from orchestrator.worker import rng
from orchestrator.worker.agreement import Agreed, Wish
from orchestrator.worker.context import park
from orchestrator.worker.data_item import Item
from orchestrator.worker.loops import TrainingLoop
from orchestrator.worker.report import PeerLostError
from orchestrator.worker.rounds import Rounds
from orchestrator.worker.shm import STOP_NOW

LEAVE_TIMEOUT_S = 60.0
IDLE_STEPS = 100  # a loop that has not trained for so many steps may be stopped in between
_LEAVE_STEPS = 20


class Leaving(Rounds):
    """Adds every way out."""

    def _mark_finished(self, loop: TrainingLoop) -> None:
        """The ranks have agreed to finish: no later launch enters this loop again."""
        loop.record.done = "finish"
        if self.guard.is_clean():
            self.saver.record(self.step, self.head())

    def left_by_break(self, where: str = "") -> None:
        """`break`: all ranks must have left at the same step, or the next collective would hang. `where`: the script's
        line, if this is called while the loop is being dropped: then an exception would be lost, and this rank fails
        at once.
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
                f"Rank {self.group.rank} left the loop by `break`{where and ' at '}{where} in step {self.step} while "
                "another rank went on; one rank's wish to end is `run.finish(reason)`."
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
            if self._stop_agreed != STOP_NOW:
                self._save_alone()
            self.context.tell({"op": "stopped", "step": self.step})
            park()

    def _wait_for_all(self) -> None:
        """From here on nobody changes anything."""
        agreed = self.agreement.now(self._leaving)
        if not self._same_steps(agreed):
            theirs = "is still in its loop" if agreed[Wish.STAYING] else "took more or fewer"
            raise UsageError(
                f"The script ended on rank {self.group.rank} after step {self.step} while another rank {theirs}; all "
                "ranks must take the same steps. One rank's wish to end is `run.finish(reason)`."
            )

    def complete(self) -> None:
        """The script has ended normally: stage what is trained as `final`, and say so."""
        if self._loop is not None:  # left by an exception that the script took as its way out
            self.left_by_break()
        trained = self.step - self._first_step
        done_before = self.source is not None and self.source.reason == "final" and trained == 0
        if not self.tracked.is_empty and not done_before:
            self._wait_for_all()
            self._save_alone()
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
            self.context.tell(
                {"op": "finished", "step": self.step, "trained": trained, "why": why, "again": done_before}
            )

    def loop_ends(self, loop: TrainingLoop) -> None:
        """What follows a loop draws the same random numbers whether its last step ran in this process or not."""
        self._loop = None
        self._item = None
        rng.seed_all(rng.derive(self.seed, "after", loop.rng_key, loop.record.index))
        self.reruns.mark()
