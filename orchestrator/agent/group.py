"""The workers of the attempt at hand on one node: start, follow, drain, salvage, kill."""

from __future__ import annotations

import binascii
import contextlib
import os
import time
from typing import TYPE_CHECKING, Any

from orchestrator.agent import children
from orchestrator.agent.children import Spare, StoreHost, Worker
from orchestrator.agent.held import Part, close
from orchestrator.agent.launching import worker_spec
from orchestrator.agent.oom import OomWatch, events_file
from orchestrator.agent.output import append, open_log
from orchestrator.storage.layout import checkpoint_dir, log_path
from orchestrator.worker import wire
from orchestrator.worker.shm import (
    ORDER_SAVE,
    ORDER_STOP,
    POISON,
    RESUME_STEP,
    STOP_PREEMPTED,
    STOP_SAVE,
    BeatPage,
    Segment,
)

if TYPE_CHECKING:
    from orchestrator.agent.node import NodeAgent

SAMPLE_EVERY_S = 0.5
OUTPUT_EVERY_S = 0.1


class GroupHost:
    """One attempt at a time; what older attempts say is dropped with their sockets."""

    def __init__(self, node: NodeAgent) -> None:
        self._node = node
        self.attempt = 0
        self.workers: dict[int, Worker] = {}
        self._start: dict[str, Any] = {}
        self._store: StoreHost | None = None
        self._started_told = True
        self._told: set[str] = set()
        self._draining = False
        self._election: dict[str, Any] = {}
        self._elected: set[int] = set()
        self._oom = OomWatch(events_file())
        node.after(SAMPLE_EVERY_S, self._sample)
        node.after(OUTPUT_EVERY_S, self._read_output)

    def command(self, command: dict[str, Any]) -> None:
        """Carry out one of the driver's commands. One for another attempt than the present one is dropped here."""
        handlers = {
            "start": self._begin,
            "drain": self._drain_asked,
            "salvage": self._salvage,
            "kill": self._kill_asked,
            "order": self._order,
            "persist": self._persist,
            "release": self._release,
            "prepare": self._prepare,
        }
        operation = command["op"]
        if operation in ("drain", "salvage", "kill", "order") and command["attempt"] != self.attempt:
            return
        handlers[operation](command)

    # -- start --------------------------------------------------------------------------------------------------------

    def _begin(self, command: dict[str, Any]) -> None:
        self.kill()
        self.attempt = command["attempt"]
        self._start = command
        self._draining = False
        self._started_told = False
        self._store = self._node.take_store(command["store"]["port"]) if command["store"]["mine"] else None
        if command["store"]["mine"] and self._store is None:
            why = "the process that hosts the attempt's store ended before the attempt began"
            self._node.emit("StartFailed", attempt=self.attempt, why=why)
            return
        with self._node.holdings.lock:
            try:
                parts = self._resume_parts(command["resume"])
            except KeyError as error:
                self._node.emit("StartFailed", attempt=self.attempt, why=error.args[0])
                return
            for local_rank, rank in enumerate(command["ranks"]):
                self._spawn(local_rank, rank, parts)
        self._tell_started()
        self._node.refill_later()

    def _resume_parts(self, resume: dict[str, Any] | None) -> list[Part]:
        if resume is None or resume["kind"] != "segments":
            return []
        found: list[Part] = []
        for pick in resume["picks"]:
            found += self._node.holdings.parts(pick["holder"], resume["step"], pick["pieces"])
        return found

    def _spawn(self, local_rank: int, rank: int, parts: list[Part]) -> None:
        settings = self._node.settings
        spare = self._node.take_spare()
        path = os.path.join(settings.log_dir, os.path.relpath(log_path(self.attempt, rank), "logs"))
        log = open_log(path)
        worker = Worker(self.attempt, rank, spare, BeatPage.create(), path)
        self.workers[rank] = worker
        segments = list(dict.fromkeys(part.segment.fd for part in parts))
        spec = worker_spec(settings, self._node.base_env, self._start, local_rank, rank, path, parts, segments)
        if rank == 0:
            self._node.output.follow(path)
        with contextlib.suppress(OSError):  # a spare that died is reported by the zygote
            wire.send(spare.sock, spec, (log, worker.beat.fd, *segments))
        os.close(log)
        self._node.listen(
            spare.sock,
            lambda message, descriptors: self._on_worker(worker, message, descriptors),
            lambda: self._on_closed(worker),
        )

    def spares(self) -> list[Spare]:
        """Forks that became workers or the store of this attempt."""
        store = [self._store.spare] if self._store is not None else []
        return [*(worker.spare for worker in self.workers.values()), *store]

    def forked(self, number: int) -> None:
        """The zygote has answered for a fork."""
        self._tell_started()

    def _tell_started(self) -> None:
        if self._started_told or not all(worker.pid or worker.exited for worker in self.workers.values()):
            return
        self._started_told = True
        pids = [[rank, worker.pid] for rank, worker in self.workers.items()]
        self._node.emit("GroupStarted", attempt=self.attempt, agent=self._node.settings.name, workers=pids)

    # -- what workers say ---------------------------------------------------------------------------------------------

    def _on_worker(self, worker: Worker, message: wire.Message, descriptors: list[int]) -> None:
        operation = message.pop("op")
        if worker.attempt == self.attempt:
            getattr(self, f"_worker_{operation}")(worker, message, descriptors)
        wire.discard(descriptors)  # those that no handler took out of the list

    def _on_closed(self, worker: Worker) -> None:
        worker.closed = True

    def _worker_segment(self, worker: Worker, message: wire.Message, descriptors: list[int]) -> None:
        ranks = self._start["ranks"]
        share = (ranks.index(worker.rank), len(ranks))
        segment = Segment(descriptors.pop(0))
        self._node.holdings.add(worker.attempt, worker.rank, message["kind"], segment, share)

    def _worker_stepped(self, worker: Worker, message: wire.Message, descriptors: list[int]) -> None:
        worker.stepped = True
        self._node.emit("WorkerStepped", attempt=worker.attempt, rank=worker.rank, **message)

    def _worker_progress(self, worker: Worker, message: wire.Message, descriptors: list[int]) -> None:
        self._node.emit("Metrics", attempt=worker.attempt, rank=worker.rank, **message)

    def _worker_facts(self, worker: Worker, message: wire.Message, descriptors: list[int]) -> None:
        self._node.emit("Facts", attempt=worker.attempt, **message)

    def _worker_notice(self, worker: Worker, message: wire.Message, descriptors: list[int]) -> None:
        """What ranks tell the user is told once, however many ranks and attempts say it."""
        if message["text"] not in self._told:
            self._told.add(message["text"])
            self._node.emit("Notice", **message)

    def _worker_fault(self, worker: Worker, message: wire.Message, descriptors: list[int]) -> None:
        self._node.emit("FaultFired", attempt=worker.attempt, rank=worker.rank, **message)

    def _worker_failed(self, worker: Worker, message: wire.Message, descriptors: list[int]) -> None:
        worker.failed = True
        self._flush_output(worker)
        if worker.rank == 0:
            self._node.output.close()
        append(worker.log_path, message["error"]["traceback"])
        self._node.emit("WorkerFailed", attempt=worker.attempt, rank=worker.rank, alive=True, **message)
        self._drain()

    def _worker_finished(self, worker: Worker, message: wire.Message, descriptors: list[int]) -> None:
        worker.left = "finished"
        self._flush_output(worker)
        self._node.emit("WorkerFinished", attempt=worker.attempt, rank=worker.rank, **message)

    def _worker_stopped(self, worker: Worker, message: wire.Message, descriptors: list[int]) -> None:
        worker.left = "stopped"
        self._node.emit("WorkerStopped", attempt=worker.attempt, rank=worker.rank, **message)

    def _worker_staged(self, worker: Worker, message: wire.Message, descriptors: list[int]) -> None:
        arena = self._node.holdings.of(worker.attempt, worker.rank, "arena")
        if arena is None:
            raise RuntimeError(f"rank {worker.rank} staged a share before its arena was announced")
        part = Part(arena, message["slot"], ("head",) if worker.rank == 0 else (), worker.rank)
        self._stage(worker, message, part, worker.rank, message["shares"])

    def _worker_staged_whole(self, worker: Worker, message: wire.Message, descriptors: list[int]) -> None:
        segment = Segment(descriptors.pop(0))
        self._stage(worker, message, Part(segment, 0, ("head",), worker.rank), 0, 1)
        close(segment)  # the saver's job has a descriptor of its own

    def _stage(self, worker: Worker, message: wire.Message, part: Part, index: int, shares: int) -> None:
        step, reason, name = message["step"], message["reason"], message["name"]
        event = {"attempt": worker.attempt, "step": step, "reason": reason, "name": name}
        extra = {"bytes": message["bytes"], "stall_ms": message.get("stall_ms", 0.0)}
        self._node.emit("SaveStaged", rank=index, world_size=shares, **event, **extra)
        job = {"directory": self._directory(step, reason, name), "attempt": worker.attempt, "step": step}
        item = {"fd": 0, "slot": part.slot, "index": index, "pieces": list(part.pieces)}
        self._node.save({**job, "parts": [item]}, [part], {**event, "shares": shares, "indices": [index]})

    def _directory(self, step: int, reason: str, name: str) -> str:
        """Unique for every save of every driver, and the same on every node."""
        mark = f"{binascii.crc32(name.encode()):08x}" if name else ""
        return checkpoint_dir(step, self.attempt, f"{self._start['token']}{reason}{mark}")

    # -- failure ----------------------------------------------------------------------------------------------------

    def exited(self, pid: int, status: int) -> None:
        """The zygote has reaped a process; if it was a worker that had not left, that is a failure."""
        if self._store is not None and self._store.spare.pid == pid:
            self._store_gone(children.describe_exit(status))
        worker = next((w for w in self.workers.values() if w.pid == pid), None)
        if worker is not None and not worker.exited:
            cause = children.describe_exit(status)
            self._gone(worker, "oom" if cause == "signal:9" and self._oom.took_one() else cause)

    def _store_gone(self, cause: str) -> None:
        """Ranks that have not found each other would look for it until they give up; later nobody needs it."""
        if self._store is not None:
            self._node.forget(self._store.spare.sock)
            self._store = None
        if all(worker.stepped or worker.left for worker in self.workers.values()):
            return
        why = f"the process that hosts the attempt's store ended ({cause}) before all ranks had stepped"
        self._node.emit("StartFailed", attempt=self.attempt, why=why)
        self._drain()
        self._after_answer()

    def all_exited(self, cause: str) -> None:
        """The zygote has died, and every fork of it with it."""
        if self._store is not None:
            self._node.forget(self._store.spare.sock)
            self._store = None
        for worker in [worker for worker in self.workers.values() if not worker.exited]:
            children.kill_group(worker.pid)
            self._gone(worker, cause)
        self._tell_started()

    def _gone(self, worker: Worker, cause: str) -> None:
        worker.exited = True
        self._hear_the_rest(worker)
        if worker.left:
            self._not_salvaged(worker)
            self._after_answer()
            return
        if not worker.failed:
            step = max(0, worker.beat.words[RESUME_STEP])
            fields = {"cause": cause, "step": step, "at": time.monotonic(), "error": None, "alive": False}
            self._node.emit("WorkerFailed", attempt=worker.attempt, rank=worker.rank, **fields)
        self._not_salvaged(worker)
        self._drain()
        self._after_answer()

    def _not_salvaged(self, worker: Worker) -> None:
        if worker.rank in self._elected:
            self._salvage_failed(worker, "it ended before it had written its state")

    def _hear_the_rest(self, worker: Worker) -> None:
        """What it sent before it died is still in the socket."""
        with contextlib.suppress(OSError, ValueError):
            worker.spare.sock.setblocking(False)
            while True:
                received = wire.receive(worker.spare.sock)
                if received is None:
                    break
                self._on_worker(worker, *received)
        self._node.forget(worker.spare.sock)

    def _drain_asked(self, command: dict[str, Any]) -> None:
        self._drain()
        self._after_answer()

    def _drain(self) -> None:
        """Poison the attempt and ask every survivor what it holds. The driver is told; it need not ask first."""
        if self._draining:
            return
        self._draining = True
        for worker in self.workers.values():
            worker.beat.words[POISON] = self.attempt
        for worker in self._survivors():
            self._send(worker, {"op": "drain", "deadline_s": self._node.settings.drain_timeout_s})

    def _survivors(self) -> list[Worker]:
        return [worker for worker in self.workers.values() if not worker.exited and not worker.closed]

    def _send(self, worker: Worker, message: wire.Message) -> None:
        with contextlib.suppress(OSError):
            wire.send(worker.spare.sock, message)

    def _worker_offer(self, worker: Worker, message: wire.Message, descriptors: list[int]) -> None:
        worker.answer = message
        self._after_answer()

    def _after_answer(self) -> None:
        """Tell the driver what this node holds, once every survivor has said what it holds.

        A worker whose socket is closed is dying: its exit status, which is the root cause, is a moment away.
        """
        if not self._draining:
            return
        waiting = [worker for worker in self.workers.values() if not worker.exited and worker.answer is None]
        live = {w.rank: w.answer["step"] for w in self._survivors() if w.answer is not None and w.answer["clean"]}
        offers = self._node.holdings.offers(self.attempt, live)
        agent = self._node.settings.name
        self._node.emit("OffersIn", attempt=self.attempt, agent=agent, offers=offers, settled=not waiting)

    def _salvage(self, command: dict[str, Any]) -> None:
        self._election = command
        self._elected = {rank for rank in command["ranks"] if rank in self.workers}
        for rank in list(self._elected):
            worker = self.workers[rank]
            if worker.exited:
                self._salvage_failed(worker, "it is dead")
                return
            self._send(worker, {"op": "salvage", "election": command["election"], "step": command["step"]})
        self._salvage_done()

    def _worker_salvaged(self, worker: Worker, message: wire.Message, descriptors: list[int]) -> None:
        if message["election"] != self._election.get("election") or worker.rank not in self._elected:
            return
        if not message["ok"]:
            self._salvage_failed(worker, message["why"])
            return
        self._node.holdings.add(worker.attempt, worker.rank, "salvage", Segment(descriptors.pop(0)))
        self._elected.discard(worker.rank)
        self._salvage_done()

    def _salvage_done(self) -> None:
        if not self._elected:
            self._tell_salvaged(True, "")

    def _salvage_failed(self, worker: Worker, why: str) -> None:
        """The survivor is none: its offer is withdrawn before the driver elects again."""
        self._elected = set()
        worker.answer = {"clean": False, "step": -1}
        self._after_answer()
        self._tell_salvaged(False, f"rank {worker.rank}: {why}")

    def _tell_salvaged(self, ok: bool, why: str) -> None:
        election = self._election["election"]
        agent = self._node.settings.name
        self._node.emit("Salvaged", attempt=self.attempt, agent=agent, election=election, ok=ok, why=why)

    # -- saves and orders ---------------------------------------------------------------------------------------------

    def _persist(self, command: dict[str, Any]) -> None:
        """Write this node's picks of a choice to storage; `index` numbers all picks of all nodes."""
        event = {"attempt": command["attempt"], "step": command["step"], "reason": command["reason"], "name": ""}
        indices = [pick["index"] for pick in command["picks"]]
        try:
            with self._node.holdings.lock:
                self._persist_picks(command, {**event, "shares": command["shares"], "indices": indices})
        except KeyError as error:
            for index in indices:
                self._node.emit("ShardLost", rank=index, why=error.args[0], **event)

    def _persist_picks(self, command: dict[str, Any], context: dict[str, Any]) -> None:
        items: list[dict[str, Any]] = []
        parts: list[Part] = []
        for pick in command["picks"]:
            found = self._node.holdings.parts(pick["holder"], command["step"], pick["pieces"])
            for number, part in enumerate(found):
                index = pick["index"] if number == len(found) - 1 else None
                items.append({"fd": len(parts), "slot": part.slot, "index": index, "pieces": list(part.pieces)})
                parts.append(part)
        attempt, step = command["attempt"], command["step"]
        directory = checkpoint_dir(step, attempt, f"{command['token']}{command['reason']}")
        self._node.save({"directory": directory, "attempt": attempt, "step": step, "parts": items}, parts, context)

    def _order(self, command: dict[str, Any]) -> None:
        for worker in self._survivors():
            if command["order"] == "stop":
                worker.beat.words[ORDER_STOP] = STOP_PREEMPTED if command["name"] == "preemption" else STOP_SAVE
            else:
                if command["name"]:
                    self._send(worker, {"op": "save", "name": command["name"]})
                else:
                    worker.beat.words[ORDER_SAVE] += 1

    def _release(self, command: dict[str, Any]) -> None:
        self._node.holdings.release(command["attempt"])

    def _prepare(self, command: dict[str, Any]) -> None:
        self._node.prepare()

    # -- kill and sample ----------------------------------------------------------------------------------------------

    def _kill_asked(self, command: dict[str, Any]) -> None:
        self.kill()

    def kill(self) -> None:
        """SIGKILL every worker of this attempt and its store, without waiting. Their segments stay."""
        for worker in self.workers.values():
            if not worker.exited:
                children.kill_group(worker.pid)
            worker.exited = True
            self._flush_output(worker)
            self._node.forget(worker.spare.sock)
            worker.beat.close()
        self.workers = {}
        self._elected = set()
        if self._store is not None:
            children.kill_group(self._store.spare.pid)
            self._node.forget(self._store.spare.sock)
            self._store = None

    def _sample(self) -> None:
        self._node.after(SAMPLE_EVERY_S, self._sample)
        for worker in self._survivors():
            step = worker.beat.words[RESUME_STEP]
            if step >= 0 and not self._draining and not worker.left:
                self._node.emit("Progress", attempt=worker.attempt, rank=worker.rank, step=step)

    def _read_output(self) -> None:
        self._node.after(OUTPUT_EVERY_S, self._read_output)
        self._emit_output(rest=False)

    def _flush_output(self, worker: Worker) -> None:
        if worker.rank == 0:
            self._emit_output(rest=True)

    def _emit_output(self, rest: bool) -> None:
        lines = self._node.output.lines(rest)
        if lines:
            self._node.emit("Output", lines=lines)
