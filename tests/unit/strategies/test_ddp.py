"""DDP over 3 and 4 gloo ranks on loopback: bitwise restarts, weighted shares, transparency. See `ranks.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Every scenario's result, from one process that forks all the ranks."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ranks.py")), str(tmp_path_factory.mktemp("ranks"))],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("case", ["ours-3", "ours-4", "view", "static", "unused"])
def test_new_processes_continue_bit_for_bit(results: dict[str, Any], case: str) -> None:
    result = results[case]
    assert result["finite"] and result["ranks_agree"]
    assert result["equal"]
    assert not any(result["rebuilt_late"])


def test_plain_ddp_does_not(results: dict[str, Any]) -> None:
    """Else the test above would say nothing."""
    assert results["plain"]["finite"] and results["plain"]["ranks_agree"]
    assert all(results["plain"]["rebuilt_late"])
    assert not results["plain"]["equal"]


def test_settling_leaves_everything_alone(results: dict[str, Any]) -> None:
    for rank in results["untouched"]:
        assert rank["grads_none"] and rank["state"] and rank["random"]
        assert rank["settle_ms"] < 50


def test_gradients_are_weighted_by_the_ranks_shares(results: dict[str, Any]) -> None:
    for rank in results["shares"]:
        assert rank == {
            "even": True,
            "even hook": False,
            "4+4+2": True,
            "4+4+2 hook": True,
            "4+4+2 views": True,
            "4+4+2 views hook": True,
            "10+0+0": True,
            "10+0+0 hook": True,
        }


def test_equal_shares_through_the_hook_are_exact(results: dict[str, Any]) -> None:
    assert results["even_hook_is_exact"] == [True, True, True]


def test_a_hook_of_the_user_gets_weighted_gradients(results: dict[str, Any]) -> None:
    assert results["user_hook"] == [{"gradient": 0.5 * 4 + 0.25 * 8 + 0.25 * 12, "calls": 1}] * 3


def test_unexchanged_gradients_are_seen(results: dict[str, Any]) -> None:
    for rank in results["accumulation"]:
        assert rank["alike"] and rank["bias"] == 2.0
        #       fresh, microbatch, another model's, this model's, last one, past wrapper, dropped, user's no_sync
        assert rank["seen"] == [True, False, True, False, True, False, True, False]


def test_a_callback_decides_on_the_next_pass_and_not_on_the_one_that_just_ended(results: dict[str, Any]) -> None:
    assert results["counted_passes"] == [[False, False, True, True]] * 3


def test_the_wrapped_module_shows_through(results: dict[str, Any]) -> None:
    for rank in results["transparent"]:
        assert rank["shout"] == "hey! x3.0" and rank["written"] == 3.0 and not rank["own"]
        assert rank["missing"] == "'Net' object has no attribute 'nonsense'"
        assert rank["state"] and rank["parameters"] and rank["buffers"]
        assert rank["metadata"] == {"version": 2}
        assert rank["ema"] == ["module.brief.bias", "module.brief.weight"]
        assert rank["tracked"] and rank["tracked ema"]
        assert rank["heard"] == ["DataParallel"]
        assert rank["frozen"] == "Linear"
        assert rank["refused"].startswith("`prepare` was given find_unused, which")


def test_where_early_layout_fails_all_ranks_fall_back_and_say_so_once(results: dict[str, Any]) -> None:
    assert results["fallback"] == [{"finds": True, "warnings": 1, "exchanged": True}] * 3
