"""Which checkpoints stay. Pure: records and rules in, each record and the rules that keep it out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from orchestrator.errors import UsageError
from orchestrator.spec import Retention, SaveTrigger
from orchestrator.storage.manifest import CheckpointRecord

Kept = tuple[CheckpointRecord, tuple[str, ...]]


def plan(checkpoints: Sequence[CheckpointRecord], retention: Retention) -> list[Kept]:
    """Every checkpoint (given oldest commit first) with the rules that keep it: "last", "every", "best", "bytes",
    "final", "named", "newest". Those that no rule keeps, `kept_by == ()`, are to go. The newest always stays.

    Raises UsageError for a rule that is none (`--keep-every auto`).
    """
    kept: dict[int, list[str]] = {index: [] for index in range(len(checkpoints))}
    for rule, indices in _rules(checkpoints, retention):
        for index in indices:
            kept[index].append(rule)
    if checkpoints and not kept[len(checkpoints) - 1]:
        kept[len(checkpoints) - 1].append("newest")
    return [(record, tuple(kept[index])) for index, record in enumerate(checkpoints)]


def _rules(checkpoints: Sequence[CheckpointRecord], retention: Retention) -> Iterator[tuple[str, list[int]]]:
    count = len(checkpoints)
    yield "last", list(range(max(0, count - retention.keep_last), count))
    if retention.keep_every is not None:
        yield "every", _every(checkpoints, retention.keep_every)
    if retention.keep_best is not None:
        yield "best", best(checkpoints, *retention.keep_best)
    if retention.keep_bytes is not None:
        yield "bytes", _within(checkpoints, retention.keep_bytes)
    yield "final", [index for index, record in enumerate(checkpoints) if record.reason == "final"]
    # RUN@name means the newest of that name, so the older ones are like any other checkpoint.
    yield "named", sorted({record.name: index for index, record in enumerate(checkpoints) if record.name}.values())


_MEASURES: dict[str, Callable[[CheckpointRecord], float]] = {
    "steps": lambda record: record.step,
    "epochs": lambda record: record.epoch,
    "seconds": lambda record: record.created,
}


def _every(checkpoints: Sequence[CheckpointRecord], trigger: SaveTrigger) -> list[int]:
    """The first checkpoint at or past each multiple of `every` steps, epochs or seconds.

    A pure function of each interval, so a checkpoint that was once kept stays kept when later ones are removed.
    """
    measure = _MEASURES.get(trigger.unit)
    if measure is None or trigger.every <= 0:
        raise UsageError(f"--keep-every {trigger.unit} keeps nothing; give steps, epochs or a time, such as 1000steps.")
    first: dict[int, int] = {}
    for index, record in enumerate(checkpoints):
        first.setdefault(math.floor(measure(record) / trigger.every), index)
    return sorted(index for interval, index in first.items() if interval > 0)


def best(checkpoints: Sequence[CheckpointRecord], count: int, metric: str, mode: str) -> list[int]:
    """Indices of the `count` best by `metric` ("min" or "max"), best first; among equals the newer. nan is no value."""
    sign = 1 if mode == "min" else -1
    ranked = [
        (sign * record.metrics[metric], -index)
        for index, record in enumerate(checkpoints)
        if metric in record.metrics and not math.isnan(record.metrics[metric])
    ]
    return [-index for _, index in sorted(ranked)[:count]]


def _within(checkpoints: Sequence[CheckpointRecord], limit_bytes: int) -> list[int]:
    """The newest ones that together take no more than `limit_bytes`."""
    kept, total = [], 0
    for index in reversed(range(len(checkpoints))):
        total += checkpoints[index].bytes
        if total > limit_bytes:
            break
        kept.append(index)
    return kept
