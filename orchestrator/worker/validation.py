"""`run.batches(..., train=False)`: this rank's share of a validation set, each sample once, counting no steps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from orchestrator.worker.data_item import LoopSource

if TYPE_CHECKING:
    from orchestrator.worker.run import Run


class Validation:
    """Iterate as often as wanted; random generators continue afterwards as if nothing had happened."""

    def __init__(self, run: Run, source: LoopSource) -> None:
        self._run = run
        self._source = source

    def __len__(self) -> int:
        if self._source.length is None:
            raise TypeError("this loop's length is known only to its source")
        return self._source.length

    def __iter__(self) -> Iterator[Any]:
        # Ranks other than 0 hold buffers of their own until the next training forward; what they measure must not
        # differ.
        self._run.share_buffers()
        iterator = self._source.open()
        try:
            while iterator.has_next():
                yield next(iterator).batch
        finally:
            iterator.close()
