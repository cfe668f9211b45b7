"""From indices to a finished batch, in the training process or in a loader process, with the same result in both."""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.utils.data import Subset, TensorDataset, default_collate, get_worker_info

from orchestrator.worker import rng
from orchestrator.worker.order import Indices

# (epoch, position of the first sample in the epoch's order, indices into the dataset)
Key = tuple[int, int, Indices]


class Fetcher:
    """`fetcher[key]` is the batch of `key`: a map-style dataset of batches, as torch's DataLoader wants it.

    Around `dataset[i]` torch, numpy and random are seeded from (seed, epoch, position), so a sample's augmentation does
    not depend on which process reads it, on how many there are, or on what was read before. `__getitems__` and a custom
    `collate_fn` go on from the seed of the batch's first and last sample. Tensors and plain lists run no user
    code when indexed, so nothing is seeded for them. In the training process its generators are left as they were.
    """

    def __init__(self, dataset: Any, collate_fn: Callable[[Any], Any] | None, seed: int, stream: str = "data") -> None:
        self.dataset = dataset
        self._seed = rng.derive(seed, stream)
        self._collate = collate_fn or default_collate
        own_collate = self._collate is not default_collate
        self._tensors = None if own_collate else _tensor_columns(dataset)
        self._listed = isinstance(dataset, (list, tuple))
        self._pure = not own_collate and (self._listed or self._tensors is not None)
        self._batched = _takes_batches(dataset)

    def __getitem__(self, key: Key) -> Any:
        if self._pure:
            return self._fetch(key)
        with contextlib.nullcontext() if get_worker_info() is not None else rng.guard(cuda=False):
            return self._fetch(key)

    def _fetch(self, key: Key) -> Any:
        epoch, position, indices = key
        if self._tensors is not None:
            return self._gather(indices)
        if self._pure:
            return self._collate([self.dataset[i] for i in indices.tolist()])
        base = rng.mix64(self._seed ^ rng.mix64(epoch + 1))
        if self._listed or self._batched:
            rng.seed_all(rng.mix64(base ^ position), cuda=False)
            return self._collate(self._many(indices.tolist()))
        samples = []
        for offset, index in enumerate(indices.tolist()):
            rng.seed_all(rng.mix64(base ^ (position + offset)), cuda=False)
            samples.append(self.dataset[index])
        return self._collate(samples)

    def _many(self, indices: list[int]) -> Any:
        if self._listed:
            return [self.dataset[i] for i in indices]
        return self.dataset.__getitems__(indices)

    def _gather(self, indices: Indices) -> list[torch.Tensor]:
        """What default_collate makes of a TensorDataset's samples, without making the samples."""
        columns, subset = self._tensors  # type: ignore[misc]
        rows = torch.from_numpy(indices if subset is None else subset[indices])
        return [torch.index_select(c, 0, rows if c.device.type == "cpu" else rows.to(c.device)) for c in columns]


def _takes_batches(dataset: Any) -> bool:
    """Whether the dataset reads whole batches itself (Subset only passes `__getitems__` on, or loops as we do)."""
    inner = dataset
    while type(inner) is Subset:
        inner = inner.dataset
    return bool(getattr(inner, "__getitems__", None))


def _tensor_columns(dataset: Any) -> tuple[tuple[torch.Tensor, ...], Indices | None] | None:
    """(tensors, subset indices or None) if `dataset` is a TensorDataset or a Subset of one; None for all else."""
    subset: Indices | None = None
    inner: Any = dataset
    while type(inner) is Subset:
        own = np.asarray(inner.indices)
        if own.ndim != 1 or own.dtype.kind not in "iu":
            return None
        subset = own.astype(np.int64) if subset is None else own.astype(np.int64)[subset]
        inner = inner.dataset
    if type(inner) is not TensorDataset:
        return None
    plain = all(type(t) is torch.Tensor and t.layout is torch.strided for t in inner.tensors)
    if not plain:
        return None
    if subset is not None:
        subset = np.where(subset < 0, subset + len(inner), subset)
    return inner.tensors, subset


def identity(batch: Any) -> Any:
    """The DataLoader's collate_fn: Fetcher has collated already."""
    return batch


class WorkerInit:
    """worker_init_fn of our loader processes: ends with the rank, then does what the user's function does."""

    def __init__(self, user: Callable[[int], None] | None) -> None:
        self._user = user

    def __call__(self, worker_id: int) -> None:
        die_with_parent()
        # A handler of the training process (ours or the user's) must not keep a loader from being ended.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        info = get_worker_info()
        if info is not None:  # user code looks for its own dataset there, not for our wrapper of it
            wrapper: Any = info.dataset
            object.__setattr__(info, "dataset", wrapper.dataset)
        if self._user is not None:
            self._user(worker_id)


def die_with_parent() -> None:
    """Have the kernel SIGKILL this process when the thread that forked it ends. Linux only; elsewhere torch watches."""
    if not sys.platform.startswith("linux"):
        return
    pr_set_pdeathsig = 1
    ctypes.CDLL(None, use_errno=True).prctl(pr_set_pdeathsig, signal.SIGKILL, 0, 0, 0)
    parent = multiprocessing.parent_process()
    if parent is not None and not parent.is_alive():  # it died before we asked
        os._exit(1)
