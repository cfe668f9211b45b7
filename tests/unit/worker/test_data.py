"""Loops over map-style datasets: the same global batches at any world size, the exact next sample from any cursor."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset, Subset, TensorDataset, default_collate

from orchestrator.errors import UsageError
from orchestrator.worker import rng
from orchestrator.worker.data import make_loop
from orchestrator.worker.data_map import MapLoop


class Numbers(Dataset[int]):
    """Sample i is i."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, index: int) -> int:
        return index


class Noisy(Numbers):
    """Sample i with random augmentation from all three libraries."""

    def __getitem__(self, index: int) -> tuple[int, float, float, float]:  # type: ignore[override]
        return index, float(torch.rand(())), float(np.random.randn()), random.gauss(0, 1)


def loop(source: Any, batch_size: int | None = None, rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    return make_loop(source, batch_size, rank=rank, world_size=world_size, **{"seed": 3, **options})


def drain(source: Any, batch_size: int | None = None, cursor: Any = None, **options: Any) -> list[Any]:
    iterator = loop(source, batch_size, **options).open(cursor)
    items = list(iterator)
    iterator.close()
    return items


def listed(items: list[Any]) -> list[Any]:
    """Batches as plain lists, to compare exactly."""

    def plain(batch: Any) -> Any:
        return [plain(part) for part in batch] if isinstance(batch, list) else batch.tolist()

    return [plain(item.batch) for item in items]


def steps_of_all_ranks(world_size: int, **options: Any) -> list[list[int]]:
    """The global batches as the group reads them: rank after rank, stand-ins left out."""
    ranks = [drain(Numbers(50), 14, rank=rank, world_size=world_size, **options) for rank in range(world_size)]
    assert len({len(items) for items in ranks}) == 1
    together = []
    for items in zip(*ranks, strict=True):
        parts = [item.batch.tolist() if item.weight[0] else [] for item in items]
        assert [len(part) for part in parts] == [item.weight[0] for item in items]
        assert sum(item.share for item in items) == pytest.approx(1, abs=1e-12)
        assert {item.samples for item in items} == {sum(item.weight[0] for item in items)}
        together.append([index for part in parts for index in part])
    return together


@pytest.mark.parametrize("drop_last", [True, False])
@pytest.mark.parametrize("world_size", [2, 3, 4, 7])
def test_the_sequence_of_global_batches_is_the_same_at_any_world_size(world_size: int, drop_last: bool) -> None:
    alone = steps_of_all_ranks(1, epochs=3, drop_last=drop_last)
    assert [len(step) for step in alone] == ([14] * 3 if drop_last else [14, 14, 14, 8]) * 3
    assert steps_of_all_ranks(world_size, epochs=3, drop_last=drop_last) == alone


def test_epochs_hold_every_sample_once_in_orders_of_their_own() -> None:
    steps = steps_of_all_ranks(3, epochs=2, drop_last=False)
    first, second = sum(steps[:4], []), sum(steps[4:], [])
    assert sorted(first) == sorted(second) == list(range(50))
    assert first != second


def test_microbatches_together_are_the_step() -> None:
    whole = drain(Numbers(50), 24, rank=1, world_size=2, epochs=2)
    parts = drain(Numbers(50), 24, rank=1, world_size=2, epochs=2, accumulate=3)
    assert [item.micro for item in parts] == [0, 1, 2] * 4
    assert [item.last_micro for item in parts] == [False, False, True] * 4
    assert {(item.samples, item.weight) for item in parts} == {(8, (12, 24))}
    joined = [sum((item.batch.tolist() for item in parts[i : i + 3]), []) for i in range(0, 12, 3)]
    assert joined == [item.batch.tolist() for item in whole]


def test_a_rank_without_a_sample_gets_a_stand_in_that_weighs_nothing() -> None:
    last = [drain(Numbers(9), 4, rank=rank, world_size=2, drop_last=False)[-1] for rank in (0, 1)]
    assert [item.weight for item in last] == [(1, 1), (0, 1)]
    assert last[1].batch.tolist() == last[0].batch.tolist()


@pytest.mark.parametrize(
    ("options", "length"),
    [
        ({"epochs": 3}, 9),
        ({"epochs": 3, "drop_last": False}, 12),
        ({"epochs": 3, "max_steps": 5}, 5),
        ({"epochs": 1, "max_steps": 5}, 3),
        ({"epochs": None, "max_steps": 7}, 7),
        ({"epochs": 2, "accumulate": 7}, 42),
        ({"epochs": None, "max_steps": 7, "accumulate": 7}, 49),
        ({"epochs": 0}, 0),
        ({"max_steps": 0}, 0),
    ],
)
def test_length_is_the_whole_loop(options: dict[str, Any], length: int) -> None:
    assert loop(Numbers(50), 14, **options).length == length == len(drain(Numbers(50), 14, **options))


CURSOR_CASES = [
    {"epochs": 3},
    {"epochs": 2, "drop_last": False, "rank": 1, "world_size": 3},
    {"epochs": None, "max_steps": 7},
    {"epochs": 2, "accumulate": 2, "rank": 1, "world_size": 2},
]


@pytest.mark.parametrize("options", CURSOR_CASES, ids=str)
def test_from_every_cursor_the_rest_comes_exactly(options: dict[str, Any]) -> None:
    plan = loop(Noisy(50), 16, **options)
    whole = listed(drain(Noisy(50), 16, **options))
    iterator = plan.open()
    for done in range(plan.length + 1):
        cursor = json.loads(json.dumps(iterator.cursor()))
        assert cursor["index"] == done
        assert listed(list(plan.open(cursor))) == whole[done:]
        assert iterator.has_next() == (done < plan.length)
        next(iterator, None)


@pytest.mark.parametrize("options", [CURSOR_CASES[0], CURSOR_CASES[1]], ids=str)
def test_cursors_with_loader_processes_count_what_was_consumed(options: dict[str, Any]) -> None:
    whole = listed(drain(Noisy(50), 16, **options))
    ahead = loop(Noisy(50), 16, num_workers=2, **options)
    here = loop(Noisy(50), 16, **options).open()
    iterator = ahead.open()
    for done in range(ahead.length):
        assert iterator.cursor() == here.cursor()
        assert iterator.has_next()
        assert listed([next(iterator)]) == whole[done : done + 1] == listed([next(here)])
    assert not iterator.has_next() and next(iterator, None) is None
    middle = ahead.open({"index": 4, "epoch": 1, "position": 16, "samples": 64} if "rank" not in options else None)
    assert listed(list(middle)) == (whole[4:] if "rank" not in options else whole)


def test_cursor_at_the_end_of_an_epoch() -> None:
    iterator = loop(Numbers(50), 14, epochs=2, drop_last=False).open()
    for _ in range(3):
        next(iterator)
    assert iterator.cursor() == {"index": 3, "epoch": 0, "position": 42, "samples": 42}
    next(iterator)
    assert iterator.cursor() == {"index": 4, "epoch": 1, "position": 0, "samples": 50}


def test_a_cursor_of_another_world_size_continues_with_the_next_samples() -> None:
    alone = loop(Numbers(50), 14, epochs=2).open()
    next(alone)
    rest = [item.batch.tolist() for item in alone]
    cursor = {"index": 1, "epoch": 0, "position": 14, "samples": 14}
    ranks = [drain(Numbers(50), 14, cursor, rank=rank, world_size=2, epochs=2) for rank in (0, 1)]
    assert [a.batch.tolist() + b.batch.tolist() for a, b in zip(*ranks, strict=True)] == rest


def test_a_cursor_beyond_the_dataset_is_refused() -> None:
    with pytest.raises(UsageError, match="stands at sample 42 .* only 30"):
        loop(Numbers(30), 14).open({"index": 3, "epoch": 0, "position": 42, "samples": 42})


def test_first_epoch_numbers_the_epochs_of_a_loop_inside_run_epochs() -> None:
    both = drain(Noisy(50), 14, epochs=2)
    inner = drain(Noisy(50), 14, epochs=1, first_epoch=1)
    assert listed(inner) == listed(both)[3:]
    assert {item.epoch for item in inner} == {1}


@pytest.mark.parametrize("collate", [None, lambda samples: (default_collate(samples), torch.rand(3))])
def test_augmentation_does_not_depend_on_the_number_of_loader_processes(collate: Any) -> None:
    def run(num_workers: int) -> list[Any]:
        items = drain(Noisy(24), 8, epochs=2, num_workers=num_workers, collate_fn=collate)
        return [[part.tolist() for part in _flat(item.batch)] for item in items]

    torch.manual_seed(random.randrange(1000))  # whatever the program drew before
    assert run(0) == run(1) == run(2)


def _flat(batch: Any) -> list[torch.Tensor]:
    return [part for parts in batch for part in _flat(parts)] if isinstance(batch, (list, tuple)) else [batch]


def test_augmentation_differs_between_samples_and_epochs() -> None:
    values = [value for item in drain(Noisy(24), 8, epochs=2) for value in item.batch[1].tolist()]
    assert len(set(values)) == 48


@pytest.mark.parametrize("num_workers", [0, 2])
def test_reading_moves_no_generator_of_the_program(num_workers: int) -> None:
    rng.seed_all(5)
    expected = [torch.rand(()).item(), np.random.randn(), random.gauss(0, 1)]
    rng.seed_all(5)
    drain(Noisy(24), 8, epochs=2, num_workers=num_workers)
    assert [torch.rand(()).item(), np.random.randn(), random.gauss(0, 1)] == expected


class Batched(Numbers):
    def __getitem__(self, index: int) -> int:
        raise AssertionError("`__getitems__` is there to be used")

    def __getitems__(self, indices: list[int]) -> list[tuple[int, float]]:
        return [(index, random.random()) for index in indices]


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: Subset(d, range(20))])
def test_getitems_is_honoured_and_seeded(wrap: Any) -> None:
    assert listed(drain(wrap(Batched(20)), 5)) == listed(drain(wrap(Batched(20)), 5, num_workers=1))


