"""Following a log as it grows."""

from __future__ import annotations

from pathlib import Path

import pytest

from orchestrator.agent import output
from orchestrator.agent.output import OutputTail


@pytest.fixture
def tail(tmp_path: Path) -> OutputTail:
    (tmp_path / "log").write_bytes(b"")
    tail = OutputTail()
    tail.follow(str(tmp_path / "log"))
    return tail


def write(tmp_path: Path, data: bytes) -> None:
    with (tmp_path / "log").open("ab") as file:
        file.write(data)


def test_whole_lines_and_the_rest(tmp_path: Path, tail: OutputTail) -> None:
    write(tmp_path, b"one\n\ntwo\r\nthr")
    assert tail.lines() == ["one", "", "two"]
    assert tail.lines() == []
    write(tmp_path, b"ee\nfour")
    assert tail.lines() == ["three"]
    assert tail.lines(rest=True) == ["four"]


def test_a_progress_bar_is_shown_now_and_then_and_at_its_end(
    tmp_path: Path, tail: OutputTail, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(output.time, "monotonic", lambda: now[0])
    write(tmp_path, b"\r 0%\r10%")
    assert tail.lines() == ["10%"]
    write(tmp_path, b"\r20%\r")
    assert tail.lines() == []
    now[0] += output.SHOW_UPDATE_EVERY_S
    write(tmp_path, b"30%\r40%")
    assert tail.lines() == ["40%"]
    write(tmp_path, b"\r100%\nnext\n")
    assert tail.lines() == ["100%", "next"]


def test_a_log_that_cannot_be_read_says_nothing(
    tmp_path: Path, tail: OutputTail, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stale(_fd: int, _size: int) -> bytes:
        raise OSError(116, "Stale file handle")

    write(tmp_path, b"unfinished")
    assert tail.lines() == []
    monkeypatch.setattr(output.os, "read", stale)
    assert tail.lines() == []
    assert tail.lines(rest=True) == ["unfinished"]
