"""A virtual cluster: agents, workers in lockstep, snapshots, savers. It does what the machine orders and reports back.

It is deliberately dumb, and knows what is really where (`holds`): a choice of the machine is checked against that.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

from orchestrator.control import actions as do
from orchestrator.control import events as ev
from orchestrator.control.consistency import Choice, Offer, Tier

from .plan import Plan

BOOTING, COMPUTING, WAITING, UPDATING, PARKED, LEFT, DEAD = range(7)


class Worker:
    """One rank of one attempt. `step` is its last completed step; `record` the steps whose boundary record is kept."""

    __slots__ = ("agent", "attempt", "clean", "epoch", "newest", "raised", "rank", "record", "state", "step")

    def __init__(self, rank: int, agent: Agent, attempt: int) -> None:
        self.rank, self.agent, self.attempt = rank, agent, attempt
        self.state, self.step, self.newest = BOOTING, -1, -1
        self.clean = False
        self.record: tuple[int, ...] = ()
        self.raised = False
        self.epoch = 0  # counts changes of what the rank does: a timer of an earlier one is void


class Agent:
    """One node and what goes with it: workers, snapshots (attempt, rank, step), salvage (attempt, holder, step)."""

    def __init__(self, name: str, slots: int) -> None:
        self.name, self.slots = name, slots
        self.alive = True
        self.workers: dict[int, Worker] = {}
        self.attempt = 0
        self.poisoned = False
        self.silent = False
        self.answered = False
        self.snapshots: set[tuple[int, int, int]] = set()
        self.salvage: set[tuple[int, str, int]] = set()
        self.released = -1
        self.broken: set[str] = set()  # holders that can never write what they hold
        self.joined_at = 0.0
        self.up_at = 0.0  # when its last message to the driver arrives
        self.down_at = 0.0


class Group:
    """What all ranks of an attempt agree on."""

    def __init__(self, attempt: int, world_size: int, step: int, resume: Choice | None) -> None:
        self.attempt, self.world_size, self.step, self.resume = attempt, world_size, step, resume
        self.workers: dict[int, Worker] = {}
        self.arrived: set[int] = set()
        self.formed = False
        self.restored: set[int] = set()
        self.stop_after: int | None = None
        self.saves: dict[int, str] = {}
        self.killed = False
        self.ended_dirty = False  # something about its end was outside of what is promised


class Cluster:
    """All agents together. `later(delay, fn, *args)` and `tell(agent, event)` are handed in by the schedule."""

    def __init__(self, plan: Plan, rng: Random, later: Callable[..., None], clock: Callable[[], float]) -> None:
        self.plan, self.rng, self.later, self.clock = plan, rng, later, clock
        self.agents: dict[str, Agent] = {}
        self.group: Group | None = None
        self.tell: Callable[[Agent, ev.Event], None] = lambda agent, event: None
        self.lost: Callable[[Agent, ev.AgentLost], None] = lambda agent, event: None
        self.made = 0
        self.generation = 0

    # agents

    def add_agent(self, slots: int) -> None:
        agent = Agent(f"agent-{self.made}", slots)
        self.made += 1
        self.agents[agent.name] = agent
        self.tell(agent, ev.AgentJoined(agent.name, f"node-{agent.name}", slots))

    def lose_agent(self, agent: Agent) -> None:
        if not agent.alive:
            return
        self.silence(agent)
        now = self.clock()
        lost = ev.AgentLost(agent.name, "the node is gone", now)
        self.later(max(self.rng.uniform(0.0, 1.0), agent.joined_at - now), self.lost, agent, lost)
        if self.rng.random() < 0.85:
            self.later(self.rng.uniform(0.5, 4.0), self.add_agent, agent.slots)

    def silence(self, agent: Agent) -> None:
        agent.alive = False
        for worker in agent.workers.values():
            worker.state = DEAD
            worker.epoch += 1
        agent.snapshots.clear()
        agent.salvage.clear()

    def all_die(self) -> None:
        for agent in self.agents.values():
            self.silence(agent)
        self.agents = {}
        self.group = None
        self.generation += 1

    # a group's life

    def start(self, order: do.StartGroup, step: int, told_step: int | None) -> None:
        group = self.group = Group(order.attempt, len(order.placement), step, order.resume)
        for name in {name for _, name in order.placement}:
            agent = self.agents[name]
            ranks = tuple(rank for rank, home in order.placement if home == name)
            self.send(agent, self._fork, agent, group, ranks, told_step)

    def send(self, agent: Agent, fn: Callable[..., None], *args: Any) -> None:
        """An order to an agent: late, but in order."""
        now = self.clock()
        agent.down_at = max(agent.down_at, now + self.rng.random() * self.plan.delay_s)
        self.later(agent.down_at - now, self._deliver, agent, fn, args)

    def _deliver(self, agent: Agent, fn: Callable[..., None], args: tuple[Any, ...]) -> None:
        if agent.alive:
            fn(*args)

    def _fork(self, agent: Agent, group: Group, ranks: tuple[int, ...], told_step: int | None) -> None:
        if group.killed:
            return
        agent.attempt, agent.poisoned, agent.answered = group.attempt, False, False
        agent.silent = self.rng.random() < self.plan.silent_drain
        agent.workers = {rank: Worker(rank, agent, group.attempt) for rank in ranks}
        group.workers.update(agent.workers)
        pids = tuple((rank, 1000 + rank) for rank in ranks)
        self.tell(agent, ev.GroupStarted(group.attempt, agent.name, pids, told_step))
        for worker in agent.workers.values():
            self.later(self.rng.uniform(0.05, 1.0), self._boot, group, worker, worker.epoch)

    def _boot(self, group: Group, worker: Worker, epoch: int) -> None:
        if worker.epoch != epoch or worker.agent.poisoned:
            return
        if self.plan.fails_at_once:
            self.fail(worker, "raise", "at once")
            return
        if group.resume is not None and not self.holds(group.resume):
            if all(offer.agent in self.agents and self.agents[offer.agent].alive for offer, _ in group.resume.picks):
                raise AssertionError(f"attempt {group.attempt} finds its source gone: {group.resume}")
            self.fail(worker, "kill")  # the agent it reads from has just died
            return
        worker.step = worker.newest = group.step
        worker.clean, worker.record = True, (group.step,)
        group.restored.add(worker.rank)
        if len(group.restored) == group.world_size:
            group.formed = True
            for other in group.workers.values():
                if other.state == BOOTING:
                    self._begin(group, other)

    def _begin(self, group: Group, worker: Worker) -> None:
        """A boundary: leave, stop, or start on the next step."""
        if worker.agent.poisoned:
            self._park(worker)
        elif worker.step >= self.plan.total_steps:
            self._leave(group, worker, "final")
        elif group.stop_after is not None and worker.step >= group.stop_after:
            self._leave(group, worker, "stop")
        else:
            worker.state = COMPUTING
            worker.epoch += 1
            self.later(self.rng.uniform(0.2, 1.0), self._computed, group, worker, worker.epoch)

    def _leave(self, group: Group, worker: Worker, reason: str) -> None:
        if worker.step == group.step and reason == "final":
            self.tell(worker.agent, ev.WorkerStepped(group.attempt, worker.rank, worker.step, self.clock()))
        self._stage(worker, reason)
        worker.state = LEFT
        worker.epoch += 1
        left: ev.Event = ev.WorkerFinished(group.attempt, worker.rank, worker.step)
        if reason == "stop":
            left = ev.WorkerStopped(group.attempt, worker.rank, worker.step)
        self.tell(worker.agent, left)

    def _computed(self, group: Group, worker: Worker, epoch: int) -> None:
        if worker.epoch != epoch:
            return
        if self.plan.program_fails_at == worker.step:
            self.fail(worker, "raise", "the program's own")
            return
        worker.state = WAITING
        worker.record = (*worker.record[-2:], worker.step + 1)  # the candidate for the next boundary
        group.arrived.add(worker.rank)
        if len(group.arrived) == group.world_size:
            group.arrived = set()
            for other in group.workers.values():
                if other.state == WAITING:  # one that died meanwhile had sent its share already
                    self.later(self.rng.uniform(0.0, 0.2), self._reduced, group, other, other.epoch)

    def _reduced(self, group: Group, worker: Worker, epoch: int) -> None:
        if worker.epoch != epoch or worker.agent.poisoned:
            return
        worker.state, worker.clean = UPDATING, False
        worker.epoch += 1
        self.later(self.rng.uniform(0.0, 0.2), self._updated, group, worker, worker.epoch)

    def _updated(self, group: Group, worker: Worker, epoch: int) -> None:
        if worker.epoch != epoch:
            return
        if worker.agent.poisoned and self.rng.random() < self.plan.stuck_dirty:
            worker.state = PARKED
            self._offer(worker.agent)
            return
        worker.step += 1
        worker.clean = True
        if worker.step == group.step + 1 and not worker.agent.poisoned:
            phases = {"first_step": self.clock()}
            self.tell(worker.agent, ev.WorkerStepped(group.attempt, worker.rank, worker.step, self.clock(), phases))
        elif self.rng.random() < 0.1:
            self.tell(worker.agent, ev.Progress(group.attempt, worker.rank, worker.step))
        if not worker.agent.poisoned:
            if worker.step in group.saves:
                self._stage(worker, "requested", group.saves[worker.step])
            if worker.step % self.plan.save_every == 0 and worker.step < self.plan.total_steps:
                self._stage(worker, "periodic")
        self._begin(group, worker)

    # saves

    def _stage(self, worker: Worker, reason: str, name: str = "") -> None:
        agent = worker.agent
        mine = sorted(slot for slot in agent.snapshots if slot[:2] == (worker.attempt, worker.rank))
        agent.snapshots -= set(mine[:-2])  # three slots
        agent.snapshots.add((worker.attempt, worker.rank, worker.step))
        world = self.plan.world_size
        self.tell(agent, ev.SaveStaged(worker.attempt, worker.rank, worker.step, world, reason, name))
        shard = ev.ShardPersisted(worker.attempt, worker.step, worker.rank, world, reason, {}, name)
        self._write(agent, shard)

    def _write(self, agent: Agent, shard: ev.ShardPersisted) -> None:
        event: ev.Event = shard
        if self.rng.random() < self.plan.persist_fails:
            event = ev.ShardLost(shard.attempt, shard.step, shard.rank, "disk full", shard.reason, shard.name)
        self.later(self.rng.uniform(0.0, self.plan.persist_s), self._written, agent, event)

    def _written(self, agent: Agent, event: ev.Event) -> None:
        if agent.alive:
            self.tell(agent, event)

    def persist(self, order: do.PersistChoice) -> None:
        names = sorted(order.choice.agents)
        for index, name in enumerate(names):
            shard = ev.ShardPersisted(order.attempt, order.choice.step, index, len(names), order.reason, {})
            if name in self.agents:
                self.send(self.agents[name], self._write, self.agents[name], shard)

    # failures

    def fail(self, worker: Worker, kind: str, message: str = "chance") -> None:
        if worker.state in (DEAD, LEFT) or worker.raised:
            return
        step, at = max(worker.step, 0), self.clock()
        error = ev.ErrorInfo("ValueError", message, frame="train.py:3") if kind == "raise" else None
        cause = {"raise": "exception", "exit": "exit:3", "hang": "hang"}.get(kind, "signal:9")
        worker.epoch += 1
        if kind == "raise":
            worker.raised, worker.state = True, PARKED
            worker.clean = worker.clean and worker.step >= 0
        else:
            worker.state, worker.clean = DEAD, False
        alive = kind == "raise"
        failed = ev.WorkerFailed(worker.attempt, worker.rank, cause, step, at, error, alive)
        self.later(self.rng.uniform(0.0, 0.2), self._noticed, worker, failed)
        if kind != "raise" and self.group is not None and self.rng.random() < 0.3:
            self._drag_down(self.group, worker)

    def _drag_down(self, group: Group, dead: Worker) -> None:
        """Another rank notices the lost connection and says so, perhaps before its agent sees the death."""
        for other in group.workers.values():
            if other.state == WAITING and other is not dead and not other.raised:
                other.raised, other.state = True, PARKED
                other.epoch += 1
                error = ev.ErrorInfo("DistBackendError", "connection closed by peer", secondary=True)
                said = ev.WorkerFailed(group.attempt, other.rank, "exception", other.step, self.clock(), error, True)
                self.later(self.rng.uniform(0.0, 0.3), self._noticed, other, said)

    def _noticed(self, worker: Worker, failed: ev.WorkerFailed) -> None:
        agent = worker.agent
        if not agent.alive or agent.attempt != worker.attempt:
            return
        self.tell(agent, failed)
        self._poison(agent)

    def _poison(self, agent: Agent) -> None:
        if not agent.poisoned:
            agent.poisoned = True
            for worker in agent.workers.values():
                if worker.state in (COMPUTING, WAITING, BOOTING):
                    self._park(worker)
        self._offer(agent)

    def _park(self, worker: Worker) -> None:
        worker.state = PARKED
        worker.epoch += 1
        if worker.agent.answered:
            self._offer(worker.agent)

    def drain(self, agent: Agent, attempt: int) -> None:
        if agent.attempt < attempt:  # nothing was forked here
            agent.attempt, agent.workers, agent.poisoned = attempt, {}, True
        if agent.attempt == attempt:
            self._poison(agent)

    def _offer(self, agent: Agent) -> None:
        """Tell the driver what is here."""
        agent.answered = True
        if agent.silent:
            return
        settled = all(worker.state != UPDATING for worker in agent.workers.values())
        self.tell(agent, ev.OffersIn(agent.attempt, agent.name, tuple(self.offers(agent)), settled))

    def offers(self, agent: Agent) -> list[Offer]:
        """What can really be had from this agent now, besides salvage of earlier attempts."""
        found = []
        for rank, worker in agent.workers.items():
            if worker.clean and worker.state == PARKED:
                pieces = frozenset({"all", f"rank:{rank}"})
                found.append(Offer(Tier.LIVE, worker.step, agent.name, f"{agent.name}/{rank}/live", pieces, 100))
            if rank == 0 or self.plan.every_rank_has_head:
                tier = Tier(self.plan.record_tier)
                for step in worker.record:
                    holder = f"{agent.name}/{rank}/record"
                    found.append(Offer(tier, step, agent.name, holder, frozenset({"head"}), 1))
        for attempt, rank, step in agent.snapshots:
            pieces = {f"share:{rank}/{self.plan.world_size}", f"rank:{rank}"} | ({"head"} if rank == 0 else set())
            holder = f"{agent.name}/{rank}/slot"
            found.append(Offer(Tier.MEMORY, step, agent.name, holder, frozenset(pieces), 50, attempt))
        return found

    def salvage(self, agent: Agent, order: do.Salvage) -> None:
        """Write what was elected, if it is still there."""
        offered = {(offer.holder, offer.step) for offer in self.offers(agent)}
        mine = [offer for offer, _ in order.choice.picks if offer.agent == agent.name]
        ok = all((offer.holder, offer.step) in offered or offer.tier is Tier.MEMORY for offer in mine)
        if agent.attempt != order.attempt:
            ok = False
        if ok and (mine[0].holder in agent.broken or self.rng.random() < self.plan.salvage_fails):
            agent.broken.add(mine[0].holder)
            ok = False
        if not ok and self.group is not None:
            self.group.ended_dirty = True
        if ok:
            agent.salvage |= {(order.attempt, offer.holder, offer.step) for offer in mine}
        why = "" if ok else "it is gone"
        said = ev.Salvaged(order.attempt, agent.name, order.election, ok, why)
        self.later(self.rng.uniform(0.0, 0.2), self._written, agent, said)

    def kill(self, group: Group) -> None:
        """The driver's order. That it takes a while to arrive matters to nobody: attempts fence what still lives."""
        group.killed = True
        for worker in group.workers.values():
            if worker.state != DEAD:
                worker.state = DEAD
                worker.epoch += 1
                worker.clean = False

    # the truth

    def holds(self, choice: Choice) -> bool:
        """True if every piece of `choice` can really be read now."""
        for offer, _ in choice.picks:
            agent = self.agents.get(offer.agent)
            if agent is None or not agent.alive:
                return False
            rank = int(offer.holder.split("/")[1])
            slot = (offer.attempt or choice.attempt, rank, offer.step)
            written = (choice.attempt, offer.holder, offer.step) in agent.salvage
            kept = offer.holder.endswith("/record") and agent.released < choice.attempt
            if not (written or kept or (offer.holder.endswith("/slot") and slot in agent.snapshots)):
                return False
        return True

    def newest_clean(self, group: Group) -> int | None:
        """The newest step that parked survivors and the records of living agents really cover now."""
        heads = {
            step
            for worker in group.workers.values()
            if worker.agent.alive and (worker.rank == 0 or self.plan.every_rank_has_head)
            for step in worker.record
        }
        clean: dict[int, set[int]] = {}
        for worker in group.workers.values():
            if worker.agent.alive and worker.clean and worker.state == PARKED:
                clean.setdefault(worker.step, set()).add(worker.rank)
        need = self.plan.world_size if self.plan.per_rank else 1
        return max((step for step, ranks in clean.items() if step in heads and len(ranks) >= need), default=None)

    def release(self, upto: int) -> None:
        for agent in self.agents.values():
            agent.released = max(agent.released, upto)
            agent.snapshots = {slot for slot in agent.snapshots if slot[0] > upto}
            agent.salvage = {segment for segment in agent.salvage if segment[0] > upto}
