"""Signals to the driver: what is saved, how it exits, that the same command goes on, that nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.faulty import go, processes_of, start
from tests.e2e.harness import DEADLINE_S, Launch, Launcher, assert_equal_states, clean_env, state

STEPS = "300"


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> dict[str, Any]:
    """The final state of an undisturbed run."""
    launcher = Launcher(tmp_path_factory.mktemp("calm"), cluster)
    launch = start(launcher, "calm", [], STEPS=STEPS)
    assert launch.wait() == 0, launch.output
    return state(launch.directory)


def stepping(launch: Launch) -> Launch:
    """Wait until this launch trains."""
    launch.until("a first step", lambda: "step " in launch.output.rpartition("| seed ")[2])
    return launch


def gone(directory: Path) -> None:
    """Wait until no process of the run is left; there must be no draft of a file in its directory then."""
    end = time.monotonic() + DEADLINE_S
    while processes_of(directory):
        assert time.monotonic() < end, processes_of(directory)
        time.sleep(0.05)
    assert [path for path in directory.rglob("*") if path.name.startswith(".tmp") or path.suffix == ".tmp"] == []


def groups_of(address: str) -> list[str]:
    """States of all placement groups of the cluster that hold resources."""
    script = (
        "import json; from orchestrator.driver.launch import prepare_ray; prepare_ray('auto');"
        "import ray; from ray.util import placement_group_table as table;"
        f"ray.init({address!r}, log_to_driver=False);"
        "print(json.dumps([g['state'] for g in table().values() if g['state'] != 'REMOVED']))"
    )
    done = subprocess.run([sys.executable, "-c", script], env=clean_env(), capture_output=True, text=True, timeout=60)
    states: list[str] = json.loads(done.stdout.splitlines()[-1])
    return states


def test_platform_signals_save_and_exit_75_and_the_same_command_goes_on(
    launcher: Launcher, calm: dict[str, Any]
) -> None:
    for launches, number in enumerate((signal.SIGTERM, signal.SIGHUP), start=1):
        launch = stepping(start(launcher, "train", [], STEPS=STEPS, PAUSE="0.05"))
        launch.signal(signal.SIGUSR2)
        launch.until_event("checkpoint_committed", count=launches, reason="requested")
        launch.signal(number)
        assert launch.wait() == 75, launch.output
        saved, finished = launch.events("checkpoint_committed")[-1], launch.events("run_finished")[-1]
        assert saved["reason"] == "preemption"
        assert (finished["outcome"], finished["exit_code"], finished["step"]) == ("stopped", 75, saved["step"])
        assert launch.events("worker_failed") == []
        gone(launch.directory)
    last = start(launcher, "train", [], STEPS=STEPS)
    assert last.wait() == 0, last.output
    assert last.events("group_started")[-1]["resume_step"] == saved["step"]
    assert_equal_states(calm, state(last.directory))
    assert groups_of(launcher.address) == []


def test_ctrl_c_as_a_terminal_sends_it(embedded: Launcher) -> None:
    launch = stepping(start(embedded, "train", [], STEPS=STEPS, PAUSE="0.05", own_group=True))
    os.killpg(launch.process.pid, signal.SIGINT)
    assert launch.wait() == 76, launch.output
    assert launch.events("checkpoint_committed")[-1]["reason"] == "stop"
    assert launch.events("worker_failed") == []
    gone(launch.directory)
    again = start(embedded, "train", [], STEPS=STEPS, HOLD="0", own_group=True)
    again.until_event("group_started", count=2)
    os.killpg(again.process.pid, signal.SIGINT)
    again.until_output("asked to stop")
    os.killpg(again.process.pid, signal.SIGINT)
    assert again.wait() == 130, again.output
    assert again.events("run_finished")[-1]["exit_code"] == 130
    gone(again.directory)


def test_signals_during_start_up_end_cleanly(embedded: Launcher) -> None:
    early = start(embedded, "early", [])
    early.until_output("start anew")  # Ray is on its way up
    early.signal(signal.SIGTERM)
    assert early.wait() == 75, early.output
    late = start(embedded, "late", [{"rank": 0, "start": 1, "where": "after init", "what": "wait"}])
    late.until_event("group_started")
    late.signal(signal.SIGINT)
    assert late.wait() == 76, late.output
    for launch in (early, late):
        assert "Traceback" not in launch.output
        gone(launch.directory)


@pytest.mark.parametrize("where", ["embedded", "shared"])
def test_a_killed_driver_leaves_nothing_and_the_same_command_goes_on(
    embedded: Launcher, cluster: str, calm: dict[str, Any], where: str
) -> None:
    embedded.address = "local" if where == "embedded" else cluster
    launch = start(embedded, "train", [], "--save-every", "10steps", HOLD="25", PAUSE="0.02", STEPS=STEPS)
    launch.until("two checkpoints", lambda: len(launch.events("checkpoint_committed")) >= 2)
    stepping(launch)
    launch.signal(signal.SIGKILL)
    gone(launch.directory)
    go(launch)
    again = start(embedded, "train", [], STEPS=STEPS)
    assert again.wait() == 0, again.output
    assert again.events("group_started")[-1]["resume_step"] == launch.events("checkpoint_committed")[1]["step"]
    assert_equal_states(calm, state(again.directory))
