"""Scripts as their authors would port them: killed at exact lines, they end bitwise as if nothing had happened."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.harness import Launch, Launcher, assert_equal_states, state

SCRIPTS = Path(__file__).with_name("scripts")

# script, arguments, strikes (place:rank:step). Zero steps lost is promised as long as one survivor has not written to
# tracked state in the step at hand; DIRTY: at most what lies between two snapshots.
CLEAN, DIRTY = "clean", "dirty"
CASES = [
    pytest.param("nanogpt.py", ["loop"], {"evaluated:0:8": CLEAN, "micro-2:1:11": CLEAN}, id="nanogpt-own-loop"),
    pytest.param("nanogpt.py", ["api"], {"micro-1:0:6": CLEAN, "stepped:1:12": DIRTY}, id="nanogpt-accumulate"),
    pytest.param("gan.py", [], {"between D and G:1:7": DIRTY, "before D:0:15": DIRTY}, id="gan"),
    pytest.param(
        "classifier.py", [],
        {"validating:0:16": CLEAN, "before step:1:21": CLEAN, "after validation:1:32": CLEAN}, id="classifier",
    ),  # fmt: skip
    pytest.param("ema.py", [], {"keys written:1:6": DIRTY, "before average:0:13": DIRTY}, id="ema"),
    pytest.param("phases.py", [], {"between:1:12": CLEAN, "tuning:0:12": DIRTY, "tuning:1:18": CLEAN}, id="phases"),
    pytest.param("tricks.py", [], {"before step:0:5": CLEAN, "stepped:1:11": DIRTY}, id="tricks"),
]


@pytest.mark.parametrize(("script", "arguments", "strikes"), CASES)
def test_killed_script_ends_as_undisturbed(
    launcher: Launcher, tmp_path: Path, script: str, arguments: list[str], strikes: dict[str, str]
) -> None:
    words = [str(SCRIPTS / script), *arguments]
    if script == "nanogpt.py":
        words.append(_bytes_file(tmp_path))
    fired = tmp_path / "fired"
    fired.mkdir()
    environment = ["--env", f"STRIKES={','.join(strikes)}", "--env", f"FIRED={fired}"]
    calm = launcher.start("--workers", "2", "--run-name", "calm", *words, run="calm")
    struck = launcher.start("--workers", "2", "--run-name", "struck", *environment, *words, run="struck")
    for launch in (calm, struck):
        assert launch.wait() == 0, launch.output[-6000:]
    assert {path.name for path in fired.iterdir()} == set(strikes)
    recoveries = struck.events("recovered")
    assert {event["cause"] for event in recoveries} == {"signal:9"}
    assert len(struck.events("group_started")) == 1 + len(strikes)
    if DIRTY not in strikes.values():
        assert sum(event["lost_steps"] for event in recoveries) == 0, recoveries
    _assert_same_end(calm, struck)
    if "best" in (SCRIPTS / script).read_text():
        assert_equal_states(state(calm.directory, "best"), state(struck.directory, "best"))
    if script == "phases.py":
        _changes_nothing_once_complete(launcher, struck, words)


def _changes_nothing_once_complete(launcher: Launcher, ended: Launch, words: list[str]) -> None:
    """Launched again, the code between its phases runs on the final state, and must leave no mark on it."""
    before, json_before = state(ended.directory), _json_half(ended.directory)
    again = launcher.run("--workers", "2", "--run-name", "struck", *words, run="struck")
    assert "complete at step 24" in again.output
    assert "phases begun: 1, heads alike: True" in again.output
    assert_equal_states(before, state(ended.directory))
    assert json_before == _json_half(ended.directory)


def _assert_same_end(calm: Launch, struck: Launch) -> None:
    assert_equal_states(state(calm.directory), state(struck.directory))
    assert _json_half(calm.directory) == _json_half(struck.directory)
    for launch in (calm, struck):
        assert launch.events("run_finished")[-1]["outcome"] == "completed"
    assert calm.events("run_finished")[-1]["step"] == struck.events("run_finished")[-1]["step"]


def _json_half(directory: Path) -> dict[str, Any]:
    """`run.state`, learning rates, counters of the last checkpoint. Call after `state`, which writes the export."""
    from safetensors import safe_open

    with safe_open(directory.parent / f".export-{directory.name}-last.safetensors", "pt") as file:
        return json.loads(file.metadata()["state"])


def _bytes_file(directory: Path) -> str:
    import numpy as np

    path = directory / "data.bin"
    np.random.default_rng(0).integers(0, 64, 2000).astype(np.uint16).tofile(path)
    return str(path)
