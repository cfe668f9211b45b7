"""The processes around the workers: zygote, saver, agent, a second node; and storage that takes nothing any more."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.faulty import fired, go, roots, start
from tests.e2e.harness import Launch, Launcher, assert_equal_states, clean_env, state

_TWO_NODES = """
import json, sys
from orchestrator.driver.launch import prepare_ray
prepare_ray("auto")
import ray
from ray.cluster_utils import Cluster
cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False})
cluster.add_node(num_cpus=2)
print(json.dumps(cluster.address), flush=True)
sys.stdin.read()
cluster.shutdown()
"""


@pytest.fixture(scope="module")
def two_nodes() -> Iterator[str]:
    """The address of a Ray cluster of two nodes with room for two workers each."""
    holder = subprocess.Popen(
        [sys.executable, "-c", _TWO_NODES], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
        text=True, env=clean_env(),
    )  # fmt: skip
    try:
        assert holder.stdout is not None
        lines = iter(holder.stdout.readline, "")
        yield next(json.loads(line) for line in lines if line.startswith('"'))
    finally:
        holder.communicate(timeout=30)


def process(launch: Launch, module: str) -> int:
    """The pid of a process of ours that serves this launch, by its module and the agent that started it."""
    worker = next(iter(launch.pids().values()))
    zygote = parent(worker)
    agent = parent(zygote)
    for entry in Path("/proc").iterdir():
        ours = entry.name.isdigit() and parent(int(entry.name)) == agent
        if ours and module in (entry / "cmdline").read_bytes().decode():
            return int(entry.name)
    raise AssertionError(f"no {module} below agent {agent}")


def parent(pid: int) -> int:
    """The parent's pid, 0 if there is none."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])
    except OSError:
        return 0


@pytest.fixture(scope="module")
def calm(tmp_path_factory: pytest.TempPathFactory, cluster: str) -> dict[str, Any]:
    """The final state of an undisturbed run."""
    launcher = Launcher(tmp_path_factory.mktemp("calm"), cluster)
    launch = start(launcher, "calm", [])
    assert launch.wait() == 0, launch.output
    return state(launch.directory)


def test_zygote_saver_and_agent_killed(launcher: Launcher, calm: dict[str, Any]) -> None:
    launch = start(launcher, "struck", [], "--save-every", "10steps", HOLD="25", PAUSE="0.02")
    launch.until_event("checkpoint_committed")
    saver = process(launch, "orchestrator.agent.saver")
    zygote = process(launch, "orchestrator.agent.zygote")
    os.kill(saver, signal.SIGKILL)
    os.kill(zygote, signal.SIGKILL)
    launch.until_event("group_started", count=2)
    assert launch.events("group_started")[-1]["resume_sources"] == ["memory"], "the agent still holds the snapshots"
    assert {event["cause"] for event in launch.events("worker_failed")} == {"signal:9"}
    launch.until_event("recovered")
    agent = parent(process(launch, "orchestrator.agent.zygote"))
    os.kill(agent, signal.SIGKILL)
    launch.until_event("group_started", count=3)
    assert launch.events("group_started")[-1]["resume_sources"] == ["storage"], "its memory went with the agent"
    assert launch.events("worker_failed")[-1]["cause"] == "node_lost"
    go(launch)
    assert launch.wait() == 0, launch.output
    assert "save_dropped" not in {event["event"] for event in launch.events()}
    assert_equal_states(calm, state(launch.directory))


def test_two_nodes_pass_state_on(launcher: Launcher, two_nodes: str) -> None:
    launcher.address = two_nodes
    options = {"STEPS": "24"}
    reference = start(launcher, "calm", [], workers=4, **options)
    assert reference.wait() == 0, reference.output
    faults: list[dict[str, Any]] = [
        {"rank": 0, "step": 4, "where": "backward", "what": "SIGKILL"},
        {"rank": 3, "step": 8, "where": "optimizer", "what": "SIGKILL"},
        {"rank": 2, "step": 12, "where": "forward", "what": "broken forward"},
        {"rank": 1, "step": 16, "where": "body", "what": "all"},
    ]
    launch = start(launcher, "struck", faults, workers=4, **options)
    assert launch.wait() == 0, launch.output
    fired(launch, faults)
    assert [cause for _, cause in roots(launch)] == ["signal:9", "signal:9", "exception", "signal:9"]
    assert [event["lost_steps"] for event in launch.events("recovered")][:3] == [0, 0, 0]
    assert (launch.directory / "logs" / "agent-1.log").exists(), "there are two agents"
    assert_equal_states(state(reference.directory), state(launch.directory))


def test_storage_that_takes_nothing_more(launcher: Launcher, calm: dict[str, Any]) -> None:
    bug = [{"rank": 1, "step": 20, "where": "forward", "what": "SIGKILL"}]
    launch = start(launcher, "train", bug, "--save-every", "5steps", HOLD="15", PAUSE="0.02")
    launch.until_event("checkpoint_committed")
    checkpoints = launch.directory / "checkpoints"
    checkpoints.rename(launch.directory / "kept")
    checkpoints.write_text("no directory any more")
    go(launch)
    assert launch.wait() == 1, launch.output
    (finished,) = launch.events("run_finished")
    assert finished["outcome"] == "failed"
    assert "could not be kept" in finished["why"] and "ot a directory" in finished["why"]
    reasons = {event["reason"] for event in launch.events("save_dropped")}
    assert reasons >= {"periodic", "exception", "final"}, "training went on, and every save was told"
    assert [event["lost_steps"] for event in launch.events("recovered")] == [0]
    checkpoints.unlink()
    (launch.directory / "kept").rename(checkpoints)
    again = start(launcher, "train", bug)
    assert again.wait() == 0, again.output
    assert again.events("group_started")[-1]["resume_step"] == launch.events("checkpoint_committed")[0]["step"]
    assert_equal_states(calm, state(again.directory))
