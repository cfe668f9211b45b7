"""Checkpoints by the training process itself, at the boundary: each rank its share, rank 0 manifest and commit."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from importlib import metadata
from typing import Any

import torch

from orchestrator.errors import StorageError, SupersededError
from orchestrator.storage.assemble import assemble
from orchestrator.storage.commitlog import checkpoint_entry
from orchestrator.storage.digest import crc32c
from orchestrator.storage.heads import checkpoint_head
from orchestrator.storage.layout import checkpoint_dir, manifest_path, shard_path
from orchestrator.storage.manifest import CheckpointRecord
from orchestrator.storage.prune import prune
from orchestrator.storage.segment import deal
from orchestrator.storage.shards import write_shard
from orchestrator.worker.copying import CopyPlan, Named, view_of
from orchestrator.worker.group import Group
from orchestrator.worker.plain import Place, gather
from orchestrator.worker.tracked import RunState


class PlainWriter:
    """Writes at once, so one save is never in flight beside another. A full disk costs checkpoints, not training."""

    def __init__(self, group: Group, options: dict[str, Any], tracked: RunState) -> None:
        self._group, self._tracked = group, tracked
        self._place: Place = options["place"]
        self._retention = options["retention"]
        self._keep_record = bool(options["exception_save"]) and group.rank == 0
        self._saves = 0
        self._alone = 0
        self._recorded: tuple[int, str] | None = None
        self._buffers: list[tuple[str, torch.Tensor]] = []
        self.last_step = self._place.source.step if self._place.source is not None else -1

    # -- boundaries -----------------------------------------------------------------------------------------------

    def record(self, step: int, head: dict[str, Any]) -> None:
        """Keep what a step changes before its first optimizer step: after an exception it makes a checkpoint."""
        if not self._keep_record:
            return
        self._recorded = (step, json.dumps(head))
        live = self._tracked.buffers()
        if [name for name, _ in live] != [name for name, _ in self._buffers]:
            self._buffers = [(name, tensor.detach().clone()) for name, tensor in live]
        elif live:
            with torch.no_grad():
                torch._foreach_copy_([kept for _, kept in self._buffers], [tensor.detach() for _, tensor in live])

    def write(self, step: int, head: dict[str, Any], reason: str, name: str) -> float:
        """A checkpoint by all ranks together. Returns the seconds that training stood still."""
        started = time.perf_counter()
        self._saves += 1
        directory = checkpoint_dir(step, self._place.attempt, f"{self._place.token}n{self._saves}")
        report = self._write_file(directory, step, head, self._share())
        reports = gather(self._group, f"plain/save/{self._saves}", json.dumps(report))
        if self._group.rank == 0:
            self._commit(step, [json.loads(text) for text in reports], reason, name)
        return time.perf_counter() - started

    def write_alone(self, step: int, head: dict[str, Any], reason: str, name: str) -> None:
        """A checkpoint by rank 0 alone, which holds all that is replicated."""
        everything = [*self._tracked.replicated(), *self._tracked.per_rank(), *self._tracked.buffers()]
        self._write_alone(step, head, reason, name, everything)

    def write_recorded(self, reason: str) -> bool:
        """Rank 0's last resume point as a checkpoint. Its tensors must be known to be clean.

        False if there is none, or storage has it already.
        """
        lacking = self._group.world_size > 1 and self._tracked.holds_per_rank
        if self._recorded is None or lacking or self._recorded[0] <= self.last_step:
            return False
        step, head = self._recorded[0], json.loads(self._recorded[1])
        everything = [*self._tracked.replicated(), *self._tracked.per_rank(), *self._buffers]
        self._write_alone(step, head, reason, "", everything)
        return self.last_step == step

    def _write_alone(self, step: int, head: dict[str, Any], reason: str, name: str, tensors: Named) -> None:
        self._alone += 1
        directory = checkpoint_dir(step, self._place.attempt, f"{self._place.token}w{self._alone}")
        self._commit(step, [self._write_file(directory, step, head, tensors)], reason, name)

    # -- writing --------------------------------------------------------------------------------------------------

    def _share(self) -> Named:
        """Buffers are rank 0's, other replicated tensors are dealt out over all ranks, per-rank ones are its own."""
        replicated, rank = self._tracked.replicated(), self._group.rank
        owners = deal(
            {name: tensor.numel() * tensor.element_size() for name, tensor in replicated}, self._group.world_size
        )
        mine = [pair for pair in replicated if owners[pair[0]] == rank]
        return [*mine, *(self._tracked.buffers() if rank == 0 else []), *self._tracked.per_rank()]

    def _write_file(self, directory: str, step: int, head: dict[str, Any], tensors: Named) -> dict[str, Any]:
        """`write_shard`'s report, or ``{"why": …}``."""
        rank = self._group.rank
        shared, own = self._tracked.split(self._tracked.trees())
        trees = {"trees": shared, "own_trees": {str(rank): own} if own else {}}
        labels = {
            "attempt": self._place.attempt,
            "step": step,
            "rank": rank,
            "world_size": self._group.world_size,
            "head": checkpoint_head([{"head": head, **trees}]),
        }
        try:
            plan = CopyPlan(tensors)
            data = _copied(plan, tensors)
            return write_shard(self._place.store, shard_path(directory, rank), labels, plan.table, data)
        except (StorageError, OSError) as error:
            return {"why": f"rank {rank}: {error}"}

    def _commit(self, step: int, reports: list[dict[str, Any]], reason: str, name: str) -> None:
        log = self._place.log
        if log is None:
            return
        try:
            failed = [report["why"] for report in reports if "why" in report]
            if failed:
                raise StorageError(failed[0])
            manifest = assemble(
                reports, run=self._place.name, reason=reason, created=time.time(), name=name,
                strategy=str(reports[0]["head"].get("strategy", "")), config=self._config(reports[0]),
                versions=_versions(), metrics=_means(reports),
            )  # fmt: skip
            data = manifest.to_bytes()
            self._place.store.write_new(manifest_path(manifest.directory), [data], len(data))
            log.append(checkpoint_entry(CheckpointRecord.of(manifest, crc32c(data))))
        except SupersededError:
            raise
        except (StorageError, OSError) as error:
            _say(f"the checkpoint of step {step} was not saved ({error}); training goes on")
            return
        self.last_step = max(self.last_step, step)
        try:
            prune(log, self._retention)
        except SupersededError:
            raise
        except (StorageError, OSError) as error:
            _say(f"old checkpoints could not be removed ({error}); training goes on")

    def _config(self, report: dict[str, Any]) -> dict[str, Any]:
        config = dict(report["head"].get("config") or {})
        if self._retention.keep_best is not None:
            config["keep_best"] = list(self._retention.keep_best)
        return config

    # -- the end --------------------------------------------------------------------------------------------------

    def close(self, step: int, why: str) -> None:
        """The script has ended normally, and what it trained is committed."""
        self._place.close("completed", step, why)

    def abandon(self) -> None:
        """The script has failed: the run stays unfinished."""
        self._place.close()


def _say(text: str) -> None:
    print(f"orchestrator: {text}", file=sys.stderr, flush=True)


def _copied(plan: CopyPlan, tensors: Named) -> memoryview:
    """The data area of a file: a copy, so that tensors on a device and strided ones need no case of their own."""
    if not plan.data_bytes:
        return memoryview(b"")
    data: memoryview = torch.empty(plan.data_bytes, dtype=torch.uint8).numpy().data
    sources = dict(tensors)
    with torch.no_grad():
        for entry in plan.table:
            if entry.end > entry.begin:
                view_of(data, entry).copy_(sources[entry.name].detach())
    return data


def _means(reports: list[dict[str, Any]]) -> dict[str, float]:
    """Metrics, mean over the ranks that logged them."""
    found = [report["head"].get("metrics") or {} for report in reports]
    names = sorted({name for metrics in found for name in metrics})
    held = {name: [metrics[name] for metrics in found if name in metrics] for name in names}
    return {name: sum(values) / len(values) for name, values in held.items()}


def _versions() -> dict[str, str]:
    found = {"python": ".".join(map(str, sys.version_info[:3])), "system": os.uname().sysname}
    for name in ("torch", "numpy", "training-orchestrator"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            found[name] = metadata.version(name)
    return found
