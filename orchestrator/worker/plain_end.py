"""The end of a script that nobody launched: nobody calls us then, so the interpreter has to."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from types import TracebackType
from typing import TYPE_CHECKING

from orchestrator.errors import OrchestratorError
from orchestrator.worker.report import PeerLostError

if TYPE_CHECKING:
    from orchestrator.worker.run import Run
    from orchestrator.worker.saving import PlainSaver


class GroupEnd:
    """Takes the process group down before the interpreter does.

    A reducer that outlives its gloo group aborts the process at exit (seen in half of the runs under torchrun with
    torch 2.13), and a model lives as long as the script's globals.
    """

    def __init__(self, run: Run) -> None:
        self._run, self._pid = run, os.getpid()

    def install(self) -> None:
        """Before `ScriptEnd.install`: what is registered first runs last."""
        atexit.register(self.ended)

    def ended(self) -> None:
        """At the interpreter's end, whatever ended the script."""
        if os.getpid() != self._pid:
            return
        import torch.distributed as dist

        for wrapped in getattr(self._run._strategy, "_wrapped", ()):
            for name in ("reducer", "logger", "process_group"):
                wrapped.__dict__.pop(name, None)
        self._run.group.control = None
        self._run.agreement.close()
        gc.collect()
        if dist.is_initialized():
            dist.destroy_process_group()


class ScriptEnd:
    """Commits `final` at a normal end; after an uncaught exception keeps the last resume point, and the run goes on."""

    def __init__(self, run: Run, saver: PlainSaver) -> None:
        self._run, self._saver = run, saver
        self._pid = os.getpid()
        self._failed = False
        self._previous = sys.excepthook

    def install(self) -> None:
        """Once a process."""
        sys.excepthook = self.uncaught
        atexit.register(self.ended)

    def uncaught(self, kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        """As `sys.excepthook`: the user sees the error first."""
        self._previous(kind, error, trace)
        if os.getpid() != self._pid:
            return
        self._failed = True
        reason = "stop" if issubclass(kind, KeyboardInterrupt) else "exception"
        try:
            if self._run.guard.is_clean():
                self._saver.keep_recorded(reason)
        except (OrchestratorError, OSError, RuntimeError) as another:
            _say(f"the state before the error could not be saved: {another}")
        finally:
            self._saver.abandon()

    def ended(self) -> None:
        """At the interpreter's end. A forked child that ends is no end of the run."""
        if self._failed or os.getpid() != self._pid:
            return
        try:
            self._run.complete()
        except PeerLostError:
            _say("another rank ended without completing, so there is no final checkpoint")
            self._saver.abandon()
        except OrchestratorError as error:
            _say(str(error))
            self._saver.abandon()


def _say(text: str) -> None:
    print(f"orchestrator: {text}", file=sys.stderr, flush=True)
