"""The commit log: exclusive, shared by drivers, robust against what crashes and strangers leave behind."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from orchestrator.errors import StorageError, SupersededError
from orchestrator.spec import Retention
from orchestrator.storage.commitlog import CommitLog, checkpoint_entry, outcome_entry, removed_entry
from orchestrator.storage.local import LocalStore
from orchestrator.storage.prune import prune, sweep
from orchestrator.storage.store import Bytes

from .helpers import save


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    return LocalStore(tmp_path / "run")


def driver(store: LocalStore, nonce: str = "") -> CommitLog:
    log = CommitLog(store, clock=lambda: 5.0)
    log.take_over(nonce)
    return log


def committed(store: LocalStore, log: CommitLog, *steps: int) -> None:
    for step in steps:
        log.append(checkpoint_entry(save(store, step)[0]))


def test_entries_come_back_in_order(store: LocalStore) -> None:
    log = driver(store, "d1")
    committed(store, log, 10, 20)
    log.append(outcome_entry("completed", 0, 20))
    read = CommitLog(store).entries()
    assert [(entry.sequence, entry.kind) for entry in read] == [
        (1, "takeover"), (2, "checkpoint"), (3, "checkpoint"), (4, "outcome"),
    ]  # fmt: skip
    assert {(entry.nonce, entry.time) for entry in read} == {("d1", 5.0)}
    assert [record.step for record in CommitLog(store).checkpoints()] == [10, 20]
    assert [item.path for item in store.list("commits")] == [f"commits/0000000{n}.json" for n in (1, 2, 3, 4)]


def test_a_superseded_driver_cannot_append_however_long_it_was_paused(store: LocalStore) -> None:
    old = driver(store)
    committed(store, old, 10)
    new = driver(store)
    committed(store, new, 20, 30)
    late = checkpoint_entry(save(store, 11)[0])
    for _ in range(2):
        with pytest.raises(SupersededError, match="Another driver has taken over"):
            old.append(late)
    committed(store, new, 40)
    assert [record.step for record in CommitLog(store).checkpoints()] == [10, 20, 30, 40]


def test_two_takeovers_at_the_same_moment_leave_one_driver(store: LocalStore, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = CommitLog(store), CommitLog(store)
    monkeypatch.setattr(two, "_sequences", lambda: [])  # it listed before the other one's entry appeared
    one.take_over()
    assert two.take_over().sequence == 2
    two.append(outcome_entry("stopped", 76, 0))
    with pytest.raises(SupersededError):
        one.append(outcome_entry("completed", 0, 0))


def test_reading_only_cannot_append(store: LocalStore) -> None:
    with pytest.raises(StorageError, match=r"take_over\(\) comes before append"):
        CommitLog(store).append(outcome_entry("completed", 0, 0))


class LostAnswers(LocalStore):
    """Creates the file, then says it was there already, as a retried PUT does; or fails outright."""

    mode = ""

    def create_exclusive(self, path: str, data: bytes) -> bool:
        created = super().create_exclusive(path, data)
        if self.mode == "fails":
            raise StorageError("connection lost")
        return created and not self.mode


def test_an_entry_in_the_way_may_be_ones_own(tmp_path: Path) -> None:
    store = LostAnswers(tmp_path)
    log = driver(store)
    store.mode = "retried"
    assert log.append(outcome_entry("failed", 1, 7)).sequence == 2
    store.mode = "fails"
    with pytest.raises(StorageError, match="connection lost"):
        log.append(outcome_entry("stopped", 76, 8))
    store.mode = ""
    assert log.append(outcome_entry("stopped", 76, 8)).sequence == 3
    store.mode = "fails"
    with pytest.raises(StorageError, match="connection lost"):
        log.append(outcome_entry("stopped", 76, 9))
    store.mode = ""
    assert log.append(outcome_entry("completed", 0, 9)).sequence == 5  # the lost one had been written as number 4
    assert [entry.body.get("step") for entry in CommitLog(store).entries()] == [None, 7, 8, 9, 9]


@pytest.mark.parametrize(
    "content",
    [b"", b'{"schema":1,"kind":"che', b"[]", b"\xff\xfe", b'{"schema":9}', b"null", b"[" * 100_000,
     b'{"schema":1,"kind":"checkpoint","nonce":"x","time":1,"body":{"directory":"../../etc"}}',
     b'{"schema":1,"kind":"removed","nonce":"x","time":1,"body":{"directories":[[]]}}',
     b'{"schema":1,"kind":"outcome","nonce":"x","time":1,"body":{}}'],
)  # fmt: skip
def test_torn_and_alien_entries_are_skipped_and_named(store: LocalStore, content: bytes) -> None:
    log = driver(store)
    committed(store, log, 10)
    (store.root / "commits/00000003.json").write_bytes(content)
    (store.root / "commits/.tmp-0123").write_bytes(b"half")
    (store.root / "commits/notes.txt").write_bytes(b"hello")
    (store.root / "commits/0000000007.json").write_bytes(b"{}")
    (store.root / "commits/sub").mkdir()
    (store.root / "commits/sub/00000009.json").write_bytes(b"{}")
    new = CommitLog(store)
    assert new.take_over().sequence == 4
    committed(store, new, 20)
    assert [record.step for record in new.checkpoints()] == [10, 20]
    assert list(new.unreadable) == [3] and "commits/00000003.json" in new.unreadable[3]
    with pytest.raises(SupersededError):
        log.append(outcome_entry("completed", 0, 0))


def test_a_directory_in_the_way_is_passed_by_a_takeover(store: LocalStore) -> None:
    driver(store)
    (store.root / "commits/00000002.json").mkdir()
    assert CommitLog(store).take_over().sequence == 3


def test_outcome_counts_until_the_next_takeover(store: LocalStore) -> None:
    log = driver(store)
    assert log.outcome() is None
    log.append(outcome_entry("completed", 0, 30, "done"))
    outcome = CommitLog(store).outcome()
    assert outcome is not None and outcome.body == {"outcome": "completed", "exit_code": 0, "step": 30, "why": "done"}
    driver(store)
    assert CommitLog(store).outcome() is None


def test_latest_sound_goes_back_past_damaged_ones(store: LocalStore) -> None:
    log = driver(store)
    committed(store, log, 10, 20, 30, 40)
    records = log.checkpoints()
    (store.root / records[3].directory / "manifest.json").unlink()
    (store.root / records[2].directory / "rank-00001.safetensors").write_bytes(b"short")
    flipped = store.root / records[1].directory / "rank-00000.safetensors"
    flipped.write_bytes(flipped.read_bytes()[:-1] + b"\x99")
    rejected: list[tuple[str, int]] = []

    def on_reject(path: str, why: str, step: int) -> None:
        assert path in why
        rejected.append((path, step))

    by_manifest = CommitLog(store).latest_sound("manifest", on_reject)
    assert by_manifest is not None and by_manifest[0].step == 20
    assert rejected == [(records[3].directory, 40), (records[2].directory, 30)]
    by_bytes = CommitLog(store).latest_sound("full", on_reject)
    assert by_bytes is not None and by_bytes[1].step == 10 and rejected[2:][-1] == (records[1].directory, 20)


def test_latest_sound_of_nothing(store: LocalStore) -> None:
    assert CommitLog(store).latest_sound() is None


def test_a_swapped_manifest_is_noticed(store: LocalStore) -> None:
    log = driver(store)
    committed(store, log, 10, 20)
    one, two = (store.root / record.directory / "manifest.json" for record in log.checkpoints())
    two.write_bytes(one.read_bytes())
    rejected: list[str] = []
    found = log.latest_sound(on_reject=lambda path, why, step: rejected.append(why))
    assert found is not None and found[0].step == 10 and "was committed" in rejected[0]


# -------------------------------------------------------------------------------------------------- prune and sweep


def directories(store: LocalStore) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in (store.root / "checkpoints").iterdir())


def test_prune_says_it_first_and_then_deletes(store: LocalStore) -> None:
    log = driver(store)
    committed(store, log, 10, 20, 30)
    dry = prune(log, Retention(keep_last=1), dry_run=True)
    assert ([record.step for record in dry.removed], directories(store)) == ([10, 20], [10, 20, 30])
    report = prune(log, Retention(keep_last=1))
    assert report.removed == dry.removed and report.freed_bytes == sum(record.bytes for record in dry.removed)
    assert (directories(store), [record.step for record in log.checkpoints()]) == ([30], [30])
    assert prune(log, Retention(keep_last=1)).removed == []


def test_prune_never_removes_the_only_sound_checkpoint(store: LocalStore) -> None:
    log = driver(store)
    committed(store, log, 10, 20, 30)
    (store.root / log.checkpoints()[2].directory / "rank-00000.safetensors").unlink()
    report = prune(log, Retention(keep_last=1))
    assert [(record.step, kept_by) for record, kept_by in report.plan] == [(10, ()), (20, ("sound",)), (30, ("last",))]
    for record in log.checkpoints():
        (store.root / record.directory / "manifest.json").write_bytes(b"gone")
    assert prune(log, Retention(keep_last=1)).removed == []


def test_a_superseded_driver_deletes_nothing(store: LocalStore) -> None:
    log = driver(store)
    committed(store, log, 10, 20)
    driver(store)
    with pytest.raises(SupersededError):
        prune(log, Retention(keep_last=1))
    save(store, 15)
    with pytest.raises(SupersededError):
        sweep(log)
    assert directories(store) == [10, 15, 20]


def test_sweep_takes_what_no_commit_names_and_nobody_owns(store: LocalStore) -> None:
    log = driver(store)
    committed(store, log, 10, 20)
    owned, stray = save(store, 30)[0], save(store, 25)[0]
    log.append(removed_entry([log.checkpoints()[0].directory], "retention"))  # a crash came before the deletion
    assert sweep(log, {owned.directory}, dry_run=True) == ["checkpoints/step-000000010-a0003-abc", stray.directory]
    assert directories(store) == [10, 20, 25, 30]
    sweep(log, {owned.directory})
    assert directories(store) == [20, 30]


def test_sweep_waits_while_an_entry_cannot_be_read(store: LocalStore) -> None:
    log = driver(store)
    committed(store, log, 10)
    save(store, 20)
    (store.root / "commits/00000002.json").write_bytes(b"torn")
    assert sweep(CommitLog(store)) == [] and directories(store) == [10, 20]


# -------------------------------------------------------------------------------------------------- crash prefixes


class CrashingStore(LocalStore):
    """Dies at its n-th change: before it, or in the midst of a deletion or of writing a file."""

    left = 0

    def _count(self) -> None:
        if self.left == 0:
            raise KeyboardInterrupt("crash")
        self.left -= 1

    def write_new(self, path: str, blocks: Iterable[Bytes], size: int) -> None:
        self._count()
        super().write_new(path, blocks, size)

    def create_exclusive(self, path: str, data: bytes) -> bool:
        self._count()
        return super().create_exclusive(path, data)

    def delete(self, paths: Iterable[str], sweep: bool = False) -> None:
        for path in paths:
            self._count()
            super().delete([path], sweep)


def life(store: LocalStore) -> None:
    """What a driver does over its life, in its order."""
    log = CommitLog(store, clock=lambda: 0.0)
    log.take_over()
    for step in (10, 20, 30):
        log.append(checkpoint_entry(save(store, step)[0]))
        prune(log, Retention(keep_last=1))
    log.append(outcome_entry("completed", 0, 30))


@pytest.mark.parametrize("changes", range(23))
def test_a_crash_at_any_change_leaves_the_last_commit_whole(tmp_path: Path, changes: int) -> None:
    store = CrashingStore(tmp_path / "run")
    store.left = changes
    try:
        life(store)
        assert changes == 22, "the table of crash points ends where the life does"
    except KeyboardInterrupt:
        pass
    sound = LocalStore(tmp_path / "run")
    log = CommitLog(sound)
    commits = [entry.body["step"] for entry in log.entries() if entry.kind == "checkpoint"]
    rejected: list[str] = []
    found = log.latest_sound("full", lambda path, why, step: rejected.append(why))
    assert rejected == [] and (found[0].step if found else None) == (commits[-1] if commits else None)
    log.take_over()
    sweep(log)
    if commits:
        assert directories(sound) == [record.step for record in log.checkpoints()]


