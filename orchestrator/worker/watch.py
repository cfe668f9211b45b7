"""Noticing writes where no version counts them: arrays, and tensors that an object makes anew or copies."""

from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import torch

from orchestrator.worker.state_items import ObjectItem, TensorItem, as_stored


class ContentWatch:
    """Follows one item. Live tensors are known by their memory and version; arrays and copies by their content."""

    def __init__(self, item: ObjectItem | TensorItem) -> None:
        self.item = item
        self._held: list[Any] = []  # memory that is held on to cannot become another tensor's
        self._marks: list[Any] = []
        self._copies: bool | None = None  # whether every look yields other memory

    def changed(self) -> bool:
        """Whether anything was written or replaced since the last call, True at the first."""
        values = self.item.raw()
        if self._copies is None:
            again = self.item.raw()
            self._copies = [_place(value) for value in values] != [_place(value) for value in again]
        marks = [self._mark(value) for value in values]
        known, self._marks, self._held = self._marks, marks, values
        return marks != known

    def _mark(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor) and not self._copies:
            return (*_place(value), value._version)
        if isinstance(value, np.ndarray):
            return zlib.crc32(np.ascontiguousarray(value))
        tensor = as_stored(value.detach(), self.item.name).cpu().contiguous()
        return zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy())


def _place(value: Any) -> tuple[Any, ...]:
    """Where the value lies. Arrays are looked into anyway."""
    return (value.data_ptr(), tuple(value.shape)) if isinstance(value, torch.Tensor) else ()
