"""Numbered scenarios: events in, whole action lists out. Two ranks on one agent unless it says otherwise."""

from __future__ import annotations

import pytest

from orchestrator.control.actions import (
    Action,
    AskWorkers,
    Commit,
    Drain,
    Finish,
    KillGroup,
    PersistChoice,
    Record,
    ReleaseSegments,
    Salvage,
    StartGroup,
    Tell,
)
from orchestrator.control.consistency import Choice, Offer, Tier, choose, required_pieces
from orchestrator.control.events import (
    AgentJoined,
    AgentLost,
    Committed,
    ErrorInfo,
    Event,
    GroupStarted,
    OffersIn,
    Progress,
    Salvaged,
    SaveRequested,
    SaveStaged,
    ShardLost,
    ShardPersisted,
    StopRequested,
    Tick,
    WorkerFailed,
    WorkerFinished,
    WorkerStepped,
    WorkerStopped,
)
from orchestrator.control.machine import Machine
from orchestrator.control.state import MachineConfig, State

A = "agent-0"
B = "agent-1"
BOTH_ON_A = ((0, A), (1, A))
USER = ErrorInfo("ValueError", "bad batch", frame="train.py:31")
REQUIRED = required_pieces(2, per_rank=False)


def live(step: int, rank: int = 0, agent: str = A, pieces: tuple[str, ...] = ("all", "head")) -> Offer:
    return Offer(Tier.LIVE, step, agent, f"{agent}/{rank}/live", frozenset(pieces))


def picked(*offers: Offer, attempt: int = 0) -> Choice:
    choice = choose(offers, REQUIRED)
    assert choice is not None
    return Choice(choice.step, choice.picks, choice.reason, attempt)


def orders(actions: tuple[Action, ...]) -> list[Action]:
    """Without what is only written or told."""
    return [action for action in actions if not isinstance(action, Record | Tell)]


def records(actions: tuple[Action, ...], event: str) -> list[dict[str, object]]:
    return [action.fields for action in actions if isinstance(action, Record) and action.event == event]


def told(actions: tuple[Action, ...]) -> str:
    return " | ".join(action.text for action in actions if isinstance(action, Tell))


class Driven:
    """A machine and a clock that moves by hand."""

    def __init__(self, **config: object) -> None:
        self.machine = Machine(MachineConfig(**{"world_size": 2, **config}))  # type: ignore[arg-type]
        self.now = 0.0

    def __call__(self, event: Event, now: float | None = None) -> tuple[Action, ...]:
        self.now = self.now + 0.001 if now is None else now
        return self.machine.step(event, self.now)

    def running(self, attempt: int = 1) -> Driven:
        """Two ranks, each past step 1."""
        self(AgentJoined(A, "node-a", 2))
        self(GroupStarted(attempt, A, ((0, 10), (1, 11))))
        self(WorkerStepped(attempt, 0, 1, self.now))
        self(WorkerStepped(attempt, 1, 1, self.now))
        return self

    def restarted(self, step: int = 7) -> Driven:
        """Attempt 2 after rank 1 was killed at `step`, restored from rank 0; every rank is past it."""
        self.running()
        self.kill_at(step)
        self(GroupStarted(2, A, ((0, 20), (1, 21))))
        self(WorkerStepped(2, 0, step + 1, self.now))
        self(WorkerStepped(2, 1, step + 1, self.now))
        return self

    def kill_at(self, step: int, attempt: int = 1) -> tuple[Action, ...]:
        self(WorkerFailed(attempt, 1, "signal:9", step, self.now))
        self(OffersIn(attempt, A, (live(step),), settled=True))
        return self(Salvaged(attempt, A, 1, ok=True))

    def saved(self, step: int, reason: str, attempt: int = 1, name: str = "") -> tuple[Action, ...]:
        """Both ranks stage and persist."""
        for rank in (0, 1):
            self(SaveStaged(attempt, rank, step, 2, reason, name))
        self(ShardPersisted(attempt, step, 0, 2, reason, {}, name))
        return self(ShardPersisted(attempt, step, 1, 2, reason, {}, name))


def shard(attempt: int, step: int, rank: int, reason: str, shares: int = 2, name: str = "") -> ShardPersisted:
    return ShardPersisted(attempt, step, rank, shares, reason, {}, name)


