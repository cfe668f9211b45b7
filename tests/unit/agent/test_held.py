"""What an agent offers, and what it hands out: only what a slot really holds."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest

from orchestrator.agent.held import Holdings, Part, label_at
from orchestrator.worker.shm import Segment


def filled(slots: int, *steps: int, attempt: int = 1, **labels: Any) -> Segment:
    """A segment with one slot for each step, in order."""
    segment = Segment.create("test", slots, 4096, 64)
    for slot, step in enumerate(steps):
        meta = {"tensors": [], "step": step, "buffers": 0, "final": False, "head": {"user": {}}} | labels
        segment.complete(slot, attempt, step, json.dumps(meta).encode(), 8)
    return segment


def is_open(fd: int) -> bool:
    try:
        os.fstat(fd)
    except OSError:
        return False
    return True


def test_a_label_is_read_only_while_its_slot_holds_it() -> None:
    segment = filled(2, 4, 5)
    four, five = segment.labels()
    segment.begin(four.index)
    assert segment.meta_of(four) is None
    segment.complete(four.index, 1, 6, b"{}", 0)
    assert segment.meta_of(four) is None
    assert json.loads(segment.meta_of(five) or b"")["step"] == 5
    assert label_at(segment, four.index, 6) is not None and label_at(segment, four.index, 4) is None


def test_half_written_records_are_not_offered() -> None:
    holdings = Holdings("agent-0")
    heads = filled(4, 7, 8)
    holdings.add(1, 0, "heads", heads)
    stale = heads.labels()
    heads.labels = lambda: stale  # type: ignore[method-assign]
    heads.begin(1)
    assert [offer["step"] for offer in holdings.offers(1, {})] == [7]


def test_snapshots_are_offered_by_the_share_of_their_rank_unless_final() -> None:
    holdings = Holdings("agent-0")
    holdings.add(1, 3, "arena", filled(3, 10, 20, head={"user": {"final": True}}), (1, 2))
    holdings.add(1, 2, "arena", filled(3, 20, final=True), (0, 2))
    offers = [(offer["step"], offer["holder"], offer["pieces"]) for offer in holdings.offers(1, {})]
    pieces = ["share:1/2", "rank:3"]
    assert offers == [(10, "agent-0/a1/rank-3/arena", pieces), (20, "agent-0/a1/rank-3/arena", pieces)]
    assert holdings.offers(1, {}) == holdings.offers(1, {})


def test_an_earlier_transfer_is_not_taken_for_another_step() -> None:
    holdings = Holdings("agent-0")
    holder = "agent-1/a1/rank-1/salvage"
    first, second = filled(1, 4), filled(1, 9)
    holdings.keep_fetched(holder, [Part(first, 0, ("all",), 1)])
    assert holdings.parts(holder, 4, ["all"])[0].segment is first
    with pytest.raises(KeyError, match="step 9 of agent-1/a1/rank-1/salvage was not brought here"):
        holdings.parts(holder, 9, ["all"])
    holdings.keep_fetched(holder, [Part(second, 0, ("all",), 1)])
    assert holdings.parts(holder, 9, ["all"])[0].segment is second
    assert (is_open(first.fd), is_open(second.fd)) == (False, True)
    holdings.release(1)
    assert not is_open(second.fd) and holdings.fetched == {}
