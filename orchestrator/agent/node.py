"""The agent of one node, without Ray: one thread that hears zygote, saver, workers and the driver's commands.

Events for the driver are JSON objects named like `control.events`; `poll` hands them out in order. Commands are JSON too and
are carried out in the order given.
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
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from orchestrator.agent import children
from orchestrator.agent.children import Spare, StoreHost, Worker
from orchestrator.agent.group import GroupHost
from orchestrator.agent.held import Holdings
from orchestrator.agent.output import OutputTail
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
    driver_pid: int = 0  # on this very machine, else 0
    drain_timeout_s: float = 10.0
    gpu_ids: tuple[str, ...] = ()


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
        self._jobs: dict[int, dict[str, Any]] = {}
        self._job_count = 0
        self.ready = threading.Event()
        os.makedirs(settings.log_dir, exist_ok=True)
        log = os.open(os.path.join(settings.log_dir, f"{settings.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        env = dict(base_env)
        self._zygote, self._zygote_sock = children.start_zygote(list(settings.preload), env, log)
        self._saver, self._saver_sock = children.start_saver(env, log)
        os.close(log)
        self.output = OutputTail()
        self.group = GroupHost(self)
        self._register(self._wake_r, self._on_wake)
        self._register(self._zygote_sock, self._on_zygote)
        self._register(self._saver_sock, self._on_saver)
        if settings.driver_pid:
            with contextlib.suppress(OSError):
                self._driver_fd = os.pidfd_open(settings.driver_pid)
                self._selector.register(self._driver_fd, selectors.EVENT_READ, self.end)
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
            if not self._events:
                self._news.wait(timeout_s)
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
                    key.data()
                while self._timers and self._timers[0][0] <= time.monotonic():
                    heapq.heappop(self._timers)[2]()
        except BaseException:
            import traceback

            self.emit("AgentBroken", why=traceback.format_exc())
            self.group.kill()
            raise

    def after(self, delay_s: float, action: Callable[[], None]) -> None:
        """Run `action` on the agent's thread, later."""
        self._timer_count += 1
        heapq.heappush(self._timers, (time.monotonic() + delay_s, self._timer_count, action))

    def _register(self, sock: socket.socket, handler: Callable[[], None]) -> None:
        self._selector.register(sock, selectors.EVENT_READ, handler)

    def listen(self, sock: socket.socket, handler: Callable[[wire.Message, list[int]], None], closed: Callable[[], None]) -> None:
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
        wire.send(self._zygote_sock, {"op": "fork", "id": spare.number}, (theirs.fileno(),))
        theirs.close()
        return spare

    def _fork_store(self) -> StoreHost:
        listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
        listener.bind((self.settings.host, 0))
        listener.listen(1024)
        port = listener.getsockname()[1]
        spare = self._fork()
        wire.send(spare.sock, {"op": "store", "port": port}, (listener.fileno(),))
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
        message, _ = received
        operation = message["op"]
        if operation == "ready":
            self.ready.set()
            self.emit("AgentReady", agent=self.settings.name, modules=message["modules"], failed=message["failed"])
        elif operation == "dropped":
            self.emit("Notice", text=f"not preloaded, because a fork would not survive it: {', '.join(message['modules'])}")
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
        self.group.exited(pid, status)

    def _zygote_lost(self) -> None:
        self.forget(self._zygote_sock)
        self.emit("AgentBroken", why=f"the zygote ended (status {self._zygote.wait()})")
        self.group.kill()

    # -- saver --------------------------------------------------------------------------------------------------------

    def save(self, job: dict[str, Any], descriptors: tuple[int, ...], context: dict[str, Any]) -> None:
        """Give the saver a job; `context` comes back with its answer as ShardPersisted or ShardLost."""
        self._job_count += 1
        self._jobs[self._job_count] = context
        try:
            wire.send(self._saver_sock, {"op": "write", "id": self._job_count, "uri": self.settings.run_uri, **job}, descriptors)
        except OSError as error:
            self._answer(self._job_count, None, f"the saver process is gone: {error}")

    def _on_saver(self) -> None:
        received = wire.receive(self._saver_sock)
        if received is None:
            self._saver_lost()
            return
        message, _ = received
        self._answer(message["id"], message.get("shards"), message.get("why", ""))

    def _answer(self, job: int, shards: list[dict[str, Any]] | None, why: str) -> None:
        context = self._jobs.pop(job)
        if shards is None:
            for rank in context.pop("indices"):
                context.pop("shares", None)
                self.emit("ShardLost", why=why, rank=rank, **context)
            return
        context.pop("indices")
        for shard in shards:
            self.emit("ShardPersisted", rank=shard["rank"], shard=shard, **context)

    def _saver_lost(self) -> None:
        """Start another one; what the old one was writing is lost, and said to be."""
        self.forget(self._saver_sock)
        self._saver.wait()
        for job in list(self._jobs):
            self._answer(job, None, "the saver process died")
        self._saver, self._saver_sock = children.start_saver(dict(self.base_env), 2)
        self._register(self._saver_sock, self._on_saver)

    # -- the end ------------------------------------------------------------------------------------------------------

    def end(self) -> None:
        """Leave nothing behind: workers, spares, zygote, saver, this process."""
        self.group.kill()
        for spare in [*self._spares, *(store.spare for store in self._stores)]:
            children.kill_group(spare.pid)
        for process in (self._zygote, self._saver):
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)
        os._exit(0)