def test_01_a_run_from_start_to_end() -> None:
    run = Driven()
    assert run.machine.next_deadline() == 0.0
    assert run(Tick(), 0.0) == ()
    assert (run.machine.state, run.machine.next_deadline()) == (State.GATHERING, 600.0)
    assert run(AgentJoined(A, "node-a", 2), 1.0) == (StartGroup(1, BOTH_ON_A, None, from_storage=True),)
    assert run(GroupStarted(1, A, ((0, 10), (1, 11))), 2.0) == (
        Record(
            "group_started",
            {
                "attempt": 1,
                "world_size": 2,
                "resume_step": 0,
                "resume_sources": [],
                "workers": [{"rank": 0, "node": "node-a", "pid": 10}, {"rank": 1, "node": "node-a", "pid": 11}],
            },
        ),
    )
    assert run(WorkerStepped(1, 0, 1, 3.0), 3.0) == run(WorkerStepped(1, 1, 1, 3.0), 3.0) == ()
    for rank in (0, 1):
        assert run(SaveStaged(1, rank, 9, 2, "final"), 4.0) == ()
        assert run(WorkerFinished(1, rank, 9), 4.0) == ()
    assert run.machine.state is State.COMPLETING
    assert run(shard(1, 9, 0, "final"), 5.0) == ()
    commit = Commit(1, 9, "final", "", (shard(1, 9, 0, "final"), shard(1, 9, 1, "final")))
    assert run(shard(1, 9, 1, "final"), 5.0) == (commit,)
    assert run(Committed(1, 9, ok=True), 6.0) == (
        KillGroup(1),
        Finish("completed", 0, 9, "the script ended at step 9"),
    )
    assert run(Tick(), 7.0) == ()
    assert run.machine.next_deadline() is None


def test_02_a_killed_rank_costs_no_step() -> None:
    run = Driven().running()
    run(Progress(1, 0, 7))
    assert run(WorkerFailed(1, 1, "signal:9", 7, 9.99), 10.0) == (Drain(1, 10.0),)
    salvage = run(OffersIn(1, A, (live(7),), settled=True), 10.1)
    failed = {"attempt": 1, "rank": 1, "cause": "signal:9", "step": 7, "error": None, "root": True}
    assert salvage == (Salvage(1, 1, picked(live(7))), Record("worker_failed", failed))
    choice = picked(live(7), attempt=1)
    killed = "rank 1 was killed by signal 9 (SIGKILL) at step 7; restarting at once"
    assert run(Salvaged(1, A, 1, ok=True), 10.3) == (
        KillGroup(1),
        StartGroup(2, BOTH_ON_A, choice, from_storage=False),
        PersistChoice(1, choice, "exception"),
        Tell(killed, level="error"),
        Record(
            "restart_decided",
            {
                "attempt": 2,
                "resume_step": 7,
                "resume_sources": ["live"],
                "why": f"{killed}; {choice.reason}",
            },
        ),
        Tell(f"attempt 2 starts from step 7 (live): {choice.reason}"),
    )
    started = run(GroupStarted(2, A, ((0, 20), (1, 21))), 10.7)
    assert records(started, "group_started")[0]["resume_sources"] == ["live"]
    assert run(WorkerStepped(2, 0, 8, 11.0, {"connect": 0.1, "first_step": 0.2}), 11.0) == ()
    [recovered] = records(run(WorkerStepped(2, 1, 8, 10.99, {"connect": 0.2}), 11.1), "recovered")
    phases = recovered.pop("phases")
    assert recovered == pytest.approx(
        {
            "attempt": 2,
            "cause": "signal:9",
            "detect_s": 0.01,
            "recovery_s": 1.01,
            "lost_steps": 0,
            "resume_step": 7,
        }
    )
    assert phases == pytest.approx(
        {"detect": 0.01, "drain": 0.1, "salvage": 0.2, "start": 0.4, "connect": 0.2, "first_step": 0.2}
    )


def test_03_the_exception_checkpoint_is_committed_and_its_memory_freed() -> None:
    run = Driven().restarted()
    [commit] = run(shard(1, 7, 0, "exception", shares=1))
    assert commit == Commit(1, 7, "exception", "", (shard(1, 7, 0, "exception", shares=1),))
    assert run(Committed(1, 7, ok=True)) == (ReleaseSegments(1),)


