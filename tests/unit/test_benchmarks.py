"""What the benchmarks compute from step logs: exact figures from hand-written logs."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from benchmarks.harness import Running, Step, spread, table
from benchmarks.overhead import WARM_UP_STEPS, per_step
from benchmarks.recovery import Trial, measure, report, summarize

MS = 1_000_000


def log(*steps: tuple[int, int, int]) -> list[Step]:
    """Steps from (pid, step, end in ms)."""
    return [Step(pid, step, end_ms * MS, cpu_ns=0) for pid, step, end_ms in steps]


def run_with(*logs: list[Step]) -> Running:
    return cast(Running, SimpleNamespace(steps=lambda rank: logs[rank]))


def test_a_peer_that_repeats_steps() -> None:
    """Kill at 1000 ms after step 24; the group restarts from step 20, and step 25 is new."""
    first = log((1, 23, 900), (1, 24, 950), (3, 20, 3000), (3, 24, 3200), (3, 25, 3250))
    second = log((2, 23, 901), (2, 24, 951), (4, 20, 3010), (4, 24, 3210), (4, 25, 3260))
    assert measure(run_with(first, second), killed_ns=1000 * MS) == (2.01, 2.26, 5)


def test_no_step_is_lost_when_the_group_goes_on_where_it_was() -> None:
    first = log((1, 24, 950), (3, 25, 1100))
    second = log((2, 24, 951), (4, 25, 1105))
    assert measure(run_with(first, second), killed_ns=1000 * MS) == (0.105, 0.105, 0)


def test_a_survivor_may_finish_its_step_after_the_kill() -> None:
    """Rank 0 finishes step 25 in its old process: that is no recovery, and step 25 counts as finished before."""
    first = log((1, 24, 950), (1, 25, 1010), (3, 26, 1100))
    second = log((2, 24, 951), (4, 26, 1105))
    assert measure(run_with(first, second), killed_ns=1000 * MS) == (0.105, 0.105, 0)


def test_the_summary_compares_medians() -> None:
    account: dict[str, Any] = {"phases": {"detect": 0.01, "fork": 0.02}, "recovery_s": 0.1}
    ours = [Trial("orchestrator", 20, seconds, seconds, 0, account) for seconds in (0.1, 0.2, 0.1)]
    summary = summarize([*ours, Trial("torchrun", 20, 2.0, 2.2, 6), Trial("torchrun", 21, 3.0, 3.2, 7)])
    assert summary["orchestrator"]["recovery_s"] == {"median": 0.1, "min": 0.1, "max": 0.2}
    assert summary["orchestrator"]["phases_s"]["fork"] == 0.02
    assert summary["torchrun"]["ratio"] == pytest.approx(25)
    assert "detect 10.0  drain 0.0  fork 20.0" in report(summary)


def test_the_cost_of_a_step_leaves_the_warm_up_out() -> None:
    slow = [Step(1, i, i * 1000 * MS, i * 900 * MS) for i in range(WARM_UP_STEPS)]
    start = WARM_UP_STEPS * 1000 * MS
    fast = [Step(1, WARM_UP_STEPS + i, start + i * 50 * MS, start + i * 40 * MS) for i in range(5)]
    assert per_step(run_with(slow + fast, slow + fast)) == (50.0, 40.0)


def test_a_line_that_is_still_being_written_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "steps-0.log").write_text("7 0 1000 10\n7 1 2000 20\n7 2 30")
    running = Running.__new__(Running)
    running.directory = tmp_path
    assert running.steps(0) == [Step(7, 0, 1000, 10), Step(7, 1, 2000, 20)]
    assert running.steps(1) == []


def test_tables_align() -> None:
    assert table(("a", "b"), [["long", "1"], ["x", "22"]]) == "a      b\nlong   1\nx     22"
    assert spread([3, 1, 2]) == {"median": 2, "min": 1, "max": 3}
