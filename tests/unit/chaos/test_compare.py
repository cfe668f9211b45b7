"""What counts as the same final state."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from orchestrator.chaos.compare import Comparison, different_paths, same_bits
from orchestrator.chaos.run import equality_line

NAN = float("nan")


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (torch.tensor([1.0, NAN]), torch.tensor([1.0, NAN]), True),
        (torch.tensor([0.0]), torch.tensor([-0.0]), False),
        (torch.tensor(1.0), torch.tensor(1.0), True),
        (torch.tensor(1.0), torch.tensor([1.0]), False),
        (torch.zeros(2), torch.zeros(2, dtype=torch.int32), False),
        (torch.zeros(0, 3), torch.zeros(0, 3), True),
        (torch.zeros(0, 3), torch.zeros(3, 0), False),
        (torch.tensor([True]), torch.tensor([True]), True),
        (torch.ones(2, 3), torch.ones(3, 2).t(), True),
    ],
)
def test_same_bits(a: torch.Tensor, b: torch.Tensor, same: bool) -> None:
    assert same_bits(a, b) is same


@pytest.mark.parametrize(
    ("a", "b", "paths"),
    [
        ({"step": 1, "user": {"best": NAN}}, {"step": 1, "user": {"best": NAN}}, []),
        ({"step": 1, "user": {"best": 0.5}}, {"step": 2, "user": {"best": 0.25}}, ["state.step", "state.user.best"]),
        ({"a": 1}, {"b": 1}, ["state.a", "state.b"]),
        ({"list": [1, {"x": 2}]}, {"list": [1, {"x": 3}]}, ["state.list[1].x"]),
        ({"list": [1]}, {"list": [1, 2]}, ["state.list"]),
        ({"n": 1}, {"n": 1.0}, ["state.n"]),
        ({"n": True}, {"n": 1}, ["state.n"]),
    ],
)
def test_different_paths(a: Any, b: Any, paths: list[str]) -> None:
    assert list(different_paths(a, b)) == paths


def test_the_statement() -> None:
    says = "final state bitwise equal to the undisturbed run: "
    same = Comparison(53, 231_834, ())
    assert equality_line(same) == says + "yes (53 tensors, 226.4 KiB compared)"
    other = Comparison(1, 4, ("a", "b", "c", "d", "e", "f"))
    assert equality_line(other) == says + "NO (1 tensor, 4 B compared; differing: a, b, c, d, e, … (1 more))"
