"""Which run is this, may it be written here, and is somebody driving it already?"""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from orchestrator.errors import UsageError
from orchestrator.storage.commitlog import CommitLog, outcome_entry
from orchestrator.storage.local import LocalStore
from orchestrator.storage.lock import RunLock, live_driver
from orchestrator.storage.runs import (
    RunIdentity,
    choose_name,
    is_finished,
    open_or_create,
    probe_writable,
    read_identity,
    script_identity,
)

HOLDER = """
import sys, time
from orchestrator.storage.lock import RunLock
RunLock(sys.argv[1]).acquire("127.0.0.1:8265")
print("held", flush=True)
sys.stdin.read()
"""


def identity(name: str, script: str = "train.py", *args: str) -> RunIdentity:
    return RunIdentity(name, script_identity(script), args, 7, 100.0)


def make(root: Path, name: str, script: str = "train.py", *args: str, outcome: str = "") -> LocalStore:
    store = LocalStore(root / name)
    open_or_create(store, identity(name, script, *args))
    log = CommitLog(store)
    log.take_over()
    if outcome:
        log.append(outcome_entry(outcome, 0, 5))
    return store


# ------------------------------------------------------------------------------------------------------- identity


def test_a_run_is_created_once_and_keeps_its_identity(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "runs/train")
    assert open_or_create(store, identity("train", "train.py", "--lr", "0.1")) == (
        identity("train", "train.py", "--lr", "0.1"), True,
    )  # fmt: skip
    found, created = open_or_create(store, RunIdentity("train", "other.py", (), None, 200.0))
    assert (found.seed, found.args, created) == (7, ("--lr", "0.1"), False)
    raw = json.loads((store.root / "run.json").read_text())
    assert (raw["schema"], raw["kind"], raw["name"]) == (1, "orchestrator-run", "train")
    assert os.listdir(store.root) == ["run.json"] and read_identity(LocalStore(tmp_path / "none")) is None


def test_an_empty_directory_may_become_a_run(tmp_path: Path) -> None:
    (tmp_path / "train/.tmp-12").mkdir(parents=True)
    assert open_or_create(LocalStore(tmp_path / "train"), identity("train"))[1]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"thesis.tex": "x", "b": "y"}, r"holds b, thesis.tex but no run.json, so it belongs to something else"),
        ({"run.json": '{"scripts": {}}'}, "run.json in .* is not ours"),
        ({"run.json": "not json"}, "is not ours"),
        ({"run.json": "[]"}, "is not ours"),
        ({"run.json": '{"kind": "orchestrator-run", "schema": 9}'}, "newer orchestrator"),
        ({"run.json": '{"kind": "orchestrator-run", "schema": 1}'}, "is not ours"),
    ],
)
def test_a_directory_of_something_else_is_refused_untouched(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    place = tmp_path / "train"
    place.mkdir()
    for name, content in files.items():
        (place / name).write_text(content)
    with pytest.raises(UsageError, match=message):
        open_or_create(LocalStore(place), identity("train"))
    assert {path.name: path.read_text() for path in place.iterdir()} == files


def test_a_file_in_the_place_of_a_run_or_of_storage_is_refused(tmp_path: Path) -> None:
    (tmp_path / "train").write_text("x")
    with pytest.raises(UsageError, match="is a file, not a run's directory"):
        open_or_create(LocalStore(tmp_path / "train"), identity("train"))
    with pytest.raises(UsageError, match="is a file, not a directory"):
        open_or_create(LocalStore(tmp_path / "train/sub"), identity("sub"))


@pytest.mark.parametrize(
    ("number", "advice"),
    [(errno.ENOSPC, "no space is left"), (errno.EROFS, "mounted read-only"), (errno.EACCES, "permission is denied")],
)
def test_storage_that_cannot_be_written_is_refused_and_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, advice: str
) -> None:
    def fail(*_: object) -> int:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "write", fail)
    with pytest.raises(UsageError, match=f"Cannot write to .*/new/runs: .*{advice}"):
        open_or_create(LocalStore(tmp_path / "new/runs/train"), identity("train"))
    assert os.listdir(tmp_path) == []


def test_the_probe_leaves_its_directory_and_no_file(tmp_path: Path) -> None:
    probe_writable(tmp_path / "a/b")  # another launch may be about to create its run there
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob("*"))] == ["a", "a/b"]


