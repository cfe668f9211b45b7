"""The data order: a bijection, uniform, seekable; the same global batches however many ranks share them."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import UsageError
from orchestrator.worker.order import Permutation, Split, batch_text, batches_per_epoch, check_batch, split


@pytest.mark.parametrize("n", [1, 2, 3, 7, 1797, 4096, 4097, 5003, 65_536, 100_003])
def test_every_sample_comes_exactly_once(n: int) -> None:
    assert sorted(Permutation(n, seed=5, epoch=2).take(np.arange(n)).tolist()) == list(range(n))


@given(n=st.integers(4097, 20_000), seed=st.integers(-(2**63), 2**64), epoch=st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_a_bijection_for_any_key(n: int, seed: int, epoch: int) -> None:
    assert np.array_equal(np.sort(Permutation(n, seed, epoch).take(np.arange(n))), np.arange(n))


@pytest.mark.parametrize("n", [50, 10_007])
def test_the_order_is_pinned_for_ever(n: int) -> None:
    """A changed order would resume old runs at wrong samples."""
    pinned = {50: PINNED_50, 10_007: PINNED_10007}
    assert Permutation(n, seed=1, epoch=0).take(np.arange(8)).tolist() == pinned[n]


PINNED_50 = [11, 7, 13, 27, 33, 47, 21, 22]
PINNED_10007 = [5799, 6657, 3134, 8677, 1602, 8388, 8155, 8934]


@pytest.mark.parametrize("n", [100, 10_000])
def test_seed_and_epoch_change_the_order(n: int) -> None:
    orders = [Permutation(n, s, e).take(np.arange(n)) for s, e in [(0, 0), (0, 1), (1, 0), (1, 1), (-1, 0)]]
    same = [int((a == b).sum()) for i, a in enumerate(orders) for b in orders[:i]]
    assert max(same) <= 10  # a random pair agrees in one place on average


def test_without_shuffle_it_is_the_identity() -> None:
    assert Permutation(10, 3, 4, shuffle=False).take([9, 0, 5]).tolist() == [9, 0, 5]


def test_a_seek_into_a_billion_is_instant_and_equals_skipping() -> None:
    begin = time.perf_counter()
    far = Permutation(10**9, 1, 0).take(np.arange(900_000_000, 900_000_064))
    assert time.perf_counter() - begin < 0.1  # 0.3 ms here; the margin is for a busy machine
    assert len(set(far.tolist())) == 64 and far.max() < 10**9
    assert Permutation(10**9, 1, 0).take([900_000_063]).tolist() == [far[-1]]


@pytest.mark.parametrize("position", [-1, 10])
def test_positions_outside_are_refused(position: int) -> None:
    with pytest.raises(IndexError, match=r"\[0, 10\)"):
        Permutation(10, 0, 0).take([position])


def chi_square(observed: np.ndarray) -> float:
    expected = observed.sum() / observed.size
    return float(((observed - expected) ** 2 / expected).sum())


def within_six_sigma(statistic: float, freedom: int) -> bool:
    return abs(statistic - freedom) < 6 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("n", [40, 5000])
def test_a_position_gets_every_sample_equally_often(n: int) -> None:
    keys = 4000
    cells = np.zeros((4, 20), dtype=np.int64)
    for seed in range(keys):
        where = Permutation(n, seed, epoch=seed % 3).take([0, 1, n // 2, n - 1])
        cells[np.arange(4), where * 20 // n] += 1
    assert all(within_six_sigma(chi_square(row), 19) for row in cells)


@pytest.mark.parametrize("n", [40, 5000])
def test_neighbouring_positions_are_independent(n: int) -> None:
    cells = np.zeros((10, 10), dtype=np.int64)
    for seed in range(4000):
        first, second = Permutation(n, seed, epoch=0).take([7, 8]) * 10 // n
        cells[first, second] += 1
    # Two different samples fall into the same tenth slightly less often: count these cells apart.
    off_diagonal = cells[~np.eye(10, dtype=bool)]
    assert within_six_sigma(chi_square(off_diagonal), 89)


def test_neighbours_of_one_order_are_independent() -> None:
    n = 100_003
    order = Permutation(n, 11, 0).take(np.arange(n))
    for lag in (1, 2, 317):  # 317 = ceil(sqrt(n)): the width of the network's halves
        correlation = np.corrcoef(order[:-lag], order[lag:])[0, 1]
        assert abs(correlation) < 5 / n**0.5


@pytest.mark.parametrize(
    ("batch", "world", "accumulate", "loads", "counts"),
    [
        (64, 1, 1, None, (64,)),
        (64, 2, 1, None, (32, 32)),
        (10, 3, 1, None, (4, 3, 3)),
        (2, 3, 1, None, (1, 1, 0)),
        (60, 4, 4, None, (16, 16, 16, 12)),
        (64, 2, 4, None, (32, 32)),
        (12, 3, 1, (1, 1, 2), (3, 3, 6)),
        (10, 3, 1, (1, 1, 1), (4, 3, 3)),
        (4, 3, 1, (100, 1, 1), (2, 1, 1)),
    ],
)
def test_split(
    batch: int, world: int, accumulate: int, loads: tuple[float, ...] | None, counts: tuple[int, ...]
) -> None:
    dealt = split(batch, world, accumulate, loads)
    assert dealt == Split(counts, tuple(sum(counts[:rank]) for rank in range(world)))
    assert sum(dealt.counts) == batch


def test_batches_per_epoch() -> None:
    assert [batches_per_epoch(n, 64, drop) for n, drop in [(1797, True), (1797, False), (128, False)]] == [28, 29, 2]


@pytest.mark.parametrize(
    ("n", "batch", "world", "accumulate", "drop", "message"),
    [
        (
            50,
            64,
            1,
            1,
            True,
            "50 samples make no full batch of 64, so nothing would train; "
            "lower `batch_size` or pass `drop_last=False`.",
        ),
        (0, 64, 1, 1, True, "dataset is empty"),
        (100, 3, 4, 1, True, "batch_size=3 .*some of 4 ranks; pass at least batch_size=4 or start fewer workers"),
        (100, 8, 4, 4, True, "some of 4 ranks in 4 microbatches; pass at least batch_size=16"),
        (100, 30, 2, 4, True, "accumulate=4 equal microbatches; pass batch_size=24 or 32 instead"),
        (100, 3, 2, 4, True, "pass batch_size=8 instead"),
        (69, 64, 2, 4, False, r"last batch of each epoch has 5 samples \(69 = 1 x 64 \+ 5\).*drop_last=True"),
    ],
)
def test_what_cannot_train_is_refused(
    n: int, batch: int, world: int, accumulate: int, drop: bool, message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        check_batch(n, batch, world, accumulate, drop)


def test_the_batch_as_a_product() -> None:
    assert batch_text(64, 1) == "64 = 1 rank x 64"
    assert batch_text(64, 2) == "64 = 2 ranks x 32"
    assert batch_text(64, 2, 4) == "64 = 2 ranks x 4 microbatches x 8"
    assert batch_text(10, 3) == "10 = 4 + 3 + 3"
    assert batch_text(100, 30) == "100 = 30 ranks x 3 or 4"
