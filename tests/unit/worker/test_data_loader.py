"""A DataLoader as source: its settings are taken, its sharding is replaced."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    Sampler,
    SequentialSampler,
    Subset,
    SubsetRandomSampler,
    WeightedRandomSampler,
    default_collate,
    get_worker_info,
)

from orchestrator.errors import UsageError
from orchestrator.worker.data import make_loop


class Numbers(Dataset[int]):
    def __len__(self) -> int:
        return 50

    def __getitem__(self, index: int) -> int:
        return index


DATA = Numbers()


def loop(source: Any, rank: int = 0, world_size: int = 1, **options: Any) -> Any:
    return make_loop(source, rank=rank, world_size=world_size, seed=3, **options)


def read(source: Any, **options: Any) -> list[list[int]]:
    iterator = loop(source, **options).open()
    return [item.batch.tolist() for item in iterator]


def replicas(shuffle: bool) -> DistributedSampler[int]:
    return DistributedSampler(DATA, num_replicas=4, rank=1, shuffle=shuffle)


@pytest.mark.parametrize(
    ("options", "batch", "shuffle", "steps"),
    [
        ({"batch_size": 14, "shuffle": True}, 14, True, 4),
        ({"batch_size": 14}, 14, False, 4),
        ({"batch_size": 14, "drop_last": True}, 14, False, 3),
        ({"batch_size": 5, "sampler": replicas(True)}, 20, True, 3),
        ({"batch_size": 5, "sampler": replicas(False), "drop_last": True}, 20, False, 2),
        ({"batch_size": 14, "sampler": RandomSampler(DATA)}, 14, True, 4),
        ({"batch_size": 14, "sampler": SequentialSampler(DATA)}, 14, False, 4),
    ],
)
def test_batch_size_order_and_drop_last_are_taken(
    options: dict[str, Any], batch: int, shuffle: bool, steps: int
) -> None:
    plan = loop(DataLoader(DATA, **options), world_size=2)
    assert (plan.batch_size, plan.settings.shuffle, plan.steps_per_epoch) == (batch, shuffle, steps)
    assert plan.settings.sampler is None


def test_its_sharding_is_replaced() -> None:
    loader = DataLoader(DATA, batch_size=5, sampler=replicas(False))
    assert read(loader, rank=0, world_size=2)[0] == list(range(10))
    assert read(loader, rank=1, world_size=2)[0] == list(range(10, 20))


class EveryThird(Sampler[int]):
    def __init__(self, claimed: int = 17) -> None:
        self.claimed = claimed
        self.epochs: list[int] = []

    def __len__(self) -> int:
        return self.claimed

    def __iter__(self) -> Any:
        return iter(range(0, 50, 3))

    def set_epoch(self, epoch: int) -> None:
        self.epochs.append(epoch)


WEIGHTS = [float(i % 5) for i in range(50)]


@pytest.mark.parametrize(
    "make",
    [
        lambda: WeightedRandomSampler(WEIGHTS, 30),
        lambda: WeightedRandomSampler(WEIGHTS, 30, generator=torch.Generator()),
        lambda: RandomSampler(DATA, replacement=True, num_samples=30),
        lambda: RandomSampler(DATA, num_samples=30),
        lambda: SubsetRandomSampler(range(5, 35)),
        EveryThird,
    ],
)
def test_other_samplers_keep_their_order_the_same_on_all_ranks_and_from_any_cursor(make: Any) -> None:
    def ranks(world_size: int) -> list[list[int]]:
        shares = []
        for rank in range(world_size):  # a program of its own each
            torch.manual_seed(rank)
            before = torch.random.get_rng_state()
            loader = DataLoader(DATA, batch_size=8, sampler=make(), drop_last=True)
            shares.append(read(loader, rank=rank, world_size=world_size, epochs=2))
            assert torch.equal(torch.random.get_rng_state(), before)
        return [sum(parts, []) for parts in zip(*shares, strict=True)]

    alone = ranks(1)
    assert ranks(3) == alone
    plan = loop(DataLoader(DATA, batch_size=8, sampler=make(), drop_last=True), epochs=2)
    steps = plan.steps_per_epoch
    rest = plan.open({"index": steps + 1, "epoch": 1, "position": 8, "samples": 8 * (steps + 1)})
    assert [item.batch.tolist() for item in rest] == alone[steps + 1 :]


def test_weights_count_and_epochs_differ() -> None:
    loader = DataLoader(DATA, batch_size=30, sampler=WeightedRandomSampler(WEIGHTS, 30))
    first, second = read(loader, epochs=2)
    assert first != second
    assert not any(index % 5 == 0 for index in first + second)  # weight 0


def test_set_epoch_is_called() -> None:
    sampler = EveryThird()
    read(DataLoader(DATA, batch_size=8, sampler=sampler), epochs=2)
    assert sampler.epochs == [0, 1]


def test_a_sampler_that_miscounts_is_refused() -> None:
    with pytest.raises(UsageError, match="EveryThird says its length is 20 but gave 17 samples in epoch 0"):
        read(DataLoader(DATA, batch_size=8, sampler=EveryThird(20)))


class WithInfo(Numbers):
    mark = 0

    def __getitem__(self, index: int) -> int:
        return self.mark


def mark_dataset(worker_id: int) -> None:
    info = get_worker_info()
    assert info is not None and isinstance(info.dataset, WithInfo) and info.id == worker_id
    info.dataset.mark = 100 + info.num_workers


def test_workers_collate_and_worker_init_are_taken() -> None:
    def collate(samples: list[int]) -> torch.Tensor:
        return default_collate(samples) + 1000

    loader = DataLoader(
        WithInfo(), batch_size=10, num_workers=2, collate_fn=collate, worker_init_fn=mark_dataset,
        persistent_workers=True, prefetch_factor=3, timeout=30,
    )  # fmt: skip
    plan = loop(loader)
    iterator = plan.open()
    assert iterator._loader._prefetch_factor == 3 and iterator._loader._timeout == 30
    assert [item.batch.tolist() for item in iterator] == [[1102] * 10] * 5


class Pid(Numbers):
    def __getitem__(self, index: int) -> int:
        return os.getpid()


def test_loader_processes_live_through_all_epochs() -> None:
    pids = {pid for batch in read(DataLoader(Pid(), batch_size=10, num_workers=1), epochs=4) for pid in batch}
    assert len(pids) == 1 and os.getpid() not in pids


def test_validation_takes_a_loader_too() -> None:
    loader = DataLoader(Subset(DATA, range(10)), batch_size=4, shuffle=False, drop_last=True)
    assert read(loader, train=False) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_same_batch_size_twice_is_no_contradiction() -> None:
    assert loop(DataLoader(DATA, batch_size=10), batch_size=10).batch_size == 10


@pytest.mark.parametrize(
    ("loader", "options", "message"),
    [
        (
            DataLoader(DATA, batch_sampler=BatchSampler(RandomSampler(DATA), 5, True)),
            {},
            "batch_sampler of its own .BatchSampler.*give it `batch_size=` and a `sampler=`",
        ),
        (DataLoader(DATA, batch_size=None), {}, "needs `batch_size`"),
        (DataLoader(DATA, batch_size=8), {"batch_size": 16}, "batch_size=16. contradicts the DataLoader, .* is 8 over"),
    ],
)
def test_what_cannot_be_taken_is_refused(loader: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        loop(loader, **options)
