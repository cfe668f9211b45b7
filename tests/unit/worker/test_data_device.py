"""Batches reach the device whatever they are made of. "meta" stands in for a second device."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

from orchestrator.worker.data import make_loop
from orchestrator.worker.data_device import first_dim, to_device

META = torch.device("meta")


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclasses.dataclass(frozen=True)
class Sample:
    x: Any
    name: str


class MovesItself:
    def __init__(self, device: str = "cpu") -> None:
        self.device = torch.device(device)

    def to(self, device: torch.device) -> MovesItself:
        return MovesItself(str(device))


def x() -> torch.Tensor:
    return torch.zeros(2)


def devices(batch: Any) -> list[str]:
    if hasattr(batch, "device"):
        return [str(batch.device)]
    if isinstance(batch, collections.abc.Mapping):
        batch = list(batch.values())
    if isinstance(batch, Sample):
        batch = [batch.x, batch.name]
    return [d for part in batch for d in devices(part)] if isinstance(batch, (list, tuple)) else []


@pytest.mark.parametrize(
    "batch",
    [
        x(), [x(), x()], (x(), [x()]), {"a": x(), "b": {"c": x()}}, Pair(x(), "text"), Sample(x(), "text"),
        MovesItself(), collections.OrderedDict(a=x()), collections.UserDict(a=x()), [x(), None, 3, "text", b"bytes"],
    ],
    ids=lambda batch: type(batch).__name__,
)  # fmt: skip
def test_every_container_keeps_its_type(batch: Any) -> None:
    before = devices(batch)
    moved = to_device(batch, META)
    assert type(moved) is type(batch)
    assert set(devices(moved)) == {"meta"} and len(devices(moved)) == len(before)
    assert devices(batch) == before  # the original is not touched


def test_packed_sequences_move_themselves() -> None:
    assert to_device(pack_sequence([x()]), torch.device("cpu")).data.device.type == "cpu"


def test_what_is_there_already_is_not_copied() -> None:
    tensor = x()
    assert to_device([tensor], torch.device("cpu"))[0] is tensor


def test_items_arrive_on_the_device() -> None:
    item = next(make_loop([x()] * 4, 2, seed=0, rank=0, world_size=1, device="meta").open())
    assert item.batch.device == META


@pytest.mark.parametrize(
    ("batch", "samples"),
    [(torch.zeros(3, 2), 3), ([torch.zeros(4), torch.zeros(9)], 4), ({"a": torch.zeros(5)}, 5), (["a"], 1), (7, 1)],
)
def test_the_number_of_samples_in_a_ready_batch(batch: Any, samples: int) -> None:
    assert first_dim(batch) == samples
