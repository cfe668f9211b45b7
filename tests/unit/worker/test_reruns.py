"""Code that runs again on every start: what it changed is found; and replaced optimizer state is seen."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from orchestrator.worker.guard import Guard
from orchestrator.worker.reruns import Reruns
from orchestrator.worker.tracked import RunState


def trained() -> tuple[RunState, nn.Module, torch.optim.Optimizer, Any]:
    model = nn.Linear(3, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
    model(torch.ones(2, 3)).sum().backward()
    optimizer.step()
    scheduler.step()
    tracked = RunState(0)
    tracked.add({"model": model, "optimizer": optimizer, "scheduler": scheduler})
    return tracked, model, optimizer, scheduler


def test_nothing_counts_as_changed_before_the_mark() -> None:
    tracked, _, optimizer, _ = trained()
    state = {"best": 1.0}
    reruns = Reruns(tracked, lambda: state)
    optimizer.param_groups[0]["lr"] = 0.1  # the script's word before its first loop
    state["best"] = 2.0
    assert reruns.changed() == [] and not reruns.state_changed()


def test_what_code_between_loops_changes_is_named() -> None:
    tracked, _, optimizer, scheduler = trained()
    state: dict[str, Any] = {"phases": 1}
    reruns = Reruns(tracked, lambda: state)
    reruns.mark()
    assert reruns.changed() == [] and not reruns.state_changed()
    optimizer.param_groups[0]["lr"] *= 0.5
    assert reruns.changed() == ["optimizer"]
    scheduler.last_epoch += 1
    assert sorted(reruns.changed()) == ["optimizer", "scheduler"]
    state["phases"] += 1
    assert reruns.state_changed()
    reruns.mark()
    assert reruns.changed() == [] and not reruns.state_changed()


def test_state_that_an_optimizer_loaded_is_clean_from_the_next_resume_point_on() -> None:
    tracked, _, optimizer, _ = trained()
    guard = Guard(None, tracked.mutable_versions)
    guard.resume_point(1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert guard.has_written()
    guard.resume_point(2)
    tracked.mutable_versions(deep=True)
    assert not guard.has_written()
    optimizer.step()
    assert guard.has_written()


def test_state_that_an_optimizer_loaded_is_what_a_checkpoint_gets() -> None:
    tracked, _, optimizer, _ = trained()
    before = dict(tracked.tensors())
    state = copy.deepcopy(optimizer.state_dict())
    for one in state["state"].values():
        one["momentum_buffer"].fill_(7.0)
    optimizer.load_state_dict(state)
    held = {name: tensor for name, tensor in tracked.tensors() if "momentum" in name}
    assert len(held) == 2 and all(bool((tensor == 7.0).all()) for tensor in held.values())
    assert not any(tensor is before[name] for name, tensor in held.items())
