"""Tracked state: what survives a restart, under which names, and what is refused."""

from __future__ import annotations

import json
import random
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from orchestrator.errors import ConfigRefusedError, UsageError
from orchestrator.worker.state import TrackedState

Setup = Callable[[], dict[str, Any]]


class Net(nn.Module):
    """A frozen layer, BatchNorm, a tied weight, a buffer that is not saved, a bf16 part."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, width)
        self.norm = nn.BatchNorm1d(width)
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.brief = nn.Linear(width, width, dtype=torch.bfloat16)
        self.tied = nn.Linear(width, width, bias=False)
        self.tied.weight = self.fc1.weight
        self.register_buffer("scratch", torch.zeros(1), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.frozen(self.norm(torch.tanh(self.fc1(x))))
        return self.tied(x + self.brief(x.bfloat16()).float()).sum()


def trainable(module: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def saved(state: TrackedState) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a checkpoint would hold: trees through JSON, copies of the tensors."""
    flat = state.snapshot()
    assert len({name for name, _ in flat.tensors}) == len(flat.tensors)
    return json.loads(json.dumps(flat.trees)), {name: tensor.detach().clone() for name, tensor in flat.tensors}


def tracked(named: dict[str, Any], **options: Any) -> TrackedState:
    state = TrackedState()
    state.add(named, **options)
    return state


def load(state: TrackedState, checkpoint: tuple[dict[str, Any], dict[str, torch.Tensor]], **options: Any) -> list[str]:
    trees, tensors = checkpoint
    return state.load(trees, lambda names: {name: tensors[name].clone() for name in names}, **options)


def train(objects: dict[str, Any], steps: range) -> None:
    """A step of everything there is: closures, two optimizers, schedulers of any kind, averages, scalers."""
    optimizers = [value for value in objects.values() if isinstance(value, torch.optim.Optimizer)]
    model = objects["model"]
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        ema = objects.get("ema")
        learning = [value for value in objects.values() if isinstance(value, nn.Module) and value is not ema]
        for optimizer in optimizers:

            def closure(optimizer: Any = optimizer, x: Any = x, learning: Any = learning) -> torch.Tensor:
                optimizer.zero_grad()
                loss = sum((module(x) - 1) ** 2 for module in learning)
                loss.backward()
                return loss

            optimizer.step(closure)
        for value in objects.values():
            if isinstance(value, lr_scheduler.ReduceLROnPlateau):
                value.step(float(step % 3))
            elif isinstance(value, lr_scheduler.LRScheduler):
                value.step()
        if ema is not None:
            ema.update_parameters(model)


def adamw(**options: Any) -> Setup:
    def build() -> dict[str, Any]:
        model = Net()
        return {"model": model, "optimizer": torch.optim.AdamW(trainable(model), lr=0.01, **options)}

    return build


def adamw_like(kind: Any) -> Setup:
    def build() -> dict[str, Any]:
        model = Net()
        return {"model": model, "optimizer": kind(trainable(model), lr=0.01)}

    return build


def sgd_groups() -> dict[str, Any]:
    model = Net()
    optimizer = torch.optim.SGD(
        [
            {"params": [p for p in trainable(model) if p.ndim > 1], "weight_decay": 0.1},
            {"params": [p for p in trainable(model) if p.ndim == 1], "lr": 0.002},
        ],
        lr=0.01,
        momentum=0.9,
    )
    return {"optimizer": optimizer, "model": model}


def lbfgs() -> dict[str, Any]:
    model = Net().float()
    model.brief = nn.Linear(4, 4).bfloat16().requires_grad_(False)
    return {"model": model, "optimizer": torch.optim.LBFGS(trainable(model), lr=0.1, max_iter=3, history_size=3)}


def gan() -> dict[str, Any]:
    generator, critic = Net(), Net()
    return {
        "model": generator,
        "critic": critic,
        "opt_g": torch.optim.Adam(trainable(generator), lr=0.01),
        "opt_d": torch.optim.RMSprop(trainable(critic), lr=0.01),
    }


def both_in_one() -> dict[str, Any]:
    generator, critic = Net(), Net()
    both = trainable(generator) + trainable(critic)
    return {"model": generator, "critic": critic, "optimizer": torch.optim.Adam(both, lr=0.01)}


