"""Copying live tensors into a slot of shared memory, by views that are built once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch

from orchestrator.errors import UsageError
from orchestrator.storage.segment import TensorEntry, layout
from orchestrator.worker.shm import Segment

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.uint16: "U16",
    torch.uint32: "U32",
    torch.uint64: "U64",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.complex64: "C64",
}
DTYPES: dict[str, torch.dtype] = {name: dtype for dtype, name in DTYPE_NAMES.items()}

Named = Sequence[tuple[str, torch.Tensor]]


def dtype_name(tensor: torch.Tensor, name: str) -> str:
    """The safetensors name of the tensor's dtype. Raises UsageError for one that has none."""
    try:
        return DTYPE_NAMES[tensor.dtype]
    except KeyError:
        raise UsageError(f"`{name}` is of dtype {tensor.dtype}, which checkpoints cannot hold; convert it.") from None


def view_of(data: memoryview, entry: TensorEntry) -> torch.Tensor:
    """The tensor that `entry` describes, as a view of `data` (no copy)."""
    dtype = DTYPES[entry.dtype]
    if entry.begin == entry.end:
        return torch.empty(entry.size, dtype=dtype)
    flat = torch.frombuffer(data, dtype=torch.uint8, count=entry.end - entry.begin, offset=entry.begin)
    return flat.view(dtype).view(entry.size)


class CopyPlan:
    """Table and views for one list of tensors; valid while the very same tensor objects are to be copied.

    It reads the live tensors: `p.data = …`, `module.half()` and `vector_to_parameters` give them other memory.
    """

    def __init__(self, tensors: Named) -> None:
        sources = dict(tensors)
        self.table, self.data_bytes = layout(
            (name, dtype_name(tensor, name), tuple(tensor.shape)) for name, tensor in sources.items()
        )
        self._tensors = [tensor for _, tensor in tensors]
        self._kinds = [(tensor.dtype, tensor.shape) for tensor in self._tensors]
        self._filled = [entry for entry in self.table if entry.end > entry.begin]
        self._sources = [sources[entry.name] for entry in self._filled]
        self._segment: Segment | None = None
        self._views: dict[int, list[torch.Tensor]] = {}  # of that segment, by slot
        self.table_json = json.dumps([entry.to_json() for entry in self.table])

    def fits(self, tensors: Named) -> bool:
        """Whether these are the very tensors that the plan was made for, of the same dtypes and shapes."""
        return len(tensors) == len(self._tensors) and all(
            tensor is known and (tensor.dtype, tensor.shape) == kind
            for (_, tensor), known, kind in zip(tensors, self._tensors, self._kinds, strict=True)
        )

    def copy(self, segment: Segment, slot: int) -> None:
        """Copy all tensors into the slot's data area; on CUDA it waits for the copies."""
        if segment is not self._segment:
            self._segment, self._views = segment, {}
        views = self._views.get(slot)
        if views is None:
            data = segment.data(slot)
            views = self._views[slot] = [view_of(data, entry) for entry in self._filled]
        if views:
            with torch.no_grad():
                torch._foreach_copy_(views, self._sources)


def slot_meta(table_json: str, head: dict[str, Any], **labels: Any) -> bytes:
    """The JSON part of a slot: a SegmentHead (docs/architecture.md, section 3)."""
    rest = json.dumps({**labels, "head": head})
    return f'{{"tensors": {table_json}, {rest[1:]}'.encode()
