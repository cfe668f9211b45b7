"""What run is this? Its identity in `run.json`, the choice of its name, and whether its place can be written.

How a run ended is no file of its own: the last `outcome` entry of its commit log says so, until a later takeover. That
way it is exclusive like every commit, a superseded driver cannot write it, and it works where files cannot be replaced.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import CheckpointDamagedError, StorageError, UsageError
from orchestrator.storage.commitlog import CommitLog
from orchestrator.storage.layout import MAX_NAME, RUN_FILE, check_run_name, name_from_script
from orchestrator.storage.local import TEMPORARY, LocalStore, explain, make_directories
from orchestrator.storage.store import MissingFileError, Store, local_path

SCHEMA = 1
KIND = "orchestrator-run"
PROBE_BYTES = 1 << 20


@dataclass(frozen=True)
class RunIdentity:
    """`run.json`. `script`: absolute path, or the module's name; `created`: seconds since 1970."""

    name: str
    script: str
    args: tuple[str, ...]
    seed: int | None
    created: float

    def to_bytes(self) -> bytes:
        """As stored."""
        raw = {
            "schema": SCHEMA, "kind": KIND, "name": self.name, "script": self.script, "args": list(self.args),
            "seed": self.seed, "created": self.created,
        }  # fmt: skip
        return json.dumps(raw, indent=1).encode() + b"\n"


@dataclass(frozen=True)
class NameChoice:
    """A run's name; `continues` an existing run or not; `why`, in words for the console."""

    name: str
    continues: bool
    why: str


def script_identity(script: str, module: bool = False) -> str:
    """What tells scripts apart: a file's absolute path, a module's name."""
    return script if module else os.path.realpath(script)


def read_identity(store: Store) -> RunIdentity | None:
    """The run in a place; None if nothing says there is one. Raises UsageError for somebody else's run.json."""
    try:
        data = bytes(store.read(RUN_FILE))
    except MissingFileError:
        return None
    return _parse(data, store)


def _parse(data: bytes, store: Store) -> RunIdentity:
    try:
        raw: Any = json.loads(data)
        if raw["kind"] != KIND:
            raise ValueError("kind")
        if raw["schema"] > SCHEMA:
            raise UsageError(f"The run in {store} was written by a newer orchestrator; install that one.")
        args, seed = tuple(map(str, raw["args"])), raw["seed"]
        if seed is not None and type(seed) is not int:
            raise TypeError("seed")
        return RunIdentity(str(raw["name"]), str(raw["script"]), args, seed, float(raw["created"]))
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UsageError(
            f"{RUN_FILE} in {store} is not ours, so the directory belongs to something else; choose another --run-name "
            "or --storage."
        ) from None


def is_finished(store: Store) -> bool:
    """True if the run completed and no driver has taken it up since."""
    outcome = CommitLog(store).outcome()
    return outcome is not None and outcome.body["outcome"] == "completed"


def open_or_create(store: LocalStore, identity: RunIdentity) -> tuple[RunIdentity, bool]:
    """The run's stored identity (which counts: its seed is kept), and whether it was created just now.

    Raises UsageError if the directory belongs to something else or cannot be written; nothing is left behind then.
    """
    probe_writable(store.root.parent)
    found = read_identity(store)
    if found is None:
        _refuse_foreign(store)
        if store.create_exclusive(RUN_FILE, identity.to_bytes()):
            return identity, True
        found = read_identity(store)
    assert found is not None
    probe_writable(store.root)
    return found, False


def _refuse_foreign(store: LocalStore) -> None:
    if store.root.exists() and not store.root.is_dir():
        raise UsageError(f"{store.root} is a file, not a run's directory; choose another --run-name or --storage.")
    alien = sorted(name for name in _names_in(store.root) if not name.startswith(TEMPORARY))
    if alien:
        shown = ", ".join(alien[:3]) + (", …" if len(alien) > 3 else "")
        raise UsageError(
            f"{store.root} holds {shown} but no {RUN_FILE}, so it belongs to something else; choose another --run-name "
            "or --storage. Nothing in it was touched."
        )


def _names_in(directory: Path) -> list[str]:
    try:
        return os.listdir(directory)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UsageError(str(explain(error, directory, "read"))) from error


def probe_writable(directory: Path) -> None:
    """Write, sync and delete a file of 1 MiB. Raises UsageError (before anything is started) saying what is wrong.

    Directories made for it stay, as another launch may be about to use them; only a failed probe takes them away.
    """
    made = _missing(directory)
    probe = directory / f"{TEMPORARY}{secrets.token_hex(8)}"
    try:
        make_directories(directory)
        try:
            descriptor = os.open(probe, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                _fill(descriptor)
            finally:
                os.close(descriptor)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        _remove_empty(made)
        raise UsageError(str(explain(error, directory, "write to"))) from error


def _fill(descriptor: int) -> None:
    left = PROBE_BYTES
    while left:
        left -= os.write(descriptor, b"\0" * left)
    os.fsync(descriptor)


def _missing(directory: Path) -> list[Path]:
    """Directories on the way that do not exist, innermost first."""
    return [path for path in (directory, *directory.parents) if not path.exists()]


def _remove_empty(directories: Sequence[Path]) -> None:
    for directory in directories:
        try:
            directory.rmdir()
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTEMPTY, errno.EEXIST, errno.EROFS, errno.EACCES):
                raise


def choose_name(
    storage: str, script: str, args: Sequence[str] = (), *, module: bool = False, run_name: str | None = None
) -> NameChoice:
    """CONTRACT's `--run-name`: the given one; else the newest unfinished run of the same script and arguments; else the
    script's stem, or the next free `-2`, `-3`, …. Creates nothing. Raises UsageError for an impossible name.
    """
    root = Path(local_path(storage))
    if run_name is not None:
        there = read_identity(LocalStore(root / check_run_name(run_name))) is not None
        return NameChoice(run_name, there, "named by --run-name" + ("; it exists and goes on" if there else ""))
    stem = name_from_script(script, module)
    wanted = (script_identity(script, module), tuple(args))
    taken = _taken(root, stem)
    for number in sorted(taken, reverse=True):
        if _goes_on(LocalStore(root / _numbered(stem, number)), wanted):
            name, free = _numbered(stem, number), _numbered(stem, max(taken) + 1)
            why = f"unfinished run of the same script and arguments; to start anew: --run-name {free}"
            return NameChoice(name, True, why)
    name = _numbered(stem, max(taken, default=0) + 1)
    return NameChoice(name, False, "new run, named after the script" + (", numbered: others exist" if taken else ""))


def _numbered(stem: str, number: int) -> str:
    return stem if number <= 1 else f"{stem[: MAX_NAME - 8]}-{number}"


def _taken(root: Path, stem: str) -> set[int]:
    """Numbers in use, by runs or by anything else of that name."""
    prefix = f"{stem[: MAX_NAME - 8]}-"
    names = _names_in(root)
    rest = (name.removeprefix(prefix) for name in names if name.startswith(prefix))
    numbers = {int(text) for text in rest if text.isascii() and text.isdigit() and len(text) < 7 and text[0] != "0"}
    return {number for number in numbers if number > 1} | ({1} if stem in names else set())


def _goes_on(store: LocalStore, wanted: tuple[str, tuple[str, ...]]) -> bool:
    try:
        identity = read_identity(store)
        return identity is not None and (identity.script, identity.args) == wanted and not is_finished(store)
    except (UsageError, CheckpointDamagedError):
        return False  # somebody else's directory: its name is taken, that is all
    except StorageError as error:
        raise UsageError(f"{error} (looking for an unfinished run to continue)") from error
