"""The loop around the machine: next event → step → execute actions. It waits, sends and records; it decides nothing."""

from __future__ import annotations

import json
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import RayError

from orchestrator.control import actions
from orchestrator.control.events import (
    AgentJoined,
    AgentLost,
    Committed,
    ErrorInfo,
    Event,
    GroupStarted,
    StopRequested,
    Tick,
    WorkerFailed,
)
from orchestrator.control.machine import Machine
from orchestrator.control.state import MachineView
from orchestrator.driver import requests
from orchestrator.driver.cluster import AgentHandle
from orchestrator.driver.committer import CommitReport, Committer
from orchestrator.driver.console import ConsolePort
from orchestrator.driver.journal import Journal
from orchestrator.driver.progress import ProgressBoard
from orchestrator.driver.translate import to_event
from orchestrator.errors import EXIT_FAILED, CheckpointDamagedError, OrchestratorError, StorageError
from orchestrator.storage.commitlog import CommitLog, OnReject, outcome_entry
from orchestrator.storage.manifest import CheckpointRecord, Manifest

REQUESTS_EVERY_S = 0.2
TRANSFER_TIMEOUT_S = 120.0
REPLACE_EVERY_S = 1.0
OUTCOME_WITHIN_S = 5.0  # the committer was given its time before


