"""Are a checkpoint's files still what was committed? Reads bytes, knows no tensors."""

from __future__ import annotations

from orchestrator.errors import CheckpointDamagedError
from orchestrator.storage.coverage import coverage
from orchestrator.storage.digest import crc32c
from orchestrator.storage.layout import manifest_path
from orchestrator.storage.manifest import CheckpointRecord, Manifest, StoredFile, parse_manifest
from orchestrator.storage.store import MissingFileError, Store

BLOCK_BYTES = 8 << 20


def read_manifest(store: Store, record: CheckpointRecord) -> Manifest:
    """The manifest that a commit names. Raises CheckpointDamagedError if it is gone or not what was committed."""
    path = manifest_path(record.directory)
    try:
        data = bytes(store.read(path))
    except MissingFileError as error:
        raise CheckpointDamagedError(f"{path} is missing, although step {record.step} was committed.") from error
    found = crc32c(data)
    if found != record.manifest_crc32c:
        raise CheckpointDamagedError(
            f"{path} is damaged: its CRC32C is {found:08x}, {record.manifest_crc32c:08x} was committed."
        )
    manifest = parse_manifest(data, record.directory)
    if manifest.step != record.step:
        raise CheckpointDamagedError(f"{path} is of step {manifest.step}, but step {record.step} was committed.")
    return manifest


def check_manifest(store: Store, record: CheckpointRecord) -> Manifest:
    """The manifest, its state covered and its files there at full length; no tensor byte is read.

    Raises CheckpointDamagedError saying what is wrong.
    """
    manifest = read_manifest(store, record)
    coverage(manifest)
    check_files(store, manifest)
    return manifest


def check_files(store: Store, manifest: Manifest) -> None:
    """Raises CheckpointDamagedError naming the first file that is missing or of another length."""
    held = {item.path: item.size_bytes for item in store.list(manifest.directory)}
    for file in manifest.files:
        path = manifest.path_of(file.path)
        if path not in held:
            raise CheckpointDamagedError(f"{path} is missing.")
        if held[path] != file.bytes:
            raise CheckpointDamagedError(f"{path} is {held[path]} bytes long, {file.bytes} were committed.")


def verify_files(store: Store, manifest: Manifest) -> int:
    """Re-read every byte; returns how many. Raises CheckpointDamagedError naming the first bad file, and the tensor."""
    check_files(store, manifest)
    for file in manifest.files:
        path = manifest.path_of(file.path)
        found = range_crc32c(store, path, 0, file.bytes)
        if found != file.crc32c:
            raise CheckpointDamagedError(
                f"{path} is damaged: its CRC32C is {found:08x}, {file.crc32c:08x} was committed"
                f"{_damaged_tensor(store, manifest, file)}."
            )
    return manifest.size_bytes


def range_crc32c(store: Store, path: str, begin: int, end: int) -> int:
    """CRC32C of a byte range of a file, read in blocks."""
    buffer, value = memoryview(bytearray(min(BLOCK_BYTES, end - begin))), 0
    for start in range(begin, end, BLOCK_BYTES):
        stop = min(start + BLOCK_BYTES, end)
        value = crc32c(store.read(path, start, stop, buffer[: stop - start]), value)
    return value


def _damaged_tensor(store: Store, manifest: Manifest, file: StoredFile) -> str:
    chunks = [(c.begin, c, name) for name, t in manifest.tensors.items() for c in t.chunks if c.file == file.path]
    for _, chunk, name in sorted(chunks, key=lambda item: item[0]):
        if range_crc32c(store, manifest.path_of(file.path), chunk.begin, chunk.end) != chunk.crc32c:
            return f"; tensor {name!r} is affected"
    return "; its header is affected"


def verify(store: Store, record: CheckpointRecord) -> Manifest:
    """`check_manifest` and every byte of every file. Raises CheckpointDamagedError naming the first bad file."""
    manifest = check_manifest(store, record)
    verify_files(store, manifest)
    return manifest