def test_04_a_consequence_is_never_the_root() -> None:
    run = Driven().running()
    lost_peer = ErrorInfo("DistBackendError", "closed", secondary=True)
    run(WorkerFailed(1, 0, "exception", 7, 4.0, lost_peer, alive=True))
    run(WorkerFailed(1, 1, "signal:9", 7, 4.1))
    settled = run(OffersIn(1, A, (live(7),), settled=True))
    assert [(fields["rank"], fields["root"]) for fields in records(settled, "worker_failed")] == [(0, False), (1, True)]


def test_05_an_elected_survivor_dies_and_the_election_is_repeated() -> None:
    run = Driven(world_size=3)
    run(AgentJoined(A, "node-a", 3))
    run(GroupStarted(1, A, ((0, 10), (1, 11), (2, 12))))
    run(WorkerFailed(1, 0, "signal:9", 7, run.now))
    head = Offer(Tier.LIVE, 7, A, f"{A}/0/record", frozenset({"head"}))
    one, two = live(7, 1, pieces=("all",)), live(7, 2, pieces=("all",))
    assert orders(run(OffersIn(1, A, (head, one, two), settled=True))) == [Salvage(1, 1, picked(head, one))]
    late = run(WorkerFailed(1, 1, "signal:9", 7, run.now))
    assert records(late, "worker_failed")[0]["root"] is False
    assert orders(run(OffersIn(1, A, (head, two), settled=True))) == [Salvage(1, 2, picked(head, two))]
    assert run(Salvaged(1, A, 1, ok=True)) == (), "an answer to the election before"
    again = orders(run(Salvaged(1, A, 2, ok=True)))
    assert again[:2] == [
        KillGroup(1),
        StartGroup(2, ((0, A), (1, A), (2, A)), picked(head, two, attempt=1), from_storage=False),
    ]


def test_06_what_could_not_be_written_is_not_elected_again() -> None:
    run = Driven().running()
    run(WorkerFailed(1, 1, "signal:9", 7, run.now))
    memory = Offer(Tier.MEMORY, 5, A, f"{A}/slot", frozenset({"all", "head"}), attempt=1)
    run(OffersIn(1, A, (live(7), memory), settled=True))
    again = run(Salvaged(1, A, 1, ok=False, why="no memory"))
    choice = picked(memory, attempt=1)
    assert orders(again) == [
        KillGroup(1),
        StartGroup(2, BOTH_ON_A, choice, from_storage=False),
        PersistChoice(1, choice, "exception"),
    ]
    assert f"{A} could not write what it was elected for (no memory); electing again" in told(again)
    run(GroupStarted(2, A, ((0, 20), (1, 21))))
    run(WorkerStepped(2, 0, 6, run.now))
    assert records(run(WorkerStepped(2, 1, 6, run.now)), "recovered")[0]["lost_steps"] == 2


def test_07_an_agent_that_does_not_answer_a_drain_is_named() -> None:
    run = Driven()
    run(AgentJoined(A, "node-a", 1))
    run(AgentJoined(B, "node-b", 1))
    run(GroupStarted(1, A, ((0, 10),)))
    run(GroupStarted(1, B, ((1, 11),)), 2.0)
    run(WorkerFailed(1, 1, "signal:9", 7, 2.9), 3.0)
    run(OffersIn(1, A, (live(7),), settled=True), 3.1)
    assert run.machine.next_deadline() == 13.0
    overdue = run(Tick(), 13.0)
    assert orders(overdue) == [Salvage(1, 1, picked(live(7)))]
    assert f"{B} did not say within 10 s what its ranks hold; going on with what the others hold" in told(overdue)


def test_08_an_agent_that_does_not_start_its_workers_is_named() -> None:
    run = Driven(start_timeout_s=60.0)
    run(AgentJoined(A, "node-a", 1), 0.0)
    run(AgentJoined(B, "node-b", 1), 0.0)
    run(GroupStarted(1, A, ((0, 10),)), 1.0)
    assert run.machine.next_deadline() == 60.0
    assert orders(run(Tick(), 60.0)) == [Drain(1, 10.0)]
    run(OffersIn(1, A, (), settled=True), 60.1)
    [failed] = records(run(OffersIn(1, B, (), settled=True), 60.2), "worker_failed")
    assert (failed["rank"], failed["cause"]) == (1, "hang")
    assert failed["error"] == {
        "type": "StartTimeout",
        "message": f"{B} did not start its workers within 60 s",
    }


