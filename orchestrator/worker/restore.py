"""Where a rank's state comes from at its start: segments that survived, or a checkpoint in storage."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any, Protocol

import torch

from orchestrator.errors import CheckpointDamagedError
from orchestrator.storage.heads import checkpoint_head
from orchestrator.storage.segment import TensorEntry
from orchestrator.worker.copying import view_of
from orchestrator.worker.shm import Segment


class Source(Protocol):
    """A consistent state of the run."""

    step: int
    reason: str
    head: dict[str, Any]

    def fetch(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        """CPU tensors by full name; digests are verified where the tier has any. Raises CheckpointDamagedError."""
        ...

    def forget(self) -> None:
        """Nothing will be fetched any more; `head` stays."""
        ...


def open_source(resume: dict[str, Any] | None, descriptors: list[int]) -> Source | None:
    """The source that the agent named, or None for a fresh start."""
    if resume is None:
        return None
    if resume["kind"] == "segments":
        return SegmentSource(resume, descriptors)
    from orchestrator.worker.stored import StoredSource

    return StoredSource(resume)


class SegmentSource:
    """State that survivors or snapshots hold in shared memory: several slots, each supplying pieces."""

    def __init__(self, resume: dict[str, Any], descriptors: list[int]) -> None:
        self.step: int = resume["step"]
        self.reason = "recovery"
        segments = self._segments = [Segment(fd) for fd in descriptors]
        heads: list[dict[str, Any]] = []
        rest: list[dict[str, Any]] = []
        self._where: dict[str, tuple[Segment, int, TensorEntry]] = {}
        for part in sorted(resume["parts"], key=lambda part: "buffers" not in part["pieces"]):
            segment, slot = segments[part["fd"]], part["slot"]
            meta = json.loads(segment.meta(slot))
            (heads if "head" in part["pieces"] else rest).append(meta)
            for item in meta["tensors"]:
                self._where.setdefault(item["name"], (segment, slot, TensorEntry.from_json(item)))
        self.head = checkpoint_head([*heads, *rest])

    def fetch(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        found = {}
        for name in names:
            if name not in self._where:
                raise CheckpointDamagedError(f"The state of step {self.step} in memory lacks tensor {name}.")
            segment, slot, entry = self._where[name]
            found[name] = view_of(segment.data(slot), entry)
        return found

    def forget(self) -> None:
        """The memory is that of a whole state."""
        self._where.clear()
        for segment in self._segments:
            segment.close()
        self._segments.clear()
