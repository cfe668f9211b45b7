"""What a data loop hands to the run's loop, and the two Protocols between them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

# A place in a loop, as JSON: {"index": yields done, "epoch", "position": samples of the epoch done (all ranks),
# "samples": samples done in all}; "micro" too if it lies inside a step; "reader" (this rank's own, and whatever its
# state_dict holds) for iterables. It counts items consumed, never prefetched ones.
Cursor = dict[str, Any]


class Item(NamedTuple):
    """One yield of a loop: the microbatch of one rank, on the rank's device."""

    batch: Any
    epoch: int
    samples: int  # over all ranks, in this yield
    weight: tuple[int, int]  # (n_r, B): this rank's samples in the whole step, all ranks' samples in it
    micro: int  # 0 … accumulate - 1
    last_micro: bool

    @property
    def share(self) -> float:
        """n_r / B: what this rank's mean gradient weighs. Sums to 1 over ranks; 0 for a rank with a stand-in sample."""
        return self.weight[0] / self.weight[1]


class LoopIterator(Iterator[Item], Protocol):
    """A loop under way. `close` may be called at any time, and more than once."""

    def has_next(self) -> bool:
        """Whether this rank has another item. May read it ahead (an iterable's step), which `cursor` does not count."""
        ...

    def cursor(self) -> Cursor:
        """The place after the items consumed so far: opening it yields exactly the items that would have come next."""
        ...

    def close(self) -> None:
        """End loader processes; after a validation loop, put the random generators back where they were at `open`."""
        ...


class LoopSource(Protocol):
    """A loop as planned: everything known before the first sample is read."""

    @property
    def length(self) -> int | None:
        """Yields of the whole loop on this rank, from its very beginning; None if only the source knows."""
        ...

    @property
    def steps_per_epoch(self) -> int | None:
        """Optimizer steps in an epoch; None if only the source knows."""
        ...

    @property
    def global_batch_text(self) -> str:
        """For people, e.g. "64 = 2 ranks x 32"."""
        ...

    def config(self) -> dict[str, Any]:
        """JSON facts which must be the same when a run continues."""
        ...

    def open(self, cursor: Cursor | None = None) -> LoopIterator:
        """Start, or continue at `cursor`. Raises UsageError if the cursor does not fit the source."""
        ...
