"""One save's shards become one manifest. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from orchestrator.errors import StorageError
from orchestrator.storage.coverage import coverage
from orchestrator.storage.heads import checkpoint_head
from orchestrator.storage.manifest import Chunk, Manifest, Shape, StoredFile, StoredTensor

Shard = Mapping[str, Any]


def assemble(
    shards: Sequence[Shard],
    *,
    run: str,
    reason: str,
    created: float,
    name: str = "",
    strategy: str = "",
    config: Mapping[str, Any] | None = None,
    versions: Mapping[str, str] | None = None,
    metrics: Mapping[str, float] | None = None,
) -> Manifest:
    """The manifest of one save, from what `write_shard` reported for each of its files.

    Of the heads, the first that has content counts, by rank; see `checkpoint_head`. `config` and `metrics` default to
    the head's. A box that several ranks wrote (two survivors' replicas) is taken once. Raises StorageError if the
    shards do not belong together or do not cover the state: such a save must not be committed.
    """
    ordered = sorted(shards, key=lambda shard: (not shard["head"], int(shard["rank"])))
    if not ordered:
        raise StorageError("A checkpoint without any shard cannot be committed.")
    same = {(shard["attempt"], shard["step"], shard["file"]["path"].rpartition("/")[0]) for shard in ordered}
    if len(same) != 1:
        raise StorageError(f"Shards of different saves cannot make one checkpoint: {sorted(same)}.")
    attempt, step, directory = same.pop()
    head = checkpoint_head(ordered)
    manifest = Manifest(
        run=run, step=step, epoch=int(head.get("epoch") or 0), samples=int(head.get("samples") or 0), reason=reason,
        name=name, attempt=attempt, world_size=int(ordered[0]["world_size"]), strategy=strategy, created=created,
        config=config if config is not None else head.get("config") or {}, versions=versions or {},
        metrics=metrics if metrics is not None else head.get("metrics") or {},
        files=tuple(_file_of(shard) for shard in ordered), tensors=_merge(ordered), state=head, directory=directory,
    )  # fmt: skip
    coverage(manifest)
    return manifest


def _file_of(shard: Shard) -> StoredFile:
    file = shard["file"]
    return StoredFile(file["path"].rpartition("/")[2], file["bytes"], int(file["crc32c"], 16))


def _merge(shards: Iterable[Shard]) -> dict[str, StoredTensor]:
    kinds: dict[str, tuple[str, Shape]] = {}
    chunks: dict[str, dict[tuple[Shape, Shape], Chunk]] = {}
    for shard in shards:
        file = shard["file"]["path"].rpartition("/")[2]
        for item in shard["tensors"]:
            name, kind = item["name"], (item["dtype"], tuple(item["shape"]))
            if kinds.setdefault(name, kind) != kind:
                raise StorageError(
                    f"Rank {shard['rank']} holds {name!r} as {kind}, another rank as {kinds[name]}: values that differ "
                    "between ranks must be tracked with `per_rank=`."
                )
            box = (tuple(item["offset"]), tuple(item["size"]))
            chunk = Chunk(*box, file, item["begin"], item["end"], int(item["crc32c"], 16))
            chunks.setdefault(name, {}).setdefault(box, chunk)
    return {name: StoredTensor(*kinds[name], tuple(boxes.values())) for name, boxes in sorted(chunks.items())}
