"""The dirty word: who sees what, and when."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.worker import guard as guard_module
from orchestrator.worker import tracking
from orchestrator.worker.guard import Guard
from orchestrator.worker.shm import DIRTY, RESUME_STEP


class _Parked(Exception):
    pass


class _Words(dict[int, int]):
    """The beat page's words; `seen` keeps every value that the dirty word ever had."""

    def __init__(self) -> None:
        super().__init__({DIRTY: 0, RESUME_STEP: -1})
        self.seen: list[int] = []

    def __setitem__(self, word: int, value: int) -> None:
        super().__setitem__(word, value)
        if word == DIRTY:
            self.seen.append(value)


@pytest.fixture
def rank(monkeypatch: pytest.MonkeyPatch) -> Any:
    def park() -> None:
        raise _Parked

    monkeypatch.setattr(guard_module, "park", park)
    return SimpleNamespace(beat=SimpleNamespace(words=_Words()), poisoned=False)


def test_a_rank_is_dirty_from_its_first_optimizer_step_to_the_next_resume_point(rank: Any) -> None:
    guard = Guard(rank, lambda deep: 0)
    assert not guard.is_clean()
    guard.resume_point(7)
    assert guard.is_clean() and rank.beat.words[RESUME_STEP] == 7
    guard.pre_step(object())
    assert not guard.is_clean() and rank.beat.words[DIRTY] == 1
    guard.resume_point(8)
    assert guard.is_clean() and rank.beat.words[DIRTY] == 0


def test_a_poisoned_rank_parks_and_its_dirty_word_never_moves(rank: Any) -> None:
    guard = Guard(rank, lambda deep: 0)
    guard.resume_point(7)
    rank.beat.words.seen.clear()
    rank.poisoned = True
    with pytest.raises(_Parked):
        guard.pre_step(object())
    assert rank.beat.words.seen == [], "a side thread that copies at this moment would take its copy for spoiled"
    assert guard.is_clean()


def test_the_second_optimizer_of_a_step_parks_dirty(rank: Any) -> None:
    guard = Guard(rank, lambda deep: 0)
    guard.resume_point(7)
    guard.pre_step(object())
    rank.poisoned = True
    with pytest.raises(_Parked):
        guard.pre_step(object())
    assert not guard.is_clean()


def test_a_write_that_no_hook_announced_makes_a_rank_dirty(rank: Any) -> None:
    versions = [3]
    guard = Guard(rank, lambda deep: versions[0])
    guard.resume_point(7)
    versions[0] = 4
    assert not guard.is_clean()


def test_a_poisoned_rank_parks_before_an_optimizer_that_nobody_tracks_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    def park() -> None:
        raise _Parked

    monkeypatch.setattr(tracking, "park", park)
    known, other = object(), object()
    run = SimpleNamespace(context=SimpleNamespace(poisoned=False), tracked=SimpleNamespace(optimizers={"known": known}))
    tracking.Tracking._before_any_step(run, other, (), {})  # type: ignore[arg-type]
    run.context.poisoned = True
    tracking.Tracking._before_any_step(run, known, (), {})  # type: ignore[arg-type]  # the guard's own hook parks it
    with pytest.raises(_Parked):
        tracking.Tracking._before_any_step(run, other, (), {})  # type: ignore[arg-type]
