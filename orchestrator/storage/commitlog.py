"""The commit log: `commits/00000001.json`, `…02.json`, …, each created exclusively and never changed.

An entry *is* the commit. The sequence is shared by all drivers that ever write a run, and each driver begins with a
takeover entry of its own. A driver that was superseded finds its next number taken when it appends, and stops; so it
may be paused for any time, at any point, and no clock is trusted. Kinds of entries:

==============  ====================================================================================
``takeover``    a driver begins; ends the claim of all drivers before it
``checkpoint``  a manifest is complete and durable (`CheckpointRecord`)
``removed``     these checkpoints no longer count; their files are deleted after this entry
``outcome``     the run came to an end: "completed", "failed" or "stopped". Until a later takeover, this is how it ended
==============  ====================================================================================
"""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from orchestrator.errors import CheckpointDamagedError, StorageError, SupersededError
from orchestrator.storage.layout import COMMITS, commit_path, commit_sequence
from orchestrator.storage.manifest import CheckpointRecord, Manifest
from orchestrator.storage.store import MissingFileError, Store
from orchestrator.storage.verify import check_manifest, verify

SCHEMA = 1
KINDS = ("takeover", "checkpoint", "removed", "outcome")
MAX_TAKEOVERS = 1000

OnReject = Callable[[str, str, int], None]
"""Told (path of the checkpoint, why it cannot be used, step)."""


@dataclass(frozen=True)
class LogEntry:
    """One entry. `nonce`: whose; `time`: when, in seconds since 1970 (for people, never decided on)."""

    kind: str
    body: Mapping[str, Any] = field(default_factory=dict)
    nonce: str = ""
    time: float = 0.0
    sequence: int = 0


def checkpoint_entry(record: CheckpointRecord) -> LogEntry:
    """The entry that commits a checkpoint."""
    return LogEntry("checkpoint", record.to_json())


def removed_entry(directories: Iterable[str], why: str) -> LogEntry:
    """The entry after which these checkpoints do not count."""
    return LogEntry("removed", {"directories": sorted(directories), "why": why})


def outcome_entry(outcome: str, exit_code: int, step: int, why: str = "") -> LogEntry:
    """The entry that says how the run ended; see CONTRACT.md's `run_finished`."""
    return LogEntry("outcome", {"outcome": outcome, "exit_code": exit_code, "step": step, "why": why})


