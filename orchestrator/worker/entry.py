"""The main of a forked worker: become a process of its own, wait for the specification, run the user's script."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import gc
import io
import os
import random
import runpy
import signal
import socket
import sys
import threading
import time
import types
from typing import Any

from orchestrator.worker import context as context_module
from orchestrator.worker import report, wire
from orchestrator.worker.context import WorkerContext, park
from orchestrator.worker.shm import BeatPage

_PR_SET_PDEATHSIG = 1
_KEPT: list[Any] = []


def die_with_parent() -> None:
    """SIGKILL for this process when its parent's forking thread ends."""
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def child_main(sock_fd: int) -> None:
    """Serve as a spare until the agent says what to be: a worker or the host of an attempt's store."""
    die_with_parent()
    os.setsid()
    _be_first_to_go()
    os.closerange(3, sock_fd)
    os.closerange(sock_fd + 1, 4096)
    sock = socket.socket(fileno=sock_fd)
    from orchestrator.worker import warm

    warm.up()
    received = wire.receive(sock)
    if received is None:
        os._exit(0)
    message, descriptors = received
    if message["op"] == "store":
        _serve_store(sock, descriptors[0], message)
    else:
        os._exit(_work(sock, message, descriptors))


def _be_first_to_go() -> None:
    """When memory runs out the kernel should take a worker, which can be replaced, not the agent."""
    with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
        file.write("1000")


def _serve_store(sock: socket.socket, listen_fd: int, message: dict[str, Any]) -> None:
    """Host the TCPStore of one attempt until the agent closes the socket: no rank's death takes it along."""
    from torch.distributed import TCPStore

    store = TCPStore(
        message["host"], message["port"], is_master=True, wait_for_workers=False, master_listen_fd=listen_fd
    )
    while wire.receive(sock) is not None:
        pass
    del store
    os._exit(0)


def _work(sock: socket.socket, spec: dict[str, Any], descriptors: list[int]) -> int:
    _redirect_output(descriptors[0])
    os.environ.clear()
    os.environ.update(spec["env"])
    os.chdir(spec["cwd"])
    ours = WorkerContext(
        **spec["context"],
        segments=descriptors[2:],
        sock=sock,
        beat=BeatPage(descriptors[1]),
        forked_at=spec["started"],
    )
    context_module.CURRENT = ours
    ours.mark("fork")
    _settle(spec)
    _keep_process_groups()
    from orchestrator.worker.salvage import SideThread

    SideThread(ours).start()
    from orchestrator.worker import faults

    faults.arm(ours)
    return run_program(ours, spec)


class _LogFile(io.FileIO):
    """A rank's log. What a full or vanished disk does not take is lost; `print` does not end the training for it."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return memoryview(data).nbytes

    @classmethod
    def text(cls, descriptor: int) -> io.TextIOWrapper:
        """As Python opens its own stdout, flushed at every line."""
        raw = cls(descriptor, "w", closefd=False)
        return io.TextIOWrapper(
            io.BufferedWriter(raw), encoding="utf-8", errors="backslashreplace", line_buffering=True
        )


def _redirect_output(log_fd: int) -> None:
    os.dup2(log_fd, 1)
    os.dup2(log_fd, 2)
    os.close(log_fd)
    null = os.open(os.devnull, os.O_RDONLY)
    os.dup2(null, 0)
    os.close(null)
    sys.stdin = open(0, closefd=False)  # noqa: SIM115 - lives as long as the process
    sys.stdout, sys.stderr = _LogFile.text(1), _LogFile.text(2)
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr


def _settle(spec: dict[str, Any]) -> None:
    """Threads, collector and randomness of a process of its own, not of a fork."""
    import torch

    gc.unfreeze()
    gc.enable()
    torch.set_num_threads(max(1, int(spec["env"].get("OMP_NUM_THREADS", "1"))))
    sys.setswitchinterval(0.001)
    random.seed()
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed()


def run_program(ours: WorkerContext, spec: dict[str, Any]) -> int:
    """Run the script to its end. Returns the exit status; a failed rank does not return but waits to be salvaged."""
    try:
        _execute(spec)
        _complete(ours)
    except SystemExit as leaving:
        code = _exit_code(leaving)
        if code != 0:
            _failed(ours, leaving, f"exit:{code}")
        try:
            _complete(ours)
        except BaseException as error:
            _failed(ours, error, report.cause_of(error))
    except BaseException as error:
        _failed(ours, error, report.cause_of(error))
    threading._shutdown()  # type: ignore[attr-defined]  # what a plain interpreter does first: join the user's threads
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    return 0


def _keep_process_groups() -> None:
    """Let no process group of the script be destroyed before this process ends.

    torch 2.13 can deadlock there: dropping the last reference holds the interpreter lock and joins gloo's threads, one
    of which waits for that lock to drop its own last work. So a rank hung after its script's last line.
    """
    from torch.distributed import distributed_c10d as c10d

    make = getattr(c10d, "_new_process_group_helper", None)
    if make is None:
        return

    def kept(*args: Any, **kwargs: Any) -> Any:
        made = make(*args, **kwargs)
        _KEPT.append(made)
        return made

    c10d._new_process_group_helper = kept


def _exit_code(leaving: SystemExit) -> int:
    if leaving.code is None:
        return 0
    if isinstance(leaving.code, int):
        return leaving.code & 0xFF
    print(leaving.code, file=sys.stderr)
    return 1


def _execute(spec: dict[str, Any]) -> None:
    sys.argv = [spec["script"], *spec["args"]]
    if spec["module"]:
        sys.path.insert(0, os.getcwd())
        runpy.run_module(spec["script"], run_name="__main__", alter_sys=True)
        return
    path = os.path.abspath(spec["script"])
    sys.path.insert(0, os.path.dirname(path))
    main = types.ModuleType("__main__")
    main.__dict__.update(__file__=path, __spec__=None, __builtins__=__builtins__, __cached__=None)
    sys.modules["__main__"] = main
    with open(path, "rb") as file:
        code = compile(file.read(), path, "exec")
    exec(code, main.__dict__)


def _complete(ours: WorkerContext) -> None:
    """The script's normal end: what is trained is staged as `final`, and the agent is told."""
    from orchestrator.worker import run as run_module

    active = run_module.ACTIVE
    if active is not None:
        active.complete()
        return
    if ours.attempt > 1:
        from orchestrator.worker.salvage import OWN_CHECKPOINTS

        ours.tell({"op": "notice", "text": OWN_CHECKPOINTS})
    ours.tell({"op": "finished", "step": 0, "trained": -1, "why": "the script never called orchestrator.init()"})


def _trains_without_us() -> bool:
    """Whether the script formed its process group by itself, as scripts for torchrun do."""
    import torch.distributed

    from orchestrator.worker import run as run_module

    return run_module.ACTIVE is None and torch.distributed.is_initialized()


def _failed(ours: WorkerContext, error: BaseException, cause: str) -> None:
    """Report and stand still: this rank's state may be the one that survives."""
    if ours.poisoned and report.is_lost_peer(error):
        park()
    description = report.describe(error, ours.log_path)
    description["unseen"] = _trains_without_us()
    # The agent appends the traceback to this log and keeps it from the console: the driver tells it, once.
    sys.stdout.flush()
    sys.stderr.flush()
    from orchestrator.worker import run as run_module

    step = run_module.ACTIVE.step if run_module.ACTIVE is not None else 0
    ours.tell({"op": "failed", "cause": cause, "step": step, "error": description, "at": time.monotonic()})
    park()