def tensors(n: int = 20) -> TensorDataset:
    return TensorDataset(torch.arange(n * 6).reshape(n, 2, 3).float(), torch.arange(n))


@pytest.mark.parametrize(
    "dataset",
    [tensors(), Subset(tensors(), [3, -1, 5, 7, 9, 2, 8]), Subset(Subset(tensors(), range(5, 20)), range(10))],
    ids=["whole", "subset", "nested"],
)
def test_the_fast_path_equals_default_collate(dataset: Any) -> None:
    fast = drain(dataset, 3, epochs=2)
    slow = drain(dataset, 3, epochs=2, collate_fn=lambda samples: default_collate(samples))
    assert type(fast[0].batch) is type(slow[0].batch) is list
    assert loop(dataset, 3).fetcher._tensors is not None
    for a, b in zip(fast, slow, strict=True):
        assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a.batch, b.batch, strict=True))


def test_the_fast_path_is_fast() -> None:
    iterator = loop(tensors(2000), 64, epochs=30).open()
    next(iterator)
    begin = time.perf_counter()
    steps = sum(1 for _ in iterator)
    assert (time.perf_counter() - begin) / steps < 0.0005  # 13 µs here; the margin is for a busy machine


def test_a_list_of_samples_is_a_dataset() -> None:
    samples = [(torch.tensor([float(i)]), i % 2) for i in range(10)]
    items = drain(samples, 4, shuffle=False)
    assert listed(items) == [[[[0.0], [1.0], [2.0], [3.0]], [0, 1, 0, 1]], [[[4.0], [5.0], [6.0], [7.0]], [0, 1, 0, 1]]]


