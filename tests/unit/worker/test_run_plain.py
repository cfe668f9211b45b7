"""Plain `python train.py`, one rank: the script's API, sentence by sentence."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import orchestrator
from orchestrator.errors import ConfigRefusedError, StorageError, UsageError
from orchestrator.storage.checkpoints import list_checkpoints, open_run
from orchestrator.worker import plain_writer
from orchestrator.worker import run as run_module
from orchestrator.worker.plain_end import ScriptEnd
from orchestrator.worker.run import Run
from orchestrator.worker.saving import PlainSaver

ROOT = Path(__file__).resolve().parents[3]
DATA = torch.utils.data.TensorDataset(
    torch.randn(48, 6, generator=torch.Generator().manual_seed(1)), torch.arange(48) % 3
)


class Start:
    """Starts of one script in one process; `crash` ends one as a kill would."""

    def __init__(self, storage: str) -> None:
        self.storage = storage
        self.runs: list[Run] = []

    def __call__(self, script_seed: int | None = None, **environ: str) -> Run:
        self.crash()
        if script_seed is None:
            run_module._UNSEEDED = torch.seed()  # as in a new process
        else:
            torch.manual_seed(script_seed)
        os.environ.update({f"ORCHESTRATOR_{name.upper()}": value for name, value in environ.items()})
        try:
            run = Run()
        finally:
            for name in environ:
                os.environ.pop(f"ORCHESTRATOR_{name.upper()}")
        self.runs.append(run)
        return run

    def crash(self) -> None:
        for run in self.runs:
            if isinstance(run.saver, PlainSaver):
                run.saver.abandon()
        self.runs.clear()

    def reasons(self) -> list[tuple[int, str, str]]:
        return [(r.step, r.reason, r.name) for r in list_checkpoints(open_run(f"{self.storage}/train"))]


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    for name in [name for name in os.environ if name.startswith("ORCHESTRATOR_")]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    monkeypatch.setenv("ORCHESTRATOR_STORAGE", str(tmp_path / "runs"))
    monkeypatch.setenv("ORCHESTRATOR_RUN_NAME", "train")
    made = Start(str(tmp_path / "runs"))
    yield made
    made.crash()


@pytest.fixture
def bare(start: Start, monkeypatch: pytest.MonkeyPatch) -> Start:
    """Nothing is stored."""
    monkeypatch.delenv("ORCHESTRATOR_STORAGE")
    return start


def build(run: Run, lr: float = 0.01) -> tuple[nn.Module, torch.optim.Optimizer]:
    net = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 3))
    model = run.prepare(net)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    run.track(model=model, optimizer=optimizer)
    return model, optimizer


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> torch.Tensor:
    x, y = batch
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss


def weights(model: nn.Module) -> list[torch.Tensor]:
    return [value.detach().clone() for value in model.state_dict().values()]


def assert_equal(one: list[torch.Tensor], other: list[torch.Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def end(run: Run) -> None:
    """The interpreter's normal end."""
    assert isinstance(run.saver, PlainSaver)
    ScriptEnd(run, run.saver).ended()


# -- init ---------------------------------------------------------------------------------------------------------


def test_without_storage_nothing_is_stored_or_resumed(bare: Start, tmp_path: Path) -> None:
    run = bare()
    model, optimizer = build(run)
    for batch in run.batches(DATA, batch_size=16):
        train(model, optimizer, batch)
    run.save("kept")
    assert (run.step, run.rank, run.local_rank, run.world_size, run.attempt, run.is_main) == (3, 0, 0, 1, 0, True)
    assert str(run.device) == "cpu"
    assert bare().step == 0
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("script_seed", "environ", "expected"),
    [(None, {}, 0), (11, {}, 11), (11, {"seed": "5"}, 5), (None, {"seed": "5"}, 5)],
)
def test_seed_is_the_option_else_the_scripts_else_0(
    bare: Start, script_seed: int | None, environ: dict[str, str], expected: int
) -> None:
    assert bare(script_seed, **environ).seed == expected


