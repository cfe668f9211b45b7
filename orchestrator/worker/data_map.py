"""Loops over map-style datasets: every rank computes its slice of every global batch, from any place on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from torch.utils.data._utils.pin_memory import pin_memory

from orchestrator.errors import UsageError
from orchestrator.worker import rng
from orchestrator.worker.data_device import to_device
from orchestrator.worker.data_fetch import Fetcher, Key, WorkerInit, identity
from orchestrator.worker.data_item import Cursor, Item
from orchestrator.worker.data_settings import Settings
from orchestrator.worker.order import Indices, Permutation, batch_text, batches_per_epoch, check_batch, split

# Positions turned into indices at once: about 0.5 ms, once every few hundred steps.
_CHUNK = 8192


class _Meta(NamedTuple):
    """What the loop must know about one yield without looking at its data."""

    epoch: int
    position: int  # samples of the epoch before this step
    size: int  # samples of the step over all ranks
    own: int  # of them, this rank's
    micro: int
    ends_epoch: bool


class _Shuffled:
    """Order by the keyed permutation of (seed, epoch); `shuffle=False`: 0, 1, 2, …"""

    def __init__(self, n: int, seed: int, shuffle: bool) -> None:
        self.n = n
        self._seed = seed
        self._shuffle = shuffle
        self._current: tuple[int, Permutation] | None = None

    def take(self, epoch: int, positions: Indices) -> Indices:
        if self._current is None or self._current[0] != epoch:
            self._current = (epoch, Permutation(self.n, self._seed, epoch, self._shuffle))
        return self._current[1].take(positions)


class _Sampled:
    """Order by the user's sampler: drawn whole, once an epoch, under generators seeded the same on all ranks."""

    def __init__(self, sampler: Any, seed: int) -> None:
        try:
            self.n = len(sampler)
        except TypeError:
            raise UsageError(
                f"The DataLoader's sampler {type(sampler).__name__} has no `__len__`, so its epochs have no known end; "
                "add one."
            ) from None
        self._sampler = sampler
        self._seed = seed
        self._current: tuple[int, Indices] | None = None

    def take(self, epoch: int, positions: Indices) -> Indices:
        if self._current is None or self._current[0] != epoch:
            self._current = (epoch, self._draw(epoch))
        return self._current[1][positions]

    def _draw(self, epoch: int) -> Indices:
        value = rng.derive(self._seed, "sampler", epoch)
        with rng.guard(cuda=False):
            rng.seed_all(value, cuda=False)
            if isinstance(getattr(self._sampler, "generator", None), torch.Generator):
                self._sampler.generator.manual_seed(value)
            if callable(getattr(self._sampler, "set_epoch", None)):
                self._sampler.set_epoch(epoch)
            drawn = np.asarray([int(index) for index in self._sampler], dtype=np.int64)
        if len(drawn) != self.n:
            raise UsageError(
                f"The DataLoader's sampler {type(self._sampler).__name__} says its length is {self.n} but gave "
                f"{len(drawn)} samples in epoch {epoch}; every epoch must be as long as `len(sampler)`."
            )
        return drawn


