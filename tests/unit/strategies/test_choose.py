"""Which strategy a launch gets, and what `none` does."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from orchestrator.errors import UsageError
from orchestrator.strategies import choose
from orchestrator.strategies.none import NoneStrategy

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("name", "world_size", "chosen", "reason"),
    [
        ("auto", 1, "none", "one rank has nothing to exchange"),
        ("auto", 3, "ddp", "3 ranks, each holding the whole model"),
        ("ddp", 2, "ddp", "asked for"),
        ("ddp", 1, "none", "one rank has nothing to exchange"),
        ("none", 4, "none", "asked for"),
    ],
)
def test_choice(name: str, world_size: int, chosen: str, reason: str) -> None:
    strategy, why = choose(name, world_size)
    assert (strategy.name, why) == (chosen, reason)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("fsdp", "`--strategy fsdp` is not available in this version; use `ddp`, or `auto`."),
        ("hsdp", "`--strategy hsdp` is not available in this version; use `ddp`, or `auto`."),
        ("zero", "`--strategy zero` does not exist; choose one of auto, ddp, fsdp, hsdp, none."),
    ],
)
def test_refusal(name: str, message: str) -> None:
    with pytest.raises(UsageError) as caught:
        choose(name, 2)
    assert str(caught.value) == message


def test_none_returns_the_module_and_accepts_what_ddp_accepts() -> None:
    module = nn.Linear(2, 2)
    strategy = NoneStrategy()
    assert strategy.wrap(module, CPU, find_unused_parameters=True) is module
    assert strategy.exchanged()
    with pytest.raises(UsageError, match="was given bucket_size, which"):
        strategy.wrap(module, CPU, bucket_size=3)


def test_forward_callbacks_hear_training_forwards_of_the_module_only() -> None:
    strategy, heard = NoneStrategy(), []
    module = strategy.wrap(nn.BatchNorm1d(2), CPU)
    strategy.on_forward(lambda called: heard.append(int(called.num_batches_tracked)))
    shadow = copy.deepcopy(module)
    x = torch.zeros(4, 2)
    module(x), shadow(x), module.eval()(x), module.train()(x)
    assert heard == [1, 2]


def test_a_compiled_module_is_listened_to_from_outside() -> None:
    strategy, heard = NoneStrategy(), []
    module = strategy.wrap(nn.Linear(2, 2), CPU)
    outside = nn.Sequential(module)
    strategy.on_forward(heard.append)
    strategy.on_forward(heard.append, also=outside)
    outside(torch.zeros(1, 2))
    assert heard == [module, outside]
