"""The side thread of a worker: it hears the agent while the main thread computes, hangs in a collective or is
parked.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import TYPE_CHECKING, Any

import torch.distributed

from orchestrator.worker import run as run_module
from orchestrator.worker import wire
from orchestrator.worker.context import WorkerContext

if TYPE_CHECKING:
    from orchestrator.worker.run import Run

OWN_CHECKPOINTS = (
    "The script joined its process group without orchestrator.init(): the whole group starts again from the script's "
    "beginning, and its own checkpoints count. With init() and track() a lost worker costs no step."
)


class SideThread(threading.Thread):
    """Answers `drain` (can this rank's state be used?) and `salvage` (write it), without any collective."""

    def __init__(self, context: WorkerContext) -> None:
        super().__init__(name="orchestrator-side", daemon=True)
        self._context = context

    def run(self) -> None:
        while True:
            try:
                received = wire.receive(self._context.sock)
            except OSError:
                received = None
            if received is None:
                self._end()
                return
            message, descriptors = received
            for descriptor in descriptors:
                os.close(descriptor)
            self._handle(message)

    def _handle(self, message: wire.Message) -> None:
        operation = message["op"]
        if operation == "drain":
            threading.Thread(target=self._drain, args=(message,), name="orchestrator-drain", daemon=True).start()
        elif operation == "salvage":
            self._salvage(message)
        elif operation == "save":
            run = run_module.ACTIVE
            if run is not None:
                run.saves.order_named(message["name"])

    def _end(self) -> None:
        """The agent is gone: nobody will use what this process does. Its data loaders go with it."""
        os.killpg(0, signal.SIGKILL)

    def _drain(self, message: dict[str, Any]) -> None:
        run = run_module.ACTIVE
        clean = False
        if run is not None and run.salvageable:
            clean = run.guard.settle(time.monotonic() + message["deadline_s"])
        step = run.guard.resume_step if run is not None else -1
        if run is None and torch.distributed.is_initialized():
            self._context.tell({"op": "notice", "text": OWN_CHECKPOINTS})
        self._context.tell({"op": "offer", "clean": clean, "step": step})

    def _salvage(self, message: dict[str, Any]) -> None:
        run = run_module.ACTIVE
        answer: dict[str, Any] = {"op": "salvaged", "election": message["election"], "ok": False, "why": ""}
        if run is None:
            self._context.tell(answer | {"why": "this rank had not joined the group"})
            return
        try:
            self._write(run, message, answer)
        except Exception as error:
            self._context.tell(answer | {"why": f"{type(error).__name__}: {error}"})

    def _write(self, run: Run, message: dict[str, Any], answer: dict[str, Any]) -> None:
        if run.guard.resume_step != message["step"]:
            self._context.tell(answer | {"why": f"the state here is that of step {run.guard.resume_step}"})
            return
        segment = run.salvage_segment()
        if run.guard.resume_step != message["step"] or not run.guard.is_clean():
            self._context.tell(answer | {"why": "a tracked tensor was written to while it was being copied"})
            return
        self._context.tell(answer | {"ok": True, "step": message["step"]}, (segment.fd,))
        segment.close()