class MapLoop:
    """A LoopSource over a dataset with `__len__` and `__getitem__` (or a list of samples).

    Training: all ranks take the same number of steps; a rank without a sample in the last batch of an epoch
    (`drop_last=False`) gets a copy of that batch's first sample with weight 0, so that collectives still match.
    Validation (`train=False`): every sample once over all ranks, in order; a rank may get fewer batches.
    Raises UsageError for batches that cannot be dealt out.
    """

    def __init__(self, settings: Settings, rank: int, world_size: int, device: torch.device) -> None:
        if settings.batch_size is None:
            raise ValueError("a map-style loop needs a batch size")
        self.settings = settings
        self.rank, self.world_size, self.device = rank, world_size, device
        seed = settings.seed if settings.train else rng.derive(settings.seed, "validation")
        self.order: _Shuffled | _Sampled
        if settings.sampler is not None:
            self.order = _Sampled(settings.sampler, seed)
        else:
            self.order = _Shuffled(len(settings.source), seed, settings.shuffle)
        self.batch_size = settings.batch_size if settings.train else max(settings.batch_size, world_size)
        if settings.train:
            check_batch(self.order.n, self.batch_size, world_size, settings.accumulate, settings.drop_last)
        self.fetcher = Fetcher(settings.source, settings.collate_fn, seed)
        self.steps_per_epoch = batches_per_epoch(self.order.n, self.batch_size, settings.drop_last)
        self.global_batch_text = batch_text(self.batch_size, world_size, settings.accumulate)

    @property
    def length(self) -> int:
        """Yields of the whole loop on this rank."""
        s = self.settings
        steps = self.steps_per_epoch * s.epochs if s.epochs is not None else s.max_steps
        assert steps is not None
        steps = steps if s.max_steps is None else min(steps, s.max_steps)
        return (steps - self._idle_steps(steps)) * s.accumulate

    def _idle_steps(self, steps: int) -> int:
        """Steps in which this rank has nothing to validate: last batches smaller than the group."""
        rest = self.order.n % self.batch_size
        if self.settings.train or rest == 0 or rest > self.rank:
            return 0
        return steps // self.steps_per_epoch

    def config(self) -> dict[str, Any]:
        """JSON facts which must be the same when a run continues."""
        s = self.settings
        return {
            "dataset_len": self.order.n,
            "global_batch": self.batch_size,
            "accumulate": s.accumulate,
            "drop_last": s.drop_last,
            "shuffle": type(s.sampler).__name__ if s.sampler is not None else s.shuffle,
            "seed": s.seed,
        }

    def open(self, cursor: Cursor | None = None) -> MapIterator:
        """Start, or continue at `cursor`. Raises UsageError if it lies beyond the dataset."""
        place = cursor or {"index": 0, "epoch": self.settings.first_epoch, "position": 0, "samples": 0}
        if place["position"] > self.order.n:
            raise UsageError(
                f"The checkpoint stands at sample {place['position']} of its epoch, but the dataset has only "
                f"{self.order.n}; continue with the dataset it was trained on, or start a new run."
            )
        return MapIterator(self, place)

    def plan(self, place: Cursor) -> Iterator[tuple[Key, _Meta]]:
        """Every yield from `place` on: which samples this rank reads, and what the yield counts."""
        skip = place.get("micro", 0)
        for epoch, first, size, count in self._runs(place):
            for key, meta in self._deal(epoch, first, size, count):
                if skip:
                    skip -= 1
                else:
                    yield key, meta

    def _runs(self, place: Cursor) -> Iterator[tuple[int, int, int, int]]:
        """(epoch, first position, batch size, number of such batches): full batches, then the last one of an epoch."""
        s = self.settings
        left = None if s.max_steps is None else s.max_steps - place["index"] // s.accumulate
        epoch, first = place["epoch"], place["position"]
        while self.steps_per_epoch and (s.epochs is None or epoch < s.first_epoch + s.epochs):
            full, rest = divmod(self.order.n - first, self.batch_size)
            for size, count in ((self.batch_size, full), (rest, int(rest > 0 and not s.drop_last))):
                count = count if left is None else min(count, left)
                left = None if left is None else left - count
                if count:
                    yield epoch, first, size, count
                first += size * count
            if left == 0:
                return
            epoch, first = epoch + 1, 0

    def _deal(self, epoch: int, first: int, size: int, count: int) -> Iterator[tuple[Key, _Meta]]:
        s = self.settings
        shares = split(size, self.world_size, s.accumulate)
        own, offset = shares.counts[self.rank], shares.offsets[self.rank]
        if own == 0 and not s.train:
            return
        inner = np.arange(own) + offset if own else np.zeros(s.accumulate, dtype=np.int64)
        ends_at = self.order.n - (self.batch_size - 1 if s.drop_last else 0)
        chunk = max(1, _CHUNK // len(inner))
        for begin in range(0, count, chunk):
            starts = first + np.arange(begin, min(begin + chunk, count)) * size
            positions = (starts[:, None] + inner).reshape(len(starts), s.accumulate, -1)
            indices = self.order.take(epoch, positions)
            for start, where, which in zip(starts.tolist(), positions[:, :, 0].tolist(), indices, strict=True):
                ends = start + size >= ends_at
                for micro in range(s.accumulate):
                    yield (epoch, where[micro], which[micro]), _Meta(epoch, start, size, own, micro, ends)


class MapIterator:
    """A MapLoop under way, read in this process or, with `num_workers`, by loader processes that run ahead of it."""

    def __init__(self, loop: MapLoop, place: Cursor) -> None:
        self._loop = loop
        self._place: Cursor = {name: place[name] for name in ("index", "epoch", "position", "samples")}
        self._micro: int = place.get("micro", 0)
        # Drawn from the plan, not yet consumed: one at most in this process, the prefetched ones with loaders.
        self._drawn: deque[_Meta] = deque()
        self._keys: deque[Key] = deque()
        self._plan = loop.plan(place)
        self._closed = False
        self._restore: Callable[[], None] | None = None if loop.settings.train else rng.capture()
        self._pinned = _pins(loop)
        self._loader = _start_loader(loop, self._draw_all(), self._pinned) if loop.settings.num_workers else None

    def __iter__(self) -> MapIterator:
        return self

    def __next__(self) -> Item:
        if self._closed or not self.has_next():
            self.close()
            raise StopIteration
        batch = self._read()
        meta = self._drawn.popleft()
        self._advance(meta)
        return self._item(to_device(batch, self._loop.device, non_blocking=self._pinned), meta)

    def has_next(self) -> bool:
        """Whether this rank has another item; reads nothing."""
        if self._closed:
            return False
        if not self._drawn and self._loader is None:
            drawn = next(self._plan, None)
            if drawn is not None:
                self._keys.append(drawn[0])
                self._drawn.append(drawn[1])
        return bool(self._drawn)

    def cursor(self) -> Cursor:
        """The place after the items consumed so far (JSON)."""
        return {**self._place, "micro": self._micro} if self._micro else dict(self._place)

    def close(self) -> None:
        """End the loader processes; after validation, put the random generators back where they were."""
        if self._closed:
            return
        self._closed = True
        loader, self._loader = self._loader, None
        if loader is not None and hasattr(loader, "_shutdown_workers"):
            loader._shutdown_workers()
        if self._restore is not None:
            self._restore()

    def _read(self) -> Any:
        if self._loader is not None:
            return self._receive(self._loader)
        batch = self._loop.fetcher[self._keys[0]]
        self._keys.popleft()  # only now: after an exception the sample is still to be read
        return pin_memory(batch) if self._pinned else batch  # type: ignore[no-untyped-call]

    def _receive(self, loader: Iterator[Any]) -> Any:
        try:
            return next(loader)
        except BaseException:  # the loader has moved on: what it gave next would belong to other positions
            self.close()
            raise

    def _draw_all(self) -> Iterator[Key]:
        for key, meta in self._plan:
            self._drawn.append(meta)
            yield key

    def _advance(self, meta: _Meta) -> None:
        place = self._place
        place["index"] += 1
        self._micro = (meta.micro + 1) % self._loop.settings.accumulate
        if self._micro:
            return
        place["samples"] += meta.size
        place["epoch"], place["position"] = (
            (meta.epoch + 1, 0) if meta.ends_epoch else (meta.epoch, meta.position + meta.size)
        )

    def _item(self, batch: Any, meta: _Meta) -> Item:
        accumulate = self._loop.settings.accumulate
        last = meta.micro == accumulate - 1
        return Item(batch, meta.epoch, meta.size // accumulate, (meta.own, meta.size), meta.micro, last)


def _pins(loop: MapLoop) -> bool:
    """Pinned memory makes copies to a GPU asynchronous; pinning itself is only cheap beside loader processes."""
    wanted = loop.settings.pin_memory
    return loop.device.type == "cuda" and (loop.settings.num_workers > 0 if wanted is None else wanted)


def _start_loader(loop: MapLoop, keys: Iterator[Key], pinned: bool) -> Any:
    """torch's loader processes over our keys: one stream through all epochs, so no dead time between them."""
    s = loop.settings
    options = dict(s.loader_options)
    generator = torch.Generator()  # of its own: the loader's draw of a base seed must not move the program's
    generator.manual_seed(rng.derive(s.seed, "loader", loop.rank))
    loader: DataLoader[Any] = DataLoader(
        loop.fetcher,  # type: ignore[arg-type]
        batch_size=None,
        sampler=keys,
        collate_fn=identity,
        num_workers=s.num_workers,
        pin_memory=pinned,
        generator=generator,
        worker_init_fn=WorkerInit(options.pop("worker_init_fn", None)),
        **options,
    )
    return iter(loader)
