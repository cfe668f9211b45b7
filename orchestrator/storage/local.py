"""A run on a local (or shared, POSIX) file system."""

from __future__ import annotations

import errno
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from orchestrator.errors import CheckpointDamagedError, StorageError
from orchestrator.storage.store import Bytes, MissingFileError, StoredObject

TEMPORARY = ".tmp-"  # what a crash may leave behind begins with this; listings skip it, deletion sweeps it
_NO_LINKS = {errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK}
_ADVICE = {
    errno.ENOSPC: "no space is left there; free some, lower --keep-last, or put the run elsewhere by --storage",
    errno.EDQUOT: "the disk quota is used up; free some, lower --keep-last, or put the run elsewhere by --storage",
    errno.EFBIG: "the file system (or ulimit -f) refuses files of this size; put the run elsewhere by --storage",
    errno.EROFS: "the file system is mounted read-only; remount it or put the run elsewhere by --storage",
    errno.EACCES: "permission is denied; give this user write access or put the run elsewhere by --storage",
    errno.EPERM: "permission is denied; give this user write access or put the run elsewhere by --storage",
    errno.ENOTDIR: "a part of this path is a file, not a directory; put the run elsewhere by --storage",
    errno.EIO: "the disk reports an I/O error; see the kernel's log and put the run elsewhere by --storage",
    errno.EMFILE: "too many files are open; raise ulimit -n",
    errno.ESTALE: "the network file system lost this file; check the mount",
}

_READ_ERRORS: dict[int, type[StorageError]] = {
    errno.ENOENT: MissingFileError,
    errno.ENOTDIR: MissingFileError,
    errno.EIO: CheckpointDamagedError,
    errno.EISDIR: CheckpointDamagedError,
}


def explain(error: OSError, path: str | Path, doing: str) -> StorageError:
    """The StorageError for what the system said, with the path and what to do about it."""
    advice = _ADVICE.get(error.errno or 0, error.strerror or str(error))
    kind: type[StorageError] = StorageError
    if doing == "read":
        kind = _READ_ERRORS.get(error.errno or 0, StorageError)
    return kind(f"Cannot {doing} {path}: {advice}.")