def test_the_seed_is_kept_with_the_run(start: Start) -> None:
    run = start(3, save_at="1")
    model, optimizer = build(run)
    for batch in run.batches(DATA, batch_size=16):
        train(model, optimizer, batch)
        if run.step == 1:
            break
    assert start(99).seed == 3
    with pytest.raises(ConfigRefusedError, match="started with seed 3; `--seed 8`"):
        start(seed="8")


def test_a_live_run_is_not_started_twice(start: Start) -> None:
    start()
    with pytest.raises(UsageError, match="is live"):
        Run()


def test_a_checkpoint_is_saved_although_old_ones_cannot_be_removed(
    start: Start, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise StorageError("read-only")

    monkeypatch.setattr(plain_writer, "prune", fail)
    run = start()
    model, optimizer = build(run)
    for batch in run.batches(DATA, batch_size=16):
        train(model, optimizer, batch)
        if run.step == 0:
            run.save("kept")
    end(run)
    assert ("kept" in [name for _, _, name in start.reasons()], run.step) == (True, 3)
    said = capfd.readouterr().err
    assert "orchestrator: old checkpoints could not be removed (read-only); training goes on" in said
    assert "was not saved" not in said


def test_variables_that_cannot_be_read_are_named(bare: Start) -> None:
    with pytest.raises(UsageError, match="ORCHESTRATOR_SAVE_EVERY=5lightyears: unknown unit"):
        bare(save_every="5lightyears")


# -- run.state ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(2), r"run\.state\['x'\] is a Tensor; .* `\.item\(\)`"),
        ((1, 2), r"run\.state\['x'\] is a tuple; .* Make it a list"),
        ({3: "a"}, r"run\.state\['x'\] has the key 3 of type int, which would come back as a string; use '3'"),
        ([1, {"deep": {1}}], r"run\.state\['x'\]\[1\]\['deep'\] is a set"),
        (object(), r"run\.state\['x'\] is an object; .*`state_dict` belongs in `run\.track`"),
    ],
)
def test_state_that_is_not_json_is_refused_by_its_key(bare: Start, value: Any, message: str) -> None:
    run = bare()
    model, optimizer = build(run)
    run.state["fine"] = float("nan")
    run.state["x"] = value
    with pytest.raises(UsageError, match=message):
        for batch in run.batches(DATA, batch_size=16):
            train(model, optimizer, batch)


def test_state_is_restored_by_init_as_of_the_checkpoint(start: Start) -> None:
    run = start(save_at="2")
    model, optimizer = build(run)
    nested: dict[str, Any] = {"list": [], "best": float("inf")}
    run.state["nested"] = nested
    for batch in run.batches(DATA, batch_size=16):
        train(model, optimizer, batch)
        nested["list"].append(run.step)
    assert start().state == {"nested": {"list": [0, 1], "best": float("inf")}}


# -- prepare and track --------------------------------------------------------------------------------------------


def test_track_refuses_what_it_cannot_hold(bare: Start) -> None:
    run = bare()
    net = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    text = r'`track\(best_acc=0\.0\)`: a number can only be copied; use `run\.state\["best_acc"\]`'
    with pytest.raises(UsageError, match=text):
        run.track(best_acc=0.0)
    with pytest.raises(UsageError, match=r'a string can only be copied; use `run\.state\["tag"\]`'):
        run.track(tag="a")
    text = r"`optimizer` holds 2 parameters of no tracked module; build it after `run\.prepare"
    with pytest.raises(UsageError, match=text):
        run.track(optimizer=optimizer)
    with pytest.raises(UsageError, match="Nothing is tracked"):
        next(iter(run.steps(3)))


