"""Where things lie inside a run's directory, what a run may be called, and how RUN addresses are read. Pure."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import PurePosixPath

from orchestrator.errors import UsageError

RUN_FILE = "run.json"
JOURNAL = "journal.jsonl"
LIVE_FILE = "live.json"
LOCK_FILE = "lock"
PROGRESS_FILE = "progress.json"
LOGS = "logs"
COMMITS = "commits"
CHECKPOINTS = "checkpoints"
REQUESTS = "requests"
MANIFEST = "manifest.json"

MAX_NAME = 100
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+=,-]*")
_COMMIT = re.compile(r"(\d{8,18})\.json")
_CHECKPOINT = re.compile(r"step-(\d{9,18})-a(\d{4,18})-([A-Za-z0-9]+)")


def commit_path(sequence: int) -> str:
    """`commits/00000001.json`."""
    return f"{COMMITS}/{sequence:08d}.json"


def commit_sequence(path: str) -> int | None:
    """The number in a commit entry's path, None for a file that is not one."""
    match = _COMMIT.fullmatch(path.rpartition("/")[2])
    return int(match[1]) if match else None


def checkpoint_dir(step: int, attempt: int, token: str) -> str:
    """`checkpoints/step-000000120-a0003-<token>`; the token (letters and digits) makes it this driver's own."""
    if not re.fullmatch(r"[A-Za-z0-9]+", token):
        raise ValueError(f"token {token!r} must be letters and digits")
    return f"{CHECKPOINTS}/step-{step:09d}-a{attempt:04d}-{token}"


def parse_checkpoint_dir(path: str) -> tuple[int, int, str] | None:
    """(step, attempt, token) of a checkpoint's directory, None for a path that is not one."""
    head, _, name = path.rstrip("/").rpartition("/")
    match = _CHECKPOINT.fullmatch(name) if head == CHECKPOINTS else None
    return (int(match[1]), int(match[2]), match[3]) if match else None


def shard_name(rank: int) -> str:
    """`rank-00000.safetensors`."""
    return f"rank-{rank:05d}.safetensors"


def shard_path(directory: str, rank: int) -> str:
    """A rank's file in a checkpoint's directory."""
    return f"{directory}/{shard_name(rank)}"


def manifest_path(directory: str) -> str:
    """The manifest in a checkpoint's directory."""
    return f"{directory}/{MANIFEST}"


def log_path(attempt: int, rank: int) -> str:
    """A rank's log, relative to the run's directory: `logs/a0003/rank-00000.log`."""
    return f"{LOGS}/a{attempt:04d}/rank-{rank:05d}.log"


def check_run_name(name: str) -> str:
    """Returns `name`. Raises UsageError if it could leave the storage, hide, or be taken for something else."""
    if not name:
        raise UsageError("The run's name is empty; give one, such as `--run-name train-1`.")
    if "/" in name or "\\" in name or name in (".", ".."):
        raise UsageError(f"Run name {name!r} has a slash or leads elsewhere; the place belongs in `--storage`.")
    if len(name) > MAX_NAME:
        raise UsageError(f"Run name {name[:40]!r}… is {len(name)} characters long; at most {MAX_NAME} are possible.")
    if not _NAME.fullmatch(name):
        raise UsageError(
            f"Run name {name!r} must begin with a letter, digit or _; then also . + = , - are possible, nothing else."
        )
    return name


def check_save_name(name: str) -> str:
    """Returns `name`. Raises UsageError if `RUN@name` could not address a checkpoint of that name.

    "best" may be a script's own: `RUN@best` is then the newest one of that name, else what `--keep-best` says.
    """
    if name == "last" or name.isdigit():
        raise UsageError(f"`run.save({name!r})`: RUN@{name} already means something else; choose another name.")
    if len(name) > MAX_NAME or not _NAME.fullmatch(name):
        raise UsageError(f"`run.save({name[:40]!r})`: a name is up to {MAX_NAME} letters, digits and _ . + = , -")
    return name


def name_from_script(script: str, module: bool = False) -> str:
    """A run's name when none was given: the script's stem (or the module's last part), odd characters made dashes."""
    stem = script.rpartition(".")[2] if module else PurePosixPath(script).stem
    stem = re.sub(r"[^A-Za-z0-9_.+=,-]+", "-", stem).strip("-.+=,")[: MAX_NAME - 6]
    return stem or "run"


@dataclass(frozen=True)
class Selector:
    """Which checkpoint. `kind`: "last", "best", "step" (then `value` is the step's digits) or "name"."""

    kind: str = "last"
    value: str = ""

    def __str__(self) -> str:
        return self.value or self.kind


LAST = Selector()


def parse_selector(text: str) -> Selector:
    """`120`, `last`, `best`, or a saved checkpoint's name. Raises UsageError for what can be none of them."""
    if text in ("last", "best"):
        return Selector(text)
    if text.isascii() and text.isdigit():
        return Selector("step", str(int(text)))
    if not _NAME.fullmatch(text) or len(text) > MAX_NAME:
        raise UsageError(f"@{text} selects no checkpoint; use @STEP, @last, @best or the name it was saved by.")
    return Selector("name", text)


@dataclass(frozen=True)
class RunAddress:
    """RUN of the command line: where runs live, which one, and (if given) which of its checkpoints."""

    storage: str
    name: str
    selector: Selector | None = None

    @property
    def uri(self) -> str:
        """The run's own place."""
        return f"{self.storage.rstrip('/')}/{self.name}"

    def __str__(self) -> str:
        return self.uri + (f"@{self.selector}" if self.selector else "")


def parse_address(text: str, default_storage: str) -> RunAddress:
    """`URI/NAME[@SELECTOR]`, or a bare NAME under `default_storage`. Raises UsageError for what is neither."""
    place, at, selector = text.rpartition("@")
    if not at or "/" in selector:
        place, at = text, ""
    storage, slash, name = place.rstrip("/").rpartition("/")
    if slash and storage.endswith(":/"):
        raise UsageError(f"{text!r} names a bucket or host but no run; write it as URI/NAME.")
    if not slash:
        storage = default_storage
    elif not storage:
        storage = "/"
    return RunAddress(storage, check_run_name(name), parse_selector(selector) if at else None)