class Shell:
    """One launch, from warm agents to `Finish`."""

    def __init__(
        self,
        machine: Machine,
        agents: list[AgentHandle],
        committer: Committer,
        journal: Journal,
        console: ConsolePort,
        directory: Path,
        token: str,
        faults: tuple[str, ...],
        replace_agent: Callable[[AgentHandle], AgentHandle],
    ) -> None:
        self._machine, self._committer, self._journal, self._console = machine, committer, journal, console
        self._agents = {agent.name: agent for agent in agents}
        self._replace_agent = replace_agent
        self._directory, self._token = directory, token
        self._faults = [json.loads(fault) for fault in faults]
        self._problem_told = False
        self._queue: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._stores: dict[str, list[tuple[str, int]]] = {name: [] for name in self._agents}
        self._waiting_start: actions.StartGroup | None = None
        self._placement: tuple[tuple[int, str], ...] = ()
        self._resume_step: int | None = None
        self._first_attempt = machine.config.first_attempt
        self._reports: dict[tuple[int, int, str, str], CommitReport] = {}
        self._outbox: dict[str, list[dict[str, Any]]] = {}
        self.board = ProgressBoard(console, directory)
        self.finish: actions.Finish | None = None
        self._handlers = {
            actions.StartGroup: self._start_group,
            actions.Drain: self._drain,
            actions.Salvage: self._salvage,
            actions.KillGroup: self._kill,
            actions.PersistChoice: self._persist,
            actions.Commit: self._commit,
            actions.ReleaseSegments: self._release,
            actions.AskWorkers: self._ask,
            actions.Record: self._record,
            actions.Tell: self._tell,
            actions.Finish: self._finish,
        }

    # -- events in ----------------------------------------------------------------------------------------------------

    def post(self, agent: str, message: dict[str, Any]) -> None:
        """An agent's message, from any thread."""
        self._queue.put((agent, message))

    def post_event(self, event: Event) -> None:
        """An event of the driver's own, from any thread or signal handler."""
        self._queue.put(("", event))

    def committed(self, event: Committed, report: CommitReport | None) -> None:
        """The committer's answer."""
        if report is not None:
            self._reports[event.attempt, event.step, event.reason, event.name] = report
        self.post_event(event)

    def run(self) -> actions.Finish:
        """Serve until the machine is finished."""
        for agent in self._agents.values():
            agent.follow(self.post)
        next_look = 0.0
        try:
            while self.finish is None:
                now = time.monotonic()
                if now >= next_look:
                    next_look = now + REQUESTS_EVERY_S
                    self._look()
                self._wait(next_look)
        except (OrchestratorError, RayError, OSError) as error:
            self._give_up(error)
        assert self.finish is not None
        return self.finish

    def _look(self) -> None:
        for request in requests.take(self._directory):
            self._step(request)
        self.board.show(self._machine.view())
        if self._journal.problem and not self._problem_told:
            self._problem_told = True
            self._console.notice(f"{self._journal.problem}; the run goes on without it", "warning")

    def _give_up(self, error: Exception) -> None:
        """What the loop cannot go on after is an end like any other, told once and written down."""
        text = str(error) if isinstance(error, OrchestratorError) else f"{type(error).__name__}: {error}"
        why = text.strip().splitlines()[0] if text.strip() else type(error).__name__
        if why != text:  # else the summary says it all
            self._console.failure(text)
        self._finish(actions.Finish("failed", EXIT_FAILED, self._machine.view().step, why))

    def _wait(self, next_look: float) -> None:
        deadline = self._machine.next_deadline()
        until = min(next_look, deadline) if deadline is not None else next_look
        try:
            agent, message = self._queue.get(timeout=max(0.0, until - time.monotonic()))
        except queue.Empty:
            if deadline is not None and time.monotonic() >= deadline:
                self._step(Tick())
            return
        while True:
            self._take(agent, message)
            if self.finish is not None:
                return
            try:
                agent, message = self._queue.get_nowait()
            except queue.Empty:
                return

    def _take(self, agent: str, message: Any) -> None:
        if isinstance(message, AgentHandle):
            self._add_agent(message)
            return
        if not isinstance(message, dict):
            if isinstance(message, Committed) and message.ok:
                self._record_commit(message)
            self._step(message)
            return
        if agent not in self._agents:
            return  # what an agent that was given up still said
        handler = getattr(self, f"_on_{message['event']}", None)
        if handler is not None:
            handler(agent, message)
        if agent in self._agents and self._agents[agent].local is False and "at" in message:
            message["at"] = time.monotonic()  # another machine's clock
        event = to_event(message)
        if event is not None:
            self._step(event)

    def _step(self, event: Event) -> None:
        if isinstance(event, GroupStarted) and self._resume_step is not None:
            event = GroupStarted(event.attempt, event.agent, event.workers, self._resume_step)
        for action in self._machine.step(event, time.monotonic()):
            self._handlers[type(action)](action)
        self._flush()

    def _flush(self) -> None:
        outbox, self._outbox = self._outbox, {}
        for name, commands in outbox.items():
            if name in self._agents:
                self._agents[name].send(commands)

    def _send(self, agent: str, command: dict[str, Any]) -> None:
        self._outbox.setdefault(agent, []).append(command)

    def _send_all(self, command: dict[str, Any]) -> None:
        for name in self._agents:
            self._send(name, command)

    # -- what only the shell is told ----------------------------------------------------------------------------------

    def _on_AgentReady(self, agent: str, message: dict[str, Any]) -> None:
        for name, why in message["failed"].items():
            self._console.notice(f"{name} could not be preloaded: {why}", "warning")
        handle = self._agents[agent]
        if handle.joined:
            return  # its zygote was started anew
        handle.joined = True
        self._step(AgentJoined(agent, handle.node.address, handle.slots))

    def _on_AgentLost(self, agent: str, message: dict[str, Any]) -> None:
        self._give_up_agent(agent, message["why"], message["at"])

    def _on_AgentBroken(self, agent: str, message: dict[str, Any]) -> None:
        self._give_up_agent(agent, message["why"], time.monotonic())

    def _give_up_agent(self, agent: str, why: str, at: float) -> None:
        """The machine is told, and another agent is started in its place. A launch whose agents do not come up ends."""
        handle = self._agents.pop(agent)
        self._stores.pop(agent)
        handle.close()
        if not handle.joined and self._machine.view().attempt == 0:
            where = f"{agent} on {handle.node.address}"
            text = f"{where} could not start: {why.strip()}; see its log beside those of the ranks"
            self._console.failure(text)
            self._finish(actions.Finish("failed", EXIT_FAILED, self._machine.view().step, text.splitlines()[0]))
            return
        self._step(AgentLost(agent, why, at))
        if self.finish is None:
            threading.Thread(target=self._replace, args=(handle,), name=f"replace-{agent}", daemon=True).start()

    def _replace(self, lost: AgentHandle) -> None:
        """Try until there is one; the machine ends the run if that takes too long."""
        told = ""
        if not lost.joined:
            time.sleep(REPLACE_EVERY_S)  # a replacement that did not come up either
        while self.finish is None:
            try:
                self._queue.put(("", self._replace_agent(lost)))
                return
            except (OrchestratorError, RayError) as error:
                if str(error) != told:
                    told = str(error)
                    self._console.notice(f"no agent in place of {lost.name} yet: {told}", "warning")
            time.sleep(REPLACE_EVERY_S)

    def _add_agent(self, handle: AgentHandle) -> None:
        self._agents[handle.name] = handle
        self._stores[handle.name] = []
        handle.follow(self.post)

    def _on_StoresGone(self, agent: str, message: dict[str, Any]) -> None:
        self._stores[agent] = []

    def _on_StoreReady(self, agent: str, message: dict[str, Any]) -> None:
        self._stores[agent].append((message["host"], message["port"]))
        waiting, self._waiting_start = self._waiting_start, None
        if waiting is not None:
            self._start_group(waiting)
            self._flush()

    def _on_StartFailed(self, agent: str, message: dict[str, Any]) -> None:
        error = ErrorInfo("StartFailed", message["why"])
        first = next((rank for rank, home in self._placement if home == agent), 0)
        rank = message.get("rank", first)
        self._step(WorkerFailed(message["attempt"], rank, "exit:70", 0, time.monotonic(), error))

    def _on_Output(self, agent: str, message: dict[str, Any]) -> None:
        for line in message["lines"]:
            self._console.rank0(line)

    def _on_Metrics(self, agent: str, message: dict[str, Any]) -> None:
        self.board.metrics(message)

    def _on_Facts(self, agent: str, message: dict[str, Any]) -> None:
        self.board.facts(message)
        if message.get("per_rank"):
            self._machine.hold_per_rank()

    def _on_Notice(self, agent: str, message: dict[str, Any]) -> None:
        self._console.notice(message["text"], "info")

    def _on_FaultFired(self, agent: str, message: dict[str, Any]) -> None:
        self._faults = [fault for fault in self._faults if fault["id"] != message["id"]]
        fields = {key: message[key] for key in ("attempt", "rank", "id")}
        self._journal.record("fault_fired", fields)

    def _on_SaveStaged(self, agent: str, message: dict[str, Any]) -> None:
        if message["rank"] == 0:
            fields = {key: message[key] for key in ("attempt", "step", "stall_ms", "bytes", "reason")}
            self._journal.record("snapshot", fields)

    # -- actions out --------------------------------------------------------------------------------------------------

    def _start_group(self, action: actions.StartGroup) -> None:
        self._placement = action.placement
        main = action.placement[0][1]
        if not self._stores[main]:
            self._waiting_start = action
            self._send(main, {"op": "prepare"})
            return
        host, port = self._stores[main].pop(0)
        resume = self._resume(action)
        agents = list(dict.fromkeys(agent for _, agent in action.placement))
        self._transfer(action, agents)
        for number, agent in enumerate(agents):
            ranks = [rank for rank, home in action.placement if home == agent]
            command = {
                "op": "start",
                "attempt": action.attempt,
                "ranks": ranks,
                "world_size": len(action.placement),
                "node_rank": number,
                "nodes": len(agents),
                "store": {"host": host, "port": port, "mine": agent == main},
                "resume": resume,
                "faults": self._faults,
                "token": self._token,
                "restarts": action.attempt - self._first_attempt,
            }
            self._send(agent, command)

    def _resume(self, action: actions.StartGroup) -> dict[str, Any] | None:
        self._resume_step = None
        if action.resume is not None:
            picks = [
                {"holder": offer.holder, "agent": offer.agent, "pieces": sorted(pieces)}
                for offer, pieces in action.resume.picks
            ]
            return {"kind": "segments", "step": action.resume.step, "picks": picks}
        if not action.from_storage:
            return None
        found = self._committer.locked(lambda log: _to_continue(log, self._rejected))
        if found is None:
            return None
        record, manifest = found
        self._resume_step = manifest.step
        return {"kind": "storage", "uri": str(self._directory), "directory": record.directory}

    def _rejected(self, path: str, why: str, step: int) -> None:
        fields = {"step": step, "path": path, "why": why}
        self._journal.record("checkpoint_rejected", fields)
        self._console.event("checkpoint_rejected", fields)

    def _transfer(self, action: actions.StartGroup, agents: list[str]) -> None:
        """Bring what nodes hold to all others, before workers start.

        An agent that was not brought what it needs fails the attempt when it is told to start.
        """
        transfers: dict[Any, str] = {}
        for offer, pieces in action.resume.picks if action.resume is not None else ():
            receivers = [agent for agent in agents if agent != offer.agent and agent in self._agents]
            if not receivers or action.resume is None or offer.agent not in self._agents:
                continue
            step = action.resume.step
            slots = self._agents[offer.agent].actor.fetch.remote(offer.holder, step, sorted(pieces))
            for agent in receivers:
                done = self._agents[agent].actor.receive.remote(offer.holder, step, slots)
                transfers[done] = f"{offer.holder} could not be brought to {agent}"
        deadline = time.monotonic() + TRANSFER_TIMEOUT_S
        for done, what in transfers.items():
            try:
                ray.get(done, timeout=max(0.0, deadline - time.monotonic()))
            except RayError as error:
                why = (str(error).strip() or type(error).__name__).splitlines()[-1][:300]
                self._console.notice(f"{what}: {why}", "warning")

    def _drain(self, action: actions.Drain) -> None:
        self._send_all({"op": "drain", "attempt": action.attempt})

    def _salvage(self, action: actions.Salvage) -> None:
        for agent in sorted(action.choice.agents):
            mine = [offer.holder for offer, _ in action.choice.picks if offer.agent == agent]
            ranks = [int(holder.split("/")[2][5:]) for holder in mine if holder.endswith("/salvage")]
            command = {"op": "salvage", "attempt": action.attempt, "election": action.election, "ranks": ranks}
            self._send(agent, {**command, "step": action.choice.step})

    def _kill(self, action: actions.KillGroup) -> None:
        self._waiting_start = None
        self._send_all({"op": "kill", "attempt": action.attempt})

    def _persist(self, action: actions.PersistChoice) -> None:
        picks: dict[str, list[dict[str, Any]]] = {}
        for index, (offer, pieces) in enumerate(action.choice.picks):
            item = {"holder": offer.holder, "pieces": sorted(pieces), "index": index}
            picks.setdefault(offer.agent, []).append(item)
        for agent, mine in picks.items():
            command = {
                "op": "persist",
                "attempt": action.attempt,
                "step": action.choice.step,
                "reason": action.reason,
                "shares": len(action.choice.picks),
                "picks": mine,
                "token": self._token,
            }
            self._send(agent, command)

    def _commit(self, action: actions.Commit) -> None:
        self._committer.commit(action)

    def _release(self, action: actions.ReleaseSegments) -> None:
        self._send_all({"op": "release", "attempt": action.attempt})

    def _ask(self, action: actions.AskWorkers) -> None:
        self._send_all({"op": "order", "attempt": action.attempt, "order": action.order, "name": action.name})

    def _record(self, action: actions.Record) -> None:
        self._journal.record(action.event, action.fields)
        self._console.event(action.event, action.fields)
        self.board.recorded(action.event, action.fields)

    def _record_commit(self, event: Committed) -> None:
        report = self._reports.pop((event.attempt, event.step, event.reason, event.name), None)
        if report is not None:
            fields = {key: value for key, value in asdict(report).items() if key != "name" or value}
            self._record(actions.Record("checkpoint_committed", fields))

    def _tell(self, action: actions.Tell) -> None:
        if action.error is not None or action.level == "error":
            self._console.failure(action.text, action.error)
        else:
            self._console.notice(action.text, action.level)

    def _finish(self, action: actions.Finish) -> None:
        self.finish = action

    def record_outcome(self) -> None:
        """The run's end, in the commit log and the journal."""
        if self.finish is None:
            return
        outcome = asdict(self.finish)
        try:
            self.locked(lambda log: _append_outcome(log, outcome))
        except StorageError as error:
            self._console.notice(f"the run's outcome could not be written: {error}", "warning")
        attempt = self._machine.view().attempt
        self._journal.record("run_finished", {"attempt": attempt, **outcome})

    def locked(self, use: Callable[[CommitLog], Any]) -> Any:
        """Use the commit log when the run has ended. Raises StorageError if storage hangs."""
        return self._committer.locked(use, OUTCOME_WITHIN_S)

    def view(self) -> MachineView:
        """What the machine shows of itself."""
        return self._machine.view()

    def interrupt(self, kind: str) -> None:
        """A signal asks to stop."""
        self.post_event(StopRequested("platform" if kind == "platform" else "person"))


def _to_continue(log: CommitLog, on_reject: OnReject) -> tuple[CheckpointRecord, Manifest] | None:
    """The newest sound checkpoint, None if nothing was committed yet. Raises CheckpointDamagedError if none is sound:

    beginning anew would let retention delete what may still be mended.
    """
    found = log.latest_sound("full", on_reject)
    if found is None and log.checkpoints():
        raise CheckpointDamagedError(
            "No committed checkpoint of this run can be read, so it cannot go on; nothing was deleted. See "
            "`orchestrator checkpoint verify RUN`, or start anew with --run-name."
        )
    return found


def _append_outcome(log: CommitLog, outcome: dict[str, Any]) -> None:
    log.append(outcome_entry(outcome["outcome"], outcome["exit_code"], outcome["step"], outcome["why"]))
