"""A small checkpoint, made the way a run makes one: two ranks' shares, a manifest, no torch."""

from __future__ import annotations

import struct
from typing import Any

from orchestrator.storage.assemble import assemble
from orchestrator.storage.digest import crc32c
from orchestrator.storage.layout import checkpoint_dir, manifest_path, shard_path
from orchestrator.storage.manifest import CheckpointRecord, Manifest
from orchestrator.storage.segment import layout
from orchestrator.storage.shards import write_shard
from orchestrator.storage.store import Store

WEIGHT = struct.pack("<6f", *range(6))
BIAS = struct.pack("<2f", 0.5, -0.5)
COUNT = struct.pack("<q", 7)
HEAD = {
    "step": 120, "epoch": 2, "samples": 7680, "seed": 1, "user": {"best": float("inf")}, "loops": {"train": {}},
    "tracked": {
        "model": {"fc.weight": {"$tensor": "model.fc.weight"}, "fc.bias": {"$tensor": "model.fc.bias"}},
        "scheduler": {"last_epoch": 2, "count": {"$tensor": "scheduler.count"}},
    },
    "per_rank": {}, "config": {"batch_size": 64}, "metrics": {"loss": 0.25},
}  # fmt: skip


def head(step: int, rank: int, **more: Any) -> dict[str, Any]:
    return {"attempt": 3, "step": step, "rank": rank, "world_size": 2, "head": {**HEAD, "step": step, **more}}


def write_shards(store: Store, step: int = 120, token: str = "abc", **more: Any) -> list[dict[str, Any]]:
    """Rank 0 holds the weight's first row and the bias, rank 1 its second row and the count."""
    directory = checkpoint_dir(step, 3, token)
    first, _ = layout([("model.fc.weight", "F32", (2, 3), (0, 0), (1, 3)), ("model.fc.bias", "F32", (2,))])
    second, _ = layout([("model.fc.weight", "F32", (2, 3), (1, 0), (1, 3)), ("scheduler.count", "I64", ())])
    assert [entry.name for entry in first] == ["model.fc.bias", "model.fc.weight"]
    assert [entry.name for entry in second] == ["scheduler.count", "model.fc.weight"]
    return [
        write_shard(store, shard_path(directory, 0), head(step, 0, **more), first, memoryview(BIAS + WEIGHT[:12])),
        write_shard(store, shard_path(directory, 1), head(step, 1, **more), second, memoryview(COUNT + WEIGHT[12:])),
    ]


def save(
    store: Store, step: int = 120, token: str = "abc", reason: str = "periodic", name: str = "", **more: Any
) -> tuple[CheckpointRecord, Manifest]:
    """Everything of a save but the commit."""
    shards = write_shards(store, step, token, **more)
    manifest = assemble(shards, run="train", reason=reason, name=name, created=1000.0 + step)
    data = manifest.to_bytes()
    assert store.create_exclusive(manifest_path(manifest.directory), data)
    return CheckpointRecord.of(manifest, crc32c(data)), manifest
