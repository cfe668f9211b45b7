"""Where in a worker each fault strikes, and that it does so once. Killing is replaced by a mark."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from orchestrator.worker import faults


class _Context(SimpleNamespace):
    rank = 1

    def tell(self, message: dict[str, Any]) -> None:
        self.told.append(message["id"])


@pytest.fixture
def context(monkeypatch: pytest.MonkeyPatch) -> _Context:
    monkeypatch.setattr(faults, "_armed", [])
    monkeypatch.setattr(faults, "_context", None)
    return _Context(faults=[], told=[])


def fault(name: str = "f", **fields: Any) -> dict[str, Any]:
    return {"id": name, "kind": "raise", "rank": 1, "step": 5, "moment": "step", "offset": 0.5, "after": "", **fields}


def passes(context: _Context, place: str, step: int, subject: Any = None) -> bool:
    """Whether the fault strikes here; if it does, the agent was told first."""
    before = len(context.told)
    try:
        faults.at(place, step, subject)
    except faults.ChaosError:
        assert len(context.told) == before + 1
        return True
    assert len(context.told) == before
    return False


@pytest.mark.parametrize(
    ("moment", "offset", "place"),
    [
        ("step", 0.5, "step"),
        ("forward", 0.5, "forward"),
        ("optimizer", 0.1, "pre_step"),
        ("optimizer", 0.9, "post_step"),
        ("boundary", 0.5, "boundary"),
        ("save", 0.4, "copying"),
        ("save", 0.6, "staged"),
    ],
)
def test_a_fault_strikes_at_its_place_from_its_step_on(
    context: _Context, moment: str, offset: float, place: str
) -> None:
    places = ["step", "forward", "pre_step", "mid_step", "post_step", "boundary", "copying", "staged"]
    context.faults = [fault(moment=moment, offset=offset)]
    faults.arm(context)  # type: ignore[arg-type]
    assert not any(passes(context, each, 4) for each in places)
    assert [each for each in places if passes(context, each, 5)] == [place]
    assert not any(passes(context, each, 6) for each in places)  # once


def test_a_save_that_was_overtaken_is_made_up_for_by_a_copy_to_memory(context: _Context) -> None:
    context.faults = [fault(moment="save")]
    faults.arm(context)  # type: ignore[arg-type]
    assert not passes(context, "snapshot", 5)
    assert passes(context, "snapshot", 6)


def test_in_the_middle_of_an_optimizer_step_half_of_the_parameters_are_spoiled(context: _Context) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1)) for _ in range(3)], lr=0.1)
    context.faults = [fault(moment="optimizer", offset=0.5)]
    faults.arm(context)  # type: ignore[arg-type]
    assert passes(context, "mid_step", 5, optimizer)
    assert [parameter.item() for parameter in optimizer.param_groups[0]["params"]] == [1.0, 1.0, 0.0]


def test_a_fault_in_backward_strikes_when_its_parameter_has_its_gradient(context: _Context) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    context.faults = [fault(moment="backward", offset=0.9)]
    faults.arm(context)  # type: ignore[arg-type]
    faults.at("forward", 5, model)
    assert context.told == []
    with pytest.raises(faults.ChaosError, match="f: rank 1 was made to fail \\(backward, step 5\\)"):
        model(torch.ones(1, 2)).sum().backward()
    assert context.told == ["f"]


def test_an_exception_at_any_moment_reaches_the_main_thread(context: _Context) -> None:
    context.faults = [fault(moment="any", delay_s=0.0)]
    faults.arm(context)  # type: ignore[arg-type]
    with pytest.raises(faults.ChaosError, match="f: rank 1 was made to fail \\(any, step 5\\)"):
        faults.at("step", 5)
        while True:
            sum(range(100))
    assert context.told == ["f"]


def test_only_the_first_of_several_strikes_in_one_process(context: _Context) -> None:
    context.faults = [fault("f"), fault("g"), fault("h", rank=0)]
    faults.arm(context)  # type: ignore[arg-type]
    assert passes(context, "step", 5)
    assert not passes(context, "step", 6)
    assert context.told == ["f"]
    context.faults = [fault("g"), fault("h", rank=0)]  # what the next group is given
    faults.arm(context)  # type: ignore[arg-type]
    assert passes(context, "step", 6)
    assert context.told == ["f", "g"]


def test_a_fault_waits_for_the_one_it_comes_after(context: _Context) -> None:
    context.faults = [fault("f", rank=0), fault("g", after="f")]
    faults.arm(context)  # type: ignore[arg-type]
    assert not passes(context, "step", 5)
    context.faults = [fault("g", after="f")]
    faults.arm(context)  # type: ignore[arg-type]
    assert passes(context, "step", 5)
