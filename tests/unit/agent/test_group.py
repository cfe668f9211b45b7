"""The agent's share of an attempt, with a node that only takes notes."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from orchestrator.agent.children import Spare, StoreHost, Worker
from orchestrator.agent.group import GroupHost
from orchestrator.agent.held import Holdings
from orchestrator.agent.output import OutputTail
from orchestrator.worker import wire
from orchestrator.worker.shm import BeatPage, Segment


class Notes:
    """Stands for NodeAgent."""

    def __init__(self) -> None:
        self.settings = SimpleNamespace(name="agent-0", drain_timeout_s=1.0)
        self.holdings = Holdings("agent-0")
        self.output = OutputTail()
        self.events: list[dict[str, Any]] = []

    def after(self, delay_s: float, action: Any) -> None:
        """Timers never ring here."""

    def emit(self, event: str, **fields: Any) -> None:
        self.events.append({"event": event, **fields})

    def forget(self, sock: Any) -> None:
        sock.close()

    def said(self, event: str) -> list[dict[str, Any]]:
        return [item for item in self.events if item["event"] == event]


@pytest.fixture
def node() -> Notes:
    return Notes()


@pytest.fixture
def group(node: Notes) -> GroupHost:
    """Two workers (their pids are none of any process) in attempt 1."""
    group = GroupHost(node)  # type: ignore[arg-type]
    group.attempt, group._start = 1, {"ranks": [0, 1]}
    for rank in (0, 1):
        ours, theirs = wire.pair()
        theirs.close()
        spare = Spare(rank, ours, pid=-10 - rank)
        group.workers[rank] = Worker(1, rank, spare, BeatPage.create(), os.devnull)
    return group


def elect(group: GroupHost, rank: int, election: int = 1) -> None:
    group.command({"op": "salvage", "attempt": 1, "election": election, "step": 5, "ranks": [rank]})


def salvaged(group: GroupHost, rank: int, election: int) -> int:
    """A rank's answer; returns the descriptor that came with it."""
    fd = Segment.create("whole", 1, 8, 8).fd
    answer = {"op": "salvaged", "election": election, "ok": True, "why": "", "step": 5}
    group._on_worker(group.workers[rank], answer, [fd])
    return fd


def test_the_state_of_an_election_that_is_over_is_given_back(group: GroupHost, node: Notes) -> None:
    elect(group, 0, election=2)
    late = salvaged(group, 0, election=1)
    with pytest.raises(OSError):
        os.fstat(late)
    assert node.said("Salvaged") == []
    kept = salvaged(group, 0, election=2)
    os.fstat(kept)
    assert [event["ok"] for event in node.said("Salvaged")] == [True]


def test_a_finished_rank_that_ends_while_elected_is_reported(group: GroupHost, node: Notes) -> None:
    group.workers[1].left = "finished"
    elect(group, 1)
    group.exited(group.workers[1].pid, 0)
    assert [(event["ok"], event["why"]) for event in node.said("Salvaged")] == [
        (False, "rank 1: it ended before it had written its state")
    ]
    assert node.said("WorkerFailed") == []


@pytest.mark.parametrize(("stepped", "failures"), [(1, 1), (2, 0)])
def test_the_end_of_the_store_fails_an_attempt_that_is_not_formed(
    group: GroupHost, node: Notes, stepped: int, failures: int
) -> None:
    ours, theirs = wire.pair()
    group._store = StoreHost(Spare(9, ours, pid=-99), 1234)
    for rank in range(stepped):
        message = {"op": "stepped", "step": 1, "at": 0.0, "phases": {}}
        group._on_worker(group.workers[rank], message, [])
    group.exited(-99, 9)
    theirs.close()
    whys = [event["why"] for event in node.said("StartFailed")]
    assert len(whys) == failures == len(node.said("OffersIn"))
    assert all("store ended (signal:9) before all ranks had stepped" in why for why in whys)
    assert group.spares() == [worker.spare for worker in group.workers.values()]


def test_killing_a_group_gives_its_beat_pages_back(group: GroupHost) -> None:
    pages = [worker.beat for worker in group.workers.values()]
    fds = [page.fd for page in pages]
    group.kill()
    for page, fd in zip(pages, fds, strict=True):
        with pytest.raises(OSError):
            os.fstat(fd)
        page.close()
