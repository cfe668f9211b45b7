"""What a run says: first contact, progress at a bearable rate, events, a failure told once, the end."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest

from orchestrator.control.events import ErrorInfo
from orchestrator.ui import lines
from orchestrator.ui.console import make_console
from orchestrator.ui.jsonlines import JsonConsole
from orchestrator.ui.live import LiveConsole
from orchestrator.ui.plain import PlainConsole

ERROR = ErrorInfo(
    type="ValueError",
    message="boom",
    traceback='Traceback (most recent call last):\n  File "train.py", line 9, in f\nValueError: boom\n',
    frame="train.py:9 in f",
    log_path="runs/train/logs/a0001/rank-00001.log",
)


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def plain(quiet: bool = False) -> tuple[PlainConsole, io.StringIO, Clock]:
    stream, clock = io.StringIO(), Clock()
    return PlainConsole(stream, quiet, clock), stream, clock


def said(stream: io.StringIO) -> list[str]:
    return [line.removeprefix("orchestrator | ") for line in stream.getvalue().splitlines()]


def test_first_contact_says_how_to_stop_and_continue() -> None:
    console, stream, _ = plain()
    console.header(
        {
            "run": "train",
            "path": "runs/train",
            "ranks": 2,
            "where": {"node-1": 2},
            "batch": 64,
            "seed": 0,
            "resume": None,
            "command": ("orchestrator", "launch", "train.py", "a b"),
        }
    )
    assert said(stream) == [
        "run         train",
        "path        runs/train",
        "ranks       2",
        "where       node-1: 2",
        "batch       64",
        "seed        0",
        "stop        Ctrl-C saves and exits 76; a second one stops at once",
        "continue    the same command again: orchestrator launch train.py 'a b'",
        "start anew  --run-name with a new name",
    ]
    console.header({"batch": "64"})
    assert said(stream)[-1] == "batch  64"


def test_progress_names_what_is_known() -> None:
    state = lines.Progress(120, 400, 1234.5, {"loss": 0.12345}, 12.4, 100, 1, 0.114)
    assert lines.progress(state) == (
        "step 120/400 (30 %), 1,234 samples/s, loss 0.1235, 12.0 s left, saved at 100, 1 restart (0.11 s)"
    )
    assert lines.progress(lines.Progress(3)) == "step 3"


def test_plain_progress_comes_every_ten_seconds_or_tenth() -> None:
    console, stream, clock = plain()
    for step, now in [(1, 0.0), (2, 1.0), (9, 2.0), (10, 3.0), (11, 4.0), (12, 13.0), (13, 13.5), (20, 14.0)]:
        clock.now = now
        console.progress(step, 100)
    assert [line.split(" ")[1] for line in said(stream)] == ["1/100", "10/100", "12/100", "20/100"]


@pytest.mark.parametrize(
    ("name", "fields", "text"),
    [
        ("group_started", {"attempt": 1, "world_size": 2, "resume_sources": []}, "2 workers started"),
        (
            "group_started",
            {"attempt": 2, "world_size": 2, "resume_step": 50, "resume_sources": ["live"]},
            "2 workers go on at step 50, state from live (attempt 2)",
        ),
        (
            "recovered",
            {"recovery_s": 0.114, "lost_steps": 0, "resume_step": 50, "phases": {"detect": 0.01, "fork": 0.02}},
            "recovered in 0.11 s, 0 steps lost, at step 50 (detect 0.010, fork 0.020)",
        ),
        (
            "checkpoint_committed",
            {"step": 9, "reason": "final", "bytes": 1536, "seconds": 0.02},
            "checkpoint of step 9 saved (final, 1.5 KiB, 0.02 s)",
        ),
        (
            "checkpoint_rejected",
            {"step": 9, "path": "checkpoints/x", "why": "digest differs"},
            "warning: checkpoint of step 9 at checkpoints/x is not used: digest differs",
        ),
        ("checkpoint_committed", {"step": 9, "reason": "periodic"}, None),
        ("worker_failed", {"rank": 1, "root": True}, None),
        ("something_new", {"x": 1}, None),
    ],
)
def test_events(name: str, fields: dict[str, Any], text: str | None) -> None:
    console, stream, _ = plain()
    console.event(name, fields)
    assert said(stream) == ([text] if text else [])


def test_a_failure_tells_cause_traceback_and_log() -> None:
    console, stream, _ = plain()
    console.failure("rank 1 failed at step 50", ERROR)
    assert said(stream) == [
        "rank 1 failed at step 50",
        "ValueError: boom",
        "  Traceback (most recent call last):",
        '    File "train.py", line 9, in f',
        "  ValueError: boom",
        "full log: runs/train/logs/a0001/rank-00001.log",
    ]


def test_the_end_says_what_failures_cost_and_how_to_load() -> None:
    console, stream, _ = plain()
    facts = {"outcome": "completed", "step": 400, "steps": 400, "seconds": 12.34, "restarts": 1, "lost_s": 0.114}
    console.summary({**facts, "lost_steps": 0, "checkpoint_step": 400, "load": "runs/train", "tracked": ["net", "opt"]})
    assert said(stream) == [
        "completed at step 400; 400 steps in this launch in 12.3 s",
        "1 restart cost 0.11 s and 0 steps",
        'load step 400: orchestrator.load("runs/train")["net"]',
    ]


def test_a_stopped_run_says_how_to_continue() -> None:
    console, stream, _ = plain()
    console.summary({"outcome": "stopped", "step": 7, "command": "orchestrator launch train.py", "logs": "runs/t/logs"})
    assert said(stream) == [
        "stopped at step 7",
        "no worker was lost",
        "to continue: the same command again: orchestrator launch train.py",
        "logs: runs/t/logs",
    ]


def test_quiet_leaves_rank_0_and_trouble() -> None:
    console, stream, _ = plain(quiet=True)
    console.header({"run": "x"})
    console.progress(1)
    console.notice("fine")
    console.event("recovered", {})
    console.summary({"outcome": "completed"})
    console.rank0("hello\n")
    console.notice("odd", "warning")
    console.failure("rank 1 failed")
    assert stream.getvalue().splitlines() == ["hello", "orchestrator | warning: odd", "orchestrator | rank 1 failed"]


def test_json_is_one_object_a_line_and_survives_nan() -> None:
    stream, clock = io.StringIO(), Clock()
    console = JsonConsole(stream, clock=clock, wall_clock=lambda: 5.0)
    console.header({"run": "train", "where": ("a", "b")})
    console.event("recovered", {"ts": 1.5, "attempt": 2, "recovery_s": 0.1})
    console.progress(1, 10, metrics={"loss": float("nan")})
    console.progress(2, 10)
    console.rank0('he said "hi"\x1b[0m\n')
    console.failure("rank 1 failed", ERROR)
    records = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [record["event"] for record in records] == ["header", "recovered", "progress", "output", "failure"]
    assert records[0] == {"ts": 5.0, "event": "header", "run": "train", "where": ["a", "b"]}
    assert records[1] == {"ts": 1.5, "event": "recovered", "attempt": 2, "recovery_s": 0.1}
    assert records[2]["metrics"] == {"loss": "NaN"}
    assert records[3]["line"] == 'he said "hi"\x1b[0m'
    assert records[4]["error"]["traceback"] == ERROR.traceback


def screen(written: str) -> list[str]:
    """What a terminal shows after `written`: carriage return and erase-line are obeyed, colours dropped."""
    rows = [""]
    for piece in re.split(r"(\r\x1b\[2K|\n)", re.sub(r"\x1b\[[0-9;]*m", "", written)):
        if piece == "\n":
            rows.append("")
        elif piece == "\r\x1b[2K":
            rows[-1] = ""
        else:
            rows[-1] += piece
    return rows


def live(monkeypatch: pytest.MonkeyPatch) -> tuple[LiveConsole, Terminal, Clock]:
    monkeypatch.setenv("COLUMNS", "60")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    stream, clock = Terminal(), Clock()
    return LiveConsole(stream, clock=clock), stream, clock


def test_the_live_line_never_mangles_rank_0(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream, clock = live(monkeypatch)
    output = ["epoch 1\tloss 0.5", "[bold]not markup[/]", "\x1b[31mred\x1b[0m", "x" * 200, "", " 50%|#####"]
    for step, line in enumerate(output):
        clock.now += 1
        console.progress(step, 10)
        console.rank0(line + "\n")
    assert screen(stream.getvalue())[-1] == "| step 5/10 (50 %)"
    console.close()
    assert screen(stream.getvalue()) == [*[line.replace("\x1b[31m", "").replace("\x1b[0m", "") for line in output], ""]
    assert "\x1b[31mred\x1b[0m\n" in stream.getvalue()


def test_the_live_line_fits_the_terminal_and_redraws_seldom(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream, clock = live(monkeypatch)
    console.progress(1, 100, 1000.0, {f"metric_{n}": 1.0 for n in range(20)})
    assert len(screen(stream.getvalue())[-1]) == 59
    before = stream.getvalue()
    clock.now += 0.1
    console.progress(2, 100)
    assert stream.getvalue() == before
    console.progress(100, 100)
    assert screen(stream.getvalue())[-1] == "| step 100/100 (100 %)"


def test_long_lines_of_ours_are_not_broken_and_warnings_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    console, stream, _ = live(monkeypatch)
    console.notice("w" * 100, "warning")
    assert screen(stream.getvalue()) == ["| warning: " + "w" * 100, ""]
    assert "\x1b[33m" in stream.getvalue()


def test_no_color_is_honoured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    stream = Terminal()
    LiveConsole(stream).notice("careful", "warning")
    assert not re.search(r"\x1b\[(?:\d+;)*3\d", stream.getvalue())


def test_the_stream_decides_which_console(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    assert type(make_console(False, False, Terminal())) is LiveConsole
    assert type(make_console(False, False, io.StringIO())) is PlainConsole
    assert type(make_console(True, False, Terminal())) is JsonConsole
    monkeypatch.setenv("TERM", "dumb")
    assert type(make_console(False, False, Terminal())) is PlainConsole


def test_a_reader_that_went_away_stops_nothing() -> None:
    class Broken(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    console = PlainConsole(Broken())
    console.rank0("a")
    console.failure("b", ERROR)


def test_what_the_terminal_cannot_spell_is_escaped() -> None:
    raw = io.BytesIO()
    console = PlainConsole(io.TextIOWrapper(raw, encoding="ascii"))
    console.rank0("h\u00e9")
    assert raw.getvalue() == b"h\\xe9\n"
