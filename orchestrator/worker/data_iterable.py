"""Loops over iterables that know their own place (`state_dict`): every rank reads its own."""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch.utils.data import default_collate

from orchestrator.errors import UsageError
from orchestrator.worker import rng
from orchestrator.worker.data_device import first_dim, to_device
from orchestrator.worker.data_item import Cursor, Item
from orchestrator.worker.data_settings import Settings
from orchestrator.worker.order import batch_text, check_batch, split


class IterableLoop:
    """A LoopSource over an iterable with `state_dict`/`load_state_dict`; for validation on one rank over any iterable.

    Which samples a rank sees is the iterable's business. It yields ready batches, or samples if `batch_size` is given.
    Ready batches weigh the same on every rank, as in DistributedDataParallel itself. An epoch ends when the iterable
    does; samples that make no full step are dropped unless `drop_last=False`.
    """

    length: int | None = None
    steps_per_epoch: int | None = None

    def __init__(self, settings: Settings, rank: int, world_size: int, device: torch.device) -> None:
        self.settings = settings
        self.rank, self.world_size, self.device = rank, world_size, device
        self.own = 0  # samples of this rank in a step, 0: as they come
        self.batch_size = settings.batch_size
        if self.batch_size is not None:
            if not settings.train:
                self.batch_size = max(self.batch_size, world_size)
            check_batch(None, self.batch_size, world_size, settings.accumulate, settings.drop_last)
            self.own = split(self.batch_size, world_size, settings.accumulate).counts[rank]
        self._refuse()
        self.stateful = hasattr(settings.source, "state_dict") and hasattr(settings.source, "load_state_dict")
        self.global_batch_text = (
            f"{settings.accumulate * world_size} ready batches of the source"
            if self.batch_size is None
            else batch_text(self.batch_size, world_size, settings.accumulate)
        )

    def _refuse(self) -> None:
        s = self.settings
        kind = type(s.source).__name__
        if s.accumulate > 1 and not s.drop_last:
            raise UsageError(
                f"The last samples of {kind} may not fill {s.accumulate} microbatches; pass `drop_last=True` or "
                "`accumulate=1`."
            )
        if not s.train and self.world_size > 1 and not hasattr(s.source, "state_dict"):
            raise UsageError(
                f"{kind} cannot be shared out: each of the {self.world_size} ranks would read all of it and count it "
                f"{self.world_size} times; pass a dataset with `__len__` and `__getitem__` for validation."
            )

    def config(self) -> dict[str, Any]:
        """JSON facts which must be the same when a run continues."""
        s = self.settings
        return {
            "dataset_len": None,
            "global_batch": self.batch_size,
            "accumulate": s.accumulate,
            "drop_last": s.drop_last,
            "shuffle": type(s.source).__name__,
            "seed": s.seed,
        }

    def open(self, cursor: Cursor | None = None) -> IterableIterator:
        """Start, or continue at `cursor`, which must hold this rank's `reader`. Raises UsageError if it does not."""
        if cursor is not None and self.stateful and "reader" not in cursor:
            raise UsageError(
                f"The checkpoint holds no state of {type(self.settings.source).__name__} for rank {self.rank}; "
                "an iterable that every rank reads by itself continues only with as many workers as it was saved with."
            )
        return IterableIterator(self, cursor)


class _DryError(Exception):
    """The source has nothing more for this loop."""


