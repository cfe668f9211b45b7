"""What a rank leaves in shared memory, read as the agent would read it; and which writes betray themselves."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from orchestrator.storage.segment import TensorEntry
from orchestrator.worker.copying import CopyPlan, view_of
from orchestrator.worker.group import Group
from orchestrator.worker.restore import SegmentSource
from orchestrator.worker.shm import Segment
from orchestrator.worker.staging import WHOLE_SEGMENTS, Stager
from orchestrator.worker.tracked import RunState


class Agent:
    """Keeps the newest segment of each kind, as it was announced; `seen` is called at each announcement."""

    attempt, rank, world_size, local_rank, local_world_size, faults = 1, 0, 1, 0, 1, ()

    def __init__(self) -> None:
        self.segments: dict[str, Segment] = {}
        self.steps_when_announced: list[tuple[str, list[int]]] = []

    def tell(self, message: dict[str, Any], descriptors: tuple[int, ...] = ()) -> None:
        segment = Segment(os.dup(descriptors[0]))
        self.segments[message["kind"]] = segment
        self.steps_when_announced.append((message["kind"], sorted(label.step for label in segment.labels())))

    def tensor(self, kind: str, step: int, name: str) -> torch.Tensor:
        return tensor_in(self.segments[kind], step, name)


def tensor_in(segment: Segment, step: int, name: str) -> torch.Tensor:
    slot = segment.find(1, step)
    assert slot is not None
    entries = [TensorEntry.from_json(item) for item in json.loads(segment.meta(slot))["tensors"]]
    return view_of(segment.data(slot), next(entry for entry in entries if entry.name == name))


def staged(**named: Any) -> tuple[Agent, Stager, RunState]:
    agent, state = Agent(), RunState(0)
    state.add(named)
    return agent, Stager(agent, Group(0, 0, 1, 1, torch.device("cpu")), state), state  # type: ignore[arg-type]


def _data(model: nn.Linear) -> None:
    model.weight.data = torch.full((2, 2), 5.0)


def _vector(model: nn.Linear) -> None:
    nn.utils.vector_to_parameters(torch.full((6,), 5.0), model.parameters())


def _half(model: nn.Linear) -> None:
    model.half()
    with torch.no_grad():
        model.weight.fill_(5.0)


@pytest.mark.parametrize("give_other_memory", [_data, _vector, _half])
def test_a_snapshot_holds_what_a_parameter_is_now_whatever_memory_it_lies_in(
    give_other_memory: Callable[[nn.Linear], None],
) -> None:
    model = nn.Linear(2, 2)
    agent, stager, state = staged(model=model)
    stager.snapshot(1, {}, pin=False)
    before = state.mutable_versions()
    give_other_memory(model)
    assert state.mutable_versions(deep=True) != before
    stager.snapshot(2, {}, pin=False)
    found = agent.tensor("arena", 2, "model.weight")
    assert found.dtype == model.weight.dtype and torch.equal(found, model.weight.detach())


def test_buffers_that_were_given_other_memory_are_recorded() -> None:
    model = nn.BatchNorm1d(2)
    agent, stager, _ = staged(model=model)
    stager.record(1, {})
    model.running_mean.data = torch.full((2,), 5.0)  # type: ignore[union-attr]
    stager.record_buffers(1)
    assert agent.tensor("buffers", 1, "model.running_mean").tolist() == [5.0, 5.0]


def test_a_record_that_grows_is_announced_with_the_earlier_ones_and_its_own() -> None:
    agent, stager, _ = staged(model=nn.Linear(2, 2))
    stager.record(1, {"user": 1})
    stager.record(2, {"user": "x" * 100_000})
    assert agent.steps_when_announced == [("heads", [1]), ("heads", [1, 2])]
    slot = agent.segments["heads"].find(1, 1)
    assert slot is not None and json.loads(agent.segments["heads"].meta(slot))["head"] == {"user": 1}
    assert stager.head_at(2) == {"user": "x" * 100_000}


def test_buffers_that_grow_keep_those_of_the_resume_point() -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("seen", torch.ones(2))
    agent, stager, _ = staged(model=model)
    stager.record(1, {})
    model.register_buffer("seen", torch.full((5000,), 2.0))
    stager.record_buffers(2)
    assert agent.steps_when_announced[1:] == [("buffers", [1]), ("buffers", [1, 2])]
    assert agent.tensor("buffers", 1, "model.seen").tolist() == [1.0, 1.0]
    assert agent.tensor("buffers", 2, "model.seen").tolist() == [2.0] * 5000


def test_saves_of_one_rank_take_turns_in_a_few_segments() -> None:
    _, stager, _ = staged(model=nn.Linear(2, 2))
    segments = [stager.write_whole(step, {}) for step in range(1, WHOLE_SEGMENTS + 1)]
    assert len({id(segment) for segment in segments}) == WHOLE_SEGMENTS
    segments[1].unpin(0)
    again = stager.write_whole(9, {})
    assert again is segments[1] and again.find(1, 9) == 0
    assert segments[0].find(1, 1) == 0


def test_a_plan_writes_into_the_segment_at_hand_although_it_has_the_number_of_a_closed_one() -> None:
    plan = CopyPlan([("w", torch.ones(3))])
    old = Segment.create("old", 1, 100, plan.data_bytes)
    plan.copy(old, 0)
    old.close()
    new = Segment.create("new", 1, 100, plan.data_bytes)
    assert new.fd == old.fd
    plan.copy(new, 0)
    assert view_of(new.data(0), plan.table[0]).tolist() == [1.0, 1.0, 1.0]


def test_a_source_lets_go_of_its_segments_and_keeps_its_head() -> None:
    agent, stager, _ = staged(model=nn.Linear(2, 2))
    stager.snapshot(1, {"step": 1, "user": {"a": 1}}, pin=False)
    arena = agent.segments["arena"]
    part = {"fd": 0, "slot": arena.find(1, 1), "pieces": ["head"]}
    descriptor = os.dup(arena.fd)
    source = SegmentSource({"step": 1, "parts": [part]}, [descriptor])
    assert source.fetch(["model.weight"])["model.weight"].shape == (2, 2)
    source.forget()
    with pytest.raises(OSError):
        os.fstat(descriptor)
    assert source.head["user"] == {"a": 1}


class Average:
    """An average that makes its tensors anew at each update; `view` is how its state_dict hands them out."""

    def __init__(self, view: Callable[[Any], Any], start: Any) -> None:
        self._view, self.shadow = view, start

    def update(self) -> None:
        self.shadow = 0.5 * self.shadow + 1

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self._view(self.shadow)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = state["shadow"]


@pytest.mark.parametrize(
    ("view", "start"),
    [
        (lambda value: value, torch.zeros(3)),
        (lambda value: value.detach(), torch.zeros(3)),
        (lambda value: value.clone(), torch.zeros(3)),
        (lambda value: value.clone(), torch.zeros(3, dtype=torch.complex128)),
        (lambda value: value, np.zeros(3)),
        (lambda value: value.copy(), np.zeros((2, 3)).T),
    ],
)
@pytest.mark.parametrize("deep", [False, True])
def test_an_average_that_is_made_anew_betrays_itself_once(view: Any, start: Any, deep: bool) -> None:
    average = Average(view, start)
    state = RunState(0)
    state.add({"model": nn.Linear(2, 2), "average": average})
    before = state.mutable_versions()
    assert state.mutable_versions(deep) == before
    average.update()
    after = state.mutable_versions(deep)
    assert after != before
    assert state.mutable_versions() == state.mutable_versions(True) == after
    average.update()
    assert state.mutable_versions(deep) != after


def test_a_write_to_a_tracked_array_betrays_itself() -> None:
    array = np.zeros(4)
    state = RunState(0)
    state.add({"counts": array})
    before = state.mutable_versions()
    array[1] += 1
    after = state.mutable_versions(deep=True)
    assert after != before and state.mutable_versions() == after


def test_tensors_that_an_object_has_only_later_are_watched() -> None:
    average = SimpleNamespace(shadow={})
    average.state_dict = lambda: dict(average.shadow)
    average.load_state_dict = average.shadow.update
    state = RunState(0)
    state.add({"average": average})
    before = state.mutable_versions()
    average.shadow["w"] = torch.zeros(2)
    state.recorded()
    after = state.mutable_versions()
    assert after != before
    average.shadow["w"] = torch.zeros(2)
    assert state.mutable_versions(deep=True) != after
