"""Batches to the rank's device, whatever containers a collate function has built."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch


def to_device(batch: Any, device: torch.device, non_blocking: bool = False) -> Any:
    """`batch` with every tensor in it on `device`.

    Follows mappings, lists, tuples, namedtuples and dataclasses; anything else with a `.to` (BatchEncoding,
    PackedSequence, …) moves itself; what has neither is passed on as it is. Containers keep their type; tensors
    already there are not copied. `non_blocking` is only useful for pinned memory.
    """
    if isinstance(batch, torch.Tensor):
        return batch if batch.device == device else batch.to(device, non_blocking=non_blocking)
    if isinstance(batch, (str, bytes, int, float)) or batch is None:
        return batch
    if callable(getattr(batch, "to", None)) and not isinstance(batch, type):
        return batch.to(device)
    return _map(batch, lambda part: to_device(part, device, non_blocking))


def _map(batch: Any, move: Callable[[Any], Any]) -> Any:
    if isinstance(batch, dict) and type(batch) is dict:
        return {key: move(value) for key, value in batch.items()}
    if isinstance(batch, Mapping):
        return _mapping(batch, move)
    if isinstance(batch, tuple):
        parts = [move(part) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, list):
        return [move(part) for part in batch]
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        moved = copy.copy(batch)
        for field in dataclasses.fields(batch):  # object.__setattr__: frozen ones too
            object.__setattr__(moved, field.name, move(getattr(batch, field.name)))
        return moved
    return batch


def _mapping(batch: Mapping[Any, Any], move: Callable[[Any], Any]) -> Any:
    moved = copy.copy(batch)
    if not hasattr(moved, "__setitem__"):
        return {key: move(value) for key, value in batch.items()}
    for key, value in batch.items():
        moved[key] = move(value)
    return moved


def first_dim(batch: Any) -> int:
    """The number of samples in a ready batch: the first tensor's (or array's) leading size; 1 if there is none."""
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if getattr(batch, "shape", None):
        return int(batch.shape[0])
    if isinstance(batch, (list, tuple)) and batch and not isinstance(batch[0], (int, float, str, bytes)):
        return first_dim(batch[0])
    if isinstance(batch, (list, tuple)):
        return len(batch)
    return 1