class IterableIterator:
    """An IterableLoop under way. Reads whole steps; the state of the boundary before the newest one is kept."""

    def __init__(self, loop: IterableLoop, cursor: Cursor | None) -> None:
        self._loop = loop
        self._source = loop.settings.source
        self._restore: Callable[[], None] | None = None if loop.settings.train else rng.capture()
        place = cursor or {"index": 0, "epoch": loop.settings.first_epoch, "position": 0, "samples": 0}
        self._place: Cursor = {name: place[name] for name in ("index", "epoch", "position", "samples")}
        self._queue: deque[Item] = deque()  # read, not consumed: the rest of one step
        # The source's state after the last step consumed; None: not taken yet.
        self._boundary: dict[str, Any] | None = None
        self._closed = self._dry = False
        self._may_be_empty = False  # continued within an epoch, perhaps at its very end
        self._over = False  # the source has said already that this epoch is over
        self._epoch: int = place["epoch"]
        self._steps_in_epoch = 0
        with rng.guard(cuda=False):
            rng.seed_all(rng.derive(loop.settings.seed, "reader", loop.rank, "open"), cuda=False)
            self._start(cursor)
        for _ in range(place.get("micro", 0)):
            if self.has_next():
                self._queue.popleft()  # consumed before

    def _start(self, cursor: Cursor | None) -> None:
        if cursor is not None and self._loop.stateful:
            self._epoch = cursor["reader"]["epoch"]
            self._may_be_empty = not cursor["reader"]["fresh"]
            self._set_epoch()
            self._source.load_state_dict(copy.deepcopy(cursor["reader"]["state"]))
        else:
            self._set_epoch()
        self._iterator = iter(self._source)

    def _set_epoch(self) -> None:
        if callable(getattr(self._source, "set_epoch", None)):
            self._source.set_epoch(self._epoch)

    def __iter__(self) -> IterableIterator:
        return self

    def __next__(self) -> Item:
        if not self.has_next():
            self.close()
            raise StopIteration
        item = self._queue.popleft()
        self._advance(item)
        if not self._queue:
            self._boundary = None
        return item._replace(batch=to_device(item.batch, self._loop.device))

    def has_next(self) -> bool:
        """Whether this rank has another item; reads one step ahead to know, which `cursor` does not count."""
        if self._closed:
            return False
        if not self._queue and not self._dry:
            self._read_ahead()
        return bool(self._queue)

    def cursor(self) -> Cursor:
        """The place after the items consumed so far; "reader" is this rank's own."""
        place = dict(self._place)
        if place["index"] % self._loop.settings.accumulate:
            place["micro"] = place["index"] % self._loop.settings.accumulate
        if self._loop.stateful:
            place["reader"] = self._reader()
        return place

    def close(self) -> None:
        """Let go of the source; after validation, put the random generators back where they were."""
        if self._closed:
            return
        self._reader()  # the source may be used elsewhere afterwards
        self._closed = self._dry = True
        self._queue.clear()
        if self._restore is not None:
            self._restore()

    def _reader(self) -> dict[str, Any] | None:
        """The source's state at the boundary: taken before anything beyond it is read."""
        if self._boundary is None and self._loop.stateful:
            state = copy.deepcopy(self._source.state_dict())
            # A source that has ended stands at the start of the next epoch.
            self._boundary = {"epoch": self._epoch + self._over, "fresh": self._over, "state": state}
        return self._boundary

    def _advance(self, item: Item) -> None:
        place = self._place
        place["index"] += 1
        if item.last_micro:
            fresh = item.epoch != place["epoch"]
            place["epoch"] = item.epoch
            place["position"] = item.weight[1] + (0 if fresh else place["position"])
            place["samples"] += item.weight[1]

    def _read_ahead(self) -> None:
        s = self._loop.settings
        step = self._place["index"] // s.accumulate
        # Seeded by place, so that what is read does not depend on when it is read ahead.
        with rng.guard(cuda=False):
            rng.seed_all(rng.derive(s.seed, "reader", self._loop.rank, step), cuda=False)
            self._reader()
            self._dry = True  # unless a step comes: after an exception too, the boundary must stay what it is
            if s.max_steps is None or step < s.max_steps:
                with contextlib.suppress(_DryError):
                    self._queue.extend(self._read_step())
                    self._dry = False

    def _read_step(self) -> list[Item]:
        """The microbatches of the next full step, going on to the next epoch where this one has no more."""
        if not self._in_range():
            raise _DryError
        if self._over:
            self._next_epoch()
        micros: list[Any] = []
        while len(micros) < self._loop.settings.accumulate:
            batch = self._read_batch()
            if batch is None:  # the epoch is over; what it left over makes no step
                micros.clear()
                self._next_epoch()
            else:
                micros.append(batch)
        self._steps_in_epoch += 1
        return self._items(micros)

    def _in_range(self) -> bool:
        s = self._loop.settings
        return s.epochs is None or self._epoch < s.first_epoch + s.epochs

    def _next_epoch(self) -> None:
        if self._steps_in_epoch == 0 and not self._may_be_empty:
            if self._loop.settings.train:
                raise UsageError(
                    f"{type(self._source).__name__} gave rank {self._loop.rank} no full batch in epoch {self._epoch}, "
                    "so nothing would train; check that its `__iter__` starts over at the end, or lower `batch_size`."
                )
            raise _DryError
        self._epoch, self._steps_in_epoch = self._epoch + 1, 0
        self._may_be_empty = self._over = False
        if not self._in_range():
            raise _DryError
        self._set_epoch()
        self._iterator = iter(self._source)

    def _read_batch(self) -> tuple[Any, int] | None:
        """(microbatch, its samples), or None at the end of the epoch."""
        s = self._loop.settings
        if self._loop.batch_size is None:
            for batch in self._iterator:
                return batch, first_dim(batch)
            return None
        wanted = self._loop.own // s.accumulate
        samples = list(itertools.islice(self._iterator, wanted))
        self._over = 0 < len(samples) < wanted and not s.drop_last
        if not samples or (len(samples) < wanted and s.drop_last):
            return None
        return (s.collate_fn or default_collate)(samples), len(samples)

    def _items(self, micros: list[tuple[Any, int]]) -> list[Item]:
        world_size, last = self._loop.world_size, len(micros) - 1
        own = sum(count for _, count in micros)
        full = self._loop.batch_size is not None and own == self._loop.own
        total = self._loop.batch_size if full and self._loop.batch_size is not None else own * world_size
        each = total // len(micros) if full else None
        return [
            Item(batch, self._epoch, each or count * world_size, (own, total), micro, micro == last)
            for micro, (batch, count) in enumerate(micros)
        ]
