"""The warm parent of all workers of a node: a bare process that has imported torch and forks on demand.

It holds one thread and no CUDA context while it forks; that is verified after every preload, and a module that breaks
it is left out (and named) by a restart without it. Protocol, over one socket to the agent:

    agent → zygote   {"op": "fork", "id": 7} + the child's end of its own socket
    zygote → agent   {"op": "ready", "modules": […], "dropped": […]}, {"op": "forked", "id": 7, "pid": 4711},
                     {"op": "exited", "pid": 4711, "status": wait status}

The zygote ends, with all its children, on EOF of the agent's socket.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import select
import signal
import socket
import sys
import warnings
from collections.abc import Sequence

from orchestrator.worker import wire

WARM_MODULES = (
    "torch",
    "torch.distributed",
    "torch.nn.parallel",
    "torch.utils.data",
    "torch._dynamo",
    "numpy",
    "safetensors",
    "orchestrator.worker.warm",
)
# pandas brings pyarrow, whose allocator starts a thread of its own unless told not to.
_NO_THREAD = {"JE_ARROW_MALLOC_CONF": "background_thread:false", "PYTORCH_NVML_BASED_CUDA_CHECK": "1"}
_THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_NUM_THREADS")


def environment(base: dict[str, str]) -> dict[str, str]:
    """The zygote's environment: one thread everywhere, no CUDA call on import."""
    clean = {name: value for name, value in base.items() if name not in ("PYTHONUNBUFFERED",)}
    return clean | dict.fromkeys(_THREAD_VARIABLES, "1") | _NO_THREAD


def main(argv: Sequence[str] | None = None) -> None:
    """`python -m orchestrator.agent.zygote FD PARENT_PID MODULE…`; serves until the socket on FD closes."""
    descriptor, *modules = list(sys.argv[1:] if argv is None else argv)
    sock = socket.socket(fileno=int(descriptor))
    sock.set_inheritable(False)
    imported, failed, culprit = preload([*WARM_MODULES, *modules])
    if culprit in modules:
        restart_without(sock, modules, culprit)
    gc.collect()
    gc.freeze()
    wire.send(sock, {"op": "ready", "modules": imported, "failed": failed})
    Zygote(sock).serve()


def preload(modules: Sequence[str]) -> tuple[list[str], dict[str, str], str]:
    """Import what can be imported. Returns names; for those that cannot, why; and the first that leaves us
    unforkable.
    """
    imported: list[str] = []
    failed: dict[str, str] = {}
    for name in modules:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                importlib.import_module(name)
            imported.append(name)
        except BaseException as error:  # a user's module may raise anything, SystemExit included
            failed[name] = f"{type(error).__name__}: {error}"
        if not is_forkable():
            return imported, failed, name
    return imported, failed, ""


def is_forkable() -> bool:
    """One thread and no NVIDIA descriptor: a fork of this process is a whole process."""
    if len(os.listdir("/proc/self/task")) > 1:
        return False
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            if os.readlink(f"/proc/self/fd/{name}").startswith("/dev/nvidia"):
                return False
    return True


def restart_without(sock: socket.socket, modules: Sequence[str], culprit: str) -> None:
    """Start over without the module that brought a thread or a device with it."""
    keep = [name for name in modules if name != culprit]
    wire.send(sock, {"op": "dropped", "modules": [culprit]})
    sock.set_inheritable(True)
    os.execv(sys.executable, [sys.executable, "-m", "orchestrator.agent.zygote", str(sock.fileno()), *keep])


class Zygote:
    """The serving loop. Only this, the process's single thread, forks: PDEATHSIG follows the thread that forked."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        self._children: set[int] = set()
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.set_wakeup_fd(self._wake_w, warn_on_full_buffer=False)

    def serve(self) -> None:
        poller = select.poll()
        poller.register(self._sock.fileno(), select.POLLIN)
        poller.register(self._wake_r, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if self._wake_r in ready:
                with contextlib.suppress(BlockingIOError):
                    os.read(self._wake_r, 4096)
                self._reap()
            if self._sock.fileno() in ready:
                received = wire.receive(self._sock)
                if received is None:
                    self._end()
                else:
                    self._handle(*received)

    def _handle(self, message: wire.Message, descriptors: list[int]) -> None:
        if message["op"] != "fork":
            raise ValueError(f"zygote: unknown message {message['op']!r}")
        child_end = descriptors[0]
        pid = os.fork()
        if pid == 0:
            self._become_child(child_end)
        os.close(child_end)
        self._children.add(pid)
        wire.send(self._sock, {"op": "forked", "id": message["id"], "pid": pid})

    def _become_child(self, child_end: int) -> None:
        from orchestrator.worker import entry

        status = 70
        try:
            signal.set_wakeup_fd(-1)
            for number in (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_SETMASK, ())  # Ray blocks SIGINT in all that it starts
            entry.child_main(child_end)
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)

    def _reap(self) -> None:
        while True:
            try:
                info = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if info is None:
                return
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(info.si_pid, signal.SIGKILL)  # its data loaders would keep its sockets open
            _, status = os.waitpid(info.si_pid, 0)
            self._children.discard(info.si_pid)
            with contextlib.suppress(OSError):
                wire.send(self._sock, {"op": "exited", "pid": info.si_pid, "status": status})

    def _end(self) -> None:
        for pid in self._children:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        os._exit(0)


if __name__ == "__main__":
    main()
