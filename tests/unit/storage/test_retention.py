"""Retention as a table: checkpoints and rules in, what keeps each out."""

from __future__ import annotations

import math

import pytest

from orchestrator.errors import UsageError
from orchestrator.spec import Retention, SaveTrigger
from orchestrator.storage.manifest import CheckpointRecord
from orchestrator.storage.retention import best, plan


def record(step: int, *, reason: str = "periodic", name: str = "", **metrics: float) -> CheckpointRecord:
    return CheckpointRecord(
        f"checkpoints/{step}", 0, step, step // 100, step, reason, name, 10, 1000.0 + step, metrics, step
    )


STEPS = [record(step) for step in (50, 100, 150, 200, 250, 300)]


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        (Retention(), {200: "last", 250: "last", 300: "last"}),
        (Retention(keep_last=1), {300: "last"}),
        (Retention(keep_last=99), dict.fromkeys((50, 100, 150, 200, 250, 300), "last")),
        (Retention(keep_last=0), {300: "newest"}),
        (Retention(keep_last=1, keep_every=SaveTrigger("steps", 100)), {100: "every", 200: "every", 300: "last every"}),
        (Retention(keep_last=0, keep_every=SaveTrigger("steps", 120)), {150: "every", 250: "every", 300: "newest"}),
        (Retention(keep_last=0, keep_every=SaveTrigger("epochs", 2)), {200: "every", 300: "newest"}),
        (Retention(keep_last=0, keep_every=SaveTrigger("seconds", 200)), {50: "every", 200: "every", 300: "newest"}),
        (Retention(keep_last=0, keep_bytes=25), {250: "bytes", 300: "bytes"}),
        (Retention(keep_last=0, keep_bytes=9), {300: "newest"}),
        (Retention(keep_last=0, keep_best=(2, "loss", "min")), {300: "newest"}),
    ],
)
def test_rules(retention: Retention, kept: dict[int, str]) -> None:
    planned = plan(STEPS, retention)
    assert [record for record, _ in planned] == STEPS
    assert {record.step: " ".join(kept_by) for record, kept_by in planned if kept_by} == kept


def test_final_and_named_ones_always_stay() -> None:
    given = [record(1, reason="final"), record(2, name="v1"), record(3), record(4)]
    kept = [kept_by for _, kept_by in plan(given, Retention(keep_last=1))]
    assert kept == [("final",), ("named",), (), ("last",)]


def test_of_one_name_the_newest_stays() -> None:
    given = [record(1, name="best"), record(2, name="v1"), record(3, name="best"), record(4), record(5)]
    kept = [kept_by for _, kept_by in plan(given, Retention(keep_last=1))]
    assert kept == [(), ("named",), ("named",), (), ("last",)]


def test_best_by_metric() -> None:
    given = [
        record(1, acc=0.5), record(2, acc=0.9), record(3, acc=math.nan), record(4), record(5, acc=0.9),
        record(6, acc=0.7),
    ]  # fmt: skip
    assert best(given, 3, "acc", "max") == [4, 1, 5]
    assert best(given, 1, "acc", "min") == [0]
    kept = [kept_by for _, kept_by in plan(given, Retention(keep_last=1, keep_best=(2, "acc", "max")))]
    assert kept == [(), ("best",), (), (), ("best",), ("last",)]


def test_nothing_to_keep() -> None:
    assert plan([], Retention()) == []


def test_what_is_kept_is_stable_when_the_rest_goes() -> None:
    retention = Retention(keep_last=2, keep_every=SaveTrigger("steps", 100), keep_best=(1, "loss", "min"))
    given = [record(step, loss=(step * 37) % 101) for step in range(10, 1000, 30)]
    kept = [record for record, kept_by in plan(given, retention) if kept_by]
    assert [record for record, kept_by in plan(kept, retention) if kept_by] == kept


@pytest.mark.parametrize("trigger", [SaveTrigger("auto", 0), SaveTrigger("steps", 0)])
def test_a_rule_that_is_none(trigger: SaveTrigger) -> None:
    with pytest.raises(UsageError, match="keeps nothing"):
        plan(STEPS, Retention(keep_every=trigger))