class Broken(Numbers):
    def __getitem__(self, index: int) -> int:
        if index == 5:
            raise ZeroDivisionError("sample 5 is broken")
        return index


@pytest.mark.parametrize("num_workers", [0, 1])
def test_an_exception_of_the_dataset_arrives_as_itself(num_workers: int) -> None:
    iterator = loop(Broken(8), 2, shuffle=False, num_workers=num_workers).open()
    assert [next(iterator).batch.tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(ZeroDivisionError, match="sample 5 is broken") as caught:
        next(iterator)
    assert num_workers == 0 or "Original Traceback" in str(caught.value)  # the loader process's own
    assert iterator.cursor() == {"index": 2, "epoch": 0, "position": 4, "samples": 4}
    iterator.close()


def test_close_ends_the_loader_processes() -> None:
    iterator = loop(Pids(40), 2, num_workers=2).open()
    pids = {int(pid) for _ in range(4) for pid in next(iterator).batch}
    iterator.close()
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    assert next(iterator, None) is None
    iterator.close()


class Pids(Numbers):
    def __getitem__(self, index: int) -> int:
        return os.getpid()


def test_loader_processes_die_with_their_parent() -> None:
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        try:
            iterator = loop(Pids(40), 2, num_workers=1).open()
            os.write(write, str(int(next(iterator).batch[0])).encode())
            signal.pause()
        finally:
            os._exit(1)
    child = int(os.read(read, 20))
    os.kill(parent, signal.SIGKILL)
    os.waitpid(parent, 0)
    deadline = time.monotonic() + 5  # torch's own watchdog needs up to 5 s; the kernel none
    while _running(child) and time.monotonic() < deadline:
        os.sched_yield()
    assert not _running(child) and time.monotonic() < deadline - 3


def _running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as stat:
            return stat.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize(("n", "batch", "world_size"), [(50, 14, 3), (50, 2, 4), (3, 8, 4), (12, 4, 2)])
def test_validation_sees_every_sample_once_over_all_ranks(n: int, batch: int, world_size: int) -> None:
    plans = [loop(Numbers(n), batch, rank=rank, world_size=world_size, train=False) for rank in range(world_size)]
    shares = [list(plan.open()) for plan in plans]
    assert sorted(index for items in shares for item in items for index in item.batch.tolist()) == list(range(n))
    assert [plan.length for plan in plans] == [len(items) for items in shares]
    assert all(len(item.batch) == item.weight[0] > 0 for items in shares for item in items)
    for items in shares:
        own = [index for item in items for index in item.batch.tolist()]
        assert own == sorted(own)  # in order


def test_validation_has_randomness_of_its_own_and_leaves_none() -> None:
    rng.seed_all(5)
    expected = torch.rand(()).item()
    rng.seed_all(5)
    iterator = loop(Noisy(10), 5, train=False).open()
    for _ in iterator:
        torch.rand(3)  # the loop's body may draw too
    assert torch.rand(()).item() == expected
    same = listed(drain(Noisy(10), 5, train=False))
    assert same == listed(drain(Noisy(10), 5, train=False))
    assert same != listed(drain(Noisy(10), 5, shuffle=False))


def test_validation_of_an_empty_dataset_yields_nothing() -> None:
    assert drain(Numbers(0), 4, train=False) == []
    assert drain(Numbers(0), 4, train=False, epochs=None, max_steps=3) == []


def test_batches_can_be_closed_before_they_end() -> None:
    rng.seed_all(5)
    expected = torch.rand(()).item()
    rng.seed_all(5)
    iterator = loop(Numbers(10), 5, train=False).open()
    next(iterator), torch.rand(())
    iterator.close()
    assert torch.rand(()).item() == expected


def test_config_names_what_must_stay() -> None:
    plan = loop(Numbers(50), 14, world_size=2)
    assert isinstance(plan, MapLoop) and plan.steps_per_epoch == 3
    assert plan.global_batch_text == "14 = 2 ranks x 7"
    assert plan.config() == {
        "dataset_len": 50, "global_batch": 14, "accumulate": 1, "drop_last": True, "shuffle": True, "seed": 3,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (Numbers(50), {"batch_size": 64}, "50 samples make no full batch of 64, so nothing would train"),
        (Numbers(50), {}, "needs `batch_size`"),
        (Numbers(50), {"batch_size": 0}, r"batch_size=0\): pass a whole number of at least 1"),
        (Numbers(50), {"batch_size": 6.4}, "batch_size=6.4"),
        (Numbers(50), {"batch_size": True}, "batch_size=True"),
        (Numbers(50), {"batch_size": 8, "accumulate": 0}, "accumulate=0"),
        (Numbers(50), {"batch_size": 8, "epochs": -1}, "epochs=-1"),
        (Numbers(50), {"batch_size": 8, "epochs": None}, "pass `epochs` or `max_steps`"),
        (Numbers(50), {"batch_size": 2, "world_size": 3}, "leaves nothing for some of 3 ranks"),
        ([], {"batch_size": 2}, "dataset is empty"),
        ({"a": 1}, {"batch_size": 2}, "cannot read samples from a dict"),
        ("abc", {"batch_size": 2}, "cannot read samples from a str"),
        (7, {"batch_size": 2}, "cannot read from int"),
    ],
)
def test_what_cannot_be_is_refused(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loop(source, **options)