def averaged() -> dict[str, Any]:
    model = Net()
    return {
        "model": model,
        "optimizer": torch.optim.SGD(trainable(model), lr=0.01),
        "ema": AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True),
    }


def scheduled(make: Callable[[torch.optim.Optimizer], Any]) -> Setup:
    def build() -> dict[str, Any]:
        objects = sgd_groups()
        return {**objects, "scheduler": make(objects["optimizer"])}

    return build


SETUPS: dict[str, Setup] = {
    "adamw": adamw(),
    "amsgrad": adamw(amsgrad=True),
    "adafactor": adamw_like(torch.optim.Adafactor),
    "foreach": adamw(foreach=True),
    "nadam": adamw_like(torch.optim.NAdam),
    "sgd, groups": sgd_groups,
    "lbfgs": lbfgs,
    "gan": gan,
    "one optimizer, two modules": both_in_one,
    "ema": averaged,
    "StepLR": scheduled(lambda o: lr_scheduler.StepLR(o, 2)),
    "OneCycleLR": scheduled(lambda o: lr_scheduler.OneCycleLR(o, max_lr=[0.001, 0.002], total_steps=20)),
    "ReduceLROnPlateau": scheduled(lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1)),
    "LambdaLR": scheduled(lambda o: lr_scheduler.LambdaLR(o, lambda step: 0.9**step)),
    "CosineAnnealingWarmRestarts": scheduled(lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3)),
    "SequentialLR": scheduled(
        lambda o: lr_scheduler.SequentialLR(
            o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.ExponentialLR(o, 0.9)], milestones=[2]
        )
    ),
}


