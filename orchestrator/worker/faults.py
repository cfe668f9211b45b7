"""Faults on purpose: how `chaos` makes this rank fail at a chosen moment. Costs nothing when nothing is armed.

A process fails once: with the first fault whose moment has come all others are disarmed, and wait for the next group.
The agent is told before the fault strikes, so that it never strikes twice.
"""

from __future__ import annotations

import ctypes
import os
import signal
import threading
import time
from typing import Any

import torch

from orchestrator.worker.context import WorkerContext


class ChaosError(RuntimeError):
    """Raised on purpose by a fault of kind `raise`."""


_armed: list[dict[str, Any]] = []
_context: WorkerContext | None = None


def arm(context: WorkerContext) -> None:
    """Arm the faults meant for this rank that have not struck yet. One for the start-up strikes after its delay."""
    global _context
    _context = context
    waiting = {fault["id"] for fault in context.faults}
    mine = [fault for fault in context.faults if fault["rank"] == context.rank and fault.get("after") not in waiting]
    _armed[:] = mine
    for fault in mine:
        if fault["moment"] == "start":
            _armed.clear()
            _strike_later(fault)
            return


def at(place: str, step: int, subject: Any = None) -> None:
    """The main thread passes a place in its code, `step` steps being complete (as `run.step`).

    Places: step, forward (subject: the module), pre_step, mid_step and post_step (the optimizer), boundary, copying and
    staged (a save), snapshot (a copy to memory only).
    """
    for fault in _armed:
        if step >= fault["step"] and _reached(fault, place, step):
            _armed.clear()
            _begin(fault, place, subject)
            return


def _reached(fault: dict[str, Any], place: str, step: int) -> bool:
    moment, offset = fault["moment"], fault.get("offset", 0.5)
    if moment == "optimizer":
        return place == ("pre_step" if offset < 1 / 3 else "mid_step" if offset < 2 / 3 else "post_step")
    if moment == "save":
        # A run that went on beyond the step may never save again: then a copy to memory has to do.
        return place == ("copying" if offset < 0.5 else "staged") or (place == "snapshot" and step > fault["step"])
    return bool(place == {"any": "step", "backward": "forward"}.get(moment, moment))


def _begin(fault: dict[str, Any], place: str, subject: Any) -> None:
    if fault["moment"] == "any":
        _strike_later(fault)
    elif fault["moment"] == "backward":
        _strike_in_backward(fault, subject)
    else:
        if place == "mid_step":
            _spoil_half(subject)
        _strike(fault)


def _strike_later(fault: dict[str, Any]) -> None:
    """At a moment that no line of code knows of: from a thread, `delay_s` from now."""
    main = threading.main_thread().ident

    def wait() -> None:
        time.sleep(fault.get("delay_s", 0.0))
        if fault["kind"] == "raise":
            _tell(fault)
            _raise_in(main, _text(fault))
        else:
            _strike(fault)

    threading.Thread(target=wait, name="orchestrator-fault", daemon=True).start()


def _strike_in_backward(fault: dict[str, Any], module: torch.nn.Module) -> None:
    """When the gradient of one parameter is there, the others' are not: peers wait in the middle of the exchange."""
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    chosen = parameters[min(int(fault.get("offset", 0.5) * len(parameters)), len(parameters) - 1)]
    chosen.register_hook(lambda gradient: _strike(fault))  # type: ignore[no-untyped-call]


def _spoil_half(optimizer: Any) -> None:
    """What a fault between two parameter updates leaves behind, at its worst: nobody may ever use it."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    with torch.no_grad():
        for parameter in parameters[: (len(parameters) + 1) // 2]:
            parameter.add_(1)


def _raise_in(thread_id: int | None, text: str) -> None:
    class Struck(ChaosError):
        """An exception set from outside is made without arguments."""

        def __init__(self) -> None:
            super().__init__(text)

    Struck.__name__, Struck.__qualname__ = ChaosError.__name__, ChaosError.__qualname__
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread_id or 0), ctypes.py_object(Struck))


def _text(fault: dict[str, Any]) -> str:
    return f"{fault['id']}: rank {fault['rank']} was made to fail ({fault['moment']}, step {fault['step']})"


def _tell(fault: dict[str, Any]) -> None:
    if _context is not None:
        _context.tell({"op": "fault", "id": fault["id"], "at": time.monotonic()})


def _strike(fault: dict[str, Any]) -> None:
    _tell(fault)
    kind = fault["kind"]
    if kind == "raise":
        raise ChaosError(_text(fault))
    if kind == "exit":
        os._exit(fault.get("code", 3))
    os.kill(os.getpid(), fault.get("signal", signal.SIGKILL) if kind == "kill" else signal.SIGKILL)
    threading.Event().wait()