class CommitLog:
    """One process's view of a run's log. Reading needs no takeover; appending does. Not for several threads at once."""

    def __init__(self, store: Store, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.clock = clock
        self.nonce = ""
        self.unreadable: dict[int, str] = {}
        self._next = 0
        self._read: dict[int, LogEntry] = {}

    def take_over(self, nonce: str = "") -> LogEntry:
        """Begin to write: from here on every earlier driver of this run fails to append. Returns the entry.

        `nonce` must be this process's own; one is made if none is given. Raises StorageError.
        """
        self.nonce = nonce or secrets.token_hex(16)
        self._next = 0
        for _ in range(MAX_TAKEOVERS):
            self._next = max([self._next, *self._sequences()]) + 1
            entry = self._stamped(LogEntry("takeover"))
            if self._create(entry):
                return entry
        raise StorageError(f"{MAX_TAKEOVERS} other drivers took over this run at the same time; stop them.")

    def append(self, entry: LogEntry) -> LogEntry:
        """Commit an entry; returns it with its number. If this raises StorageError it may be tried again.

        Raises SupersededError if another driver has taken over: nothing more may be written or deleted then.
        """
        if not self._next:
            raise StorageError("This process reads the run's log only; take_over() comes before append().")
        stamped = self._stamped(entry)
        while not self._create(stamped):
            if self._whose(self._next) != self.nonce:
                raise SupersededError(
                    f"Another driver has taken over this run ({commit_path(self._next)} is not ours); this one stops "
                    "and writes nothing more. Its work up to the last commit is kept."
                )
            stamped = replace(stamped, sequence=self._next + 1)  # an earlier append's answer was lost; it had worked
        return stamped

    def _stamped(self, entry: LogEntry) -> LogEntry:
        return LogEntry(entry.kind, entry.body, self.nonce, self.clock(), self._next)

    def _create(self, entry: LogEntry) -> bool:
        raw = {
            "schema": SCHEMA, "kind": entry.kind, "nonce": entry.nonce, "time": entry.time,
            "body": entry.body,
        }  # fmt: skip
        self._next = entry.sequence
        text = json.dumps(raw, allow_nan=False)
        if not self.store.create_exclusive(commit_path(entry.sequence), text.encode() + b"\n"):
            # A PUT that was retried after a lost answer finds its own entry in the way: that is success.
            found, body = self._entry(entry.sequence), json.loads(text)["body"]
            if found is None or (found.nonce, found.kind, found.body) != (entry.nonce, entry.kind, body):
                return False
        self._read[entry.sequence] = entry
        self._next = entry.sequence + 1
        return True

    def _whose(self, sequence: int) -> str:
        entry = self._entry(sequence)
        return "" if entry is None else entry.nonce

    def _sequences(self) -> list[int]:
        found = ((commit_sequence(item.path), item.path) for item in self.store.list(COMMITS))
        return sorted(number for number, path in found if number is not None and commit_path(number) == path)

    def entries(self) -> list[LogEntry]:
        """All entries that can be read, oldest first. Torn and alien files are skipped, and named in `unreadable`."""
        found = (self._entry(sequence) for sequence in self._sequences())
        return [entry for entry in found if entry is not None]

    def _entry(self, sequence: int) -> LogEntry | None:
        if sequence not in self._read:
            try:
                self._read[sequence] = _parse(bytes(self.store.read(commit_path(sequence))), sequence)
                self.unreadable.pop(sequence, None)
            except MissingFileError:
                return None
            except CheckpointDamagedError as error:
                self.unreadable[sequence] = str(error)
        return self._read.get(sequence)

    def checkpoints(self) -> list[CheckpointRecord]:
        """Committed checkpoints that were not removed, in the order of their commits."""
        live: dict[str, CheckpointRecord] = {}
        for entry in self.entries():
            if entry.kind == "checkpoint":
                record = _record(entry)
                live[record.directory] = record
            elif entry.kind == "removed":
                for directory in entry.body["directories"]:
                    live.pop(directory, None)
        return list(live.values())

    def outcome(self) -> LogEntry | None:
        """How the run ended, None while it is unfinished: never ended, or taken over since."""
        last = next((e for e in reversed(self.entries()) if e.kind in ("outcome", "takeover")), None)
        return last if last is not None and last.kind == "outcome" else None

    def latest_sound(
        self, level: Literal["manifest", "full"] = "manifest", on_reject: OnReject | None = None
    ) -> tuple[CheckpointRecord, Manifest] | None:
        """The last committed checkpoint that is still whole, going back past damaged ones; None if there is none.

        "manifest" checks the manifest's digest, the coverage and the files' lengths; "full" re-reads every byte.
        (Readers verify what they read in any case.) `on_reject` is told of every damaged one that is newer.
        """
        check = check_manifest if level == "manifest" else verify
        for record in reversed(self.checkpoints()):
            try:
                return record, check(self.store, record)
            except CheckpointDamagedError as error:
                if on_reject is not None:
                    on_reject(record.directory, str(error), record.step)
        return None


def _parse(data: bytes, sequence: int) -> LogEntry:
    path = commit_path(sequence)
    try:
        raw = json.loads(data)
        if raw["schema"] != SCHEMA:
            raise CheckpointDamagedError(f"{path} has schema {str(raw['schema'])[:20]}; a newer orchestrator wrote it.")
        kind, body, nonce, at = raw["kind"], raw["body"], raw["nonce"], raw["time"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise CheckpointDamagedError(f"{path} is no entry of a commit log ({error!r:.100}).") from None
    entry = LogEntry(kind, body, nonce, at, sequence)
    if kind not in KINDS or not isinstance(body, dict) or not isinstance(nonce, str) or type(at) not in (int, float):
        raise CheckpointDamagedError(f"{path} is no entry of a commit log.")
    if kind == "checkpoint":
        _record(entry)
    elif kind == "removed":
        directories = body.get("directories")
        if not isinstance(directories, list) or not all(isinstance(directory, str) for directory in directories):
            raise CheckpointDamagedError(f"{path} does not say what was removed.")
    elif kind == "outcome" and not isinstance(body.get("outcome"), str):
        raise CheckpointDamagedError(f"{path} does not say how the run ended.")
    return entry


def _record(entry: LogEntry) -> CheckpointRecord:
    return CheckpointRecord.from_json(dict(entry.body), entry.sequence, commit_path(entry.sequence))
