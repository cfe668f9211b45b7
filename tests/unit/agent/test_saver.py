"""The saver writes a slot only while it is that of its job's step."""

from __future__ import annotations

import os
from typing import Any

import pytest

from orchestrator.agent import saver
from orchestrator.worker.shm import Segment


def job(step: int) -> dict[str, Any]:
    parts = [{"fd": 0, "slot": 0, "index": 0, "pieces": ["head"]}]
    return {"id": 1, "uri": "/nowhere", "directory": "step-4", "attempt": 1, "step": step, "parts": parts}


def test_a_slot_that_has_gone_on_to_another_step_is_left_alone() -> None:
    segment = Segment.create("test", 1, 64, 64)
    segment.complete(0, 1, 9, b"{}", 0, pin=True)
    with pytest.raises(RuntimeError, match="the state of step 4 is not in its slot any more"):
        saver.write(job(4), [os.dup(segment.fd)])
    assert segment.is_pinned(0), "it is pinned for the job of step 9"


def test_a_job_that_fails_unpins_its_slot() -> None:
    segment = Segment.create("test", 1, 64, 64)
    segment.complete(0, 1, 4, b"not JSON", 0, pin=True)
    with pytest.raises(ValueError):
        saver.write(job(4), [os.dup(segment.fd)])
    assert not segment.is_pinned(0)
