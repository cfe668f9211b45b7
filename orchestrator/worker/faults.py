"""Faults on purpose: how `chaos` makes this rank fail at a chosen moment. Costs nothing when nothing is armed."""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

from orchestrator.worker.context import WorkerContext

MOMENTS = ("start", "step", "forward", "backward", "optimizer", "boundary", "save", "any")


class ChaosError(RuntimeError):
    """Raised on purpose by a fault of kind `raise`."""


_armed: list[dict[str, Any]] = []
_context: WorkerContext | None = None


def arm(context: WorkerContext) -> None:
    """Arm the faults meant for this rank that have not fired yet. One for the start-up strikes after its delay."""
    global _context
    _context = context
    _armed[:] = [fault for fault in context.faults if fault["rank"] == context.rank]
    for fault in [fault for fault in _armed if fault["moment"] == "start"]:
        if context.attempt >= fault.get("attempt", 1):
            _armed.remove(fault)
            _strike_later(fault, fault.get("delay_s", 0.0))


def at(moment: str, step: int) -> None:
    """The main thread passes `moment` of step `step` (completed steps, as `run.step`)."""
    if not _armed:
        return
    for fault in [fault for fault in _armed if step >= fault["step"]]:
        if fault["moment"] == moment:
            _armed.remove(fault)
            _strike(fault)
        elif moment == "step" and fault["moment"] in ("any", "backward"):
            _armed.remove(fault)
            _strike_later(fault, fault.get("delay_s", 0.0))


def _strike_later(fault: dict[str, Any], delay_s: float) -> None:
    """At a moment that no line of code knows of: from a thread, `delay_s` after the step's begin."""
    main = threading.main_thread().ident

    def wait() -> None:
        time.sleep(delay_s)
        if fault["kind"] == "raise":
            _tell(fault)
            _raise_in(main)
        else:
            _strike(fault)

    threading.Thread(target=wait, name="orchestrator-fault", daemon=True).start()


def _raise_in(thread_id: int | None) -> None:
    import ctypes

    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id or 0), ctypes.py_object(ChaosError))


def _tell(fault: dict[str, Any]) -> None:
    if _context is not None:
        _context.tell({"op": "fault", "id": fault["id"], "at": time.monotonic()})


def _strike(fault: dict[str, Any]) -> None:
    _tell(fault)
    kind = fault["kind"]
    if kind == "kill":
        os.kill(os.getpid(), fault.get("signal", signal.SIGKILL))
        time.sleep(60)
    elif kind == "exit":
        os._exit(fault.get("code", 3))
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif kind == "oom":
        os.kill(os.getpid(), signal.SIGKILL)
    else:
        raise ChaosError(f"fault {fault['id']} of rank {fault['rank']} at step {fault['step']} ({fault['moment']})")
