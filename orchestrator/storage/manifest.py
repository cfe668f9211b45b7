"""The manifest of a checkpoint: what it holds and where every byte lies. Pure.

A manifest read from storage is a stranger's word: every field is checked here, once, so that no reader can be led out
of the checkpoint's directory, into absurd allocations, or to the same bytes twice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from orchestrator.errors import CheckpointDamagedError

SCHEMA = 1
MAX_DIMENSIONS = 64
MAX_BYTES = 1 << 60

Shape = tuple[int, ...]

DTYPE_BYTES: dict[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
    "F8_E4M3": 1, "F8_E5M2": 1, "F8_E4M3FNUZ": 1, "F8_E5M2FNUZ": 1,
}  # fmt: skip
"""Names of safetensors → bytes per element. It has no complex128: store that as F64 with a last dimension of 2."""


@dataclass(frozen=True)
class StoredFile:
    """One file of a checkpoint. `path`: its plain name in the checkpoint's directory; `crc32c`: of all its bytes."""

    path: str
    bytes: int
    crc32c: int


@dataclass(frozen=True)
class Chunk:
    """A box of a tensor, at bytes `begin` to `end` (absolute) of `file`, row-major, with the CRC32C of these bytes."""

    offset: Shape
    size: Shape
    file: str
    begin: int
    end: int
    crc32c: int


