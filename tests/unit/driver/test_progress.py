"""What a live run says of its progress: the status line, and the file that `orchestrator status` reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from orchestrator.driver import progress
from orchestrator.driver.progress import ProgressBoard


class Console:
    """Keeps the steps that it was shown."""

    def __init__(self) -> None:
        self.steps: list[int] = []

    def progress(self, step: int, **_: Any) -> None:
        self.steps.append(step)


class View:
    committed_step = None
    restarts = 0


def message(step: int, rank: int = 0) -> dict[str, Any]:
    return {
        "rank": rank, "step": step, "index": step, "total": 100, "samples": 32 * step, "step_s": 0.5,
        "metrics": {"loss": float(rank)},
    }  # fmt: skip


def test_progress_is_written_at_most_once_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    file, console, view = tmp_path / "progress.json", Console(), View()
    file.write_text("an earlier launch's")
    board = ProgressBoard(console, tmp_path)  # type: ignore[arg-type]
    assert not file.exists()

    def show(at: float, *messages: dict[str, Any]) -> dict[str, Any]:
        now[0] = at
        for told in messages:
            board.metrics(told)
        board.show(view)  # type: ignore[arg-type]
        found: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
        return found

    assert show(100.0, message(0, rank=1)) == {}
    first = show(100.2, message(10))
    assert first == {"step": 10, "total": 100, "samples_per_s": None, "metrics": {"loss": 0.5}, "eta_s": 45.0}
    assert show(100.4, message(20))["step"] == 10
    assert show(101.1)["step"] == 10
    last = show(101.3)
    assert (last["step"], last["samples_per_s"]) == (20, pytest.approx(320 / 0.2))
    assert console.steps == [0, 10, 20]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["progress.json"]
