"""The port to wherever a run lives: five methods, so that local disk and object storage fit behind it alike."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

from orchestrator.errors import StorageError, UsageError

Bytes = bytes | bytearray | memoryview


class MissingFileError(StorageError):
    """There is no such file."""


@dataclass(frozen=True)
class StoredObject:
    """A file as listed. `modified`: seconds since 1970."""

    path: str
    size_bytes: int
    modified: float


class Store(Protocol):
    """One run's place. Paths are relative, with slashes. All methods raise StorageError saying what to do next.

    Every file is written once and never changed. That is what object storage can promise, and it is why a reader
    needs no locks: a file that is there is whole, durable, and stays what it is until it is deleted.
    """

    def write_new(self, path: str, blocks: Iterable[Bytes], size: int) -> None:
        """Write `size` bytes; the file appears whole and durable, just before this returns. Refuses an existing one."""
        ...

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """Create a small file, whole and durable, unless there is one: then False, and nothing is changed."""
        ...

    def read(self, path: str, begin: int = 0, end: int | None = None, into: memoryview | None = None) -> memoryview:
        """Bytes `begin` to `end` (None: the file's end), into the buffer if one is given. Safe in many threads at once.

        Raises MissingFileError, and CheckpointDamagedError if the file is shorter than asked for.
        """
        ...

    def list(self, prefix: str) -> list[StoredObject]:
        """Every file below the directory `prefix` ("" for all), sorted by path. An absent directory holds none."""
        ...

    def delete(self, paths: Iterable[str], sweep: bool = False) -> None:
        """Delete files; absent ones are fine, so it is safe to repeat.

        `sweep`: directories left empty go too, with what crashes left half-written in them; nobody may write there now.
        """
        ...


def default_storage() -> str:
    """Where a bare run name is looked for: ORCHESTRATOR_STORAGE, else ./runs."""
    return os.environ.get("ORCHESTRATOR_STORAGE") or "./runs"


def open_store(uri: str) -> Store:
    """The store at `uri`: a path or file://… Raises UsageError for a kind of storage that is not supported."""
    from orchestrator.storage.local import LocalStore

    return LocalStore(local_path(uri))


def local_path(uri: str) -> str:
    """The path that a storage URI means on this machine. Raises UsageError if it means none."""
    scheme, colon, rest = uri.partition("://")
    if not colon:
        if not uri:
            raise UsageError("The storage's path is empty; give a directory, such as `--storage ./runs`.")
        return uri
    if scheme == "file":
        host, slash, path = rest.partition("/")
        if host in ("", "localhost") and slash:
            return "/" + path
        raise UsageError(f"Storage {uri!r}: write file:///path, with three slashes; {host!r} would be a host.")
    if scheme == "s3":
        raise UsageError(f"Storage {uri!r}: S3 is not supported by this version yet; use a path that all nodes share.")
    raise UsageError(f"Storage {uri!r}: {scheme}:// is not supported; use a path or file:///path.")
