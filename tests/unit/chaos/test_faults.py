"""`--fault` specifications, and what they come to."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from orchestrator.chaos.faults import START_S, Fault, RandomFaults, Undisturbed, parse, schedule
from orchestrator.errors import UsageError

CALM = Undisturbed(world_size=3, steps=100, step_s=0.02)


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("kill:rank=1,step=50", Fault("fault-1", "kill", 1, 50, "step")),
        ("kill:rank=1,step=50,signal=15", Fault("fault-1", "kill", 1, 50, "step", signal=15)),
        ("raise:rank=0,step=120,moment=backward,at=0.25", Fault("fault-1", "raise", 0, 120, "backward", 0.25)),
        ("exit:rank=0,step=9,code=0", Fault("fault-1", "exit", 0, 9, "step", code=0)),
        ("oom:rank=2,step=0,moment=save", Fault("fault-1", "oom", 2, 0, "save")),
        ("kill:rank=1,moment=start,at=0", Fault("fault-1", "kill", 1, 0, "start", 0.0)),
        ("random:seed=7,count=20,kinds=kill+exit", RandomFaults(7, 20, ("kill", "exit"))),
        ("random:", RandomFaults(0, 1)),
    ],
)
def test_specifications(spec: str, expected: Fault | RandomFaults) -> None:
    assert parse([spec]) == [expected]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("stop:rank=0,step=80", "`stop` is not available in this version: hangs are not detected yet"),
        ("node:rank=1,step=50", "`node` is not available in this version"),
        ("kil:rank=1,step=5", "there is no kind `kil`; did you mean `kill`?; there are kill, raise, exit, oom, random"),
        ("kill:rank=1", "`step=` is missing"),
        ("kill:step=1", "`rank=` is missing"),
        ("kill:rank=1,step=x", "step=x must be a whole number from 0 on"),
        ("kill:rank=1,step=1,step=2", "`step` is given twice"),
        ("kill:rank=1,step", "`step` is no KEY=VALUE"),
        ("kill:rank=1,step=1,code=3", "there is no key `code`"),
        ("kill:rank=1,step=1,signal=19", "signal 19 ends no process"),
        ("exit:rank=1,step=1,code=256", "code=256 must be a whole number from 0 to 255"),
        ("kill:rank=1,step=1,moment=backwards", "there is no moment `backwards`; did you mean `backward`?"),
        ("kill:rank=1,step=1,at=2", "at=2 must be a number from 0 to 1"),
        ("kill:rank=1,step=1,moment=start", "leave `step=` out"),
        ("raise:rank=1,moment=start", "never retried; use kill or exit"),
        ("random:seed=1,count=0", "count=0 must be a whole number from 1 to 1000"),
        ("random:seed=1,kinds=kill+stop", "`stop` is not available in this version"),
        ("random:seed=1,kinds=kill+fire", "there is no kind `fire`"),
    ],
)
def test_wrong_specifications_say_what_is_wrong(spec: str, says: str) -> None:
    with pytest.raises(UsageError) as refused:
        parse([spec])
    assert str(refused.value).startswith(f"--fault {spec}: ")
    assert says in str(refused.value)


def test_a_rank_or_step_that_never_comes_is_refused() -> None:
    with pytest.raises(UsageError, match="there is no rank 3 among 3 workers"):
        schedule(parse(["kill:rank=3,step=1"]), CALM)
    with pytest.raises(UsageError, match=r"`forward` of step 100 never comes: .* the last one to strike at is 99\."):
        schedule(parse(["kill:rank=0,step=100,moment=forward"]), CALM)
    (fault,) = schedule(parse(["kill:rank=0,step=100,moment=save"]), CALM)
    assert fault.step == 100
    with pytest.raises(UsageError, match="more than 5 steps; the undisturbed run has 5"):
        schedule(parse(["random:seed=1"]), replace(CALM, steps=5))


def test_timers_get_their_delay_and_start_up_faults_of_a_rank_wait_for_each_other() -> None:
    specs = ["kill:rank=1,moment=start,at=0.5", "exit:rank=1,moment=start", "kill:rank=0,moment=start"]
    specs += ["kill:rank=0,step=3,moment=any,at=0.5"]
    one, two, three, four = schedule(parse(specs), CALM)
    assert (one.delay_s, four.delay_s) == (0.5 * START_S, 0.5 * CALM.step_s)
    assert [fault.after for fault in (one, two, three, four)] == ["", "fault-1", "", ""]


def test_random_faults_are_a_function_of_the_seed() -> None:
    draw = lambda seed: schedule(parse([f"random:seed={seed},count=20"]), CALM)  # noqa: E731
    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


@pytest.mark.parametrize("seed", range(200))
def test_random_faults_can_all_strike(seed: int) -> None:
    faults = schedule(parse([f"random:seed={seed},count=5,kinds=kill+raise+exit"]), CALM)
    assert [fault.id for fault in faults] == [f"fault-{number}" for number in range(1, 6)]
    steps = [fault.step for fault in faults if fault.moment != "start"]
    assert steps == sorted(steps)
    for index, fault in enumerate(faults):
        assert 0 <= fault.rank < 3
        assert 0 <= fault.offset <= 1
        if fault.moment == "start":  # waits for the one before it, which must not be one that comes too late
            assert fault.after == (faults[index - 1].id if index else "")
            assert index or fault.kind != "raise"
        elif fault.moment == "save" and index == 4:
            assert fault.step == 100 or 2 <= fault.step < 97
        else:
            assert 2 + 19 * index <= fault.step < 2 + 19 * (index + 1)


def test_random_faults_strike_at_every_moment_in_every_way() -> None:
    drawn = [fault for seed in range(40) for fault in schedule(parse([f"random:seed={seed},count=5"]), CALM)]
    assert {fault.moment for fault in drawn} == {"start", "forward", "backward", "optimizer", "boundary", "save", "any"}
    assert {fault.kind for fault in drawn} == {"kill", "raise", "exit"}
    assert {fault.rank for fault in drawn} == {0, 1, 2}
    assert any(fault.step == 100 for fault in drawn)


def test_a_fault_crosses_as_json_with_everything_the_worker_reads() -> None:
    (fault,) = schedule(parse(["exit:rank=2,step=7,code=4"]), CALM)
    assert json.loads(fault.to_json()) == {
        "id": "fault-1", "kind": "exit", "rank": 2, "step": 7, "moment": "step", "offset": 0.5, "delay_s": 0.0,
        "code": 4, "signal": 9, "after": "",
    }  # fmt: skip
