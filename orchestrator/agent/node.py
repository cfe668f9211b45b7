"""The agent of one node, without Ray: one thread that hears zygote, saver, workers and the driver's commands.

Events for the driver are JSON objects named like `control.events`; `poll` hands them out in order. Commands are JSON,
too, and are carried out in the order given.
"""

from __future__ import annotations

import contextlib
import heapq
import os
import queue
import selectors
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from orchestrator.agent import children
from orchestrator.agent.children import Spare, StoreHost
from orchestrator.agent.group import GroupHost
from orchestrator.agent.held import Holdings, Part, label_at
from orchestrator.agent.lease import CHECK_EVERY_S, Lease, watch
from orchestrator.agent.output import OutputTail, open_log
from orchestrator.worker import wire

REFILL_AFTER_S = 0.4


@dataclass(frozen=True)
class AgentSettings:
    """What an agent is told once. `run_uri`: the run's place in storage; `env`: of workers, over the agent's own."""

    name: str
    host: str
    slots: int
    run_name: str
    run_uri: str
    log_dir: str
    script: str
    args: tuple[str, ...]
    module: bool
    cwd: str
    options: dict[str, Any]
    env: tuple[tuple[str, str], ...] = ()
    preload: tuple[str, ...] = ()
    driver_pid: int = 0
    driver_machine: str = ""  # `lease.machine_key` where that process is one
    drain_timeout_s: float = 10.0
    gpu_ids: tuple[str, ...] = ()


@dataclass
class _SaveJob:
    """What the saver was asked for, until it has answered. `descriptors`: its own, of the parts' segments."""

    message: dict[str, Any]
    parts: list[Part]
    descriptors: list[int]
    context: dict[str, Any]
    repeated: bool = False


