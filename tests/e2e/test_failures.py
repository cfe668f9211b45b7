"""Faults of every kind, one after the other in few launches: cause told, no step lost, same final state."""

from __future__ import annotations

from typing import Any

import pytest

from tests.e2e.faulty import change, fired, roots, start
from tests.e2e.harness import Launcher, assert_equal_states, state

DEATHS: list[tuple[dict[str, Any], str]] = [
    ({"rank": 1, "step": 3, "where": "body", "what": "SIGKILL"}, "signal:9"),
    ({"rank": 0, "step": 6, "where": "backward", "what": "segv"}, "signal:11"),
    ({"rank": 1, "step": 9, "where": "forward", "what": "SIGTERM"}, "signal:15"),
    ({"rank": 0, "step": 12, "where": "optimizer", "what": "SIGABRT"}, "signal:6"),
    ({"rank": 1, "step": 15, "where": "body", "what": "sys.exit 3"}, "exit:3"),
    ({"rank": 0, "step": 18, "where": "after step", "what": "os._exit 3"}, "exit:3"),
    ({"rank": 1, "step": 21, "where": "dataset", "what": "os._exit 0"}, "exit:0"),
    ({"rank": 0, "step": 24, "where": "forward", "what": "broken forward"}, "exception"),
    ({"rank": 1, "step": 27, "where": "dataset", "what": "broken sample"}, "exception"),
    ({"rank": 0, "step": 30, "where": "body", "what": "memory"}, "oom"),
    ({"rank": 1, "step": 33, "where": "backward", "what": "broken hook"}, "exception"),
    ({"rank": 0, "step": 36, "where": "optimizer", "what": "broken optimizer"}, "exception"),
    ({"rank": 1, "step": 39, "where": "save", "what": "SIGKILL"}, "signal:9"),
    ({"rank": 0, "step": 45, "where": "save", "what": "broken save"}, "exception"),
]


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> dict[str, Any]:
    """The final state of an undisturbed run."""
    launcher = Launcher(tmp_path_factory.mktemp("calm"), cluster)
    launch = start(launcher, "calm", [])
    assert launch.wait() == 0, launch.output
    return state(launch.directory)


def test_every_kind_of_death(launcher: Launcher, calm: dict[str, Any]) -> None:
    faults = [fault for fault, _ in DEATHS]
    launch = start(launcher, "struck", faults, "--save-every", "5steps", PAUSE="0.01")
    assert launch.wait() == 0, launch.output
    fired(launch, faults)
    assert roots(launch) == [(fault["rank"], cause) for fault, cause in DEATHS]
    recovered = launch.events("recovered")
    assert [(event["cause"], event["lost_steps"]) for event in recovered] == [(cause, 0) for _, cause in DEATHS]
    assert launch.output.count("Traceback") == 7, "an exception is told once, and none that only follows from another"
    assert "ValueError: broken hook" in launch.log(11, 1)
    assert_equal_states(calm, state(launch.directory))


def test_deaths_during_start_up_and_recovery(launcher: Launcher, calm: dict[str, Any]) -> None:
    faults: list[dict[str, Any]] = [
        {"rank": 1, "start": 1, "where": "before init", "what": "SIGKILL"},
        {"rank": 0, "start": 2, "where": "after init", "what": "SIGSEGV"},
        {"rank": 1, "step": 5, "where": "backward", "what": "SIGKILL"},
        {"rank": 0, "start": 4, "where": "after prepare", "what": "SIGKILL"},
        {"rank": 1, "start": 5, "where": "after track", "what": "broken start"},
        {"rank": 0, "step": 20, "where": "after step", "what": "all"},
        {"rank": 1, "step": 60, "where": "after loop", "what": "SIGKILL"},
    ]
    launch = start(launcher, "struck", faults)
    assert launch.wait() == 0, launch.output
    fired(launch, faults[:-1])
    causes = ["signal:9", "signal:11", "signal:9", "signal:9", "exception", "signal:9"]
    assert [cause for _, cause in roots(launch)][:6] == causes
    groups = launch.events("group_started")
    resumed = [(group["resume_step"], group["resume_sources"]) for group in groups]
    assert resumed[:3] == [(0, []), (0, []), (0, [])]
    assert resumed[3][1] == ["live"] and resumed[3] == resumed[4] == resumed[5], "the salvage outlives failed starts"
    assert resumed[6][1] == ["memory"], "with every rank dead the snapshots count"
    assert [event["lost_steps"] for event in launch.events("recovered")][:2] == [0, 0]
    assert_equal_states(calm, state(launch.directory))


