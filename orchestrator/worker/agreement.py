"""How ranks come to act at the same boundary without stalling: a tiny reduction posted at one and read at a later one.

Every rank posts the same sequence of reductions, because they are posted at boundaries only and the distance to the
next one is itself agreed on. What is read is the maximum over ranks, so a wish of any rank reaches all at the same
boundary.
"""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

import torch

from orchestrator.worker.report import PeerLostError

TARGET_ROUND_S = 0.15  # latency of a stop or save request; a round costs up to 1 ms with 3 ranks on 2 cores
MAX_STRIDE = 4096


class Wish(IntEnum):
    """What a rank may ask for: positions in the reduced vector (maximum over ranks)."""

    SAVE = 0  # the time of a periodic save has come
    STOP = 1  # 1: save and stop, 2: stop without saving
    FINISH = 2
    DRY = 3
    LEAVING = 4
    STAYING = 5
    BUSY = 6
    STEP_US = 7
    COPY_US = 8
    ORDER = 9  # saves the driver has ordered so far
    CALLS = 10  # calls of `run.save` so far
    MOST_STEPS = 11  # of those who leave
    LEAST_STEPS = 12  # the same, negative


@dataclass(frozen=True)
class Agreed:
    """The maximum over ranks of every wish; all ranks hold the same, each with what it had posted itself."""

    values: tuple[int, ...]
    posted: tuple[int, ...]

    def __getitem__(self, wish: Wish) -> int:
        return self.values[wish]

    def own(self, wish: Wish) -> int:
        """What this rank wished for in that round."""
        return self.posted[wish]


class Agreement:
    """Rounds over `control` (None: one rank, every wish is granted at once)."""

    def __init__(self, control: Any) -> None:
        self._control = control
        self._pending: tuple[Any, torch.Tensor, tuple[int, ...]] | None = None
        self._stride = 1
        self._countdown = 1
        self.every_step = False  # sources that may run dry on one rank look ahead every step

    @property
    def pending(self) -> bool:
        """Whether a round was posted that is still to be read."""
        return self._pending is not None

    def close(self) -> None:
        """No more rounds."""
        self._control, self._pending = None, None

    def at_boundary(self, wishes: Callable[[], dict[Wish, int]]) -> Agreed | None:
        """Post and read as due; what was agreed on, at the boundaries where a round ends. Raises PeerLostError."""
        if self._control is None:
            return _agreed(wishes())
        self._countdown -= 1
        if self._countdown > 0:
            return None
        agreed = self._read()
        self._adapt(agreed)
        self._post(wishes())
        self._countdown = self._stride
        return agreed

    def now(self, wishes: dict[Wish, int], timeout_s: float | None = None) -> Agreed:
        """A blocking round, at the same place on all ranks. A round that was posted before is read and merged in,
        except for what only counts now: who stays, who is busy.
        """
        if self._control is None:
            return _agreed(wishes)
        before = self._read(timeout_s)
        self._post(wishes)
        agreed = self._read(timeout_s)
        if agreed is None:
            raise AssertionError("a posted round has an answer")
        self._countdown = 1
        if before is None:
            return agreed
        values = [max(pair) for pair in zip(before.values, agreed.values, strict=True)]
        for wish in (Wish.STAYING, Wish.BUSY, Wish.MOST_STEPS, Wish.LEAST_STEPS):
            values[wish] = agreed[wish]
        return Agreed(tuple(values), agreed.posted)

    def _post(self, wishes: dict[Wish, int]) -> None:
        vector = torch.zeros(len(Wish), dtype=torch.int64)
        for wish, value in wishes.items():
            vector[wish] = value
        options = torch.distributed.AllreduceOptions()
        options.reduceOp = torch.distributed.ReduceOp.MAX
        try:
            posted = tuple(vector.tolist())
            self._pending = (self._control.allreduce([vector], options), vector, posted)
        except RuntimeError as error:
            raise PeerLostError(f"an agreement could not be posted: {error}") from error

    def _read(self, timeout_s: float | None = None) -> Agreed | None:
        if self._pending is None:
            return None
        work, vector, posted = self._pending
        self._pending = None
        try:
            if timeout_s is None:
                work.wait()
            else:
                work.wait(datetime.timedelta(seconds=timeout_s))
        except RuntimeError as error:
            raise PeerLostError(f"an agreement was cut off: {error}") from error
        return Agreed(tuple(vector.tolist()), posted)

    def _adapt(self, agreed: Agreed | None) -> None:
        if self.every_step:
            self._stride = 1
        elif agreed is not None and agreed[Wish.STEP_US] > 0:
            self._stride = min(MAX_STRIDE, max(1, round(TARGET_ROUND_S * 1e6 / agreed[Wish.STEP_US])))


def _agreed(wishes: dict[Wish, int]) -> Agreed:
    values = tuple(int(wishes.get(wish, 0)) for wish in Wish)
    return Agreed(values, values)
