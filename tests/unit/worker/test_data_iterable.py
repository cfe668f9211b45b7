"""Iterables that know their place: each rank reads its own, and a cursor never counts what was read ahead."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

from orchestrator.errors import UsageError
from orchestrator.worker.data import make_loop


class Reader:
    """Yields 0 … n - 1 with noise, and knows where it is. The place moves on when the next sample is asked for."""

    def __init__(self, n: int = 10, noise: bool = False) -> None:
        self.n, self.place, self.noise = n, 0, noise

    def __iter__(self) -> Iterator[Any]:
        while self.place < self.n:
            self.place += 1
            yield (self.place - 1, random.random()) if self.noise else self.place - 1
        self.place = 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.place}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.place = state["place"]


class Stream(IterableDataset[int]):
    def __init__(self) -> None:
        self.reader = Reader()
        self.state_dict, self.load_state_dict = self.reader.state_dict, self.reader.load_state_dict

    def __iter__(self) -> Iterator[int]:
        return iter(self.reader)


def loop(source: Any, rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    return make_loop(source, rank=rank, world_size=world_size, seed=3, **options)


def values(items: Any) -> list[Any]:
    def plain(batch: Any) -> Any:
        if isinstance(batch, (list, tuple)):
            return [plain(part) for part in batch]
        return batch.tolist() if isinstance(batch, torch.Tensor) else batch

    return [plain(item.batch) for item in items]


CASES = [
    {"batch_size": 3},
    {"batch_size": 3, "epochs": 3},
    {"batch_size": 3, "epochs": 2, "drop_last": False},
    {"batch_size": 5, "epochs": 2},  # ends with the epoch exactly
    {"batch_size": 4, "epochs": None, "max_steps": 5},
    {"batch_size": 4, "accumulate": 2, "epochs": 2},
    {"epochs": 2},
    {"epochs": 2, "accumulate": 3},
]


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("options", CASES, ids=str)
def test_from_every_cursor_the_rest_comes_exactly(options: dict[str, Any], look_ahead: bool) -> None:
    whole = values(loop(Reader(noise=True), **options).open())
    iterator = loop(Reader(noise=True), **options).open()
    for done in range(len(whole) + 1):
        if look_ahead:
            assert iterator.has_next() == (done < len(whole))
        cursor = json.loads(json.dumps(iterator.cursor()))
        assert cursor["index"] == done
        assert values(loop(Reader(noise=True), **options).open(cursor)) == whole[done:]
        next(iterator, None)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"batch_size": 4}, [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ({"batch_size": 4, "drop_last": False}, [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]),
        ({"batch_size": 4, "world_size": 2}, [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]),
        ({"batch_size": 8, "world_size": 2, "accumulate": 2}, [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ({"batch_size": 7, "world_size": 2, "rank": 1}, [[0, 1, 2], [3, 4, 5], [6, 7, 8]]),
        ({"batch_size": 4, "epochs": 2}, [[0, 1, 2, 3], [4, 5, 6, 7]] * 2),
        ({"batch_size": 4, "max_steps": 1}, [[0, 1, 2, 3]]),
    ],
)
def test_samples_become_batches(options: dict[str, Any], expected: list[list[int]]) -> None:
    assert values(loop(Reader(), **options).open()) == expected


def test_ready_batches_pass_as_they_are() -> None:
    class Ready(Reader):
        def __iter__(self) -> Iterator[Any]:
            for index in super().__iter__():
                yield {"x": torch.full((5, 2), index)}

    items = list(loop(Ready(2), world_size=3).open())
    assert [item.batch["x"][0, 0].item() for item in items] == [0, 1]
    assert [(item.samples, item.weight) for item in items] == [(15, (5, 15))] * 2


def test_weights_and_counts() -> None:
    iterator = loop(Reader(), batch_size=4, drop_last=False).open()
    assert [(item.samples, item.weight) for item in iterator] == [(4, (4, 4)), (4, (4, 4)), (2, (2, 2))]
    uneven = loop(Reader(), batch_size=7, world_size=2, rank=1).open()
    item = next(uneven)
    assert (item.samples, item.weight, item.share) == (7, (3, 7), 3 / 7)
    reader = {"epoch": 0, "fresh": False, "state": {"place": 3}}
    assert uneven.cursor() == {"index": 1, "epoch": 0, "position": 7, "samples": 7, "reader": reader}


def test_reading_moves_no_generator_of_the_program() -> None:
    random.seed(1)
    expected = random.random()
    random.seed(1)
    list(loop(Reader(noise=True), batch_size=2).open())
    assert random.random() == expected


def test_a_data_loader_over_one_gives_its_batch_size() -> None:
    assert values(loop(DataLoader(Stream(), batch_size=5)).open()) == [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]]


def test_the_length_is_unknown() -> None:
    plan = loop(Reader(), batch_size=2)
    assert (plan.length, plan.steps_per_epoch) == (None, None)
    assert plan.global_batch_text == "2 = 1 rank x 2"
    assert loop(Reader(), world_size=2).global_batch_text == "2 ready batches of the source"


def test_an_exception_while_reading_leaves_the_boundary_where_it_was() -> None:
    class Torn(Reader):
        def __iter__(self) -> Iterator[Any]:
            for index in super().__iter__():
                if index == 5:
                    raise OSError("torn")
                yield index

    iterator = loop(Torn(), batch_size=2).open()
    assert values([next(iterator), next(iterator)]) == [[0, 1], [2, 3]]
    with pytest.raises(OSError, match="torn"):
        next(iterator)
    assert iterator.cursor()["reader"] == {"epoch": 0, "fresh": False, "state": {"place": 4}}


def test_validation_needs_no_state() -> None:
    assert values(loop(iter(range(5)), batch_size=2, train=False).open()) == [[0, 1], [2, 3], [4]]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (iter(range(5)), {"batch_size": 2}, "without `state_dict` and `load_state_dict`.*exact sample.*run.steps"),
        (DataLoader(Stream(), num_workers=2), {}, "num_workers=2.: an iterable is read in the training process"),
        (Reader(), {"collate_fn": list}, "`collate_fn` needs `batch_size`"),
        (Reader(), {"accumulate": 2, "drop_last": False}, "may not fill 2 microbatches"),
        (Reader(), {"batch_size": 2, "world_size": 3}, "leaves nothing for some of 3 ranks"),
        (iter(range(5)), {"batch_size": 2, "world_size": 2, "train": False}, "count it 2 times"),
    ],
)
def test_what_cannot_be_is_refused(source: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loop(source, **options)


def test_an_empty_source_is_refused_when_it_is_read() -> None:
    with pytest.raises(UsageError, match="Reader gave rank 0 no full batch in epoch 0, so nothing would train"):
        next(loop(Reader(3), batch_size=4).open())


def test_a_source_that_does_not_start_over_is_refused_not_cut() -> None:
    class Once(Reader):
        def __iter__(self) -> Iterator[Any]:
            return self

        def __next__(self) -> int:
            if self.place == self.n:
                raise StopIteration
            self.place += 1
            return self.place - 1

    assert values(loop(Once(4), batch_size=2).open()) == [[0, 1], [2, 3]]
    iterator = loop(Once(4), batch_size=2, epochs=2).open()
    assert values([next(iterator), next(iterator)]) == [[0, 1], [2, 3]]
    with pytest.raises(UsageError, match="no full batch in epoch 1.*`__iter__` starts over"):
        next(iterator)


def test_a_cursor_without_this_ranks_reader_is_refused() -> None:
    with pytest.raises(UsageError, match="no state of Reader for rank 1.*as many workers"):
        loop(Reader(), batch_size=4, rank=1, world_size=2).open({"index": 1, "epoch": 0, "position": 4, "samples": 4})