def build(setup: Setup, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    return setup()


@pytest.mark.parametrize("setup", SETUPS.values(), ids=SETUPS.keys())
def test_fresh_objects_continue_bit_for_bit(setup: Setup) -> None:
    through = build(setup, 0)
    state = tracked(through)
    train(through, range(5))
    checkpoint = saved(state)
    train(through, range(5, 10))

    rest = build(setup, 1)
    identities = [id(parameter) for parameter in rest["model"].parameters()]
    again = tracked(rest)
    assert load(again, checkpoint) == []
    assert [id(parameter) for parameter in rest["model"].parameters()] == identities
    assert all(tensor.isfinite().all() for tensor in checkpoint[1].values())
    assert equal(saved(again), checkpoint)
    train(rest, range(5, 10))
    assert equal(saved(again), saved(state))


def equal(a: tuple[Any, dict[str, torch.Tensor]], b: tuple[Any, dict[str, torch.Tensor]]) -> bool:
    assert a[0] == b[0]
    assert list(a[1]) == list(b[1])
    assert [name for name in a[1] if not torch.equal(a[1][name], b[1][name])] == []
    return all(a[1][name].dtype == b[1][name].dtype for name in a[1])


def test_names() -> None:
    objects = build(adamw(), 0)
    state = tracked(objects)
    train(objects, range(1))
    names = [name for name, _ in state.tensors()]
    assert names[:3] == ["model.fc1.weight", "model.fc1.bias", "model.norm.weight"]
    assert "optimizer.state.fc1.weight.exp_avg" in names and "optimizer.state.brief.bias.step" in names
    assert "model.tied.weight" not in names and "model.scratch" not in names
    assert state.trees()["model"]["aliases"] == {"tied.weight": "model.fc1.weight"}
    assert [name for name, _ in state.buffers()] == [
        "model.norm.running_mean",
        "model.norm.running_var",
        "model.norm.num_batches_tracked",
    ]
    assert state.trees()["optimizer"]["groups"][0]["params"][:2] == ["fc1.weight", "fc1.bias"]


def test_module_names_lead_optimizer_state_only_where_two_would_share_one() -> None:
    def names(setup: Setup) -> set[str]:
        objects = build(setup, 0)
        state = tracked(objects)
        train(objects, range(1))
        return {name for name, _ in state.tensors() if name.endswith("exp_avg")}

    assert "opt_g.state.fc1.weight.exp_avg" in names(gan)
    assert {"optimizer.state.model.fc1.weight.exp_avg", "optimizer.state.critic.fc1.weight.exp_avg"} <= names(
        both_in_one
    )


def test_tensors_are_live_and_stay_the_same_objects() -> None:
    objects = build(adamw(), 0)
    state = tracked(objects)
    assert len(state.replicated()) == 8
    train(objects, range(1))
    first = state.replicated()
    train(objects, range(1, 2))
    second = state.replicated()
    assert len(first) == 8 + 3 * 6
    assert [id(tensor) for _, tensor in first] == [id(tensor) for _, tensor in second]
    objects["model"].fc1.weight = nn.Parameter(torch.zeros(4, 4))
    assert dict(state.replicated())["model.fc1.weight"] is objects["model"].fc1.weight
    assert dict(state.replicated())["model.tied.weight"] is objects["model"].tied.weight


def test_a_group_added_later_is_held() -> None:
    model = Net()
    optimizer = torch.optim.SGD(model.fc1.parameters(), lr=0.1, momentum=0.9)
    state = tracked({"model": model, "optimizer": optimizer})
    model.head = nn.Linear(2, 2)
    optimizer.add_param_group({"params": model.head.parameters()})
    assert state.trees()["optimizer"]["groups"][1]["params"] == ["head.weight", "head.bias"]
    assert "model.head.weight" in dict(state.tensors())


def test_a_learning_rate_that_is_a_tensor_stays_the_same_tensor() -> None:
    def make(lr: float) -> tuple[TrackedState, torch.Tensor]:
        model, rate = nn.Linear(2, 2), torch.tensor(lr)
        return tracked({"model": model, "optimizer": torch.optim.Adam(model.parameters(), lr=rate)}), rate

    first, _ = make(0.5)
    second, rate = make(0.5)
    checkpoint = saved(first)
    checkpoint[1]["optimizer.param_groups.0.lr"].fill_(0.25)
    load(second, checkpoint)
    assert rate.item() == 0.25
    assert dict(second.tensors())["optimizer.param_groups.0.lr"] is rate


def test_float32_state_of_bfloat16_weights_is_not_rounded() -> None:
    class Careful(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            for parameter in self.param_groups[0]["params"]:
                self.state[parameter].setdefault("master", torch.full((2, 2), 1 / 3))

    def make() -> tuple[TrackedState, Any]:
        model = nn.Linear(2, 2, bias=False).bfloat16()
        optimizer = Careful(model.parameters(), lr=0.1)
        return tracked({"model": model, "optimizer": optimizer}), optimizer

    state, optimizer = make()
    optimizer.step()
    again, _ = make()
    load(again, saved(state))
    assert torch.equal(dict(again.tensors())["optimizer.state.weight.master"], torch.full((2, 2), 1 / 3))


def compiled(module: nn.Module) -> nn.Module:
    """Wrapped; nothing is compiled before the first call."""
    return torch.compile(module, backend="eager")


def test_wrappers_leave_no_trace_in_names() -> None:
    plain = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    inside = nn.Sequential(compiled(nn.Linear(2, 2)), nn.BatchNorm1d(2))
    names = [name for name, _ in tracked({"model": plain}).tensors()]
    assert [name for name, _ in tracked({"model": compiled(plain)}).tensors()] == names
    wrapped = tracked({"model": inside})
    assert [name for name, _ in wrapped.tensors()] == names
    assert load(wrapped, saved(tracked({"model": plain}))) == []
    assert torch.equal(inside[0]._modules["_orig_mod"].weight, plain[0].weight)


class Custom:
    """State with keys that are no strings, and lists of tensors."""

    def __init__(self, fill: float) -> None:
        self.state: Any = {
            3: [torch.full((2,), fill), {"deep": torch.full((1,), fill).double()}],
            ("a", 1): (fill, float("inf")),
            "array": np.full(2, fill),
            "number": np.float64(fill),
            "complex": torch.full((2,), complex(fill, -fill), dtype=torch.complex128),
            "ordered": OrderedDict(b=1, a=2),
        }

    def state_dict(self) -> Any:
        return self.state

    def load_state_dict(self, state: Any) -> None:
        self.state = state


def test_custom_objects() -> None:
    one, other = Custom(0.5), Custom(7.0)
    state = tracked({"thing": one})
    assert [name for name, _ in state.tensors()] == ["thing.3.0", "thing.3.1.deep", "thing.array", "thing.complex"]
    assert state.small().keys() == {"thing"} and state.big() == {}
    load(tracked({"thing": other}), saved(state))
    assert other.state[3][0].tolist() == [0.5, 0.5] and other.state[3][1]["deep"].dtype == torch.float64
    assert other.state[("a", 1)] == (0.5, float("inf"))
    assert isinstance(other.state["array"], np.ndarray) and other.state["array"].tolist() == [0.5, 0.5]
    assert other.state["number"] == 0.5
    assert other.state["complex"].tolist() == [0.5 - 0.5j] * 2
    assert list(other.state["ordered"]) == ["b", "a"]


def test_tensors_arrays_and_generators_are_restored_in_place() -> None:
    def make(seed: int) -> dict[str, Any]:
        return {
            "tensor": torch.full((2, 3), float(seed)),
            "view": torch.arange(8.0).add(seed)[::2],
            "pairs": torch.full((2,), complex(seed, 1), dtype=torch.complex128),
            "array": np.full((3,), seed, dtype=np.int32),
            "torch_generator": torch.Generator().manual_seed(seed),
            "numpy_generator": np.random.default_rng(seed),
            "legacy": np.random.RandomState(seed),
            "philox": np.random.Generator(np.random.Philox(seed)),
            "python": random.Random(seed),
        }

    def draw(objects: dict[str, Any]) -> list[float]:
        return [
            torch.rand(1, generator=objects["torch_generator"]).item(),
            objects["numpy_generator"].normal(),
            objects["legacy"].normal(),
            objects["philox"].normal(),
            objects["python"].gauss(0, 1),
        ]

    one, other = make(1), make(2)
    draw(one)
    checkpoint = saved(tracked(one))
    before = dict(other)
    load(tracked(other), checkpoint)
    assert all(other[name] is before[name] for name in before)
    assert other["tensor"].tolist() == one["tensor"].tolist()
    assert other["view"].tolist() == one["view"].tolist()
    assert other["pairs"].tolist() == one["pairs"].tolist()
    assert other["array"].tolist() == [1, 1, 1]
    assert draw(other) == draw(one)


def test_grad_scaler_and_extra_state() -> None:
    class Counting(nn.Linear):
        calls = 0

        def get_extra_state(self) -> Any:
            return {"calls": self.calls, "seen": torch.full((1,), float(self.calls))}

        def set_extra_state(self, state: Any) -> None:
            self.calls = int(state["calls"] + state["seen"].item() * 100)

    def make() -> dict[str, Any]:
        return {"model": nn.Sequential(Counting(1, 1)), "scaler": torch.amp.GradScaler("cpu", init_scale=8.0)}

    one, other = make(), make()
    one["model"][0].calls = 3
    one["scaler"]._init_scale = 4.0
    state = tracked(one)
    assert "model.0._extra_state.seen" in dict(state.tensors())
    load(tracked(other), saved(state))
    assert other["model"][0].calls == 303
    assert other["scaler"].state_dict()["scale"] == 4.0


def test_per_rank_values_carry_the_rank() -> None:
    noise = torch.zeros(2)
    state = TrackedState(rank=3)
    state.add({"noise": noise, "shared": torch.ones(1), "own": nn.BatchNorm1d(1)}, per_rank={"noise", "own"})
    assert [name for name, _ in state.replicated()] == ["shared"]
    assert [name for name, _ in state.per_rank()][0:2] == ["noise@3", "own@3.weight"]
    assert state.buffers() == []
    shared, own = state.split(state.trees())
    assert (list(shared), list(own)) == (["shared"], ["noise", "own"])
    elsewhere = TrackedState(rank=1)
    moved = torch.ones(2)
    elsewhere.add({"noise": moved}, per_rank="noise")
    load(elsewhere, saved(state), names=["noise"])
    assert moved.tolist() == [0, 0]


# -- what is refused ---------------------------------------------------------------------------------------------------


def strangers() -> dict[str, Any]:
    return {"optimizer": torch.optim.SGD(Net().parameters(), lr=0.1)}


class NoWayBack:
    def state_dict(self) -> dict[str, Any]:
        return {}


class Opaque(Custom):
    def state_dict(self) -> Any:
        return {"deep": [object()]}


@pytest.mark.parametrize(
    ("named", "message"),
    [
        ({"best_acc": 0.0}, '`track(best_acc=0.0)`: a number can only be copied; use `run.state["best_acc"]`.'),
        ({"note": "hi"}, "`track(note='hi')`: a string can only be copied; use `run.state[\"note\"]`."),
        ({"x": None}, '`track(x=None)`: None can only be copied; use `run.state["x"]`.'),
        ({"x": np.float32(1)}, '`track(x=np.float32(1.0))`: a number can only be copied; use `run.state["x"]`.'),
        ({"x": [1]}, "`track(x=…)`: a list has no `state_dict`;"),
        ({"x": object()}, "`track(x=…)`: an object has no `state_dict` and no `load_state_dict`,"),
        ({"x": NoWayBack()}, "`track(x=…)`: a NoWayBack has no `load_state_dict`, so it could not be restored;"),
        ({"x": Opaque(1.0)}, "`track(x=…)`: x.deep[0] is an object, neither tensor nor JSON"),
        (strangers(), "`optimizer` holds 8 parameters of no tracked module; build it after `run.prepare(model)`,"),
        ({"x": torch.zeros(2).to_sparse()}, "`x` is a tensor of kind torch.sparse_coo on cpu, which"),
        ({"x": np.array(["a"])}, "`track(x=…)`: this array of <U1 cannot be held"),
    ],
)
def test_refusals(named: dict[str, Any], message: str) -> None:
    state = TrackedState()
    with pytest.raises(UsageError) as caught:
        state.add({"fine": nn.Linear(1, 1), **named})
    assert str(caught.value).startswith(message), str(caught.value)
    assert state.names == []


def test_nothing_is_tracked_twice() -> None:
    model = nn.Linear(1, 1)
    state = tracked({"model": model})
    with pytest.raises(UsageError, match="`track\\(model=…\\)`: the name is tracked already"):
        state.add({"model": nn.Linear(1, 1)})
    with pytest.raises(UsageError, match="`track\\(again=…\\)`: this very object is tracked as `model` already"):
        state.add({"again": model})
    with pytest.raises(UsageError, match="`track\\(per_rank=…\\)` names noise, which this call does not track"):
        state.add({"x": torch.zeros(1)}, per_rank={"noise"})


def test_a_checkpoint_of_another_model_changes_nothing() -> None:
    first = nn.ModuleDict({"a": nn.Linear(2, 3), "b": nn.Linear(1, 1), "old": nn.Linear(1, 1, bias=False)})
    other = nn.ModuleDict({"a": nn.Linear(2, 5), "b": nn.Linear(1, 1), "new": nn.Linear(1, 1, bias=False)})
    checkpoint = saved(tracked({"model": first, "gone": torch.zeros(1), "kind": torch.zeros(1)}))
    before = {name: value.clone() for name, value in other.state_dict().items()}
    state = tracked({"model": other, "fresh": torch.zeros(1), "kind": random.Random(1)})
    with pytest.raises(ConfigRefusedError) as caught:
        load(state, checkpoint)
    assert str(caught.value).splitlines() == [
        "The checkpoint is of another model; nothing was changed. What differs:",
        "  gone: only in the checkpoint",
        "  model.a.weight: 3×2 in the checkpoint, 5×2 here",
        "  model.a.bias: 3 in the checkpoint, 5 here",
        "  model.new.weight: not in the checkpoint",
        "  model.old.weight: only in the checkpoint",
        "  fresh: not in the checkpoint",
        "  kind: stored as tensor, tracked here as generator",
        "Restore the script that wrote it, or start a new run with `--run-name`.",
    ]
    assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())


def test_long_lists_of_differences_are_cut() -> None:
    checkpoint = saved(tracked({"model": nn.Sequential(*[nn.Linear(1, 1) for _ in range(20)])}))
    with pytest.raises(ConfigRefusedError) as caught:
        load(tracked({"model": nn.Sequential(*[nn.Linear(2, 2) for _ in range(20)])}), checkpoint)
    lines = str(caught.value).splitlines()
    assert len(lines) == 23 and lines[-2] == "  … and 20 more"


def test_partial_takes_what_fits() -> None:
    first = nn.ModuleDict({"a": nn.Linear(1, 1), "old": nn.Linear(1, 1)})
    other = nn.ModuleDict({"a": nn.Linear(1, 1), "new": nn.Linear(1, 1)})
    load(tracked({"model": other, "fresh": torch.zeros(1)}), saved(tracked({"model": first})), partial=True)
    assert torch.equal(other["a"].weight, first["a"].weight)


def test_parameter_groups_that_differ() -> None:
    def make(order: int) -> TrackedState:
        model = nn.ModuleDict({"a": nn.Linear(1, 1, bias=False), "b": nn.Linear(1, 1, bias=False)})
        parts = list(model.parameters())[::order]
        return tracked({"model": model, "optimizer": torch.optim.SGD([{"params": [p]} for p in parts], lr=0.1)})

    with pytest.raises(ConfigRefusedError) as caught:
        load(make(-1), saved(make(1)))
    assert "\n  optimizer, parameter group 0: a.weight is only in the checkpoint\n" in str(caught.value)
    assert "\n  optimizer, parameter group 0: b.weight is not in the checkpoint\n" in str(caught.value)


def test_the_checkpoints_hyperparameters_win_and_that_is_said() -> None:
    def make(lr: float, decay: float, gamma: float = 0.5) -> dict[str, Any]:
        model = nn.Linear(1, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=lr, weight_decay=decay)
        scheduler = lr_scheduler.ExponentialLR(optimizer, gamma)
        return {"model": model, "optimizer": optimizer, "scheduler": scheduler}

    first = make(0.1, 0.0)
    state = tracked(first)
    first["optimizer"].step()
    first["scheduler"].step()
    again = make(0.1, 0.0)
    assert load(tracked(again), saved(state)) == []  # decayed by the scheduler: no news
    assert again["optimizer"].param_groups[0]["lr"] == 0.05
    other = make(0.01, 0.3)
    changed = tracked(other)
    notices = [
        "The checkpoint's lr 0.1 is used, not the script's 0.01; for a new run add `--run-name`.",
        "The checkpoint's weight_decay 0.0 is used, not the script's 0.3; for a new run add `--run-name`.",
    ]
    assert load(changed, saved(state)) == notices
    assert other["optimizer"].param_groups[0]["lr"] == 0.05
    assert load(tracked(make(0.01, 0.3)), saved(changed)) == notices


def test_a_dtype_that_differs_is_converted_and_that_is_said() -> None:
    notices = load(tracked({"model": nn.Linear(2, 2).bfloat16()}), saved(tracked({"model": nn.Linear(2, 2)})))
    assert notices == ["2 tensors of `model` are float32 in the checkpoint and were converted to bfloat16."]


# -- writes and steps --------------------------------------------------------------------------------------------------


def test_versions_move_with_writes_and_not_with_buffers() -> None:
    objects = {**build(adamw(), 0), "extra": torch.zeros(1)}
    state = tracked(objects)
    seen = [state.mutable_versions()]

    def moved() -> bool:
        seen.append(state.mutable_versions())
        return seen[-1] != seen[-2]

    assert not moved()
    objects["model"](torch.randn(4, 4))
    assert not moved()
    with torch.no_grad():
        objects["model"].fc1.weight.add_(1)
    assert moved()
    train(objects, range(1))
    assert moved()
    objects["extra"].add_(1)
    assert moved()
    assert not moved()


def test_fingerprint() -> None:
    def of(width: int, **more: Any) -> str:
        return tracked({"model": Net(width), **more}).fingerprint()

    assert of(3) == of(3)
    assert len({of(3), of(4), of(3, x=torch.zeros(1)), of(3, x=torch.zeros(2))}) == 4


class Homemade:
    """An optimizer that is none of torch's."""

    def __init__(self) -> None:
        self.steps = 0

    def zero_grad(self) -> None: ...

    def step(self) -> str:
        self.steps += 1
        return "done"

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


class Unhooked(torch.optim.SGD):
    """Replaces `step` on the instance, past the class's hooks."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.step = lambda closure=None: "mine"  # type: ignore[method-assign]


@pytest.mark.parametrize("scheduler_first", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW, Unhooked])
def test_steps_are_announced(kind: Any, scheduler_first: bool) -> None:
    model = nn.Linear(1, 1)
    optimizer = kind(model.parameters(), lr=0.1)
    log: list[str] = []
    if scheduler_first and kind is not Unhooked:
        lr_scheduler.StepLR(optimizer, 1)
    state = TrackedState()
    state.watch(lambda who: log.append("before"), lambda who: log.append("after"))
    state.add({"model": model, "optimizer": optimizer, "mine": Homemade()})
    if not scheduler_first:
        lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    assert log == ["before", "after"]
    torch.amp.GradScaler("cpu", enabled=False).step(optimizer)
    assert log == ["before", "after"] * 2
    assert state.optimizers["mine"].step() == "done"
    assert log == ["before", "after"] * 3
