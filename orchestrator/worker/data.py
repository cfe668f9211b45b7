"""The loops behind `run.batches`: one plan for every kind of source, opened at any place, exact on resume."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from orchestrator.worker.data_item import Cursor, Item, LoopIterator, LoopSource
from orchestrator.worker.data_iterable import IterableLoop
from orchestrator.worker.data_map import MapLoop
from orchestrator.worker.data_settings import settle

__all__ = ["Cursor", "Item", "LoopIterator", "LoopSource", "make_loop"]


def make_loop(
    source: Any,
    batch_size: int | None = None,
    epochs: int | None = 1,
    max_steps: int | None = None,
    shuffle: bool | None = None,
    seed: int = 0,
    drop_last: bool | None = None,
    num_workers: int = 0,
    collate_fn: Callable[[Any], Any] | None = None,
    accumulate: int = 1,
    train: bool = True,
    *,
    rank: int,
    world_size: int,
    device: torch.device | str = "cpu",
    first_epoch: int = 0,
) -> LoopSource:
    """The plan of one rank's share of a data loop; reads no sample yet.

    `source`: a map-style dataset or list of samples, a DataLoader, an iterable with `state_dict`. `batch_size` counts
    samples per optimizer step over all ranks and microbatches. `shuffle`, `drop_last`: None means true for training and
    false for validation (`train=False` never drops). `first_epoch`: the number of the first epoch, for loops inside
    `run.epochs`. Raises UsageError for what cannot be done, saying what can.
    """
    settings = settle(
        source,
        batch_size=batch_size,
        epochs=epochs,
        max_steps=max_steps,
        shuffle=shuffle,
        seed=seed,
        drop_last=drop_last,
        num_workers=num_workers,
        collate_fn=collate_fn,
        accumulate=accumulate,
        train=train,
        first_epoch=first_epoch,
    )
    kind = MapLoop if settings.mapped else IterableLoop
    return kind(settings, rank, world_size, torch.device(device))
