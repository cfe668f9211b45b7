"""Local disk: whole files or none, exclusive creation, and errors that say what to do."""

from __future__ import annotations

import errno
import os
import pickle
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from orchestrator.errors import CheckpointDamagedError, StorageError, UsageError
from orchestrator.storage.local import LocalStore
from orchestrator.storage.store import MissingFileError, StoredObject, local_path, open_store


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def names(store: LocalStore) -> list[str]:
    return sorted(str(path.relative_to(store.root)) for path in store.root.rglob("*") if path.is_file())


def test_blocks_become_one_file(store: LocalStore) -> None:
    store.write_new("a/b/file", [b"ab", memoryview(bytearray(b"cd")), b""], 4)
    assert bytes(store.read("a/b/file")) == b"abcd"
    assert bytes(store.read("a/b/file", 1, 3)) == b"bc" and bytes(store.read("a/b/file", 4)) == b""
    buffer = memoryview(bytearray(10))
    assert bytes(store.read("a/b/file", 2, None, buffer)) == b"cd" and bytes(buffer[:2]) == b"cd"
    assert names(store) == ["a/b/file"]


def test_large_files_are_reserved_first(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    reserved = []
    monkeypatch.setattr(os, "posix_fallocate", lambda descriptor, begin, size: reserved.append(size))
    store.write_new("file", [bytes(1 << 20)], 1 << 20)
    assert reserved == [1 << 20] and (store.root / "file").stat().st_size == 1 << 20


def test_a_file_appears_whole_or_not_at_all(store: LocalStore) -> None:
    def broken() -> Iterator[bytes]:
        yield b"abc"
        assert names(store)[0].startswith(".tmp-")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        store.write_new("file", broken(), 100)
    with pytest.raises(StorageError, match="100 bytes were announced, 3 came"):
        store.write_new("file", [b"abc"], 100)
    assert names(store) == [] and store.list("") == []


def test_an_existing_file_is_never_changed(store: LocalStore) -> None:
    store.write_new("file", [b"one"], 3)
    with pytest.raises(StorageError, match="file: it exists already"):
        store.write_new("file", [b"two"], 3)
    assert store.create_exclusive("file", b"two") is False
    assert bytes(store.read("file")) == b"one" and names(store) == ["file"]


def test_one_of_many_creators_wins(store: LocalStore) -> None:
    results: list[int] = []
    barrier = threading.Barrier(8)

    def create(number: int) -> None:
        barrier.wait()
        if store.create_exclusive("commits/1", b"%d" % number):
            results.append(number)

    threads = [threading.Thread(target=create, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 1 and bytes(store.read("commits/1")) == b"%d" % results[0]


def test_file_systems_without_hard_links(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_link(*_: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_link)
    assert store.create_exclusive("one", b"1") and not store.create_exclusive("one", b"2")
    store.write_new("two", [b"abc"], 3)
    with pytest.raises(StorageError, match="exists already"):
        store.write_new("two", [b"xyz"], 3)
    assert names(store) == ["one", "two"] and bytes(store.read("two")) == b"abc"


def test_missing_short_and_unreadable_files(store: LocalStore) -> None:
    with pytest.raises(MissingFileError, match="Cannot read .*/run/gone"):
        store.read("gone")
    store.write_new("file", [b"abc"], 3)
    with pytest.raises(CheckpointDamagedError, match=r"file is 3 bytes long, bytes 2..9 are missing"):
        store.read("file", 2, 9)
    (store.root / "dir").mkdir()
    with pytest.raises(CheckpointDamagedError, match="Cannot read"):
        store.read("dir", 0, None)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/etc/passwd", "a\0b", ".."])
def test_paths_stay_inside(store: LocalStore, path: str) -> None:
    for act in (lambda: store.read(path), lambda: store.create_exclusive(path, b""), lambda: store.delete([path])):
        with pytest.raises(StorageError, match="leads out of the run's directory"):
            act()


def test_listing_skips_what_crashes_left(store: LocalStore) -> None:
    store.write_new("b/2", [b"abc"], 3)
    store.write_new("a", [b"a"], 1)
    (store.root / "b/.tmp-12").write_bytes(b"half")
    modified = (store.root / "a").stat().st_mtime
    assert store.list("")[0] == StoredObject("a", 1, modified)
    assert [item.path for item in store.list("")] == ["a", "b/2"]
    assert [item.path for item in store.list("b")] == ["b/2"] and store.list("absent") == []


def test_sweeping_takes_leftovers_and_empty_directories_along(store: LocalStore) -> None:
    store.write_new("c/x/1", [b"1"], 1)
    store.write_new("c/x/2", [b"2"], 1)
    store.write_new("c/y/3", [b"3"], 1)
    (store.root / "c/x/.tmp-12").write_bytes(b"half")
    store.delete(["c/x/1", "gone/9"], sweep=True)
    assert names(store) == ["c/x/.tmp-12", "c/x/2", "c/y/3"]
    store.delete(["c/x/2"], sweep=True)
    assert not (store.root / "c/x").exists() and names(store) == ["c/y/3"]
    store.delete(["c/y/3"], sweep=True)
    assert store.root.is_dir() and not (store.root / "c").exists()


def test_deleting_leaves_what_others_are_writing(store: LocalStore) -> None:
    store.write_new("c/x/1", [b"1"], 1)
    (store.root / "c/x/.tmp-12").write_bytes(b"half")
    store.delete(["c/x/1"])
    assert names(store) == ["c/x/.tmp-12"]


@pytest.mark.parametrize(
    ("number", "advice"),
    [
        (errno.ENOSPC, "no space is left there; free some, lower --keep-last, or put the run elsewhere"),
        (errno.EDQUOT, "quota"),
        (errno.EROFS, "mounted read-only"),
        (errno.EACCES, "permission is denied; give this user write access"),
    ],
)
def test_errors_name_the_path_and_what_to_do(
    store: LocalStore, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def fail(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", fail)
    for act in (lambda: store.write_new("deep/file", [b"abc"], 3), lambda: store.create_exclusive("deep/file", b"abc")):
        with pytest.raises(StorageError, match=f"Cannot write .*/run/deep/file: .*{advice}"):
            act()
    assert names(store) == []


def test_a_full_disk_is_found_before_anything_is_written(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    taken: list[int] = []
    with pytest.raises(StorageError, match="no space is left"):
        store.write_new("file", (taken.append(1) or b"x" for _ in range(1 << 20)), 1 << 20)  # type: ignore[func-returns-value]
    assert taken == []


def test_a_disk_error_while_reading_is_damage(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    store.write_new("file", [b"abc"], 3)

    def bad_sector(*_: object) -> int:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "preadv", bad_sector)
    with pytest.raises(CheckpointDamagedError, match="the disk reports an I/O error"):
        store.read("file")


def test_a_file_where_a_directory_should_be(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("a file")
    with pytest.raises(StorageError, match="is a file, not a directory"):
        LocalStore(tmp_path / "run").write_new("a", [b"1"], 1)


def test_stores_may_be_sent_to_other_processes(store: LocalStore) -> None:
    assert pickle.loads(pickle.dumps(store)).root == store.root


@pytest.mark.parametrize(
    ("uri", "path"),
    [("./runs", "./runs"), ("file:///data/x", "/data/x"), ("file://localhost/x", "/x"), ("/a b", "/a b")],
)
def test_storage_uris(uri: str, path: str) -> None:
    assert local_path(uri) == path


@pytest.mark.parametrize(
    ("uri", "message"),
    [
        ("", "is empty"), ("s3://bucket/x", "S3 is not supported by this version yet"),
        ("gs://b", "gs:// is not supported"),
        ("file://host/x", "three slashes"), ("file://x", "three slashes"),
    ],
)  # fmt: skip
def test_unsupported_storage(uri: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        open_store(uri)
