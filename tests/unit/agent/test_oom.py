"""Kills for lack of memory, as a cgroup counts them."""

from __future__ import annotations

from pathlib import Path

from orchestrator.agent.oom import OomWatch, events_file


def test_each_counted_kill_is_one_death(tmp_path: Path) -> None:
    events = tmp_path / "memory.events"
    events.write_text("low 0\noom 3\noom_kill 2\noom_group_kill 0\n")
    watch = OomWatch(events)
    assert not watch.took_one(), "those before do not count"
    events.write_text("low 0\noom 9\noom_kill 4\noom_group_kill 0\n")
    assert [watch.took_one() for _ in range(3)] == [True, True, False]


def test_without_a_counter_nothing_is_claimed(tmp_path: Path) -> None:
    assert not OomWatch(None).took_one()
    assert not OomWatch(tmp_path / "gone").took_one()


def test_the_file_is_the_process_s_own_cgroup_s(tmp_path: Path) -> None:
    listing = tmp_path / "cgroup"
    listing.write_text("0::/jobs/a\n")
    assert events_file(str(listing), tmp_path) is None
    (tmp_path / "jobs" / "a").mkdir(parents=True)
    own = tmp_path / "jobs" / "a" / "memory.events"
    own.write_text("oom_kill 0\n")
    (tmp_path / "memory.events").write_text("oom_kill 0\n")
    assert events_file(str(listing), tmp_path) == own
    assert events_file(str(tmp_path / "none"), tmp_path) is None