# ------------------------------------------------------------------------------------------------------- names


def test_finished_is_what_the_log_says_last(tmp_path: Path) -> None:
    assert not is_finished(make(tmp_path, "a"))
    assert not is_finished(make(tmp_path, "b", outcome="failed"))
    done = make(tmp_path, "c", outcome="completed")
    assert is_finished(done)
    CommitLog(done).take_over()
    assert not is_finished(done)


def test_the_first_run_is_named_after_the_script(tmp_path: Path) -> None:
    choice = choose_name(str(tmp_path / "none"), "a/train.py")
    assert (choice.name, choice.continues, choice.why) == ("train", False, "new run, named after the script")
    assert choose_name(str(tmp_path), "pkg.fit", module=True).name == "fit"
    assert os.listdir(tmp_path) == []


def test_an_unfinished_run_of_the_same_script_and_arguments_is_continued(tmp_path: Path) -> None:
    make(tmp_path, "train", "train.py", "--lr", "1", outcome="stopped")
    choice = choose_name(str(tmp_path), "train.py", ("--lr", "1"))
    assert (choice.name, choice.continues) == ("train", True)
    assert choice.why == "unfinished run of the same script and arguments; to start anew: --run-name train-2"
    for script, args in (("train.py", ("--lr", "2")), ("other/train.py", ("--lr", "1"))):
        assert choose_name(f"file://{tmp_path}", script, args).name == "train-2"


def test_the_newest_unfinished_one_counts_and_numbers_go_on(tmp_path: Path) -> None:
    make(tmp_path, "train")
    make(tmp_path, "train-2")
    make(tmp_path, "train-10", outcome="completed")
    assert choose_name(str(tmp_path), "train.py").name == "train-2"
    for name in ("train", "train-2"):
        log = CommitLog(LocalStore(tmp_path / name))
        log.take_over()
        log.append(outcome_entry("completed", 0, 5))
    (tmp_path / "train-12").mkdir()
    (tmp_path / "train-old").mkdir()
    (tmp_path / "train-007").mkdir()
    choice = choose_name(str(tmp_path), "train.py")
    assert (choice.name, choice.continues) == ("train-13", False)


def test_somebody_elses_directory_only_takes_the_name(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train/run.json").write_text("{}")
    assert choose_name(str(tmp_path), "train.py").name == "train-2"


def test_a_given_name_is_taken(tmp_path: Path) -> None:
    assert choose_name(str(tmp_path), "train.py", run_name="mine").continues is False
    make(tmp_path, "mine", "other.py")
    assert choose_name(str(tmp_path), "train.py", run_name="mine").continues is True
    with pytest.raises(UsageError, match="slash"):
        choose_name(str(tmp_path), "train.py", run_name="../mine")


# ------------------------------------------------------------------------------------------------------- lock


def test_a_second_driver_is_refused_naming_the_live_one_until_it_is_killed(tmp_path: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None and holder.stdout.readline() == "held\n"
        live = live_driver(tmp_path)
        assert live is not None and (live.pid, live.address) == (holder.pid, "127.0.0.1:8265")
        with pytest.raises(UsageError, match=rf"is live: process {holder.pid} on .*, since \d+-.*orchestrator stop"):
            RunLock(tmp_path).acquire()
        holder.send_signal(signal.SIGKILL)
        holder.wait(10)
    finally:
        holder.kill()
        holder.communicate(timeout=10)
    assert (tmp_path / "live.json").exists() and live_driver(tmp_path) is None
    with RunLock(tmp_path):
        mine = live_driver(tmp_path)
        assert mine is not None and mine.pid == os.getpid()
    assert live_driver(tmp_path) is None and not (tmp_path / "live.json").exists()


def test_a_lock_may_be_released_twice_and_taken_again(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire()
    with pytest.raises(UsageError, match=re.escape(f"orchestrator status {tmp_path}")):
        RunLock(tmp_path).acquire()
    lock.release()
    lock.release()
    RunLock(tmp_path).acquire()


def test_a_damaged_note_still_means_live(tmp_path: Path) -> None:
    with RunLock(tmp_path):
        (tmp_path / "live.json").write_text("{")
        assert live_driver(tmp_path) is not None
        with pytest.raises(UsageError, match="another process drives it"):
            RunLock(tmp_path).acquire()