@contextmanager
def _explained(path: str | Path, doing: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise explain(error, path, doing) from error


class LocalStore:
    """`Store` on a directory, which is created when first written to. Holds no open files, so it may be pickled."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root).absolute()

    def __repr__(self) -> str:
        return f"LocalStore({str(self.root)!r})"

    def path(self, path: str) -> Path:
        """Where a relative path lies. Raises StorageError for one that leads out of the run's directory."""
        parts = path.split("/")
        if path.startswith("/") or ".." in parts or "\0" in path:
            raise StorageError(f"{path!r} leads out of the run's directory {self.root}.")
        return self.root.joinpath(*parts)

    def write_new(self, path: str, blocks: Iterable[Bytes], size: int) -> None:
        """See `Store`. Space is reserved first, so that a full disk is found before gigabytes are written."""
        target = self.path(path)
        with _explained(target, "write"):
            make_directories(target.parent)
            temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
            try:
                _write_file(temporary, blocks, size)
                if not _publish(temporary, target):
                    raise StorageError(f"Cannot write {target}: it exists already, and checkpoints never change.")
            finally:
                temporary.unlink(missing_ok=True)
            sync_directory(target.parent)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        """See `Store`."""
        target = self.path(path)
        with _explained(target, "write"):
            make_directories(target.parent)
            if target.exists():
                return False
            temporary = target.with_name(f"{TEMPORARY}{secrets.token_hex(8)}")
            try:
                _write_file(temporary, [data], len(data))
                created = _publish(temporary, target)
            finally:
                temporary.unlink(missing_ok=True)
            sync_directory(target.parent)
        return created

    def read(self, path: str, begin: int = 0, end: int | None = None, into: memoryview | None = None) -> memoryview:
        """See `Store`."""
        target = self.path(path)
        with _explained(target, "read"):
            descriptor = os.open(target, os.O_RDONLY | os.O_CLOEXEC)
            try:
                held = os.fstat(descriptor).st_size
                end = held if end is None else end
                if not 0 <= begin <= end <= held:
                    raise CheckpointDamagedError(f"{target} is {held} bytes long, bytes {begin}..{end} are missing.")
                buffer = memoryview(bytearray(end - begin)) if into is None else into.cast("B")[: end - begin]
                _read_all(descriptor, begin, buffer, target)
            finally:
                os.close(descriptor)
        return buffer

    def list(self, prefix: str) -> list[StoredObject]:
        """See `Store`. Files that a crash left half-written do not count."""
        base = self.path(prefix) if prefix else self.root
        found = []
        with _explained(base, "read"):
            for directory, _, names in os.walk(base, onerror=_raise_unless_absent):
                for name in names:
                    if name.startswith(TEMPORARY):
                        continue
                    path = os.path.join(directory, name)
                    try:
                        status = os.stat(path)
                    except FileNotFoundError:
                        continue  # deleted since
                    relative = os.path.relpath(path, self.root).replace(os.sep, "/")
                    found.append(StoredObject(relative, status.st_size, status.st_mtime))
        return sorted(found, key=lambda item: item.path)

    def delete(self, paths: Iterable[str], sweep: bool = False) -> None:
        """See `Store`."""
        parents = set()
        for path in paths:
            target = self.path(path)
            with _explained(target, "delete"):
                target.unlink(missing_ok=True)
            parents.add(target.parent)
        for parent in sorted(parents, key=lambda path: -len(path.parts)) if sweep else ():
            self._remove_if_empty(parent)

    def _remove_if_empty(self, directory: Path) -> None:
        while directory != self.root and self.root in directory.parents and directory.is_dir():
            names = os.listdir(directory)
            if not all(name.startswith(TEMPORARY) for name in names):
                return
            with _explained(directory, "delete"):
                for name in names:
                    (directory / name).unlink(missing_ok=True)
                try:
                    directory.rmdir()
                except OSError as error:
                    if error.errno not in (errno.ENOTEMPTY, errno.ENOENT, errno.EEXIST):
                        raise
                    return  # somebody writes there again
            directory = directory.parent


def _raise_unless_absent(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError):
        raise error


def make_directories(directory: Path) -> None:
    """mkdir -p that survives a power cut: each new directory's parent is synced. Raises OSError."""
    missing = []
    while not directory.is_dir():
        missing.append(directory)
        directory = directory.parent
    for new in reversed(missing):
        try:
            new.mkdir()
        except FileExistsError:
            if not new.is_dir():
                raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(new)) from None
        sync_directory(new.parent)


def sync_directory(directory: Path) -> None:
    """Make names created in `directory` durable. Raises OSError."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems sync directories by themselves and say EINVAL
            raise
    finally:
        os.close(descriptor)


def _write_file(path: Path, blocks: Iterable[Bytes], size: int) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        _reserve(descriptor, size)
        written = sum(_write_all(descriptor, block) for block in blocks)
        if written != size:
            raise StorageError(f"Cannot write {path}: {size} bytes were announced, {written} came.")
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reserve(descriptor: int, size: int) -> None:
    if size < 1 << 16:
        return
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.ENOTSUP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_all(descriptor: int, block: Bytes) -> int:
    view = memoryview(block).cast("B") if len(block) else memoryview(b"")
    done = 0
    while done < len(view):
        done += os.write(descriptor, view[done:])
    return done


def _read_all(descriptor: int, begin: int, buffer: memoryview, path: Path) -> None:
    done = 0
    while done < len(buffer):
        got = os.preadv(descriptor, [buffer[done:]], begin + done)
        if not got:
            raise CheckpointDamagedError(f"{path} became shorter while it was read.")
        done += got


def _publish(temporary: Path, target: Path) -> bool:
    """Name a finished file unless the name is taken: link(2) refuses where rename(2) would overwrite."""
    try:
        os.link(temporary, target)
        return True
    except FileExistsError:
        return False
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
    return _publish_without_links(temporary, target)


def _publish_without_links(temporary: Path, target: Path) -> bool:
    """For file systems without hard links: claim the name exclusively, then move the whole file over the empty claim.

    A reader (or a crash) between the two sees an empty file, which no reader of ours takes for a valid one.
    """
    try:
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    except FileExistsError:
        return False
    os.rename(temporary, target)
    return True
