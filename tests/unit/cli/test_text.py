"""What people write as sizes, durations, triggers and rank counts, and how such things are printed."""

from __future__ import annotations

import pytest

from orchestrator import text
from orchestrator.errors import UsageError
from orchestrator.spec import SaveTrigger


@pytest.mark.parametrize(
    ("written", "size_bytes"),
    [("10GiB", 10 * 2**30), ("500 MB", 500_000_000), ("4096", 4096), ("1.5k", 1536), ("2T", 2**41), ("1b", 1)],
)
def test_sizes(written: str, size_bytes: int) -> None:
    assert text.parse_size(written) == size_bytes


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("30s", 30.0), ("5m", 300.0), ("1h30m", 5400.0), ("250ms", 0.25), ("12.5", 12.5), ("0", 0.0)],
)
def test_durations(written: str, seconds: float) -> None:
    assert text.parse_duration(written) == seconds


@pytest.mark.parametrize(
    ("written", "triggers"),
    [
        ("100steps", (SaveTrigger("steps", 100),)),
        ("1step", (SaveTrigger("steps", 1),)),
        ("30s,5m", (SaveTrigger("seconds", 30), SaveTrigger("seconds", 300))),
        ("1epoch, auto", (SaveTrigger("epochs", 1), SaveTrigger("auto", 0))),
        ("0.5s", (SaveTrigger("seconds", 0.5),)),
    ],
)
def test_triggers(written: str, triggers: tuple[SaveTrigger, ...]) -> None:
    assert text.parse_triggers(written) == triggers


@pytest.mark.parametrize(
    ("parse", "written", "says"),
    [
        (text.parse_size, "ten", "write a size"),
        (text.parse_size, "10GX", "write a size"),
        (text.parse_size, "0", "at least one byte"),
        (text.parse_size, "-1GiB", "write a size"),
        (text.parse_duration, "5 parsecs", "write a duration"),
        (text.parse_duration, "-5s", "write a duration"),
        (text.parse_duration, "", "write a duration"),
        (text.parse_triggers, "100", "100 of what? Write 100steps"),
        (text.parse_triggers, "100stpes", "did you mean `steps`?"),
        (text.parse_triggers, "0steps", "whole numbers from 1"),
        (text.parse_triggers, "1.5epochs", "whole numbers from 1"),
        (text.parse_triggers, "0s", "longer than nothing"),
        (text.parse_triggers, "100steps,", "several of them with commas"),
        (text.parse_keep_every, "auto", "when to save, not what to keep"),
        (text.parse_steps, "1,x", "write step numbers"),
        (text.parse_steps, "0", "write step numbers"),
        (text.parse_keep_best, "loss", "write K:METRIC"),
        (text.parse_keep_best, "0:loss", "write K:METRIC"),
        (text.parse_keep_best, "2:loss:least", "`least` is no direction"),
        (text.parse_workers, "abc", "write how many ranks"),
        (text.parse_workers, "0", "at least 1 worker"),
        (text.parse_workers, "-1", "at least 1 worker"),
        (text.parse_workers, "5:2", "upside down; write 2:5"),
        (text.parse_workers, "2.5", "write how many ranks"),
        (text.parse_count, "-1", "whole number from 0"),
        (text.parse_amount, "many", "write a number from 0"),
        (text.parse_flag, "maybe", "write true or false"),
        (text.parse_names, "numpy,my-module", "write module names"),
        (text.parse_assignment, "NOVALUE", "write NAME=VALUE"),
        (text.parse_assignment, "1A=2", "write NAME=VALUE"),
    ],
)
def test_refusals_say_what_to_write(parse: object, written: str, says: str) -> None:
    with pytest.raises(UsageError, match=".") as caught:
        parse(written)  # type: ignore[operator]
    assert says in str(caught.value)


def test_lists_and_pairs() -> None:
    assert text.parse_steps("1000, 1,1") == (1, 1000)
    assert text.parse_keep_best("2:val_loss") == (2, "val_loss", "min")
    assert text.parse_keep_best("1:accuracy") == (1, "accuracy", "max")
    assert text.parse_keep_best("1:accuracy:min") == (1, "accuracy", "min")
    assert text.parse_workers("4") == (4, 4)
    assert text.parse_workers("2:8") == (2, 8)
    assert text.parse_workers("auto") is None
    assert text.parse_names("numpy, a.b") == ("numpy", "a.b")
    assert text.parse_assignment("A=b=c") == ("A", "b=c")
    assert text.parse_assignment("A=") == ("A", "")


@pytest.mark.parametrize(
    ("size_bytes", "shown"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (2**20 - 1, "1.0 MiB"), (10 * 2**30, "10.0 GiB")],
)
def test_human_bytes(size_bytes: int, shown: str) -> None:
    assert text.human_bytes(size_bytes) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.114, "0.11 s"),
        (9.996, "10.0 s"),
        (12.34, "12.3 s"),
        (59.96, "1 min 00 s"),
        (75, "1 min 15 s"),
        (3700, "1 h 01 min"),
        (100000, "1 d 3 h"),
        (float("inf"), "unknown"),
    ],
)
def test_human_seconds(seconds: float, shown: str) -> None:
    assert text.human_seconds(seconds) == shown


def test_counts_and_hints() -> None:
    assert text.human_count(1, "step") == "1 step"
    assert text.human_count(12000, "step") == "12,000 steps"
    assert text.did_you_mean("wrokers", ["workers", "seed"]) == "; did you mean `workers`?"
    assert text.did_you_mean("qqq", ["workers", "seed"]) == ""