class NodeAgent:
    """Owns zygote, saver, spares and shared memory of one node. Build it on the process's main thread."""

    def __init__(self, settings: AgentSettings, base_env: dict[str, str]) -> None:
        self.settings = settings
        self.base_env = base_env
        self.holdings = Holdings(settings.name)
        self._selector = selectors.DefaultSelector()
        self._wake_r, self._wake_w = socket.socketpair()
        self._commands: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._timer_count = 0
        self._events: list[dict[str, Any]] = []
        self._first_event = 0
        self._news = threading.Condition()
        self._spares: list[Spare] = []
        self._spare_count = 0
        self._stores: list[StoreHost] = []
        self._jobs: dict[int, _SaveJob] = {}
        self._job_count = 0
        self._lease = Lease()
        self.ready = threading.Event()
        self._start_zygote(list(settings.preload))
        self._start_saver()
        self.output = OutputTail()
        self.group = GroupHost(self)
        self._register(self._wake_r, self._on_wake)
        self._watch_driver()
        self.prepare()
        self._thread = threading.Thread(target=self._run, name="agent", daemon=True)

    def start(self) -> None:
        """Begin to serve."""
        self._thread.start()

    # -- for the driver (any thread) --------------------------------------------------------------------------------

    def command(self, command: dict[str, Any]) -> None:
        """Queue a command; its effects arrive as events."""
        self._commands.put(command)
        self._wake_w.send(b"x")

    def poll(self, after: int, timeout_s: float) -> tuple[int, list[dict[str, Any]]]:
        """Events from number `after` on, waiting up to `timeout_s` for one. Returns (next number, events)."""
        with self._news:
            del self._events[: max(0, after - self._first_event)]
            self._first_event = max(self._first_event, after)
            self._lease.renew()
            if not self._events:
                self._news.wait(timeout_s)
                self._lease.renew()
            return self._first_event + len(self._events), list(self._events)

    def emit(self, event: str, **fields: Any) -> None:
        """Hand an event to the driver."""
        with self._news:
            self._events.append({"event": event, **fields})
            self._news.notify_all()

    # -- the loop -----------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while True:
                timeout = max(0.0, self._timers[0][0] - time.monotonic()) if self._timers else None
                for key, _ in self._selector.select(timeout):
                    if self._selector.get_map().get(key.fd) is key:  # else closed by what was handled before it
                        key.data()
                while self._timers and self._timers[0][0] <= time.monotonic():
                    heapq.heappop(self._timers)[2]()
        except BaseException:
            import traceback

            self.emit("AgentBroken", why=f"{self.settings.name}: {traceback.format_exc()}")
            self.group.kill()
            raise

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run `action` on the agent's thread, later."""
        self._timer_count += 1
        heapq.heappush(self._timers, (time.monotonic() + delay_s, self._timer_count, action))

    def _register(self, sock: socket.socket, handler: Callable[[], None]) -> None:
        self._selector.register(sock, selectors.EVENT_READ, handler)

    def listen(
        self, sock: socket.socket, handler: Callable[[wire.Message, list[int]], None], closed: Callable[[], None]
    ) -> None:
        """Hand every message on `sock` to `handler`, and its end to `closed`."""

        def readable() -> None:
            received = wire.receive(sock)
            if received is None:
                self.forget(sock)
                closed()
            else:
                handler(*received)

        self._register(sock, readable)

    def forget(self, sock: socket.socket) -> None:
        """Stop listening to a socket and close it. Safe to repeat."""
        with contextlib.suppress(KeyError, ValueError):
            self._selector.unregister(sock)
        sock.close()

    def _on_wake(self) -> None:
        self._wake_r.recv(4096)
        while True:
            try:
                command = self._commands.get_nowait()
            except queue.Empty:
                return
            if command["op"] == "shutdown":
                self.end()
            self.group.command(command)

    # -- zygote -------------------------------------------------------------------------------------------------------

    def prepare(self) -> None:
        """Have a spare for every rank and a store for the next attempt."""
        while len(self._spares) < self.settings.slots:
            self._spares.append(self._fork())
        if not self._stores:
            self._stores.append(self._fork_store())

    def _fork(self) -> Spare:
        ours, theirs = wire.pair()
        self._spare_count += 1
        spare = Spare(self._spare_count, ours)
        with contextlib.suppress(OSError):  # a dead zygote is noticed by its socket's end
            wire.send(self._zygote_sock, {"op": "fork", "id": spare.number}, (theirs.fileno(),))
        theirs.close()
        return spare

    def _fork_store(self) -> StoreHost:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((self.settings.host, 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        spare = self._fork()
        with contextlib.suppress(OSError):
            wire.send(spare.sock, {"op": "store", "host": self.settings.host, "port": port}, (listener.fileno(),))
        listener.close()
        self.emit("StoreReady", agent=self.settings.name, host=self.settings.host, port=port)
        return StoreHost(spare, port)

    def take_spare(self) -> Spare:
        """A forked process to become a worker."""
        return self._spares.pop(0) if self._spares else self._fork()

    def take_store(self, port: int) -> StoreHost | None:
        """The store that listens on `port`; a new one is prepared for the next attempt."""
        found = next((store for store in self._stores if store.port == port), None)
        if found is not None:
            self._stores.remove(found)
        return found

    def refill_later(self) -> None:
        """Fork new spares when the group is up: forking costs time that the restart needs."""
        self.after(REFILL_AFTER_S, self.prepare)

    def _on_zygote(self) -> None:
        received = wire.receive(self._zygote_sock)
        if received is None:
            self._zygote_lost()
            return
        message, descriptors = received
        wire.discard(descriptors)
        operation = message["op"]
        if operation == "ready":
            self.ready.set()
            self._zygote_ready = True
            self.emit("AgentReady", agent=self.settings.name, modules=message["modules"], failed=message["failed"])
        elif operation == "dropped":
            names = ", ".join(message["modules"])
            self.emit("Notice", text=f"not preloaded, because a fork would not survive it: {names}")
        elif operation == "forked":
            self._forked(message["id"], message["pid"])
        elif operation == "exited":
            self._exited(message["pid"], message["status"])

    def _forked(self, number: int, pid: int) -> None:
        stores = [store.spare for store in self._stores]
        for spare in [*self._spares, *stores, *self.group.spares()]:
            if spare.number == number:
                spare.pid = pid
        self.group.forked(number)

    def _exited(self, pid: int, status: int) -> None:
        for spare in [spare for spare in self._spares if spare.pid == pid]:
            self._spares.remove(spare)
            spare.sock.close()
            self.after(1.0, self.prepare)
        if any(store.spare.pid == pid for store in self._stores):
            self._drop_stores()
            self.after(1.0, self.prepare)
        self.group.exited(pid, status)

    def _drop_stores(self) -> None:
        """The prepared stores are gone, and the driver is told; an attempt that was given one cannot start."""
        for store in self._stores:
            children.kill_group(store.spare.pid)
            store.spare.sock.close()
        self._stores = []
        self.emit("StoresGone", agent=self.settings.name)

    def _start_zygote(self, preload: list[str]) -> None:
        with self._log() as log:
            self._zygote, self._zygote_sock = children.start_zygote(preload, dict(self.base_env), log)
        self._preload = preload
        self._zygote_ready = False
        self._register(self._zygote_sock, self._on_zygote)

    def _zygote_lost(self) -> None:
        """Start another one. All its forks ended with it; what they held in shared memory stays.

        One that never got ready is started once more without the user's modules; failing then too, it is a broken
        installation.
        """
        self.forget(self._zygote_sock)
        cause = children.describe_code(self._zygote.wait())
        if not self._zygote_ready and not self._preload:
            raise RuntimeError(f"the process that forks the workers ended ({cause}) while it imported torch")
        what = "forks the workers" if self._zygote_ready else f"imports {', '.join(self._preload)} for the workers"
        self.emit("Notice", text=f"the process that {what} ended ({cause}); {self.settings.name} starts another one")
        for spare in self._spares:
            spare.sock.close()
        self._spares = []
        self._drop_stores()
        self.group.all_exited(cause)
        self._start_zygote(self._preload if self._zygote_ready else [])
        self.prepare()

    # -- saver --------------------------------------------------------------------------------------------------------

    def save(self, job: dict[str, Any], parts: list[Part], context: dict[str, Any]) -> None:
        """Give the saver a job; `context` comes back with its answer as ShardPersisted or ShardLost."""
        self._job_count += 1
        message = {"op": "write", "id": self._job_count, "uri": self.settings.run_uri, **job}
        descriptors = [os.dup(part.segment.fd) for part in parts]
        self._jobs[self._job_count] = _SaveJob(message, parts, descriptors, context)
        self._send_job(self._jobs[self._job_count])

    def _send_job(self, job: _SaveJob) -> None:
        with contextlib.suppress(OSError):  # a dead saver is noticed by its socket's end
            wire.send(self._saver_sock, job.message, tuple(job.descriptors))

    def _on_saver(self) -> None:
        received = wire.receive(self._saver_sock)
        if received is None:
            self._saver_lost()
            return
        message, descriptors = received
        wire.discard(descriptors)
        self._answer(message["id"], message.get("shards"), message.get("why", ""))

    def _answer(self, job: int, shards: list[dict[str, Any]] | None, why: str) -> None:
        done = self._jobs.pop(job)
        wire.discard(done.descriptors)
        context = done.context
        if shards is None:
            for rank in context.pop("indices"):
                context.pop("shares", None)
                self.emit("ShardLost", why=why, rank=rank, **context)
            return
        context.pop("indices")
        for shard in shards:
            self.emit("ShardPersisted", rank=shard["rank"], shard=shard, **context)

    def _saver_lost(self) -> None:
        """Start another one. It gets the jobs of the old one once more; a job that kills two of them is given up."""
        self.forget(self._saver_sock)
        cause = children.describe_code(self._saver.wait())
        for number, job in list(self._jobs.items()):
            if job.repeated:
                for part in job.parts:
                    if label_at(part.segment, part.slot, job.message["step"]) is not None:
                        part.segment.unpin(part.slot)
                self._answer(number, None, f"the saver process died twice over it, last by {cause}")
        self._start_saver()
        for job in self._jobs.values():
            job.repeated = True
            job.message["again"] = True
            self._send_job(job)

    def _start_saver(self) -> None:
        with self._log() as log:
            self._saver, self._saver_sock = children.start_saver(dict(self.base_env), log)
        self._register(self._saver_sock, self._on_saver)

    @contextlib.contextmanager
    def _log(self) -> Iterator[int]:
        """The agent's own log, for its child processes."""
        log = open_log(os.path.join(self.settings.log_dir, f"{self.settings.name}.log"))
        try:
            yield log
        finally:
            os.close(log)

    # -- the driver ---------------------------------------------------------------------------------------------------

    def _watch_driver(self) -> None:
        """End with the driver: at once on its machine, elsewhere when it has not polled for the length of a lease."""
        try:
            descriptor = watch(self.settings.driver_pid, self.settings.driver_machine)
        except ProcessLookupError:
            self.end()
        if descriptor is None:
            self.after(CHECK_EVERY_S, self._check_lease)
        else:
            self._selector.register(descriptor, selectors.EVENT_READ, self.end)

    def _check_lease(self) -> None:
        if self._lease.lapsed:
            self.end()
        self.after(CHECK_EVERY_S, self._check_lease)

    # -- the end ------------------------------------------------------------------------------------------------------

    def end(self) -> NoReturn:
        """Leave nothing behind: workers, spares, zygote, saver, this process."""
        self.group.kill()
        for spare in [*self._spares, *(store.spare for store in self._stores)]:
            children.kill_group(spare.pid)
        for process in (self._zygote, self._saver):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        os._exit(0)
