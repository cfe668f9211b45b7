"""`status`, `events`, `logs`, `stop`, `save`: read from a run's directory; a live driver is played by the test."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from orchestrator.cli import ask, look
from orchestrator.cli.history import add_up
from orchestrator.cli.main import cli
from orchestrator.storage.lock import Live, RunLock

STARTED = {"ts": 100.0, "event": "run_started", "attempt": 1, "run": "train", "spec": {"script": "train.py"}}
GROUP = {"ts": 101.0, "event": "group_started", "attempt": 1, "world_size": 2, "resume_step": 0, "resume_sources": []}
SAVED = {
    "ts": 102.0,
    "event": "checkpoint_committed",
    "attempt": 1,
    "step": 40,
    "epoch": 1,
    "reason": "periodic",
    "bytes": 2048,
    "seconds": 0.1,
    "path": "checkpoints/step-000000040-a0001-x",
}
FAILED = {
    "ts": 103.0,
    "event": "worker_failed",
    "attempt": 1,
    "rank": 1,
    "cause": "exception",
    "step": 50,
    "error": {"type": "ValueError", "message": "boom"},
    "root": True,
}
ECHO = {**FAILED, "rank": 0, "root": False, "cause": "signal:9"}
RECOVERED = {"ts": 103.5, "event": "recovered", "attempt": 2, "recovery_s": 0.25, "lost_steps": 0, "resume_step": 50}
FINISHED = {
    "ts": 110.0,
    "event": "run_finished",
    "attempt": 2,
    "outcome": "stopped",
    "exit_code": 76,
    "step": 60,
    "why": "stop",
}
LIVE = Live(pid=7, host="here", started=99.0)
HISTORY = [STARTED, GROUP, SAVED, FAILED, ECHO, RECOVERED]


class World:
    """A storage with one run in it, and whether its driver lives."""

    def __init__(self, root: Path) -> None:
        self.run = root / "runs" / "train"
        self.live: Live | None = None
        self.run.mkdir(parents=True)
        (self.run / "run.json").write_text("{}")
        self.journal(*HISTORY)

    def journal(self, *events: dict[str, Any]) -> None:
        with (self.run / "journal.jsonl").open("a") as file:
            file.writelines(json.dumps(event) + "\n" for event in events)

    def requests(self) -> list[Path]:
        return sorted((self.run / "requests").glob("*.json"))

    def log(self, attempt: int, rank: int, text: str) -> None:
        path = self.run / "logs" / f"a{attempt:04d}" / f"rank-{rank:05d}.log"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORCHESTRATOR_STORAGE", raising=False)
    world = World(tmp_path)
    for module in (look, ask):
        monkeypatch.setattr(module, "live_driver", lambda path: world.live)
    monkeypatch.setattr(look.time, "time", lambda: 120.0)
    yield world


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, list(words))


def test_history_adds_up() -> None:
    history = add_up([*HISTORY, FINISHED])
    assert (history.launches, history.attempt, history.step, history.restarts) == (1, 2, 60, 1)
    assert (history.recovery_s, history.lost_steps, history.phase) == (0.25, 0, "stopped")
    assert [event["rank"] for event in history.failures] == [1]
    again = add_up([*HISTORY, FINISHED, {**STARTED, "ts": "1970-01-01T00:03:20Z"}])
    assert (again.finished, again.started_at, again.first_started_at, again.launches) == (None, 200.0, 100.0, 2)


def test_status_of_a_live_run(world: World) -> None:
    world.live = LIVE
    (world.run / "progress.json").write_text(
        '{"step": 55, "total": 100, "samples_per_s": 640.0, "metrics": {"loss": 0.5}}'
    )
    result = call("status", "train")
    assert result.exit_code == 0
    assert result.stdout.splitlines() == [
        f"run         {world.run}",
        "state       running for 20.0 s (driver: process 7 on here)",
        "script      train.py",
        "progress    step 55/100 (55 %), 640 samples/s, loss 0.5",
        "ranks       2, attempt 2",
        "restarts    1, which cost 0.25 s and 0 steps",
        "checkpoint  step 40 (periodic, 2.0 KiB), 18.0 s ago",
        "failure     rank 1 at step 50, attempt 1: exception: ValueError: boom",
    ]


def test_status_of_dead_runs(world: World) -> None:
    assert (
        "interrupted: its driver is gone without having finished, last sign of life 16.5 s ago"
        in call("status", "runs/train").stdout
    )
    world.journal(FINISHED)
    said = call("status", str(world.run)).stdout
    assert "stopped (exit 76): stop, last sign of life 10.0 s ago" in said
    assert "launch it again with the same command" in said


def test_status_json(world: World) -> None:
    world.journal(FINISHED)
    facts = json.loads(call("status", "train", "--json").stdout)
    assert (facts["state"], facts["live"], facts["step"], facts["exit_code"]) == ("stopped", False, 60, 76)
    assert facts["checkpoint"]["step"] == 40
    assert facts["failures"][0]["error"] == {"type": "ValueError", "message": "boom"}


def test_liveness_is_the_lock_that_a_driver_holds(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.chdir(world.run.parent.parent)
    with RunLock(world.run):
        assert json.loads(call("status", "runs/train", "--json").stdout)["driver"]["pid"] == os.getpid()
    assert json.loads(call("status", "runs/train", "--json").stdout)["live"] is False


def test_recovery_in_progress_is_seen(world: World) -> None:
    world.live = LIVE
    world.journal({**FAILED, "attempt": 2})
    assert json.loads(call("status", "train", "--json").stdout)["state"] == "recovering"


def test_a_torn_line_is_left_for_later(world: World) -> None:
    with (world.run / "journal.jsonl").open("a") as file:
        file.write('{"event": "run_fin')
    assert len(call("events", "train", "--json").stdout.splitlines()) == len(HISTORY)


def test_events(world: World) -> None:
    assert [json.loads(line) for line in call("events", "train", "--json").stdout.splitlines()] == HISTORY
    line = call("events", "train").stdout.splitlines()[2]
    assert line.endswith(
        "a1   checkpoint_committed  step=40 epoch=1 reason=periodic bytes=2048 seconds=0.1 "
        "path=checkpoints/step-000000040-a0001-x"
    )


def test_events_follow_until_the_driver_is_gone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.live = LIVE

    def sleep(_: float) -> None:
        world.journal(FINISHED)
        world.live = None

    monkeypatch.setattr(look.time, "sleep", sleep)
    lines = call("events", "train", "--follow", "--json").stdout.splitlines()
    assert json.loads(lines[-1]) == FINISHED
    assert len(lines) == len(HISTORY) + 1


def test_unknown_runs_name_what_is_there(world: World) -> None:
    result = call("status", "trian")
    assert result.exit_code == 2
    assert (
        result.stderr
        == f"error: there is no run trian in {world.run.parent}; did you mean `train`? Runs there: train.\n"
    )
    assert "which does not exist" in call("status", "nowhere/x").stderr
    (world.run.parent / "other").mkdir()
    assert "(other is a directory, but not a run's)" in call("events", "other").stderr


def test_logs_choose_rank_and_newest_attempt(world: World) -> None:
    assert "has no logs yet" in call("logs", "train").stderr
    world.log(1, 0, "first\n")
    world.log(1, 1, "one\n")
    world.log(2, 0, "second\n")
    assert call("logs", "train").stdout == "second\n"
    assert call("logs", "train", "--attempt", "1").stdout == "first\n"
    assert call("logs", "train", "--rank", "1").stdout == "one\n"
    assert "no logs of attempt 3; it has attempts 1 to 2" in call("logs", "train", "--attempt", "3").stderr
    assert "no log of rank 5; it has ranks 0" in call("logs", "train", "--rank", "5").stderr


def test_logs_follow_restarts(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    world.log(1, 0, "first\n")
    world.live = LIVE

    def sleep(_: float) -> None:
        world.log(1, 0, "first\nmore\n")
        world.log(2, 0, "second\n")
        world.live = None

    monkeypatch.setattr(look.time, "sleep", sleep)
    monkeypatch.setattr(look, "live_driver", lives(world, 2))
    result = call("logs", "train", "--follow")
    assert result.stdout == "first\nmore\nsecond\n"
    assert result.stderr == "== a0002/rank-00000.log\n"


def lives(world: World, calls: int) -> Callable[[Path], Live | None]:
    """A driver that lives for so many questions."""
    left = [calls]

    def ask_once(_: Path) -> Live | None:
        left[0] -= 1
        return LIVE if left[0] >= 0 else None

    return ask_once


def play_driver(world: World, monkeypatch: pytest.MonkeyPatch, *events: dict[str, Any]) -> list[dict[str, Any]]:
    """While the command waits: take its request and write these events. Returns what was asked."""
    asked: list[dict[str, Any]] = []

    def sleep(_: float) -> None:
        for request in world.requests():
            asked.append(json.loads(request.read_text()))
            request.unlink()
            world.journal(*events)

    world.live = LIVE
    monkeypatch.setattr(ask.time, "sleep", sleep)
    return asked


STOP_SAVE = {**SAVED, "step": 60, "reason": "stop"}


def test_stop_waits_for_the_end_and_tells_the_step(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = play_driver(world, monkeypatch, STOP_SAVE, FINISHED)
    result = call("stop", "train")
    assert (result.exit_code, result.stderr) == (0, "")
    assert asked == [{"kind": "stop", "save": True, "name": ""}]
    assert result.stdout.splitlines() == [
        "run train stopped at step 60",
        "saved step 60 (stop, 2.0 KiB): checkpoints/step-000000040-a0001-x",
    ]


def test_stop_without_saving(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = play_driver(world, monkeypatch, FINISHED)
    assert call("stop", "train", "--no-save").stdout.splitlines()[1] == "no checkpoint was written on the way"
    assert asked == [{"kind": "stop", "save": False, "name": ""}]


def test_stopping_a_run_that_fails_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    play_driver(world, monkeypatch, {**FINISHED, "outcome": "failed", "exit_code": 1, "why": "rank 1 died"})
    result = call("stop", "train")
    assert (result.exit_code, result.stdout.splitlines()[0]) == (1, "run train failed at step 60: rank 1 died")


def test_save_waits_for_its_own_checkpoint(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = {**SAVED, "step": 55, "reason": "requested", "name": "good"}
    asked = play_driver(world, monkeypatch, SAVED, {**mine, "name": "other"}, mine)
    result = call("save", "train", "--name", "good", "--json")
    assert json.loads(result.stdout) == mine
    assert asked == [{"kind": "save", "save": True, "name": "good"}]
    assert call("save", "train", "--name", "last").exit_code == 2


def test_a_run_that_ends_before_it_saves_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    play_driver(world, monkeypatch, FINISHED)
    result = call("save", "train")
    assert result.exit_code == 1
    assert "run train stopped at step 60 before it saved again" in result.stderr


def test_a_name_is_answered_by_that_name_alone(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    play_driver(world, monkeypatch, {**SAVED, "reason": "requested"}, STOP_SAVE, FINISHED)
    result = call("save", "train", "--name", "good")
    assert result.exit_code == 1
    assert "run train stopped at step 60 before it saved as good" in result.stderr


def test_a_save_that_was_dropped_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    dropped = {**SAVED, "event": "save_dropped", "step": 55, "reason": "requested", "why": "disk full"}
    other = {**dropped, "name": "other", "why": "not mine"}
    play_driver(world, monkeypatch, {**dropped, "name": "", "why": "nor this"}, other, {**dropped, "name": "good"})
    result = call("save", "train", "--name", "good")
    assert (result.exit_code, result.stderr) == (1, "error: run train: the checkpoint was not saved: disk full\n")


@pytest.mark.parametrize("command", ["stop", "save"])
def test_runs_that_are_not_live_are_left_alone(world: World, command: str) -> None:
    world.journal(FINISHED)
    result = call(command, "train")
    assert (result.exit_code, result.stdout) == (0, "run train is not live (stopped at step 60); nothing to do\n")
    assert not (world.run / "requests").exists()


def test_an_order_nobody_reads_is_withdrawn(world: World) -> None:
    world.live = LIVE
    result = call("stop", "train", "--timeout", "0")
    assert result.exit_code == 1
    assert "waited 0.00 s for the run to save and stop, and the driver (process 7 on here, since " in result.stderr
    assert world.requests() == []


def test_a_driver_that_dies_meanwhile_is_told(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ask, "live_driver", lives(world, 1))
    result = call("save", "train")
    assert result.exit_code == 1
    assert "lost its driver while this command waited for a checkpoint at the next resume point" in result.stderr
    assert world.requests() == []
