"""One schedule: the machine, a virtual cluster, a commit log and a clock; invariants are checked after every event."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from random import Random
from typing import Any

from orchestrator.control import actions as do
from orchestrator.control import events as ev
from orchestrator.control.consistency import Choice
from orchestrator.control.machine import Machine
from orchestrator.control.state import MachineConfig, State

from .cluster import LEFT, Agent, Cluster, Group
from .plan import Fault, Plan, draw

HORIZON_S = 20_000.0
MAX_EVENTS = 20_000


class BrokenInvariantError(AssertionError):
    """What must never happen did. The message says what; the seed reproduces it."""


class Schedule:
    """One seed from the first agent to Finish."""

    def __init__(self, plan: Plan, trace: Callable[[str], None] | None = None) -> None:
        self.plan, self.trace = plan, trace
        self.rng = Random(plan.seed ^ 0x5EED)
        self.now = 0.0
        self.heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self.count = 0
        self.cluster = Cluster(plan, self.rng, self.later, lambda: self.now)
        self.cluster.tell, self.cluster.lost = self.tell, self.lose
        self.log: list[int] = []  # committed steps, in order
        self.persisted: set[tuple[int, int, str, str, int]] = set()
        self.last_attempt = 0
        self.group_of: dict[int, Group] = {}
        self.choices: list[Choice] = []  # whatever was chosen and not released
        self.floor: int | None = None  # the next group must not start below
        self.finish: do.Finish | None = None
        self.roots: dict[int, int] = {}
        self.driver = 0
        self.rewound = False
        self.told_lost: set[str] = set()
        self.committing: do.Commit | None = None
        self.machine = self._new_machine()

    # the driver and the clock

    def _new_machine(self) -> Machine:
        plan = self.plan
        config = MachineConfig(
            world_size=plan.world_size,
            max_restarts=plan.max_restarts,
            exception_save=plan.exception_save,
            seed=plan.seed,
            grace_s=plan.grace_s,
            per_rank=plan.per_rank,
            committed_step=self.log[-1] if self.log else None,
            first_attempt=self.last_attempt + 1,
        )
        self.driver += 1
        self.choices, self.floor, self.committing = [], None, None
        for slots in plan.slots:
            self.later(self.rng.uniform(0.0, 1.0), self.cluster.add_agent, slots)
        return Machine(config)

    def later(self, delay: float, fn: Callable[..., None], *args: Any) -> None:
        self.count += 1
        heapq.heappush(self.heap, (self.now + max(0.0, delay), self.count, fn, args))

    def tell(self, agent: Agent, event: ev.Event) -> None:
        """An agent's message: late, in order, perhaps twice."""
        if self.cluster.agents.get(agent.name) is not agent:
            return
        agent.up_at = max(agent.up_at, self.now + self.rng.random() * self.plan.delay_s)
        self.later(agent.up_at - self.now, self.hear, self.driver, event)
        if isinstance(event, ev.AgentJoined):
            agent.joined_at = agent.up_at
        elif self.plan.duplicate and self.rng.random() < self.plan.duplicate:
            self.later(agent.up_at - self.now, self.hear, self.driver, event)

    def lose(self, agent: Agent, event: ev.AgentLost) -> None:
        if self.cluster.agents.get(agent.name) is agent:
            self.told_lost.add(agent.name)
            self.hear(self.driver, event)

    def hear(self, driver: int, event: ev.Event) -> None:
        """One event reaches the driver."""
        if driver != self.driver:
            return
        if isinstance(event, ev.ShardPersisted):
            self.persisted.add((event.attempt, event.step, event.reason, event.name, event.rank))
        out = self.machine.step(event, self.now)
        if self.trace is not None:
            self.trace(f"{self.now:8.3f} {self.machine.state.name:10} {event}")
            for action in out:
                self.trace(f"{'':19} -> {action}")
        for index, action in enumerate(out):
            self.check(self.finish is None, f"{action} after Finish")
            if isinstance(action, do.Finish):
                self.check(index == len(out) - 1, "Finish is not the last action")
            _DO[type(action)](self, action)

    def run(self) -> do.Finish:
        """All of it. Raises BrokenInvariantError."""
        self._lay_traps()
        events = 0
        while self.finish is None:
            events += 1
            deadline = self.machine.next_deadline()
            due = self.heap[0][0] if self.heap else HORIZON_S
            self.check(events < MAX_EVENTS and min(due, deadline or due) < HORIZON_S, "the schedule does not end")
            if deadline is not None and deadline < due:
                self.now = max(self.now, deadline)
                self.hear(self.driver, ev.Tick())
                continue
            self.now, _, fn, args = heapq.heappop(self.heap)
            fn(*args)
        self.check(self.machine.step(ev.Tick(), self.now + 1.0) == (), "something happens after Finish")
        return self.finish

    def check(self, holds: bool, what: str) -> None:
        if not holds:
            raise BrokenInvariantError(f"seed {self.plan.seed}, {self.now:.3f} s, {self.machine.state.name}: {what}")

    # faults

    def _lay_traps(self) -> None:
        plan = self.plan
        for fault in plan.faults:
            if not fault.after:
                self.later(fault.at, self.strike, fault)
        for at in plan.save_requests:
            self.later(at, self.ask, ev.SaveRequested(""))
        if plan.stop_at is not None:
            self.later(plan.stop_at, self.ask, ev.StopRequested(plan.stop_kind, plan.stop_saves))  # type: ignore[arg-type]
            self.later(plan.stop_at + 0.5, self.ask, ev.StopRequested("person"))
        if plan.driver_dies_at is not None:
            self.later(plan.driver_dies_at, self.driver_dies)

    def ask(self, event: ev.Event) -> None:
        self.hear(self.driver, event)

    def spring(self, after: str) -> None:
        """Faults that wait for this moment."""
        for fault in self.plan.faults:
            if fault.after == after and self.rng.random() < 0.5:
                self.later(fault.at, self.strike, fault)

    def strike(self, fault: Fault) -> None:
        group = self.cluster.group
        if fault.kind == "node":
            self.floor = None  # what was there may go with it
            alive = [agent for agent in self.cluster.agents.values() if agent.alive]
            if alive:
                self.cluster.lose_agent(self.rng.choice(alive))
            return
        if group is None or group.killed or not group.workers:
            return
        workers = list(group.workers.values())
        self.rng.shuffle(workers)
        count = {"kill_all": len(workers), "kill_two": 2}.get(fault.kind, 1)
        for worker in workers[:count]:
            self.cluster.fail(worker, fault.kind, f"chance {self.rng.random()}")

    def driver_dies(self) -> None:
        """All agents end with their job; the next driver knows nothing but the commit log."""
        self.cluster.all_die()
        self.machine = self._new_machine()

    # actions

    def _current(self, attempt: int) -> Group:
        self.check(attempt == self.last_attempt, f"an action for attempt {attempt} during {self.last_attempt}")
        return self.group_of[attempt]

    def _start(self, action: do.StartGroup) -> None:
        self.check(action.attempt > self.last_attempt, f"attempt {action.attempt} after {self.last_attempt}")
        old = self.cluster.group
        self.check(old is None or old.killed, f"attempt {action.attempt} starts before the one before was killed")
        self.check([rank for rank, _ in action.placement] == list(range(self.plan.world_size)), "ranks are missing")
        self.check(not self.told_lost & {name for _, name in action.placement}, "ranks are placed on a lost agent")
        self.last_attempt = action.attempt
        step, told = self._source(action)
        if self.floor is not None and not self.rewound:
            self.check(step >= self.floor, f"starts from step {step}, but step {self.floor} was there")
        self.cluster.start(action, step, told)
        if self.cluster.group is not None:
            self.group_of[action.attempt] = self.cluster.group
        self.spring("start")

    def _source(self, action: do.StartGroup) -> tuple[int, int | None]:
        """The step a group really starts from, and what the shell says about it."""
        if self.committing is not None and not self.rewound:
            step = action.resume.step if action.resume is not None else max([*self.log, 0])
            self.check(
                self.committing.step <= step, f"starts from {step} while {self.committing.step} is being committed"
            )
        if action.resume is not None:
            self.check(not action.from_storage, "two sources")
            self._covered(action.resume)
            self.check(not self.told_lost & action.resume.agents, f"the holder is lost: {action.resume}")
            gone = any(not self.cluster.agents[offer.agent].alive for offer, _ in action.resume.picks)
            self.check(gone or self.cluster.holds(action.resume), f"nobody holds {action.resume}")
            self.check(
                not self.log or self.rewound or action.resume.step >= self.log[-1], "memory is older than storage"
            )
            return action.resume.step, None
        self.check(action.from_storage, "no source")
        newest = self.log[-1] if self.log else 0
        if len(self.log) > 1 and self.rng.random() < self.plan.damaged:
            self.rewound = True
            newest = self.log[-2]
            self.log.append(newest)  # the shell goes on from there, and so does the log
        return newest, newest if self.plan.names_resume_step or self.rewound else None

    def _covered(self, choice: Choice) -> None:
        """The picks really make a whole state, by a count of our own."""
        pieces = {piece for offer, picked in choice.picks for piece in picked if piece in offer.pieces}
        deals = [piece.split("/") for piece in pieces if piece.startswith("share:")]
        whole = "all" in pieces or bool(deals) and len(deals) == int(deals[0][1])
        ranks = {f"rank:{rank}" for rank in range(self.plan.world_size)} if self.plan.per_rank else set()
        self.check(whole and {"head", *ranks} <= pieces, f"not a whole state: {choice}")
        lines = {offer.attempt or choice.attempt for offer, _ in choice.picks}
        self.check(len(lines) == 1 and {offer.step for offer, _ in choice.picks} == {choice.step}, f"mixed: {choice}")

    def _drain(self, action: do.Drain) -> None:
        self._current(action.attempt)
        for agent in self.cluster.agents.values():
            if agent.alive:
                self.cluster.send(agent, self.cluster.drain, agent, action.attempt)
        self.spring("drain")

    def _salvage(self, action: do.Salvage) -> None:
        self._current(action.attempt)
        for name in action.choice.agents:
            agent = self.cluster.agents[name]
            self.cluster.send(agent, self.cluster.salvage, agent, action)
        self.spring("salvage")

    def _kill(self, action: do.KillGroup) -> None:
        group = self._current(action.attempt)
        self.check(not group.killed, "killed twice")
        if self.machine.state is not State.FINISHED and not self._excused(group):
            clean = self.cluster.newest_clean(group)
            if clean is not None:
                self.floor = max(clean, self.floor or 0)
        self.cluster.kill(group)

    def _excused(self, group: Group) -> bool:
        """True if an agent did not answer in time or could not write: less is promised then."""
        silent = any(agent.silent or not agent.alive for agent in self.cluster.agents.values())
        return group.ended_dirty or silent

    def _persist(self, action: do.PersistChoice) -> None:
        self.check(action.attempt <= self.last_attempt, "persists for an attempt that was never started")
        self.choices.append(action.choice)
        self.cluster.persist(action)

    def _commit(self, action: do.Commit) -> None:
        self.check(len(action.shards) == action.shards[0].shares, f"incomplete: {action}")
        for shard in action.shards:
            key = (action.attempt, action.step, action.reason, action.name, shard.rank)
            self.check(key in self.persisted, f"{key} is committed but was never persisted")
        self.check(self.committing is None, "two commits in flight")
        self.committing = action
        self.later(self.rng.uniform(0.05, 0.5), self._append, self.driver, action)

    def _append(self, driver: int, action: do.Commit) -> None:
        if driver != self.driver:
            return
        self.committing = None
        ok = self.rng.random() >= self.plan.commit_fails
        if ok:
            self.check(
                not self.log or action.step >= self.log[-1], f"the log goes from {self.log} back to {action.step}"
            )
            self.log.append(action.step)
        self.hear(driver, ev.Committed(action.attempt, action.step, ok, "" if ok else "503"))

    def _release(self, action: do.ReleaseSegments) -> None:
        group = self.group_of[self.last_attempt]
        self.check(action.attempt < self.last_attempt, "frees the memory of the living")
        reading = any(rank not in group.restored for rank in group.workers)
        source = group.resume
        if source is not None and source.attempt <= action.attempt:
            self.check(not reading, "frees a source that is still being read")
            newest = max([*self.log, -1])
            kept = [choice.step for choice in self.choices if choice.attempt > action.attempt]
            self.check(max([newest, *kept]) >= source.step, f"frees the only source of step {source.step}")
        self.cluster.release(action.attempt)

    def _ask_workers(self, action: do.AskWorkers) -> None:
        group = self._current(action.attempt)
        ahead = max((worker.step for worker in group.workers.values()), default=group.step) + 2
        if action.order == "stop":
            group.stop_after = ahead
        else:
            group.saves[ahead] = action.name

    def _record(self, action: do.Record) -> None:
        fields = action.fields
        if action.event == "worker_failed" and fields["root"]:
            attempt = fields["attempt"]
            self.roots[attempt] = self.roots.get(attempt, 0) + 1
            self.check(self.roots[attempt] == 1, f"two root causes in attempt {attempt}")
        elif action.event == "save_dropped":
            self.check(
                "nothing came" not in fields["why"], f"waited in vain, though every share's fate was told: {fields}"
            )
            replaced = "was committed before" in fields["why"] and fields["reason"] not in ("periodic", "exception")
            self.check(not replaced, f"a checkpoint that was asked for was overtaken: {fields}")
        elif action.event == "recovered":
            self.check(fields["lost_steps"] >= 0 and fields["recovery_s"] >= 0, f"nonsense: {fields}")

    def _tell(self, action: do.Tell) -> None:
        self.check(bool(action.text), "nothing to tell")

    def _finish(self, action: do.Finish) -> None:
        self.finish = action
        group = self.cluster.group
        self.check(group is None or group.killed, "Finish leaves a group alive")
        self.check(bool(action.why), "Finish without a reason")
        reliable = not self.plan.persist_fails and not self.plan.commit_fails
        promised = self.plan.exception_save or action.outcome == "stopped"
        given_up = action.outcome != "completed" and "without saving" not in action.why
        if reliable and promised and given_up and self.floor:
            self.check(bool(self.log) and self.log[-1] >= self.floor, f"step {self.floor} was there, log {self.log}")
        if action.outcome == "completed":
            self.check(action.exit_code == 0, "completed, but not with 0")
            self.check(bool(self.log) and self.log[-1] == self.plan.total_steps, f"completed, log {self.log}")
        elif action.outcome == "stopped":
            self.check(action.exit_code in (75, 76), "stopped, but with another code")
            if self.plan.stop_saves and self.floor is not None and group is not None:
                stopped = [worker.step for worker in group.workers.values() if worker.state == LEFT]
                self.check(not stopped or self.log[-1] >= max(stopped), "stopped without what was saved")
        else:
            self.check(action.exit_code == 1, f"failed with {action.exit_code}")


_DO: dict[type, Callable[[Schedule, Any], None]] = {
    do.StartGroup: Schedule._start,
    do.Drain: Schedule._drain,
    do.Salvage: Schedule._salvage,
    do.KillGroup: Schedule._kill,
    do.PersistChoice: Schedule._persist,
    do.Commit: Schedule._commit,
    do.ReleaseSegments: Schedule._release,
    do.AskWorkers: Schedule._ask_workers,
    do.Record: Schedule._record,
    do.Tell: Schedule._tell,
    do.Finish: Schedule._finish,
}


def run_seed(seed: int, trace: Callable[[str], None] | None = None) -> do.Finish:
    """Run the schedule of `seed`. Raises BrokenInvariantError or whatever the machine raises."""
    return Schedule(draw(seed), trace).run()
