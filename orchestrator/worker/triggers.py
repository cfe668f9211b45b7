"""When is a checkpoint due? Pure functions of steps, epochs, and a given time."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.spec import SaveTrigger

AUTO_FIRST_S = 60.0
AUTO_LEAST_S = 10.0
AUTO_MOST_S = 1800.0
ASSUMED_MTBF_S = 4 * 3600.0


@dataclass(frozen=True)
class Triggers:
    """`--save-every` and `--save-at`, split by what decides them."""

    every: tuple[SaveTrigger, ...]
    at: frozenset[int]

    @classmethod
    def of(cls, every: Sequence[Sequence[Any]], at: Sequence[int]) -> Triggers:
        """From JSON: pairs of unit and distance, and steps."""
        return cls(tuple(SaveTrigger(unit, distance) for unit, distance in every), frozenset(at))

    def by_step(self, step: int, epoch: int, previous_epoch: int) -> bool:
        """Due at this resume point; the same on every rank, so nobody has to ask. Epochs count from 0."""
        if step in self.at:
            return True
        for trigger in self.every:
            if trigger.unit == "steps" and step % int(trigger.every) == 0:
                return True
            if trigger.unit == "epochs" and epoch // trigger.every > previous_epoch // trigger.every:
                return True
        return False

    def by_time(self, since_s: float, cost_s: float) -> bool:
        """Due `since_s` seconds after the last save, whose cost to training was `cost_s`; one rank's clock decides."""
        return any(
            (trigger.unit == "seconds" and since_s >= trigger.every)
            or (trigger.unit == "auto" and since_s >= auto_interval_s(cost_s))
            for trigger in self.every
        )


def auto_interval_s(cost_s: float, mtbf_s: float = ASSUMED_MTBF_S) -> float:
    """The interval that loses least: sqrt(2 * cost * mean time between failures) (Young 1974), within bounds."""
    if cost_s <= 0:
        return AUTO_FIRST_S
    return min(AUTO_MOST_S, max(AUTO_LEAST_S, math.sqrt(2 * cost_s * mtbf_s)))
