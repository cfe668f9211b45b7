"""Outside the launcher: options from the environment and, with ORCHESTRATOR_STORAGE set, the run's place in storage."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from orchestrator.errors import CheckpointDamagedError, OrchestratorError, SupersededError, UsageError
from orchestrator.spec import Retention
from orchestrator.worker.group import Group
from orchestrator.worker.restore import Source

if TYPE_CHECKING:
    from orchestrator.storage.commitlog import CommitLog
    from orchestrator.storage.local import LocalStore
    from orchestrator.storage.lock import RunLock

PREFIX = "ORCHESTRATOR_"
_Value = TypeVar("_Value")


def options(environ: Mapping[str, str]) -> dict[str, Any]:
    """The options of a run without a launcher, by the launcher's variables. Raises UsageError naming the variable."""
    from orchestrator import text

    triggers = _read(environ, "SAVE_EVERY", text.parse_triggers, text.parse_triggers("auto"))
    return {
        "storage": environ.get(f"{PREFIX}STORAGE", ""),
        "run_name": environ.get(f"{PREFIX}RUN_NAME", ""),
        "seed": _read(environ, "SEED", text.parse_count, None),
        "strategy": environ.get(f"{PREFIX}STRATEGY") or "auto",
        "save_every": [[trigger.unit, trigger.every] for trigger in triggers],
        "save_at": list(_read(environ, "SAVE_AT", text.parse_steps, ())),
        "step_rng": not _read(environ, "NO_STEP_RNG", text.parse_flag, False),
        "exception_save": not _read(environ, "NO_EXCEPTION_SAVE", text.parse_flag, False),
        "retention": Retention(
            keep_last=_read(environ, "KEEP_LAST", lambda word: text.parse_count(word, 1), 3),
            keep_every=_read(environ, "KEEP_EVERY", text.parse_keep_every, None),
            keep_best=_read(environ, "KEEP_BEST", text.parse_keep_best, None),
            keep_bytes=_read(environ, "KEEP_BYTES", text.parse_size, None),
        ),
    }


def _read(environ: Mapping[str, str], name: str, parse: Callable[[str], Any], default: _Value) -> Any | _Value:
    value = environ.get(PREFIX + name, "")
    if not value:
        return default
    try:
        return parse(value)
    except UsageError as error:
        raise UsageError(f"{PREFIX}{name}={value}: {error}") from None


@dataclass
class Place:
    """The run in storage. Rank 0 drives it: it holds the lock and the commit log; the others write their shares.

    `token` and `attempt` are the same on all ranks and this start's own, so no two starts ever write one path.
    """

    name: str
    store: LocalStore
    attempt: int
    token: str
    source: Source | None
    lock: RunLock | None = None
    log: CommitLog | None = None

    @classmethod
    def open(cls, settings: dict[str, Any], group: Group) -> Place:
        """Open or create the run; every rank calls it. A seed that the run keeps is put into `settings`.

        Raises UsageError (on all ranks) if the run is live already, or its place cannot be reached by every rank.
        """
        lock, log = None, None
        plan: dict[str, Any] = {}
        if group.rank == 0:
            try:
                plan, lock, log = _take(settings)
            except OrchestratorError as error:
                plan = {"error": str(error)}
        plan = json.loads(group.share("plain/place", json.dumps(plan)))
        if "error" in plan:
            raise UsageError(plan["error"])
        store = _local_store(plan["directory"])
        _check_reachable(store, plan["nonce"], group)
        settings["seed"] = settings["seed"] if settings["seed"] is not None else plan["seed"]
        return cls(plan["name"], store, plan["attempt"], plan["token"], _source(plan), lock, log)

    def close(self, outcome: str = "", step: int = 0, why: str = "") -> None:
        """Let go of the run; `outcome` says how it ended, if it did. Safe to repeat."""
        lock, log, self.lock, self.log = self.lock, self.log, None, None
        try:
            if log is not None and outcome:
                from orchestrator.storage.commitlog import outcome_entry

                log.append(outcome_entry(outcome, 0, step, why))
        finally:
            if lock is not None:
                lock.release()


def _local_store(directory: str) -> LocalStore:
    from orchestrator.storage.local import LocalStore

    return LocalStore(directory)


