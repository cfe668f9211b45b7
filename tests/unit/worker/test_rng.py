"""Counter-based generators: a function of (seed, loop, step, rank), and a guard that leaves no trace."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from orchestrator.worker import rng


def draws() -> tuple[float, float, float, float]:
    return float(torch.rand(())), float(np.random.rand()), random.random(), random.gauss(0, 1)


def test_derive_is_pinned_for_ever() -> None:
    """Other values would change the data order and augmentation of runs already under way."""
    assert rng.derive(0) == 0x490A32D6978C23C8
    assert rng.step_seed(0, "train", 3, 1) == 0x9258020877223DE


def test_derive_separates_its_parts() -> None:
    streams = [(1,), (2,), (1, "a"), (1, "b"), (1, 1), (1, "1"), (1, "a", "b"), (1, "ab")]
    values = [rng.derive(*parts) for parts in streams]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 2**64 for value in values)


def test_a_step_draws_the_same_whatever_was_drawn_before() -> None:
    rng.seed_step(7, "train", 9, 2)
    first = draws()
    torch.rand(13), np.random.randn(), random.gauss(0, 1)  # odd numbers of gaussians leave one cached
    rng.seed_step(7, "train", 9, 2)
    assert draws() == first


@pytest.mark.parametrize("other", [(8, "train", 9, 2), (7, "gan", 9, 2), (7, "train", 10, 2), (7, "train", 9, 3)])
def test_seed_loop_step_and_rank_all_matter(other: tuple[int, str, int, int]) -> None:
    rng.seed_step(7, "train", 9, 2)
    first = draws()
    rng.seed_step(*other)
    assert not set(draws()) & set(first)


def test_guard_leaves_every_generator_where_it_was() -> None:
    rng.seed_step(1, "train", 0, 0)
    np.random.randn(), random.gauss(0, 1)
    with rng.guard():
        expected = (*draws(), np.random.randn())
    with pytest.raises(KeyError), rng.guard():
        rng.seed_all(99)
        draws()
        raise KeyError
    assert (*draws(), np.random.randn()) == expected
