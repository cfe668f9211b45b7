"""The tensor table of a segment, laid out as the data area of a safetensors file, and who writes which tensor. Pure."""

from __future__ import annotations

import heapq
import json
import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orchestrator.errors import CheckpointDamagedError, UsageError
from orchestrator.storage.manifest import DTYPE_BYTES

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library

Shape = tuple[int, ...]


@dataclass(frozen=True)
class TensorEntry:
    """A box of a tensor. `shape`: all of the tensor; `offset`, `size`: the box; `begin`, `end`: bytes in the data."""

    name: str
    dtype: str
    shape: Shape
    offset: Shape
    size: Shape
    begin: int
    end: int

    @property
    def whole(self) -> bool:
        """True if the box is the whole tensor."""
        return self.size == self.shape

    @property
    def key(self) -> str:
        """The name inside one file: boxes of a split tensor say where they lie, so that no two are alike."""
        if self.whole:
            return self.name
        return f"{self.name}[{','.join(f'{o}:{o + s}' for o, s in zip(self.offset, self.size, strict=True))}]"

    def to_json(self) -> dict[str, Any]:
        """As it crosses a process boundary."""
        return {
            "name": self.name, "dtype": self.dtype, "shape": list(self.shape), "offset": list(self.offset),
            "size": list(self.size), "begin": self.begin, "end": self.end,
        }  # fmt: skip

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> TensorEntry:
        """Undo `to_json`. Raises CheckpointDamagedError if a field is missing or of another type."""
        try:
            shape, offset, size = (tuple(map(int, data[key])) for key in ("shape", "offset", "size"))
            return cls(str(data["name"]), str(data["dtype"]), shape, offset, size, int(data["begin"]), int(data["end"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointDamagedError(f"A tensor table has an entry that cannot be read ({error!r}).") from error


def nbytes(dtype: str, size: Sequence[int]) -> int:
    """Bytes of a box. Raises UsageError for a dtype that safetensors cannot hold."""
    if dtype not in DTYPE_BYTES:
        raise UsageError(f"Tensors of dtype {dtype} cannot be stored; convert to one of {', '.join(DTYPE_BYTES)}.")
    return DTYPE_BYTES[dtype] * math.prod(size)


Box = tuple[str, str, Sequence[int]] | tuple[str, str, Sequence[int], Sequence[int], Sequence[int]]


def layout(tensors: Iterable[Box]) -> tuple[tuple[TensorEntry, ...], int]:
    """Place boxes, (name, dtype, shape) or (name, dtype, shape, offset, size), without holes; returns table and bytes.

    Larger element types come first, then by name and offset: every tensor is aligned to its element, and every process
    that is given the same boxes, in whatever order, gets the same table. Raises UsageError for a name given twice.
    """
    boxes = sorted(map(_box, tensors), key=lambda box: (-DTYPE_BYTES.get(box[1], 0), box[0], box[3]))
    table, begin = [], 0
    for name, dtype, shape, offset, size in boxes:
        end = begin + nbytes(dtype, size)
        table.append(TensorEntry(name, dtype, shape, offset, size, begin, end))
        begin = end
    _refuse_same_keys(table)
    return tuple(table), begin


def _box(tensor: Box) -> tuple[str, str, Shape, Shape, Shape]:
    shape = tuple(tensor[2])
    if len(tensor) == 3:
        return tensor[0], tensor[1], shape, (0,) * len(shape), shape
    offset, size = tuple(tensor[3]), tuple(tensor[4])
    if not len(shape) == len(offset) == len(size) or any(
        o < 0 or s < 0 or o + s > n for o, s, n in zip(offset, size, shape, strict=True)
    ):
        raise UsageError(f"A box of {tensor[0]} at {offset} of size {size} lies outside the tensor's shape {shape}.")
    return tensor[0], tensor[1], shape, offset, size


def _refuse_same_keys(table: Iterable[TensorEntry]) -> None:
    seen: set[str] = set()
    for entry in table:
        if entry.key in seen or entry.key == "__metadata__":
            raise UsageError(f"Two tensors are called {entry.key!r}, or that name is reserved; track them by others.")
        seen.add(entry.key)


def safetensors_header(table: Iterable[TensorEntry], metadata: Mapping[str, str] | None = None) -> bytes:
    """Length word and JSON header of a safetensors file whose data area is `table`; a multiple of 8 bytes long.

    Raises UsageError for names given twice, and for a header larger than the library opens (100 MB).
    """
    entries = sorted(table, key=lambda entry: (entry.begin, entry.end))
    _refuse_same_keys(entries)
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for entry in entries:
        header[entry.key] = {
            "dtype": entry.dtype, "shape": list(entry.size), "data_offsets": [entry.begin, entry.end],
        }  # fmt: skip
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise UsageError(f"The names of {len(entries)} tensors take {len(text)} bytes, more than safetensors opens.")
    return struct.pack("<Q", len(text)) + text


def deal(sizes: Mapping[str, int], shares: int) -> dict[str, int]:
    """Which of `shares` ranks stages which replicated tensor: the largest first, onto the least loaded.

    Ties go by name and rank.
    Every rank computes the same answer from the same names and sizes (bytes), so nobody has to talk. This is the
    longest-processing-time rule: no share exceeds 4/3 of the best possible (Graham 1969).
    """
    loads = [(0, share) for share in range(shares)]
    owner = {}
    for name, size in sorted(sizes.items(), key=lambda item: (-item[1], item[0])):
        load, share = loads[0]
        owner[name] = share
        heapq.heapreplace(loads, (load + size, share))
    return owner
