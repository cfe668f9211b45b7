"""A checkpoint in storage as a source to restore from. Digests are verified before bytes reach live tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from orchestrator.storage.layout import manifest_path
from orchestrator.storage.manifest import parse_manifest
from orchestrator.storage.shards import read_tensors
from orchestrator.storage.store import open_store


class StoredSource:
    """`resume`: ``{"kind": "storage", "uri": the run's place, "directory": the checkpoint's}``."""

    def __init__(self, resume: dict[str, Any]) -> None:
        self._store = open_store(resume["uri"])
        path = manifest_path(resume["directory"])
        self._manifest = parse_manifest(bytes(self._store.read(path)), resume["directory"])
        self.step = self._manifest.step
        self.reason = self._manifest.reason
        self.head: dict[str, Any] = dict(self._manifest.state)

    def fetch(self, names: Sequence[str]) -> dict[str, torch.Tensor]:
        return read_tensors(self._store, self._manifest, dict.fromkeys(names))

    def forget(self) -> None:
        """It holds no tensors."""
