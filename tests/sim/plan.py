"""What one schedule consists of: sizes, delays, odds and faults, all drawn from its seed."""

from __future__ import annotations

import random
from dataclasses import dataclass, field


@dataclass
class Fault:
    """Something bad at `at` seconds, or `at` seconds after a Drain, Salvage or StartGroup reached the cluster."""

    at: float
    kind: str  # kill, kill_two, kill_all, raise, exit, node, hang
    after: str = ""  # "", "drain", "salvage", "start"


@dataclass
class Plan:
    """One schedule. Odds are between 0 and 1; times in seconds."""

    seed: int
    world_size: int
    slots: tuple[int, ...]  # of each agent
    total_steps: int
    per_rank: bool
    exception_save: bool
    max_restarts: int
    save_every: int
    delay_s: float  # of a message, at most
    duplicate: float
    persist_s: float
    persist_fails: float
    commit_fails: float
    salvage_fails: float
    stuck_dirty: float  # a survivor caught inside its optimizer never becomes clean
    silent_drain: float  # an agent never answers a Drain
    damaged: float  # the newest checkpoint cannot be read
    names_resume_step: bool
    record_tier: int
    every_rank_has_head: bool
    program_fails_at: int | None
    fails_at_once: bool
    faults: list[Fault] = field(default_factory=list)
    stop_at: float | None = None
    stop_kind: str = "platform"
    stop_saves: bool = True
    grace_s: float = 25.0
    save_requests: list[float] = field(default_factory=list)
    driver_dies_at: float | None = None


KINDS = ("kill", "kill", "kill", "kill_two", "kill_all", "raise", "exit", "node", "hang")


def _faults(rng: random.Random) -> list[Fault]:
    faults = [Fault(rng.uniform(0.0, 25.0), rng.choice(KINDS)) for _ in range(rng.choice((0, 1, 1, 2, 2, 3, 5)))]
    for after in ("drain", "salvage", "start"):
        if rng.random() < 0.25:
            kind = rng.choice(("kill", "kill_two", "kill_all", "node"))
            faults.append(Fault(rng.uniform(0.0, 0.3 if after != "start" else 1.5), kind, after))
    return faults


def _slots(rng: random.Random, world_size: int) -> tuple[int, ...]:
    """The world cut into one to three agents, sometimes with a seat to spare."""
    agents = min(world_size, rng.choice((1, 1, 2, 2, 3)))
    slots = [1] * agents
    for _ in range(world_size - agents):
        slots[rng.randrange(agents)] += 1
    if rng.random() < 0.2:
        slots[-1] += 1
    return tuple(slots)


def draw(seed: int) -> Plan:
    """The schedule of a seed. The same seed is the same schedule on every machine."""
    rng = random.Random(seed)
    world_size = rng.choice((1, 2, 2, 3, 3, 4))
    rough = rng.random() < 0.3  # everything that can go wrong does

    def odds(small: float, large: float) -> float:
        return rng.uniform(0.0, large if rough else small) if rng.random() < 0.5 else 0.0

    plan = Plan(
        seed=seed,
        world_size=world_size,
        slots=_slots(rng, world_size),
        total_steps=rng.randint(2, 14),
        per_rank=rng.random() < 0.3,
        exception_save=rng.random() < 0.8,
        max_restarts=rng.choice((0, 1, 3, 10)),
        save_every=rng.choice((1, 2, 3, 5, 100)),
        delay_s=rng.choice((0.01, 0.1, 0.5)),
        duplicate=odds(0.05, 0.2),
        persist_s=rng.choice((0.1, 1.0, 5.0)),
        persist_fails=odds(0.05, 0.3),
        commit_fails=odds(0.05, 0.2),
        salvage_fails=odds(0.1, 0.5),
        stuck_dirty=odds(0.1, 0.5),
        silent_drain=odds(0.05, 0.2),
        damaged=odds(0.1, 0.4),
        names_resume_step=rng.random() < 0.8,
        record_tier=rng.choice((0, 1)),
        every_rank_has_head=rng.random() < 0.4,
        program_fails_at=rng.randint(0, 12) if rng.random() < 0.1 else None,
        fails_at_once=rng.random() < 0.03,
        faults=_faults(rng),
    )
    if rng.random() < 0.25:
        plan.stop_at = rng.uniform(0.0, 25.0)
        plan.stop_kind = rng.choice(("platform", "person", "request"))
        plan.stop_saves = rng.random() < 0.8
        plan.grace_s = rng.choice((0.5, 2.0, 25.0))
    plan.save_requests = [rng.uniform(0.0, 25.0) for _ in range(rng.choice((0, 0, 1, 2)))]
    if rng.random() < 0.1:
        plan.driver_dies_at = rng.uniform(1.0, 25.0)
    return plan
