"""Tensors ↔ files of a checkpoint. Writing needs no torch (a saver stays small); reading imports it when called."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, BinaryIO

from orchestrator.errors import CheckpointDamagedError, StorageError, UsageError
from orchestrator.storage.digest import crc32c
from orchestrator.storage.manifest import Chunk, Manifest
from orchestrator.storage.segment import TensorEntry, layout, nbytes, safetensors_header
from orchestrator.storage.store import Store
from orchestrator.storage.verify import check_files

if TYPE_CHECKING:
    import torch

BLOCK_BYTES = 4 << 20
MERGE_GAP_BYTES = 64 << 10
DIRECT_BYTES = 2 << 20  # chunks from this size are read straight into their tensor
THREADS = 4

Box = tuple[Sequence[int], Sequence[int]]

# ---------------------------------------------------------------------------------------------------------- writing


def write_shard(
    store: Store, path: str, head: Mapping[str, Any], table: Sequence[TensorEntry], data: memoryview
) -> dict[str, Any]:
    """Write one rank's share as a safetensors file, durable on return; digests are computed as the bytes pass.

    `head`: a SegmentHead; `table` counts instead of its "tensors", its "head" and "trees" go into the report. `data`:
    the data area, at least as long as the table says. Returns the JSON-serialisable report that `assemble` takes; byte
    ranges in it are absolute in the file. Single-threaded. Raises StorageError; a path can be written once only.
    """
    entries = sorted(table, key=lambda entry: (entry.begin, entry.end))
    end = _check_contiguous(path, entries, len(data))
    rank, step = int(head["rank"]), int(head["step"])
    header = safetensors_header(entries, {"format": "pt", "step": str(step), "rank": str(rank)})
    digests = _Digests(entries)
    store.write_new(path, digests.blocks(header, data[:end]), len(header) + end)
    tensors = [
        {
            **entry.to_json(), "begin": entry.begin + len(header), "end": entry.end + len(header),
            "crc32c": f"{value:08x}",
        }
        for entry, value in zip(entries, digests.of_entries, strict=True)
    ]  # fmt: skip
    own = dict(head.get("head") or {})
    return {
        "file": {"path": path, "bytes": len(header) + end, "crc32c": f"{digests.of_file:08x}"},
        "attempt": int(head["attempt"]), "step": step, "rank": rank, "world_size": int(head["world_size"]),
        "head": own, "trees": {} if own.get("tracked") else dict(head.get("trees") or {}), "tensors": tensors,
    }  # fmt: skip


def _check_contiguous(path: str, entries: Sequence[TensorEntry], held: int) -> int:
    end = 0
    for entry in entries:
        if entry.begin != end or entry.end - entry.begin != nbytes(entry.dtype, entry.size):
            raise StorageError(f"Cannot write {path}: {entry.name!r} lies at {entry.begin}..{entry.end}, not at {end}.")
        end = entry.end
    if end > held:
        raise StorageError(f"Cannot write {path}: its table needs {end} bytes, the segment holds {held}.")
    return end


class _Digests:
    """CRC32C of the whole file and of each entry, from one walk over the bytes while they are in the cache."""

    def __init__(self, entries: Sequence[TensorEntry]) -> None:
        self.entries = entries
        self.of_file = 0
        self.of_entries = [0] * len(entries)
        self.current = 0

    def blocks(self, header: bytes, data: memoryview) -> Iterator[bytes | memoryview]:
        self.of_file = crc32c(header)
        yield header
        for begin in range(0, len(data), BLOCK_BYTES):
            block = data[begin : begin + BLOCK_BYTES]
            self.of_file = crc32c(block, self.of_file)
            self._entries(block, begin)
            yield block

    def _entries(self, block: memoryview, begin: int) -> None:
        end = begin + len(block)
        while self.current < len(self.entries):
            entry = self.entries[self.current]
            part = block[max(entry.begin, begin) - begin : max(min(entry.end, end) - begin, 0)]
            self.of_entries[self.current] = crc32c(part, self.of_entries[self.current])
            if entry.end > end:
                return
            self.current += 1


# ---------------------------------------------------------------------------------------------------------- reading


@dataclass
class _Piece:
    """A chunk to be read: `view` is where its bytes go; `scratch` is set if only a part of it is wanted."""

    name: str
    chunk: Chunk
    view: memoryview
    scratch: torch.Tensor | None


def read_tensors(
    store: Store,
    manifest: Manifest,
    wanted: Mapping[str, Box | None] | None = None,
    out: Mapping[str, torch.Tensor] | None = None,
    *,
    threads: int = THREADS,
) -> dict[str, torch.Tensor]:
    """Read tensors, or boxes (offset, size) of them, by name; None wants everything. Results are on the CPU.

    `out` names tensors to be filled instead (of the box's shape, any device, dtype as stored). Nothing is written to
    them before every chunk's digest was verified. A chunk is read whole even if a part of it is wanted: its digest is
    of the whole. Ranges that lie close together are read at once, several files at a time.

    Raises CheckpointDamagedError naming file and tensor, UsageError for a name or box the checkpoint does not have.
    """
    boxes = wanted if wanted is not None else dict.fromkeys(manifest.tensors)
    check_files(store, manifest)
    tensors, pieces = {}, []
    for name, box in boxes.items():
        tensors[name], parts = _plan(manifest, name, box)
        pieces += parts
    jobs = list(_jobs(pieces))
    if len(jobs) > 1 and threads > 1:
        with ThreadPoolExecutor(min(threads, len(jobs)), "read") as pool:
            list(pool.map(lambda job: _read_job(store, manifest, job), jobs))
    else:
        for job in jobs:
            _read_job(store, manifest, job)
    for piece in pieces:
        if piece.scratch is not None:
            _copy_part(manifest, piece, boxes[piece.name], tensors[piece.name])
    return tensors if out is None else _fill(tensors, out)


def _plan(manifest: Manifest, name: str, box: Box | None) -> tuple[torch.Tensor, list[_Piece]]:
    import torch

    stored = manifest.tensors.get(name)
    if stored is None:
        raise UsageError(f"The checkpoint of step {manifest.step} has no tensor {name!r}.")
    offset, size = _checked_box(name, stored.shape, box)
    dtype = torch_dtype(stored.dtype)
    tensor = torch.empty(size, dtype=dtype)
    pieces, filled = [], 0
    for chunk in stored.chunks:
        common = _intersection((offset, size), (chunk.offset, chunk.size))
        if not common:
            continue
        filled += common
        exact = (tuple(chunk.offset), tuple(chunk.size)) == (offset, size)
        scratch = None if exact else torch.empty(chunk.size, dtype=dtype)
        pieces.append(_Piece(name, chunk, _bytes_of(tensor if scratch is None else scratch), scratch))
    if filled != tensor.numel():
        raise CheckpointDamagedError(f"Tensor {name!r} of step {manifest.step} is not whole: chunks are missing.")
    return tensor, pieces


def _checked_box(name: str, shape: tuple[int, ...], box: Box | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if box is None:
        return (0,) * len(shape), shape
    offset, size = tuple(box[0]), tuple(box[1])
    if not len(offset) == len(size) == len(shape) or any(
        o < 0 or s < 0 or o + s > n for o, s, n in zip(offset, size, shape, strict=True)
    ):
        raise UsageError(f"A box at {offset} of size {size} lies outside {name!r}, whose shape is {shape}.")
    return offset, size


def _intersection(one: Box, other: Box) -> int:
    ranges = zip(*one, *other, strict=True)
    return math.prod(max(0, min(a + n, b + m) - max(a, b)) for a, n, b, m in ranges)


def _bytes_of(tensor: torch.Tensor) -> memoryview:
    """The tensor's own memory, for writing. The tensor must be contiguous, on the CPU, and outlive the view."""
    import ctypes

    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(bytearray())
    return memoryview((ctypes.c_char * size).from_address(tensor.data_ptr())).cast("B")


def _jobs(pieces: Iterable[_Piece]) -> Iterator[list[_Piece]]:
    """Small pieces that lie close together in one file are read at once, large ones each by itself."""
    job: list[_Piece] = []
    for piece in sorted(pieces, key=lambda piece: (piece.chunk.file, piece.chunk.begin)):
        chunk, first = piece.chunk, job[0].chunk if job else None
        if first is None or not (
            chunk.file == first.file
            and chunk.begin - job[-1].chunk.end <= MERGE_GAP_BYTES
            and chunk.end - first.begin <= BLOCK_BYTES
            and len(piece.view) < DIRECT_BYTES
        ):
            if job:
                yield job
            job = []
        job.append(piece)
    if job:
        yield job


def _read_job(store: Store, manifest: Manifest, job: Sequence[_Piece]) -> None:
    path, begin, end = manifest.path_of(job[0].chunk.file), job[0].chunk.begin, job[-1].chunk.end
    if len(job) == 1:
        store.read(path, begin, end, job[0].view)
    else:
        block = store.read(path, begin, end)
        for piece in job:
            piece.view[:] = block[piece.chunk.begin - begin : piece.chunk.end - begin]
    for piece in job:
        found = crc32c(piece.view)
        if found != piece.chunk.crc32c:
            raise CheckpointDamagedError(
                f"{path} is damaged: tensor {piece.name!r} (bytes {piece.chunk.begin}..{piece.chunk.end}) has CRC32C "
                f"{found:08x}, {piece.chunk.crc32c:08x} was committed."
            )


def _copy_part(manifest: Manifest, piece: _Piece, box: Box | None, tensor: torch.Tensor) -> None:
    assert piece.scratch is not None
    origin, size = _checked_box(piece.name, manifest.tensors[piece.name].shape, box)
    target, source = [], []
    for a, n, b, m in zip(origin, size, piece.chunk.offset, piece.chunk.size, strict=True):
        low, high = max(a, b), min(a + n, b + m)
        target.append(slice(low - a, high - a))
        source.append(slice(low - b, high - b))
    tensor[tuple(target)] = piece.scratch[tuple(source)]


def _fill(tensors: Mapping[str, torch.Tensor], out: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    import torch

    for name, tensor in tensors.items():
        given = out.get(name)
        if given is not None and (given.shape != tensor.shape or given.dtype != tensor.dtype):
            raise UsageError(
                f"{name!r} is stored as {tensor.dtype} {tuple(tensor.shape)}, asked for as {given.dtype} "
                f"{tuple(given.shape)}."
            )
    with torch.no_grad():
        return {name: out[name].copy_(tensor) if name in out else tensor for name, tensor in tensors.items()}


# ---------------------------------------------------------------------------------------------------------- dtypes

_TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64",
    "I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16",
    "U8": "uint8", "BOOL": "bool", "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz", "F8_E5M2FNUZ": "float8_e5m2fnuz",
}  # fmt: skip


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a safetensors name."""
    import torch

    dtype: torch.dtype = getattr(torch, _TORCH_NAMES[name])
    return dtype


def dtype_name(dtype: torch.dtype) -> str:
    """The safetensors name of a torch dtype. Raises UsageError for one without (complex128, quantized)."""
    wanted = str(dtype).removeprefix("torch.")
    for name, torch_name in _TORCH_NAMES.items():
        if torch_name == wanted:
            return name
    raise UsageError(f"Tensors of {dtype} cannot be stored; convert them (complex128: torch.view_as_real) first.")


def as_kind(kind: str, tensor: torch.Tensor) -> Any:
    """What a tensor was before it was stored: `convert` for `codec.unflatten`. Unknown kinds stay tensors."""
    if kind == "numpy":
        return tensor.numpy()
    if kind == "complex":
        import torch

        return torch.view_as_complex(tensor)
    return tensor


# ---------------------------------------------------------------------------------------------------------- export

_BATCH_BYTES = 256 << 20


def export_safetensors(
    store: Store, manifest: Manifest, names: Mapping[str, str], metadata: Mapping[str, str], file: BinaryIO
) -> None:
    """Write tensors, whole, as one safetensors file, a part of them in memory at a time. `names`: key → stored name."""
    tensors = manifest.tensors
    table, _ = layout((key, tensors[name].dtype, tensors[name].shape) for key, name in names.items())
    file.write(safetensors_header(table, metadata))
    for batch in _batches(table):
        read = read_tensors(store, manifest, {names[entry.name]: None for entry in batch})
        for entry in batch:
            file.write(_bytes_of(read[names[entry.name]]))


def _batches(table: Sequence[TensorEntry]) -> Iterator[list[TensorEntry]]:
    batch: list[TensorEntry] = []
    for entry in table:
        if batch and entry.end - batch[0].begin > _BATCH_BYTES:
            yield batch
            batch = []
        batch.append(entry)
    if batch:
        yield batch


def export_torch(store: Store, manifest: Manifest, names: Mapping[str, str], file: BinaryIO) -> None:
    """Write tensors as one flat dict that `torch.load(weights_only=True)` reads. `names`: key → stored name."""
    import torch

    read = read_tensors(store, manifest, dict.fromkeys(names.values()))
    torch.save({key: read[name] for key, name in names.items()}, file)