def test_09_a_kill_during_start_up_leaves_the_source_before_it_valid() -> None:
    run = Driven().running()
    run.kill_at(7)
    run(WorkerFailed(2, 0, "signal:9", 7, run.now))
    again = run(OffersIn(2, A, (), settled=True))
    assert orders(again) == [KillGroup(2)], "the second failure without progress waits"
    deadline = run.machine.next_deadline()
    assert deadline is not None
    assert orders(run(Tick(), deadline)) == [StartGroup(3, BOTH_ON_A, picked(live(7), attempt=1), from_storage=False)]


def test_10_memory_goes_with_its_agent() -> None:
    run = Driven().running()
    run(Committed(1, 5, ok=True))  # nobody asked: ignored
    run.saved(5, "periodic")
    run(Committed(1, 5, ok=True))
    run.kill_at(7)
    lost = run(AgentLost(A, "the node is gone", run.now))
    assert f"the state of step 7 in memory went with {A}" in told(lost)
    assert run.machine.state is State.GATHERING
    run(AgentJoined(B, "node-b", 2))
    deadline = run.machine.next_deadline()
    assert deadline is not None
    assert orders(run(Tick(), deadline)) == [StartGroup(3, ((0, B), (1, B)), None, from_storage=True)]


def test_11_a_restart_from_storage_waits_for_a_commit_on_its_way() -> None:
    run = Driven().running()
    [commit] = run.saved(5, "periodic")
    assert isinstance(commit, Commit)
    run(AgentLost(A, "the node is gone", run.now))
    assert run(AgentJoined(B, "node-b", 2)) == ()
    assert run.machine.state is State.BACKOFF
    committed = run(Committed(1, 5, ok=True))
    assert orders(committed) == [StartGroup(2, ((0, B), (1, B)), None, from_storage=True)]
    assert records(committed, "restart_decided")[0]["resume_step"] == 5


def test_12_a_save_that_can_never_be_whole_is_dropped_and_told() -> None:
    run = Driven().running()
    run(SaveStaged(1, 0, 5, 2, "periodic"))
    run(shard(1, 5, 0, "periodic"))
    run(WorkerFailed(1, 1, "signal:9", 5, run.now))
    dropped = run(OffersIn(1, A, (), settled=True))
    why = "the attempt ended before every rank had staged its share"
    assert records(dropped, "save_dropped") == [{"attempt": 1, "step": 5, "reason": "periodic", "name": "", "why": why}]
    assert run(shard(1, 5, 1, "periodic")) == (), "it stays dropped"


def test_13_a_staged_save_survives_the_end_of_its_attempt() -> None:
    run = Driven().running()
    for rank in (0, 1):
        run(SaveStaged(1, rank, 5, 2, "periodic"))
    run.kill_at(7)
    assert orders(run(shard(1, 5, 0, "periodic"))) == []
    assert orders(run(shard(1, 5, 1, "periodic"))) == [
        Commit(1, 5, "periodic", "", (shard(1, 5, 0, "periodic"), shard(1, 5, 1, "periodic")))
    ]


def test_14_commits_go_one_at_a_time_and_in_step_order() -> None:
    run = Driven().running()
    [first] = run.saved(5, "periodic")
    assert isinstance(first, Commit) and first.step == 5
    assert run.saved(6, "periodic") == ()
    assert run(Committed(1, 6, ok=True)) == (), "not the one that was asked for"
    [second] = run(Committed(1, 5, ok=True))
    assert isinstance(second, Commit) and second.step == 6


def test_15_a_checkpoint_that_was_asked_for_is_not_overtaken() -> None:
    run = Driven().running()
    assert run(SaveRequested("best")) == (AskWorkers(1, "save", "best"),)
    for rank in (0, 1):
        run(SaveStaged(1, rank, 5, 2, "requested", "best"))
    run(shard(1, 5, 0, "requested", name="best"))
    assert run.saved(6, "periodic") == ()
    [commit] = run(shard(1, 5, 1, "requested", name="best"))
    assert isinstance(commit, Commit) and (commit.step, commit.name) == (5, "best")


def test_16_a_request_that_a_failure_undid_is_asked_again() -> None:
    run = Driven().running()
    run(SaveRequested("best"))
    run.kill_at(7)
    assert orders(run(GroupStarted(2, A, ((0, 20), (1, 21))))) == [AskWorkers(2, "save", "best")]


