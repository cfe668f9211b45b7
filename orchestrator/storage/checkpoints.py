"""What the command line and `orchestrator.load` do with checkpoints: list, find, load, verify, export."""

from __future__ import annotations

import json
import os
import secrets
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointDamagedError, StorageError, UsageError
from orchestrator.storage.commitlog import CommitLog
from orchestrator.storage.layout import LAST, RunAddress, Selector, parse_address, parse_selector
from orchestrator.storage.local import TEMPORARY, explain, sync_directory
from orchestrator.storage.manifest import CheckpointRecord, Manifest
from orchestrator.storage.retention import best
from orchestrator.storage.runs import RunIdentity, read_identity
from orchestrator.storage.store import Store, default_storage, local_path, open_store
from orchestrator.storage.trees import aliases, all_trees, plain_states
from orchestrator.storage.verify import check_manifest, read_manifest, verify_files

FORMATS = ("safetensors", "torch")


@dataclass(frozen=True)
class RunStore:
    """A run that exists, opened for reading."""

    address: RunAddress
    store: Store
    log: CommitLog
    identity: RunIdentity


def open_run(address: str | RunAddress, storage: str | None = None) -> RunStore:
    """The run at `URI/NAME` or NAME (a selector is kept in its `address`). Raises UsageError naming what is there."""
    if isinstance(address, str):
        address = parse_address(address, storage or default_storage())
    store = open_store(address.uri)
    identity = read_identity(store)
    if identity is None:
        raise UsageError(f"There is no run {address.name!r} in {address.storage}; {_what_there_is(address.storage)}.")
    return RunStore(address, store, CommitLog(store), identity)


def _what_there_is(storage: str) -> str:
    root = Path(local_path(storage))
    names = sorted(path.parent.name for path in root.glob("*/run.json")) if root.is_dir() else []
    if not names:
        return "nor any other run. Give URI/NAME, or set ORCHESTRATOR_STORAGE to where runs live"
    return "there are: " + ", ".join(names[:10]) + (f", … ({len(names)})" if len(names) > 10 else "")


def list_checkpoints(run: RunStore) -> list[CheckpointRecord]:
    """Committed checkpoints, oldest commit first."""
    return run.log.checkpoints()


def find(run: RunStore, selector: str | Selector | None = None) -> CheckpointRecord:
    """The checkpoint that a selector (default: the address's, else last) means. Raises UsageError listing what exists.

    Of several of one step or name the newest counts. It is looked up only, not verified.
    """
    if isinstance(selector, str):
        selector = parse_selector(selector.removeprefix("@"))
    selector = selector or run.address.selector or LAST
    records = list_checkpoints(run)
    if not records:
        raise UsageError(f"Run {run.address.name!r} has no checkpoint yet.")
    if selector.kind == "best":
        return _best(run, records)
    matches: Callable[[CheckpointRecord], bool] = {
        "last": lambda record: True,
        "step": lambda record: record.step == int(selector.value),
        "name": lambda record: record.name == selector.value,
    }[selector.kind]
    for record in reversed(records):
        if matches(record):
            return record
    names = sorted({record.name for record in records if record.name})
    steps = [str(record.step) for record in records]
    raise UsageError(
        f"Run {run.address.name!r} has no checkpoint @{selector}; there are steps {', '.join(steps[-20:])}"
        + (f" and names {', '.join(names)}." if names else ".")
    )


def _best(run: RunStore, records: list[CheckpointRecord]) -> CheckpointRecord:
    own = [record for record in records if record.name == "best"]
    if own:
        return own[-1]
    config = read_manifest(run.store, records[-1]).config
    metric, mode = _best_rule(config.get("keep_best"))
    if not metric:
        known = sorted({name for record in records for name in record.metrics})
        raise UsageError(
            f"Run {run.address.name!r} was launched without --keep-best and saved nothing as `best`, so no checkpoint "
            "is its "
            f"best; use @last or @STEP. Metrics in its checkpoints: {', '.join(known) or 'none'}."
        )
    found = best(records, 1, metric, mode)
    if not found:
        raise UsageError(f"No checkpoint of run {run.address.name!r} has the metric {metric!r}; use @last or @STEP.")
    return records[found[0]]


def _best_rule(rule: Any) -> tuple[str, str]:
    """(metric, mode) of `keep_best` in a checkpoint's configuration: [K, METRIC, MODE] or "K:METRIC[:MODE]"."""
    parts = rule.split(":") if isinstance(rule, str) else list(rule) if isinstance(rule, (list, tuple)) else []
    if len(parts) < 2:
        return "", ""
    return str(parts[1]), str(parts[2]) if len(parts) > 2 else "min"