def test_two_of_three_at_once_and_swallowed_errors(launcher: Launcher) -> None:
    steps = {"STEPS": "24", "SWALLOW": "1"}
    reference = start(launcher, "calm", [], workers=3, **steps)
    assert reference.wait() == 0, reference.output
    faults: list[dict[str, Any]] = [
        {"rank": 1, "step": 4, "where": "body", "what": "pair"},
        {"rank": 2, "step": 8, "where": "backward", "what": "SIGKILL"},
        {"rank": 0, "step": 12, "where": "forward", "what": "SIGKILL"},
        {"rank": 1, "step": 16, "where": "optimizer", "what": "SIGKILL"},
    ]
    launch = start(launcher, "struck", faults, workers=3, **steps)
    assert launch.wait() == 0, launch.output
    fired(launch, faults)
    assert [cause for _, cause in roots(launch)] == ["signal:9"] * 4
    assert [event["lost_steps"] for event in launch.events("recovered")] == [0] * 4
    assert_equal_states(state(reference.directory), state(launch.directory))


def test_one_rank_alone_goes_on_from_its_snapshot(launcher: Launcher) -> None:
    steps = {"STEPS": "24", "LOADERS": "2"}
    reference = start(launcher, "calm", [], workers=1, **steps)
    assert reference.wait() == 0, reference.output
    faults: list[dict[str, Any]] = [
        {"rank": 0, "step": 5, "where": "backward", "what": "SIGKILL"},
        {"rank": 0, "step": 9, "where": "body", "what": "loader"},
        {"rank": 0, "step": 18, "where": "optimizer", "what": "SIGKILL"},
        {"rank": 0, "start": 4, "where": "dataset", "what": "broken sample"},  # in a loader process
    ]
    launch = start(launcher, "struck", faults, workers=1, **steps)
    assert launch.wait() == 0, launch.output
    fired(launch, faults)
    assert [cause for _, cause in roots(launch)] == ["signal:9", "exception", "signal:9", "exception"]
    sources = [group["resume_sources"] for group in launch.events("group_started")]
    assert sources[:4] == [[], ["memory"], ["live"], ["memory"]]
    assert sources[4] in (["memory"], ["live"]), "live if the healthy loader process delivered a batch first"
    assert_equal_states(state(reference.directory), state(launch.directory))


def test_a_fault_of_the_program_ends_the_run_and_the_next_launch_goes_on(
    launcher: Launcher, calm: dict[str, Any]
) -> None:
    bug = {"rank": 1, "step": 7, "where": "forward", "what": "a bug of my own", "always": True}
    launch = start(launcher, "buggy", [bug])
    assert launch.wait() == 1
    assert roots(launch) == [(1, "exception")] * 2
    (finished,) = launch.events("run_finished")
    assert (finished["outcome"], finished["exit_code"], finished["step"]) == ("failed", 1, 7)
    assert launch.events("checkpoint_committed")[-1]["reason"] == "exception"
    output = launch.output
    assert "rank 1 raised at step 7: ValueError: a bug of my own (train.py:" in output
    assert output.count("full log: ") == 2 and str(launch.directory / "logs/a0002/rank-00001.log") in output
    assert output.count("Traceback") == 2, "each failure is told once"
    change(launch, [])
    again = start(launcher, "buggy", [])
    assert again.wait() == 0, again.output
    assert again.events("group_started")[-1]["resume_step"] == 7
    assert again.events("group_started")[-1]["resume_sources"] == ["storage"]
    assert_equal_states(calm, state(again.directory))


def test_what_is_not_retried_and_when_retrying_ends(launcher: Launcher) -> None:
    early = start(launcher, "early", [{"rank": 0, "start": 1, "where": "after prepare", "what": "too soon"}])
    dying = {"rank": 1, "step": 0, "where": "before init", "what": "SIGKILL", "always": True}
    dead = start(launcher, "dead", [dying], "--max-restarts", "2")
    assert early.wait() == 1
    assert len(early.events("group_started")) == 1
    assert "before the first step" in early.events("run_finished")[0]["why"]
    assert dead.wait() == 1
    assert len(dead.events("group_started")) == 3
    assert "--max-restarts 2" in dead.events("run_finished")[0]["why"]