@pytest.mark.parametrize(("kind", "code"), [("platform", 75), ("person", 76), ("request", 76)])
def test_17_a_stop_saves_and_ends_with_its_code(kind: str, code: int) -> None:
    run = Driven().running()
    reason = "preemption" if kind == "platform" else "stop"
    assert orders(run(StopRequested(kind))) == [AskWorkers(1, "stop", reason)]  # type: ignore[arg-type]
    assert run(StopRequested("person", save=False)) == (), "a second one changes nothing"
    run.saved(8, "stop")
    run(WorkerStopped(1, 0, 8))
    run(WorkerStopped(1, 1, 8))
    done = run(Committed(1, 8, ok=True))
    assert done[0] == KillGroup(1)
    [finish] = [action for action in done if isinstance(action, Finish)]
    assert (finish.outcome, finish.exit_code, finish.step) == ("stopped", code, 8)


def test_18_a_stop_that_nobody_follows_salvages_when_grace_is_over() -> None:
    run = Driven(grace_s=25.0).running()
    run(StopRequested("platform"), 10.0)
    assert run.machine.next_deadline() == 35.0
    over = run(Tick(), 35.0)
    assert orders(over) == [Drain(1, 10.0)]
    assert "ranks [0, 1] did not leave within 25 s" in told(over)
    assert orders(run(OffersIn(1, A, (live(7),), settled=True))) == [Salvage(1, 1, picked(live(7)))]
    choice = picked(live(7), attempt=1)
    assert orders(run(Salvaged(1, A, 1, ok=True))) == [KillGroup(1), PersistChoice(1, choice, "preemption")]
    run(shard(1, 7, 0, "preemption", shares=1))
    assert run(Committed(1, 7, ok=True)) == (Finish("stopped", 75, 7, "the platform asked to stop"),)


def test_19_a_worker_that_fails_while_stopping_changes_neither_end_nor_code() -> None:
    run = Driven().running()
    run(StopRequested("person"))
    run.kill_at(7)
    run(shard(1, 7, 0, "stop", shares=1))
    why = "a person asked to stop (rank 1 was killed by signal 9 (SIGKILL) at step 7 meanwhile)"
    assert run(Committed(1, 7, ok=True)) == (Finish("stopped", 76, 7, why),)


def test_20_a_stop_before_anything_was_trained_ends_at_once() -> None:
    gathering = Driven()
    assert gathering(StopRequested("platform")) == (
        Finish("stopped", 75, 0, "the platform asked to stop while no group was training"),
    )
    starting = Driven()
    starting(AgentJoined(A, "node-a", 2))
    ended = starting(StopRequested("person"))
    assert ended[0] == KillGroup(1) and isinstance(ended[-1], Finish) and ended[-1].exit_code == 76


def test_21_a_stop_without_saving_kills() -> None:
    run = Driven().running()
    assert run(StopRequested("request", save=False)) == (
        KillGroup(1),
        Finish("stopped", 76, 1, "`orchestrator stop` asked to stop, without saving"),
    )


def test_22_a_stop_whose_checkpoint_is_lost_does_not_claim_that_everything_is_saved() -> None:
    run = Driven().running()
    run(StopRequested("platform"))
    for rank in (0, 1):
        run(SaveStaged(1, rank, 8, 2, "stop"))
        run(WorkerStopped(1, rank, 8))
    finish = run(ShardLost(1, 8, 1, "disk full"))[-1]
    assert isinstance(finish, Finish)
    assert (finish.outcome, finish.exit_code) == ("failed", 1)
    assert "the stop checkpoint at step 8 could not be kept: the share of rank 1 was lost: disk full" in finish.why
    assert finish.why.endswith("nothing was saved, so the next launch starts from the beginning")


def test_23_the_programs_own_failure_keeps_the_exception_checkpoint() -> None:
    run = Driven().running()

    def raise_at_7(attempt: int) -> tuple[Action, ...]:
        run(WorkerFailed(attempt, 1, "exception", 7, run.now, USER, alive=True))
        return run(OffersIn(attempt, A, (live(7),), settled=True))

    raise_at_7(1)
    run(Salvaged(1, A, 1, ok=True))
    run(shard(1, 7, 0, "exception", shares=1))
    run(GroupStarted(2, A, ((0, 20), (1, 21))))
    given_up = raise_at_7(2)
    assert orders(given_up) == [KillGroup(2)], "what it salvaged before is as new, and its commit is waited for"
    finish = run(Committed(1, 7, ok=True))[-1]
    assert isinstance(finish, Finish)
    assert (finish.outcome, finish.exit_code, finish.step) == ("failed", 1, 7)
    assert finish.why == (
        "rank 1 raised at step 7: ValueError: bad batch (train.py:31); the attempt before raised the same at the same "
        "step, so it is the program's own; the checkpoint at step 7 is kept; the next launch continues there"
    )