def _take(settings: dict[str, Any]) -> tuple[dict[str, Any], RunLock, CommitLog]:
    """Rank 0: settle the name, lock the run, take its commit log over, find where to go on from."""
    from orchestrator.storage.commitlog import CommitLog
    from orchestrator.storage.lock import RunLock
    from orchestrator.storage.prune import sweep
    from orchestrator.storage.runs import RunIdentity, choose_name, open_or_create, script_identity
    from orchestrator.storage.store import local_path

    script, arguments = _script(), tuple(sys.argv[1:])
    choice = choose_name(settings["storage"], script, arguments, run_name=settings["run_name"] or None)
    directory = Path(local_path(settings["storage"])).resolve() / choice.name
    store = _local_store(str(directory))
    asked = RunIdentity(choice.name, script_identity(script), arguments, settings["seed"], time.time())
    identity, _ = open_or_create(store, asked)
    lock = RunLock(directory)
    lock.acquire()
    os.register_at_fork(after_in_child=lambda: _forget(lock))
    log = CommitLog(store)
    log.take_over()
    with contextlib.suppress(SupersededError):
        sweep(log)
    found = log.latest_sound("full", _rejected)
    if found is None and log.checkpoints():
        lock.release()
        raise CheckpointDamagedError(
            "No committed checkpoint of this run can be read, so it cannot go on; nothing was deleted. See "
            "`orchestrator checkpoint verify RUN`, or start anew with --run-name."
        )
    print(f"orchestrator: run {directory} ({choice.why})", file=sys.stderr, flush=True)
    if found is not None:
        print(f"orchestrator: continues from the checkpoint of step {found[0].step}", file=sys.stderr, flush=True)
    plan = {
        "name": choice.name,
        "directory": str(directory),
        "nonce": log.nonce,
        "seed": identity.seed,
        "attempt": sum(entry.kind == "takeover" for entry in log.entries()),
        "token": secrets.token_hex(4),
        "checkpoint": found[0].directory if found is not None else None,
    }
    return plan, lock, log


def _forget(lock: RunLock) -> None:
    """In a forked data loader: it must not hold the run's lock when the process that it serves is killed."""
    if lock._descriptor is not None:
        os.close(lock._descriptor)
        lock._descriptor = None


def _script() -> str:
    """What tells this program from others; code given by `-c` or typed in has no file."""
    return sys.argv[0] if sys.argv and sys.argv[0] not in ("", "-", "-c") else "run"


def _rejected(path: str, why: str, step: int) -> None:
    print(f"orchestrator: the checkpoint of step {step} is not used: {why}", file=sys.stderr, flush=True)


def _source(plan: dict[str, Any]) -> Source | None:
    if plan["checkpoint"] is None:
        return None
    from orchestrator.worker.stored import StoredSource

    return StoredSource({"uri": plan["directory"], "directory": plan["checkpoint"]})


def _check_reachable(store: LocalStore, nonce: str, group: Group) -> None:
    """A path that means another disk on another node would hold only a part of each checkpoint."""
    from orchestrator.storage.commitlog import CommitLog

    if group.world_size == 1:
        return
    own = "" if any(entry.nonce == nonce for entry in CommitLog(store).entries()) else os.uname().nodename
    blind = sorted({node for node in gather(group, "plain/reach", own) if node})
    verdict = group.share("plain/reachable", ", ".join(blind))
    if verdict:
        raise UsageError(
            f"{store.root} on {verdict} is not the place that rank 0 writes to; set ORCHESTRATOR_STORAGE to a path "
            "that all nodes share."
        )


def gather(group: Group, key: str, value: str) -> list[str]:
    """On rank 0 every rank's `value`, by rank; elsewhere nothing. `key` must be a new one in this process group."""
    if group.world_size == 1:
        return [value]
    name = f"orchestrator/{key}"
    if group.rank != 0:
        group.store.set(f"{name}/{group.rank}", f"={value}")  # a store in a file takes an empty value for none
        return []
    return [value, *(bytes(group.store.get(f"{name}/{rank}")).decode()[1:] for rank in range(1, group.world_size))]