def find_sound(run: RunStore, selector: str | Selector | None = None) -> tuple[CheckpointRecord, Manifest]:
    """Like `find`, with its manifest checked. For "last", damaged ones are passed over with a warning.

    Raises CheckpointDamagedError if the one that was asked for, or every one, is damaged.
    """
    record = find(run, selector)
    if (selector or run.address.selector or LAST) not in (LAST, "last", "@last"):
        return record, check_manifest(run.store, record)

    def warn(path: str, why: str, step: int) -> None:
        warnings.warn(f"The checkpoint of step {step} is damaged and passed over: {why}", stacklevel=4)

    found = run.log.latest_sound(on_reject=warn)
    if found is None:
        raise CheckpointDamagedError(f"Every checkpoint of run {run.address.name!r} is damaged; `verify` says how.")
    return found


def load(address: str, storage: str | None = None) -> dict[str, Any]:
    """`orchestrator.load("runs/train@best")["model"]`: tracked name → plain state, tensors on the CPU.

    Names are those of the model itself, without any wrapper's prefix; `trees.plain_state` says what comes for what.
    Values tracked as `per_rank` come as {rank: value}. Every digest is verified. Raises UsageError,
    CheckpointDamagedError.
    """
    from orchestrator.storage.shards import as_kind, read_tensors

    run = open_run(address, storage)
    _, manifest = find_sound(run)
    return plain_states(manifest.state, manifest.world_size, read_tensors(run.store, manifest), as_kind)


@dataclass(frozen=True)
class Verdict:
    """What `verify` found about one checkpoint; `why` is empty if it is sound, else it names the first bad file."""

    record: CheckpointRecord
    bytes_read: int
    why: str = ""

    @property
    def ok(self) -> bool:
        """Sound, every byte."""
        return not self.why


def verify(
    run: RunStore, selector: str | Selector | None = None, on_verdict: Callable[[Verdict], None] | None = None
) -> list[Verdict]:
    """Re-read every byte of one checkpoint, or (no selector given or in the address) of all, newest first."""
    chosen = selector or run.address.selector
    records = [find(run, chosen)] if chosen else list(reversed(list_checkpoints(run)))
    verdicts = []
    for record in records:
        verdicts.append(_verdict(run, record))
        if on_verdict is not None:
            on_verdict(verdicts[-1])
    return verdicts


def _verdict(run: RunStore, record: CheckpointRecord) -> Verdict:
    try:
        return Verdict(record, verify_files(run.store, check_manifest(run.store, record)))
    except StorageError as error:
        return Verdict(record, 0, str(error))


def export(
    run: RunStore, selector: str | Selector | None, file_format: str, output: str | os.PathLike[str]
) -> Manifest:
    """Write a checkpoint's tensors as one file, keys `<tracked name>.<fully qualified name>`; replaces `output` whole.

    "safetensors" carries what is no tensor (learning rates, counters) as JSON in its metadata, under "state"; "torch"
    is a flat dict for `torch.load(weights_only=True)`. Digests are verified on the way.
    Raises UsageError, StorageError.
    """
    from orchestrator.storage import shards

    if file_format not in FORMATS:
        raise UsageError(f"--format {file_format}: there are {' and '.join(FORMATS)}.")
    _, manifest = find_sound(run, selector)
    shared = {key: name for tree in all_trees(manifest.state) for key, name in aliases(tree).items()}
    names = {name: name for name in manifest.tensors} | shared
    target = Path(output)
    if target.is_dir() or not target.parent.is_dir():
        raise UsageError(f"--output {target}: give a file in a directory that exists.")
    temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            if file_format == "torch":
                shards.export_torch(run.store, manifest, names, file)
            else:
                shards.export_safetensors(run.store, manifest, names, _metadata(manifest), file)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
        sync_directory(target.parent)
    except OSError as error:
        raise explain(error, target, "write") from error
    finally:
        temporary.unlink(missing_ok=True)
    return manifest


def _metadata(manifest: Manifest) -> dict[str, str]:
    return {
        "format": "pt", "run": manifest.run, "step": str(manifest.step), "epoch": str(manifest.epoch),
        "state": json.dumps({key: manifest.state.get(key) for key in ("tracked", "per_rank", "user")}),
    }  # fmt: skip
