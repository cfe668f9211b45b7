"""Removes what retention lets go: first the word in the commit log, then the files."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from orchestrator.errors import CheckpointDamagedError
from orchestrator.spec import Retention
from orchestrator.storage.commitlog import CommitLog, removed_entry
from orchestrator.storage.layout import CHECKPOINTS
from orchestrator.storage.manifest import CheckpointRecord
from orchestrator.storage.retention import Kept, plan
from orchestrator.storage.verify import check_manifest, verify


@dataclass(frozen=True)
class PruneReport:
    """`plan`: every checkpoint with the rules that keep it; `removed`: those that went (or would, in a dry run)."""

    plan: list[Kept]
    removed: list[CheckpointRecord]

    @property
    def freed_bytes(self) -> int:
        """What the removed ones took."""
        return sum(record.bytes for record in self.removed)


def prune(
    log: CommitLog, retention: Retention, *, dry_run: bool = False, level: Literal["manifest", "full"] = "manifest"
) -> PruneReport:
    """Apply retention. If none of the kept checkpoints is sound, the newest sound one stays too ("sound").

    Only for the driver that has taken the log over (a dry run needs no takeover). Raises SupersededError before
    anything is deleted if another driver has; StorageError if deleting fails (the sweep gets the rest later).
    """
    decided = _keep_a_sound_one(log, plan(log.checkpoints(), retention), level)
    gone = [record for record, kept_by in decided if not kept_by]
    if gone and not dry_run:
        log.append(removed_entry((record.directory for record in gone), "retention"))
        for record in gone:
            _delete(log, record.directory)
    return PruneReport(decided, gone)


def _keep_a_sound_one(log: CommitLog, decided: list[Kept], level: Literal["manifest", "full"]) -> list[Kept]:
    """Never fewer than one verified checkpoint: looks at the kept ones first, newest first."""
    check = check_manifest if level == "manifest" else verify
    if all(kept_by for _, kept_by in decided):
        return decided
    for index in sorted(range(len(decided)), key=lambda index: (not decided[index][1], -index)):
        record, kept_by = decided[index]
        try:
            check(log.store, record)
        except CheckpointDamagedError:
            continue
        return decided if kept_by else [*decided[:index], (record, ("sound",)), *decided[index + 1 :]]
    return [(record, kept_by or ("sound",)) for record, kept_by in decided]  # none is sound: delete nothing


def sweep(log: CommitLog, owned: Collection[str] = (), *, dry_run: bool = False) -> list[str]:
    """Delete checkpoint directories that no commit names and no live attempt owns; returns them.

    `owned`: directories (`checkpoints/step-…`) that savers of a live attempt may be writing to. Does nothing if an
    entry of the log cannot be read: it might be the one that names them. Safe to repeat. Raises SupersededError before
    anything is deleted if another driver has taken over.
    """
    named = {record.directory for record in log.checkpoints()}
    found = {"/".join(item.path.split("/")[:2]) for item in log.store.list(CHECKPOINTS) if item.path.count("/") > 1}
    stray = sorted(found - named - set(owned))
    if log.unreadable:
        return []
    if stray and not dry_run:
        log.append(removed_entry(stray, "sweep"))
        for directory in stray:
            _delete(log, directory)
    return stray


def _delete(log: CommitLog, directory: str) -> None:
    log.store.delete([item.path for item in log.store.list(directory)], sweep=True)
