"""Looking at runs and asking things of them, while they are live and afterwards."""

from __future__ import annotations

import json
from typing import Any

from safetensors.torch import load_file

from tests.e2e.faulty import go, start
from tests.e2e.harness import Launcher, assert_equal_states, state


def read(launcher: Launcher, *words: str) -> Any:
    """What a command with `--json` says."""
    return json.loads(launcher.command(*words, "--json"))


def test_commands_on_a_live_run_and_afterwards(launcher: Launcher) -> None:
    launch = start(launcher, "train", [], STEPS="400", PAUSE="0.05")
    launch.until("a first step", lambda: "step " in launch.output.rpartition("| seed ")[2])
    status = read(launcher, "status", "train")
    assert status["live"] and status["state"] == "running"
    assert "running" in launcher.command("status", "train")
    saved = read(launcher, "save", "train", "--name", "keep")
    assert (saved["reason"], saved["name"]) == ("requested", "keep")
    refused = launcher.command(
        "launch", "--address", launcher.address, "--workers", "2", "--run-name", "train", "train.py", expect=2
    )
    assert "'train' is live" in refused and str(launch.process.pid) in refused
    stopped = read(launcher, "stop", "train")
    assert launch.wait() == 76
    assert (stopped["finished"]["exit_code"], stopped["checkpoint"]["reason"]) == (76, "stop")
    step = stopped["checkpoint"]["step"]

    assert "is not live" in launcher.command("stop", "train")
    assert "is not live" in launcher.command("save", "train")
    assert not read(launcher, "status", "train")["live"]
    events = [json.loads(line) for line in launcher.command("events", "train", "--json").splitlines()]
    assert [event["event"] for event in events][0::len(events) - 1] == ["run_started", "run_finished"]
    assert launcher.command("logs", "train", "--rank", "1") is not None
    listed = read(launcher, "checkpoint", "list", "train")
    assert {"keep", step} <= {item.get("name") for item in listed} | {item["step"] for item in listed}
    assert read(launcher, "checkpoint", "show", "train")["step"] == step
    launcher.command("checkpoint", "verify", "train")
    launcher.command("checkpoint", "export", "train", "--format", "safetensors", "--output", "out.safetensors")
    assert_equal_states(load_file(launcher.cwd / "out.safetensors"), state(launch.directory))

    shard = next((launch.directory / "checkpoints").glob(f"step-{step:09d}*/*.safetensors"))
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.chmod(0o644)
    shard.write_bytes(data)
    assert shard.name in launcher.command("checkpoint", "verify", "train", expect=1)
    again = start(launcher, "train", [], STEPS="400", HOLD="0")
    again.until_event("checkpoint_rejected", step=step)
    again.until_event("group_started", count=2)
    before = sorted({event["step"] for event in again.events("checkpoint_committed")})
    assert again.events("group_started")[-1]["resume_step"] == before[-2], "the one before the damaged one"
    launcher.command("stop", "train", "--no-save")
    assert again.wait() == 76, again.output
    assert sorted({event["step"] for event in again.events("checkpoint_committed")}) == before
    go(again)