def test_24_a_refusal_of_our_own_api_ends_at_once_with_its_code() -> None:
    run = Driven()
    run(AgentJoined(A, "node-a", 2))
    run(GroupStarted(1, A, ((0, 10), (1, 11))))
    error = ErrorInfo("UsageError", "call prepare first", exit_code=2)
    refused = run(WorkerFailed(1, 0, "exception", 0, run.now, error, alive=True))
    assert refused[0] == KillGroup(1)
    assert records(refused, "worker_failed")[0]["root"] is True
    finish = refused[-1]
    assert isinstance(finish, Finish)
    assert (finish.outcome, finish.exit_code) == ("failed", 2)


def test_25_a_refusal_after_training_saves_what_was_trained() -> None:
    run = Driven().running()
    error = ErrorInfo("UsageError", "second run.batches", exit_code=2)
    assert run(WorkerFailed(1, 0, "exception", 7, run.now, error, alive=True)) == (Drain(1, 10.0),)
    run(OffersIn(1, A, (live(7),), settled=True))
    choice = picked(live(7), attempt=1)
    assert orders(run(Salvaged(1, A, 1, ok=True))) == [KillGroup(1), PersistChoice(1, choice, "exception")]
    run(shard(1, 7, 0, "exception", shares=1))
    finish = run(Committed(1, 7, ok=True))[-1]
    assert isinstance(finish, Finish) and finish.exit_code == 2


def test_26_a_superseded_driver_stops_at_once() -> None:
    run = Driven().running()
    run.saved(5, "periodic")
    ended = run(Committed(1, 5, ok=False, why="entry 4 is driver 77's", superseded=True))
    assert ended == (
        KillGroup(1),
        Finish(
            "failed",
            1,
            5,
            "another driver took over this run, so step 5 was not committed: entry 4 is driver 77's; look at it with "
            "`orchestrator status`",
        ),
    )


def test_27_agents_that_never_come() -> None:
    run = Driven(world_size=4)
    run(AgentJoined(A, "node-a", 2), 0.0)
    finish = run(Tick(), 600.0)[-1]
    assert isinstance(finish, Finish)
    assert finish.exit_code == 1
    assert finish.why.startswith(
        "agents for 2 of 4 ranks did not join within 600 s; here: agent-0 on node-a (2); check the cluster's resources"
    )


def test_28_ranks_are_placed_by_the_names_of_agents() -> None:
    run = Driven(world_size=4)
    run(AgentJoined("agent-10", "n", 1))
    run(AgentJoined("agent-2", "n", 2))
    [start] = run(AgentJoined("agent-1", "n", 1))
    assert isinstance(start, StartGroup)
    assert start.placement == ((0, "agent-1"), (1, "agent-2"), (2, "agent-2"), (3, "agent-10"))


def test_29_what_an_older_attempt_says_is_dropped() -> None:
    run = Driven().restarted()
    for late in (
        WorkerFailed(1, 0, "signal:9", 7, run.now),
        WorkerStepped(1, 0, 7, run.now),
        Progress(1, 0, 99),
        WorkerFinished(1, 0, 99),
        OffersIn(1, A, (), settled=True),
        Salvaged(1, A, 1, ok=True),
        SaveStaged(1, 0, 99, 2, "periodic"),
        GroupStarted(1, A, ()),
    ):
        assert run(late) == ()
    assert (run.machine.state, run.machine.view().step) == (State.RUNNING, 8)


def test_30_the_final_state_of_a_lost_agent_is_trained_again() -> None:
    run = Driven()
    run(AgentJoined(A, "node-a", 1))
    run(AgentJoined(B, "node-b", 1))
    run(GroupStarted(1, A, ((0, 10),)))
    run(GroupStarted(1, B, ((1, 11),)))
    for rank in (0, 1):
        run(SaveStaged(1, rank, 9, 2, "final"))
        run(WorkerFinished(1, rank, 9))
    assert run.machine.state is State.COMPLETING
    assert orders(run(AgentLost(B, "the node is gone", run.now))) == [Drain(1, 10.0)]
    run(OffersIn(1, A, (), settled=True))
    assert run.machine.state is State.GATHERING
    assert orders(run(AgentJoined("agent-2", "node-c", 1)))[0] == StartGroup(
        2, ((0, A), (1, "agent-2")), None, from_storage=True
    )