def test_track_restores_right_there_and_the_checkpoints_lr_counts(
    start: Start, capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(save_at="3")
    model, optimizer = build(run)
    for batch in run.batches(DATA, batch_size=16):
        train(model, optimizer, batch)
    expected = weights(model)
    run = start()
    model, optimizer = build(run, lr=0.5)
    assert_equal(weights(model), expected)
    assert (run.step, run.epoch, optimizer.param_groups[0]["lr"]) == (3, 0, 0.01)
    text = "The checkpoint's lr 0.01 is used, not the script's 0.5; for a new run add `--run-name`."
    assert text in capsys.readouterr().out


# -- loops --------------------------------------------------------------------------------------------------------


def test_step_is_the_index_inside_the_body_and_the_count_after(bare: Start) -> None:
    run = bare()
    model, optimizer = build(run)
    loop = run.batches(DATA, batch_size=16, epochs=2)
    assert len(loop) == 6
    seen = []
    for batch in loop:
        seen.append((run.step, run.epoch))
        train(model, optimizer, batch)
    assert seen == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 1)]
    assert run.step == 6


def test_resume_is_exact(start: Start) -> None:
    def whole(run: Run, until: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        model, optimizer = build(run)
        losses = []
        for batch in run.batches(DATA, batch_size=10, epochs=3):
            losses.append(train(model, optimizer, batch).detach())
            if run.step == until:
                raise KeyError
        return weights(model), losses

    expected, losses = whole(start(run_name="calm"), -1)
    with pytest.raises(KeyError):
        whole(start(save_every="3steps"), 7)
    run = start()
    assert run.step == 6
    found, rest = whole(run, -1)
    assert_equal(found, expected)
    assert_equal(rest, losses[6:])


class Numbers(torch.utils.data.IterableDataset[Any]):
    """An iterable that knows its place."""

    def __init__(self) -> None:
        self.at = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while self.at < 6:
            self.at += 1
            yield torch.full((2, 6), float(self.at))
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("source", ["iterable", "loader"])
def test_other_sources_resume_at_the_exact_sample(start: Start, source: str) -> None:
    def script(run: Run, until: int) -> list[float]:
        weight = torch.zeros(1)
        run.track(weight=weight)
        seen = []
        loader = torch.utils.data.DataLoader(DATA, batch_size=8, shuffle=True)
        for batch in run.batches(Numbers() if source == "iterable" else loader, epochs=2):
            seen.append(float(batch.mean() if source == "iterable" else batch[0].sum()))
            weight += 1
            if run.step == until:
                raise KeyError
        return seen

    expected = script(start(run_name="calm"), -1)
    with pytest.raises(KeyError):
        script(start(save_every="3steps"), 8)
    run = start()
    assert run.step == 6
    assert script(run, -1) == expected[6:]


def test_a_save_by_the_clock(start: Start) -> None:
    run = start(save_every="100s")
    model, optimizer = build(run)
    for batch in run.batches(DATA, batch_size=8):
        train(model, optimizer, batch)
        if run.step == 3:
            run._last_save -= 100
    run.saver.abandon()
    assert start.reasons() == [(4, "periodic", "")]


def test_accumulation_yields_microbatches_and_counts_steps(bare: Start) -> None:
    run = bare()
    model, optimizer = build(run)
    seen = []
    for x, y in run.batches(DATA, batch_size=16, accumulate=2):
        seen.append((run.step, len(x), run.last_microbatch))
        (F.cross_entropy(model(x), y) / 2).backward()
        if run.last_microbatch:
            optimizer.step()
            optimizer.zero_grad()
    assert seen == [(0, 8, False), (0, 8, True), (1, 8, False), (1, 8, True), (2, 8, False), (2, 8, True)]
    assert run.step == 3


def test_a_step_in_the_middle_of_an_accumulation_is_refused(bare: Start) -> None:
    run = bare()
    model, optimizer = build(run)
    with pytest.raises(UsageError, match=r"optimizer\.step\(\) in microbatch 1 of a step.*run\.last_microbatch"):
        for batch in run.batches(DATA, batch_size=16, accumulate=2):
            train(model, optimizer, batch)


def test_max_steps_drop_last_and_too_large_a_batch(bare: Start) -> None:
    run = bare()
    build(run)
    assert len(run.batches(DATA, batch_size=10, max_steps=7, name="a")) == 7
    assert len(run.batches(DATA, batch_size=10, name="b")) == 4
    assert len(run.batches(DATA, batch_size=10, drop_last=False, name="c")) == 5
    text = "48 samples make no full batch of 64, so nothing would train; lower `batch_size`"
    with pytest.raises(UsageError, match=text):
        run.batches(DATA, batch_size=64, name="d")


def test_validation_sees_each_sample_once_and_leaves_randomness_alone(bare: Start) -> None:
    run = bare()
    model, optimizer = build(run)
    drawn: dict[bool, list[torch.Tensor]] = {False: [], True: []}
    for validates in (False, True):
        for batch in run.batches(DATA, batch_size=16, max_steps=2, name=str(validates), seed=1):
            if validates:
                parts = [x for x, _ in run.batches(DATA, batch_size=20, train=False)]
                assert [len(part) for part in parts] == [20, 20, 8]
                assert sorted(torch.cat(parts)[:, 0].tolist()) == sorted(DATA.tensors[0][:, 0].tolist())
            before = torch.get_rng_state()
            list(run.batches(DATA, batch_size=20, train=False, shuffle=True))
            assert torch.equal(torch.get_rng_state(), before)
            drawn[validates].append(batch[0])
            train(model, optimizer, batch)
    assert_equal(drawn[False], drawn[True])
    assert run.step == 4


def test_a_second_loop_needs_a_name(bare: Start) -> None:
    run = bare()
    build(run)
    run.batches(DATA, batch_size=16)
    with pytest.raises(UsageError) as caught:
        run.batches(DATA, batch_size=16)
    line = caught.traceback[0].lineno + 1
    assert str(caught.value) == (
        f"Second `run.batches` at test_run_plain.py:{line}: for validation pass `train=False`; for epochs use "
        "`run.epochs(n)`; for a new phase pass `name=`."
    )
    run.batches(DATA, batch_size=16, name="more")


def test_a_finished_loop_yields_nothing_and_what_follows_starts_from_its_last_checkpoint(start: Start) -> None:
    def script(run: Run, fails: bool) -> list[tuple[str, int]]:
        model, optimizer = build(run)
        seen = []
        for name in ("first", "second"):
            for batch in run.batches(DATA, batch_size=16, name=name):
                seen.append((name, run.step))
                train(model, optimizer, batch)
                if fails and run.step == 4:
                    raise KeyError
        return seen

    with pytest.raises(KeyError):
        script(start(save_every="2steps"), True)
    assert script(start(), False) == [("second", 4), ("second", 5)]


def test_break_counts_the_step_if_an_optimizer_stepped(start: Start) -> None:
    run = start()
    model, optimizer = build(run)
    for batch in run.batches(DATA, batch_size=16, epochs=5):
        if run.step == 2:
            break
        train(model, optimizer, batch)
    assert (run.step, run.samples) == (2, 32)
    for batch in run.batches(DATA, batch_size=16, name="after"):
        train(model, optimizer, batch)
        break
    assert (run.step, run.samples) == (3, 48)
    end(run)
    assert start.reasons() == [(3, "final", "")]
    run = start()
    build(run)
    assert [0 for name in (None, "after") for _ in run.batches(DATA, batch_size=16, epochs=5, name=name)] == []


def test_finish_ends_the_run_for_good(start: Start) -> None:
    def script(run: Run) -> list[int]:
        model, optimizer = build(run)
        seen = []
        for name in (None, "second"):
            for batch in run.batches(DATA, batch_size=16, epochs=3, name=name):
                seen.append(run.step)
                train(model, optimizer, batch)
                if run.step == 4:
                    run.finish("good enough")
        end(run)
        return seen

    assert script(start()) == [0, 1, 2, 3, 4]
    assert start.reasons() == [(5, "final", "")]
    assert script(start()) == []


def test_steps_count_from_0_and_go_on(start: Start) -> None:
    def script(run: Run, total: int, fails_at: int = -1) -> list[int]:
        weight = torch.zeros(1)
        run.track(weight=weight)
        seen = []
        for index in run.steps(total):
            seen.append(index)
            weight += 1
            if index == fails_at:
                raise KeyError
        assert weight.item() == run.step == total
        end(run)
        return seen

    with pytest.raises(KeyError):
        script(start(save_every="2steps"), 5, fails_at=4)
    assert script(start(), 5) == [4]
    assert script(start(), 7) == [5, 6]  # a completed run with more to do


def test_a_completed_run_says_so(start: Start, capsys: pytest.CaptureFixture[str]) -> None:
    for _ in range(2):
        run = start()
        model, optimizer = build(run)
        for batch in run.batches(DATA, batch_size=16):
            train(model, optimizer, batch)
        end(run)
    assert start.reasons() == [(3, "final", "")]
    assert "complete at step 3; raise epochs or name a new run" in capsys.readouterr().out


# -- epochs -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fails", ["body", "tail", "nowhere"])
def test_what_follows_the_inner_loop_takes_effect_once_per_epoch(start: Start, fails: str) -> None:
    def script(run: Run, fails: str) -> tuple[list[Any], float]:
        model, optimizer = build(run)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
        run.track(scheduler=scheduler)
        for epoch in run.epochs(3):
            assert run.epoch == epoch
            for batch in run.batches(DATA, batch_size=16):
                train(model, optimizer, batch)
                if fails == "body" and run.step == 4:
                    raise KeyError
            scheduler.step()
            run.state.setdefault("tails", []).append(epoch)
            if fails == "tail" and epoch == 1:
                raise KeyError
        return run.state["tails"], optimizer.param_groups[0]["lr"]

    if fails != "nowhere":
        with pytest.raises(KeyError):
            script(start(save_every="1steps"), fails)
    run = start()
    assert script(run, "nowhere") == ([0, 1, 2], 0.01 / 8)
    assert run.step == 9


# -- what counts as a step ----------------------------------------------------------------------------------------


def test_a_loop_without_any_optimizer_step_counts_nothing(start: Start) -> None:
    run = start(save_every="1steps")
    build(run)
    assert [index for index in run.steps(4)] == [0, 1, 2, 3]
    assert run.step == 0
    end(run)
    assert start.reasons() == [(0, "final", "")]


def test_a_step_that_a_scaler_skips_is_not_counted(bare: Start) -> None:
    run = bare()
    model, optimizer = build(run)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    run.track(scaler=scaler)
    for index, (x, y) in enumerate(run.batches(DATA, batch_size=16)):
        loss = F.cross_entropy(model(x), y) * (float("inf") if index == 1 else 1.0)
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        assert run.guard.dirty == (index != 1)
    assert run.step == 2


class Hookless:
    """An optimizer of the user's own."""

    def __init__(self, parameters: Iterator[nn.Parameter]) -> None:
        self.parameters, self.steps = list(parameters), 0

    def step(self) -> None:
        self.steps += 1
        with torch.no_grad():
            for parameter in self.parameters:
                parameter.add_(1)

    def zero_grad(self) -> None:
        pass

    def state_dict(self) -> dict[str, int]:
        return {"steps": self.steps}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.steps = state["steps"]


def test_an_optimizer_without_hooks_counts(bare: Start) -> None:
    run = bare()
    model = run.prepare(nn.Linear(6, 3))
    optimizer = Hookless(model.parameters())
    run.track(model=model, optimizer=optimizer)
    for _ in run.steps(3):
        assert not run.guard.dirty
        optimizer.step()
        assert run.guard.dirty
    assert run.step == optimizer.steps == 3


def test_a_write_that_no_hook_announced_is_noticed(bare: Start) -> None:
    run = bare()
    model, optimizer = build(run)
    average = torch.zeros(3)
    run.track(average=average)
    for batch in run.batches(DATA, batch_size=16):
        assert run.guard.is_clean()
        average += 1
        assert not run.guard.is_clean()
        train(model, optimizer, batch)


def test_gradients_carried_over_a_boundary_make_it_no_resume_point(bare: Start) -> None:
    run = bare()
    one, other = run.prepare(nn.Linear(6, 3)), run.prepare(nn.Linear(6, 3))
    every, seldom = torch.optim.SGD(one.parameters(), lr=0.1), torch.optim.SGD(other.parameters(), lr=0.1)
    run.track(one=one, other=other, every=every, seldom=seldom)
    points = []
    for x, y in run.batches(DATA, batch_size=8):
        points.append(run.guard.resume_step)
        every.zero_grad()
        F.cross_entropy(one(x) + other(x), y).backward()
        every.step()
        if run.step % 3 == 2:
            seldom.step()
            seldom.zero_grad()
    assert points == [0, 0, 0, 3, 3, 3]
    assert run.step == run.guard.resume_step == 6


# -- log, mean, save, load ----------------------------------------------------------------------------------------


def test_log_takes_numbers_and_never_warns(start: Start) -> None:
    run = start()
    model, optimizer = build(run)
    total = torch.zeros(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in run.batches(DATA, batch_size=16):
            total += 1
            run.log(loss=train(model, optimizer, batch), half=0.5, total=total)
        total.zero_()
    with pytest.raises(UsageError, match=r"run\.log\(loss=…\) takes one number, not a tensor of shape \(2,\)"):
        run.log(loss=torch.ones(2))
    with pytest.raises(UsageError, match="takes a number, not a str"):
        run.log(name="x")
    assert run.mean(3, weight=2) == 3.0
    end(run)
    record = list_checkpoints(open_run(f"{start.storage}/train"))[-1]
    assert (record.metrics["half"], record.metrics["total"]) == (0.5, 3.0)


def test_save_at_the_next_resume_point_and_load(start: Start) -> None:
    run = start(keep_last="1", save_every="2steps")
    model, optimizer = build(run)
    kept: dict[str, torch.Tensor] = {}
    for batch in run.batches(DATA, batch_size=8):
        if run.step == 2:
            run.save("best-so-far")
            run.save()
        train(model, optimizer, batch)
        if run.step == 2:
            kept = {name: value.clone() for name, value in model.state_dict().items()}
    end(run)
    assert start.reasons() == [(3, "requested", "best-so-far"), (6, "final", "")]
    state = orchestrator.load(f"{start.storage}/train@best-so-far")["model"]
    assert state.keys() == kept.keys()
    assert all(torch.equal(state[name], kept[name]) for name in kept)
    with pytest.raises(UsageError, match="already means something else"):
        run.save("last")


# -- the end ------------------------------------------------------------------------------------------------------

SCRIPT = """
import sys, torch, orchestrator
run = orchestrator.init()
assert orchestrator.init() is run
net = run.prepare(torch.nn.Sequential(torch.nn.Linear(2, 4), torch.nn.BatchNorm1d(4)))
optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
run.track(net=net, optimizer=optimizer)
data = torch.utils.data.TensorDataset(torch.arange(24.0).reshape(12, 2))
for x, in run.batches(data, batch_size=2):
    print("step", run.step)
    loss = net(x).square().mean(); optimizer.zero_grad(); loss.backward()
    if "body" in sys.argv[1] and run.step == 3: raise RuntimeError("in the body")
    optimizer.step()
if "after" in sys.argv[1]: raise RuntimeError("after the loop")
print("sum", sum(float(value.double().sum()) for value in net.state_dict().values()))
"""


WARM = """
import gc, json, os, sys
import torch, torch._dynamo
gc.collect(), gc.freeze()  # or every end of a script would search all of torch for garbage: seconds

def serve():
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            return json.loads(line)
        print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)

job = serve()
if job:
    os.chdir(job["cwd"])
    os.environ.update(job["environ"])
    output = os.open("output", os.O_CREAT | os.O_WRONLY | os.O_TRUNC)
    os.dup2(output, 1), os.dup2(output, 2)
    sys.argv = ["train.py", *job["arguments"]]
    exec(compile(open("train.py").read(), "train.py", "exec"), {"__name__": "__main__", "__file__": "train.py"})
"""
Script = Callable[..., tuple[int, list[str]]]


@pytest.fixture(scope="module")
def interpreter() -> Iterator[subprocess.Popen[str]]:
    """A plain interpreter that has imported torch and becomes a script by forking: ends are those of real processes."""
    env = {k: v for k, v in os.environ.items() if not k.startswith("ORCHESTRATOR_")}
    with subprocess.Popen(
        [sys.executable, "-c", WARM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env={**env, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip
        yield process
        process.kill()


@pytest.fixture
def script(interpreter: subprocess.Popen[str], tmp_path: Path) -> Script:
    """Run train.py to its end; exit code and lines of output."""

    def run(text: str, *arguments: str, **environ: str) -> tuple[int, list[str]]:
        (tmp_path / "train.py").write_text(text)
        job = {"cwd": str(tmp_path), "arguments": arguments, "environ": environ}
        assert interpreter.stdin is not None and interpreter.stdout is not None
        interpreter.stdin.write(json.dumps(job) + "\n")
        interpreter.stdin.flush()
        code = int(interpreter.stdout.readline())
        return code, (tmp_path / "output").read_text().splitlines()

    return run


def test_the_end_of_a_real_script(script: Script, tmp_path: Path) -> None:
    def launch(what: str, run: str = "r") -> tuple[int, list[str]]:
        return script(SCRIPT, what, ORCHESTRATOR_STORAGE="runs", ORCHESTRATOR_RUN_NAME=run)

    def reasons() -> list[tuple[int, str]]:
        return [(r.step, r.reason) for r in list_checkpoints(open_run(str(tmp_path / "runs/r")))]

    def steps(output: list[str]) -> list[str]:
        return [line for line in output if line.startswith("step")]

    code, calm = launch("calm", "calm")
    assert code == 0
    code, output = launch("body")
    assert (code, output[-1]) == (1, "RuntimeError: in the body")
    assert reasons() == [(3, "exception")]
    code, output = launch("after")
    assert (code, output[-1], steps(output)) == (1, "RuntimeError: after the loop", ["step 3", "step 4", "step 5"])
    assert reasons() == [(3, "exception"), (6, "exception")]
    code, output = launch("calm")
    assert (code, steps(output)) == (0, [])  # what was trained is not trained again
    assert [line for line in output if "sum" in line] == [line for line in calm if "sum" in line] != []
    assert reasons()[-1] == (6, "final")


def test_no_shared_memory_of_linux_is_needed(script: Script, tmp_path: Path) -> None:
    text = "import os; os.__dict__.pop('memfd_create', None)\n" + SCRIPT
    assert script(text, "calm", ORCHESTRATOR_STORAGE="runs")[0] == 0
    assert (tmp_path / "runs" / "train" / "commits").is_dir()


def test_the_seed_is_seen_although_this_package_is_imported_after_it(script: Script) -> None:
    text = "import torch; torch.manual_seed(77); import orchestrator; print(orchestrator.init().seed)"
    assert script(text) == (0, ["77"])
    assert script(text.replace("torch.manual_seed(77)", "0")) == (0, ["0"])
