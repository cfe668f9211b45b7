"""Which step can a group go on from? The newest one whose pieces the tiers together cover. Pure.

A checkpoint's state is made of *pieces*, named by strings:

* ``all``        every replicated tensor (one clean survivor of a data-parallel group holds them all), or instead
* ``share:i/n``  the i-th of n shares into which replicated tensors were dealt when a snapshot was staged;
* ``head``       the JSON half as rank 0 saw it (cursor, step, run.state, schedulers), and module buffers where a model has any;
* ``rank:r``     what rank r alone holds (values tracked as `per_rank`, the state of an iterable's reader).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum


class Tier(IntEnum):
    """Where state is held, newest first."""

    LIVE = 0
    MEMORY = 1
    PEER = 2
    STORAGE = 3


@dataclass(frozen=True)
class Offer:
    """`holder` (for example "agent-0/rank-1/live") can supply `pieces` of resume point `step` at a cost of `size_bytes`."""

    tier: Tier
    step: int
    agent: str
    holder: str
    pieces: frozenset[str]
    size_bytes: int = 0


@dataclass(frozen=True)
class Choice:
    """The step to go on from, who supplies which pieces, and why."""

    step: int
    picks: tuple[tuple[Offer, frozenset[str]], ...]
    reason: str
    attempt: int = 0

    @property
    def sources(self) -> tuple[str, ...]:
        """Tier names in CONTRACT's spelling, newest first, each once."""
        return tuple(tier.name.lower() for tier in sorted({offer.tier for offer, _ in self.picks}))
