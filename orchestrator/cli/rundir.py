"""A run's directory as the looking and asking commands see it: found by its address, read without locking anything."""

from __future__ import annotations

import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import UsageError
from orchestrator.storage import layout, store
from orchestrator.text import did_you_mean

_CHUNK_BYTES = 1 << 20
_NAMES_SHOWN = 12


@dataclass(frozen=True)
class RunDir:
    """A run that exists. `address` is what the user called it, `path` where it is."""

    address: layout.RunAddress
    path: Path

    @property
    def journal(self) -> Path:
        return self.path / layout.JOURNAL


def find_run(text: str) -> RunDir:
    """The run called RUN. Raises UsageError saying where it looked and which runs are there."""
    address = layout.parse_address(text, store.default_storage())
    storage = local_path(address.storage)
    path = storage / address.name
    if not (path / layout.RUN_FILE).is_file() and not (path / layout.JOURNAL).is_file():
        raise UsageError(f"there is no run {address.name} in {storage.absolute()}{_what_is_there(storage, path)}")
    return RunDir(address, path)


def local_path(storage: str) -> Path:
    """The directory of a storage URI. Raises UsageError for storage that is not local."""
    return Path(store.local_path(storage))


def _what_is_there(storage: Path, path: Path) -> str:
    if not storage.is_dir():
        return ", which does not exist; give RUN as STORAGE/NAME, or set ORCHESTRATOR_STORAGE"
    names = runs_in(storage)
    if path.is_dir():
        return f" ({path.name} is a directory, but not a run's){_listed(names)}"
    if not names:
        return ", nor any other run; give RUN as STORAGE/NAME, or set ORCHESTRATOR_STORAGE"
    return did_you_mean(path.name, names) + _listed(names)


def _listed(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _NAMES_SHOWN} more" if len(names) > _NAMES_SHOWN else ""
    return f" Runs there: {', '.join(names[:_NAMES_SHOWN])}{more}."


def runs_in(storage: Path) -> list[str]:
    """Names of the runs in a storage directory, sorted."""
    try:
        found = [entry.name for entry in storage.iterdir() if (entry / layout.RUN_FILE).is_file()]
    except OSError:
        return []
    return sorted(found)


class JournalReader:
    """Reads whole lines from where it stands; what is still being written waits for the next call."""

    def __init__(self, path: Path, at_end: bool = False) -> None:
        self._path = path
        self._offset = path.stat().st_size if at_end and path.exists() else 0

    def read(self) -> Iterator[dict[str, Any]]:
        """The events since the last call. A line that is no JSON object (a torn write) is skipped."""
        for line in self._lines():
            try:
                event = json.loads(line)
            except ValueError:
                continue
            if isinstance(event, dict):
                yield event

    def _lines(self) -> Iterator[bytes]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            if file.seek(0, os.SEEK_END) < self._offset:
                self._offset = 0
            file.seek(self._offset)
            for line in file:
                if not line.endswith(b"\n"):
                    return
                self._offset += len(line)
                yield line


class TextTail:
    """Reads what was appended to a file since the last call, as bytes, in pieces of bounded size."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0

    def read(self) -> Iterator[bytes]:
        if not self._path.exists():
            return
        with self._path.open("rb") as file:
            file.seek(self._offset)
            while piece := file.read(_CHUNK_BYTES):
                self._offset += len(piece)
                yield piece


def put_request(run: RunDir, kind: str, save: bool = True, name: str = "") -> Path:
    """Leave an order for the live driver: a whole file or none, whatever happens meanwhile. Returns its path."""
    folder = run.path / layout.REQUESTS
    folder.mkdir(exist_ok=True)
    nonce = uuid.uuid4().hex[:12]
    final = folder / f"{time.time_ns():020d}-{nonce}.json"
    draft = folder / f".{nonce}.tmp"
    draft.write_text(json.dumps({"kind": kind, "save": save, "name": name}) + "\n")
    draft.rename(final)
    return final