def test_31_a_rank_that_has_finished_cannot_fail_any_more() -> None:
    run = Driven().running()
    run(WorkerFinished(1, 0, 9))
    assert run(WorkerFailed(1, 0, "signal:11", 9, run.now)) == ()
    assert orders(run(WorkerFailed(1, 1, "signal:9", 8, run.now))) == [Drain(1, 10.0)]


def test_32_an_offer_from_memory_that_was_freed_meanwhile_is_not_taken() -> None:
    run = Driven().restarted()
    run(shard(1, 7, 0, "exception", shares=1))
    assert run(Committed(1, 7, ok=True)) == (ReleaseSegments(1),)
    run(WorkerFailed(2, 0, "signal:9", 8, run.now))
    stale = Offer(Tier.MEMORY, 8, A, f"{A}/slot", frozenset({"all", "head"}), attempt=1)
    again = orders(run(OffersIn(2, A, (stale,), settled=True)))
    assert again == [KillGroup(2), StartGroup(3, BOTH_ON_A, None, from_storage=True)]


def test_33_an_event_of_another_kind_is_a_programming_error() -> None:
    with pytest.raises(TypeError, match="is no event of ours"):
        Driven()("nonsense")  # type: ignore[arg-type]


def test_34_what_a_console_sees() -> None:
    view = Driven().restarted().machine.view()
    assert (view.state, view.attempt, view.step, view.restarts) == (State.RUNNING, 2, 8, 1)


def test_35_a_storage_that_never_answers_a_commit_ends_a_waiting_restart() -> None:
    run = Driven(save_timeout_s=60.0).running()
    run.saved(5, "periodic")
    run(AgentLost(A, "the node is gone", 10.0), 10.0)
    run(AgentJoined(B, "node-b", 2), 11.0)
    assert run.machine.next_deadline() == 71.0
    run(Tick(), 71.0)
    finish = run(Tick(), 131.0)[-1]
    assert isinstance(finish, Finish) and finish.exit_code == 1
    assert "storage has not answered a commit for 60 s" in finish.why


def test_36_a_damaged_checkpoint_lets_the_log_go_on_from_the_one_before() -> None:
    run = Driven(committed_step=9)
    run(AgentJoined(A, "node-a", 2))
    [started] = records(run(GroupStarted(1, A, ((0, 10), (1, 11)), resume_step=6)), "group_started")
    assert (started["resume_step"], started["resume_sources"]) == (6, ["storage"])
    [commit] = run.saved(7, "periodic")
    assert isinstance(commit, Commit) and commit.step == 7


def test_37_what_a_lost_agent_still_has_to_say_makes_no_save_whole() -> None:
    run = Driven(max_restarts=0)
    run(AgentJoined(A, "node-a", 1))
    run(AgentJoined(B, "node-b", 1))
    run(GroupStarted(1, A, ((0, 10),)))
    run(GroupStarted(1, B, ((1, 11),)))
    run(SaveStaged(1, 0, 5, 2, "periodic"))
    run(AgentLost(B, "the node is gone", run.now))
    assert run(SaveStaged(1, 1, 5, 2, "periodic")) == ()
    run(OffersIn(1, A, (live(5),), settled=True))
    given_up = orders(run(Salvaged(1, A, 1, ok=True)))
    assert given_up == [KillGroup(1), PersistChoice(1, picked(live(5), attempt=1), "exception")]


def test_38_salvage_is_not_taken_for_the_stop_checkpoint_that_only_some_ranks_staged() -> None:
    run = Driven().running()
    run(StopRequested("person"), 10.0)
    run(SaveStaged(1, 1, 7, 2, "stop"))
    run(WorkerStopped(1, 1, 7))
    run(Tick(), 35.0)
    run(OffersIn(1, A, (live(7),), settled=True))
    choice = picked(live(7), attempt=1)
    assert orders(run(Salvaged(1, A, 1, ok=True))) == [KillGroup(1), PersistChoice(1, choice, "exception")]
    assert run.machine.state is State.COMPLETING
    assert run(shard(1, 7, 1, "stop")) == (), "the share of the other save"
    [commit] = run(shard(1, 7, 0, "exception", shares=1))
    assert isinstance(commit, Commit)