@dataclass(frozen=True)
class StoredTensor:
    """A tensor by its global shape, and the boxes that together make it."""

    dtype: str
    shape: Shape
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Manifest:
    """One checkpoint. `created`: seconds since 1970; `state`: the head JSON; `directory`: where it lies, not stored."""

    run: str
    step: int
    epoch: int
    samples: int
    reason: str
    name: str
    attempt: int
    world_size: int
    strategy: str
    created: float
    config: Mapping[str, Any]
    versions: Mapping[str, str]
    metrics: Mapping[str, float]
    files: tuple[StoredFile, ...]
    tensors: Mapping[str, StoredTensor]
    state: Mapping[str, Any]
    directory: str = field(default="", compare=False)

    @property
    def size_bytes(self) -> int:
        """All files together, without the manifest itself."""
        return sum(file.bytes for file in self.files)

    def path_of(self, file: str) -> str:
        """A file's path in the run's directory."""
        return f"{self.directory}/{file}" if self.directory else file

    def to_bytes(self) -> bytes:
        """The manifest as stored: strict JSON (inf and nan are marked as the codec marks them)."""
        tensors = {
            name: {"dtype": tensor.dtype, "shape": tensor.shape, "chunks": [_chunk_json(c) for c in tensor.chunks]}
            for name, tensor in self.tensors.items()
        }
        files = [{"path": file.path, "bytes": file.bytes, "crc32c": f"{file.crc32c:08x}"} for file in self.files]
        data = {
            "schema": SCHEMA, "kind": "orchestrator-checkpoint", "run": self.run, "step": self.step,
            "epoch": self.epoch, "samples": self.samples, "reason": self.reason, "name": self.name,
            "attempt": self.attempt, "world_size": self.world_size, "strategy": self.strategy,
            "created": self.created, "config": _mark(self.config), "versions": dict(self.versions),
            "metrics": _mark(self.metrics), "files": files, "tensors": tensors, "state": _mark(self.state),
        }  # fmt: skip
        return json.dumps(data, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def _chunk_json(chunk: Chunk) -> dict[str, Any]:
    return {
        "offset": chunk.offset, "size": chunk.size, "file": chunk.file, "begin": chunk.begin, "end": chunk.end,
        "crc32c": f"{chunk.crc32c:08x}",
    }  # fmt: skip


_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _mark(value: Any) -> Any:
    """JSON has no word for inf and nan, and a best value starts as inf: say them as {"$number": "inf"}."""
    if isinstance(value, float) and not math.isfinite(value):
        return {"$number": str(float(value))}
    if isinstance(value, Mapping):
        return {key: _mark(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_mark(item) for item in value]
    return value


def _unmark(value: Any) -> Any:
    if isinstance(value, dict):
        if len(value) == 1 and value.get("$number") in ("inf", "-inf", "nan"):
            return _NOT_FINITE[value["$number"]]
        return {key: _unmark(item) for key, item in value.items()}
    return [_unmark(item) for item in value] if isinstance(value, list) else value


def parse_manifest(data: bytes, directory: str = "") -> Manifest:
    """Read a manifest that nobody vouches for. Raises CheckpointDamagedError naming the field that is wrong."""
    where = f"{directory}/manifest.json" if directory else "manifest.json"
    read = _Reader(where)
    raw = read.json(data)
    read.schema(raw)
    files = tuple(read.file(item) for item in read.array(raw, "files"))
    sizes = {file.path: file.bytes for file in files}
    if len(sizes) != len(files):
        raise read.damaged("`files` names a file twice")
    tensors = {name: read.stored_tensor(name, item, sizes) for name, item in read.object(raw, "tensors").items()}
    read.refuse_overlaps(tensors)
    metrics = _unmark(read.object(raw, "metrics"))
    if not all(type(value) in (int, float) for value in metrics.values()):
        raise read.damaged("`metrics` holds what is no number")
    return Manifest(
        run=read.text(raw, "run"), step=read.count(raw, "step"), epoch=read.count(raw, "epoch"),
        samples=read.count(raw, "samples"), reason=read.text(raw, "reason"), name=read.text(raw, "name"),
        attempt=read.count(raw, "attempt"), world_size=read.count(raw, "world_size"),
        strategy=read.text(raw, "strategy"), created=read.number(raw, "created"),
        config=_unmark(read.object(raw, "config")), versions=read.object(raw, "versions"), metrics=metrics,
        files=files, tensors=tensors, state=_unmark(read.object(raw, "state")), directory=directory,
    )  # fmt: skip


class _Reader:
    """Typed access to untrusted JSON; every refusal says which manifest and which field."""

    def __init__(self, where: str) -> None:
        self.where = where

    def damaged(self, why: str) -> CheckpointDamagedError:
        return CheckpointDamagedError(f"{self.where}: {why}; this checkpoint cannot be used.")

    def json(self, data: bytes) -> dict[str, Any]:
        try:
            raw = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise self.damaged(f"is no JSON ({str(error)[:100]})") from None
        if not isinstance(raw, dict):
            raise self.damaged("is no JSON object")
        return raw

    def schema(self, raw: dict[str, Any]) -> None:
        schema = raw.get("schema")
        if type(schema) is int and schema > SCHEMA:
            raise self.damaged(f"has schema {schema}, this orchestrator reads up to {SCHEMA}: install a newer one")
        if type(schema) is not int or schema != SCHEMA or raw.get("kind") != "orchestrator-checkpoint":
            raise self.damaged("is not a checkpoint manifest of ours")

    def count(self, raw: dict[str, Any], key: str, most: int = MAX_BYTES) -> int:
        value = raw.get(key)
        if type(value) is not int or not 0 <= value <= most:
            raise self.damaged(f"`{key}` is {str(value)[:40]!r}, not a count")
        return value

    def number(self, raw: dict[str, Any], key: str) -> float:
        value = raw.get(key)
        if type(value) not in (int, float) or not math.isfinite(float(value or 0)):
            raise self.damaged(f"`{key}` is {str(value)[:40]!r}, not a number")
        return float(value or 0)

    def text(self, raw: dict[str, Any], key: str) -> str:
        value = raw.get(key)
        if not isinstance(value, str) or len(value) > 10_000:
            raise self.damaged(f"`{key}` is {str(value)[:40]!r}, not a text")
        return value

    def object(self, raw: dict[str, Any], key: str) -> dict[str, Any]:
        value = raw.get(key)
        if not isinstance(value, dict):
            raise self.damaged(f"`{key}` is {str(value)[:40]!r}, not an object")
        return value

    def array(self, raw: dict[str, Any], key: str) -> list[Any]:
        value = raw.get(key)
        if not isinstance(value, list):
            raise self.damaged(f"`{key}` is {str(value)[:40]!r}, not a list")
        return value

    def item(self, value: Any, what: str) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise self.damaged(f"{what} is {str(value)[:40]!r}, not an object")
        return value

    def crc(self, raw: dict[str, Any]) -> int:
        value = raw.get("crc32c")
        if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{8}", value):
            raise self.damaged(f"`crc32c` is {str(value)[:40]!r}, not eight hex digits")
        return int(value, 16)

    def file(self, value: Any) -> StoredFile:
        raw = self.item(value, "an entry of `files`")
        path = self.text(raw, "path")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", path):
            raise self.damaged(f"file {path[:80]!r} is no plain name inside the checkpoint's directory")
        return StoredFile(path, self.count(raw, "bytes"), self.crc(raw))

    def shape(self, raw: dict[str, Any], key: str) -> Shape:
        value = self.array(raw, key)
        if len(value) > MAX_DIMENSIONS or not all(type(n) is int and 0 <= n <= MAX_BYTES for n in value):
            raise self.damaged(f"`{key}` is {str(value)[:60]}, not a shape")
        return tuple(value)

    def stored_tensor(self, name: str, value: Any, sizes: Mapping[str, int]) -> StoredTensor:
        raw = self.item(value, f"tensor {name!r}")
        dtype, shape = self.text(raw, "dtype"), self.shape(raw, "shape")
        if dtype not in DTYPE_BYTES:
            raise self.damaged(f"tensor {name!r} has the unknown dtype {dtype[:40]!r}")
        chunks = tuple(self.chunk(name, dtype, shape, item, sizes) for item in self.array(raw, "chunks"))
        return StoredTensor(dtype, shape, chunks)

    def chunk(self, name: str, dtype: str, shape: Shape, value: Any, sizes: Mapping[str, int]) -> Chunk:
        raw = self.item(value, f"a chunk of {name!r}")
        offset, size, file = self.shape(raw, "offset"), self.shape(raw, "size"), self.text(raw, "file")
        begin, end = self.count(raw, "begin"), self.count(raw, "end")
        if not _inside(offset, size, shape):
            raise self.damaged(f"a chunk of {name!r} at {offset} of size {size} lies outside its shape {shape}")
        if file not in sizes or not begin <= end <= sizes[file]:
            raise self.damaged(f"bytes {begin}..{end} of {file[:80]!r}, claimed by a chunk of {name!r}, do not exist")
        if end - begin != DTYPE_BYTES[dtype] * math.prod(size):
            raise self.damaged(f"a chunk of {name!r} of size {size} ({dtype}) cannot be {end - begin} bytes long")
        return Chunk(offset, size, file, begin, end, self.crc(raw))

    def refuse_overlaps(self, tensors: Mapping[str, StoredTensor]) -> None:
        chunks = ((name, chunk) for name, tensor in tensors.items() for chunk in tensor.chunks)
        ranges = sorted((c.file, c.begin, c.end, name) for name, c in chunks if c.end > c.begin)
        for (file, _, end, name), (next_file, begin, _, next_name) in zip(ranges, ranges[1:], strict=False):
            if file == next_file and begin < end:
                raise self.damaged(f"{name!r} and {next_name!r} claim the same bytes of {file}")


def _inside(offset: Shape, size: Shape, shape: Shape) -> bool:
    if not len(offset) == len(size) == len(shape):
        return False
    return all(o + s <= n for o, s, n in zip(offset, size, shape, strict=True))


@dataclass(frozen=True)
class CheckpointRecord:
    """A committed checkpoint as the commit log names it: enough to list, choose and prune without its manifest."""

    directory: str
    manifest_crc32c: int
    step: int
    epoch: int
    samples: int
    reason: str
    name: str
    bytes: int
    created: float
    metrics: Mapping[str, float] = field(default_factory=dict)
    sequence: int = 0

    @classmethod
    def of(cls, manifest: Manifest, manifest_crc32c: int) -> CheckpointRecord:
        """The record to commit for a manifest whose stored bytes have this CRC32C."""
        return cls(
            manifest.directory, manifest_crc32c, manifest.step, manifest.epoch, manifest.samples, manifest.reason,
            manifest.name, manifest.size_bytes, manifest.created, dict(manifest.metrics),
        )  # fmt: skip

    def to_json(self) -> dict[str, Any]:
        """The body of a commit entry."""
        return {
            "directory": self.directory, "manifest_crc32c": f"{self.manifest_crc32c:08x}", "step": self.step,
            "epoch": self.epoch, "samples": self.samples, "reason": self.reason, "name": self.name,
            "bytes": self.bytes, "created": self.created, "metrics": _mark(self.metrics),
        }  # fmt: skip

    @classmethod
    def from_json(cls, raw: dict[str, Any], sequence: int, where: str) -> CheckpointRecord:
        """Undo `to_json`, trusting nothing. Raises CheckpointDamagedError naming `where`."""
        read = _Reader(where)
        directory = read.text(raw, "directory")
        if not re.fullmatch(r"checkpoints/[A-Za-z0-9_][A-Za-z0-9_.-]{0,199}", directory):
            raise read.damaged(f"`directory` {directory[:80]!r} is no checkpoint's")
        metrics = _unmark(read.object(raw, "metrics"))
        if not all(type(value) in (int, float) for value in metrics.values()):
            raise read.damaged("`metrics` holds what is no number")
        return cls(
            directory, read.crc({"crc32c": raw.get("manifest_crc32c")}), read.count(raw, "step"),
            read.count(raw, "epoch"), read.count(raw, "samples"), read.text(raw, "reason"), read.text(raw, "name"),
            read.count(raw, "bytes"), read.number(raw, "created"), metrics, sequence,
        )  # fmt: skip
