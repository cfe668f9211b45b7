"""What ends a launch, and what must not: unreadable checkpoints, hanging storage, a node that sees something else."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from ray.exceptions import RayError

from orchestrator.agent.launching import worker_spec
from orchestrator.agent.node import AgentSettings
from orchestrator.agent.token import Token
from orchestrator.control import actions
from orchestrator.control.machine import Machine
from orchestrator.control.state import MachineConfig
from orchestrator.driver.cluster import _wait, check_agents
from orchestrator.driver.committer import Committer
from orchestrator.driver.journal import Journal, attempts_in
from orchestrator.driver.placing import settle_auto
from orchestrator.driver.session import _first_attempt, _seed
from orchestrator.driver.shell import Shell, _to_continue
from orchestrator.errors import ConfigRefusedError, OrchestratorError, StorageError, UsageError
from orchestrator.spec import Retention, RunSpec
from orchestrator.storage.commitlog import CommitLog, checkpoint_entry
from orchestrator.storage.local import LocalStore
from orchestrator.storage.runs import RunIdentity
from tests.unit.storage.helpers import save


class Console:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.failures: list[str] = []
        self.notices: list[str] = []

    def failure(self, text: str, error: object = None) -> None:
        self.failures.append(text)

    def notice(self, text: str, level: str = "info") -> None:
        self.notices.append(text)

    def event(self, name: str, fields: object) -> None: ...

    def progress(self, step: int, **known: object) -> None: ...


@pytest.fixture
def log(tmp_path: Path) -> CommitLog:
    made = CommitLog(LocalStore(tmp_path))
    made.take_over()
    return made


@pytest.fixture
def committer(log: CommitLog) -> Iterator[Committer]:
    made = Committer(log, "train", Retention(), {}, lambda event, report: None)
    yield made
    made.close(10.0)


def shell(tmp_path: Path, committer: Committer, console: Console) -> Shell:
    machine = Machine(MachineConfig(world_size=1))
    journal = Journal(tmp_path)
    return Shell(machine, [], committer, journal, console, tmp_path, "t", (), lambda lost: lost)  # type: ignore[arg-type]


def damaged(log: CommitLog, tmp_path: Path) -> None:
    record, manifest = save(log.store)
    log.append(checkpoint_entry(record))
    (tmp_path / manifest.directory / "rank-00000.safetensors").write_bytes(b"not what it was")


def test_no_readable_checkpoint_ends_the_run_instead_of_beginning_anew(
    tmp_path: Path, log: CommitLog, committer: Committer
) -> None:
    damaged(log, tmp_path)
    console = Console()
    served = shell(tmp_path, committer, console)
    served._stores = {"a": [("127.0.0.1", 1)]}
    start = actions.StartGroup(1, ((0, "a"),), None, True)
    served._look = lambda: served._start_group(start)  # type: ignore[method-assign]
    finish = served.run()
    served.record_outcome()
    assert (finish.outcome, finish.exit_code) == ("failed", 1)
    assert "No committed checkpoint of this run can be read" in finish.why
    assert console.failures == []  # the summary tells why, once
    outcome = CommitLog(log.store).outcome()
    assert outcome is not None and outcome.body["outcome"] == "failed"
    lines = [json.loads(line) for line in (tmp_path / "journal.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["checkpoint_rejected", "run_finished"]
    assert len(log.checkpoints()) == 1


def test_nothing_committed_yet_is_a_beginning(log: CommitLog) -> None:
    assert _to_continue(log, lambda path, why, step: None) is None


def test_a_start_that_fails_is_the_agents_own_ranks(tmp_path: Path, committer: Committer) -> None:
    served, seen = shell(tmp_path, committer, Console()), []
    served._placement = ((0, "a"), (1, "a"), (2, "b"), (3, "b"))
    served._step = seen.append  # type: ignore[method-assign, assignment]
    served._on_StartFailed("b", {"attempt": 1, "why": "no store"})
    served._on_StartFailed("b", {"attempt": 1, "why": "no segment", "rank": 3})
    assert [event.rank for event in seen] == [2, 3]


def test_a_journal_that_cannot_be_written_is_told_once(tmp_path: Path, committer: Committer) -> None:
    console = Console()
    served = shell(tmp_path, committer, console)
    served._journal.problem = "the journal could not be written: full"
    served._look()
    served._look()
    assert console.notices == ["the journal could not be written: full; the run goes on without it"]


def test_storage_that_hangs_is_an_error_and_not_a_wait(committer: Committer) -> None:
    held, let_go = threading.Event(), threading.Event()

    def hang(log: CommitLog) -> None:
        held.set()
        let_go.wait(30)

    thread = threading.Thread(target=committer.locked, args=(hang,))
    thread.start()
    held.wait(30)
    with pytest.raises(StorageError, match="Storage has not answered for 0.01 s"):
        committer.locked(CommitLog.checkpoints, 0.01)
    let_go.set()
    thread.join(30)
    assert committer.locked(CommitLog.checkpoints) == []


def test_the_committer_outlives_any_error(tmp_path: Path, log: CommitLog) -> None:
    answers: list[Any] = []
    made = Committer(log, "train", Retention(), {}, lambda event, report: answers.append(event))
    for step in (1, 2):
        made.commit(actions.Commit(1, step, "periodic", "", (object(),)))  # type: ignore[arg-type]
    made.close(30.0)
    assert [(event.step, event.ok) for event in answers] == [(1, False), (2, False)]
    assert "AttributeError" in answers[0].why


@pytest.mark.parametrize(
    ("auto", "workers", "each", "gpus", "settled"),
    [
        (("workers", "gpus_per_worker"), 0, 0.0, 8, (8, 1.0)),
        (("workers",), 0, 2.0, 8, (4, 2.0)),
        (("gpus_per_worker",), 16, 0.0, 16, (16, 1.0)),
        (("gpus_per_worker",), 16, 0.0, 8, (16, 0.0)),
        (("gpus_per_worker",), 2, 0.0, 0, (2, 0.0)),
        ((), 2, 0.0, 8, (2, 0.0)),
    ],
)
def test_auto_is_settled_by_the_clusters_gpus(
    auto: tuple[str, ...], workers: int, each: float, gpus: int, settled: tuple[int, float]
) -> None:
    assert settle_auto(auto, workers, each, gpus) == settled


@pytest.mark.parametrize(("auto", "each", "gpus"), [(("workers", "gpus_per_worker"), 0.0, 0), (("workers",), 0.0, 8)])
def test_auto_workers_without_gpus_are_refused(auto: tuple[str, ...], each: float, gpus: int) -> None:
    with pytest.raises(UsageError, match="--workers N"):
        settle_auto(auto, 0, each, gpus)


def test_a_run_keeps_its_seed() -> None:
    stored = RunIdentity("train", "/train.py", (), 7, 0.0)
    assert _seed(RunSpec("train.py"), stored) == 7
    assert _seed(RunSpec("train.py", seed=7), stored) == 7
    assert _seed(RunSpec("train.py", seed=3), RunIdentity("train", "/train.py", (), None, 0.0)) == 3
    with pytest.raises(ConfigRefusedError, match="--seed 7.*--seed 8"):
        _seed(RunSpec("train.py", seed=8), stored)


def test_attempts_are_numbered_above_all_that_left_anything(tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "a0004").mkdir(parents=True)
    assert _first_attempt(tmp_path, None) == 1
    assert _first_attempt(tmp_path, str(elsewhere)) == 5
    journal = Journal(tmp_path)
    journal.record("worker_failed", {"attempt": 9, "why": '"attempt": 77'})
    journal.close()
    assert attempts_in(tmp_path) == {9}
    assert _first_attempt(tmp_path, str(elsewhere)) == 10


def test_a_node_says_what_it_sees_otherwise(tmp_path: Path) -> None:
    entry, script = tmp_path / "00000001.json", tmp_path / "train.py"
    entry.write_text('{"nonce": "abc"}')
    script.write_text("print(1)\n")
    token = Token.of(str(entry), "abc", str(script))
    assert token.difference() == ""
    script.write_text("print(2)\n")
    assert "has another script" in token.difference()
    script.unlink()
    assert "cannot read the script" in token.difference()
    entry.write_text('{"nonce": "xyz"}')
    assert "reads something else" in token.difference()
    entry.unlink()
    assert "same place on every node" in token.difference()


def agent(address: str, answer: object) -> Any:
    future: Future[str] = Future()
    if isinstance(answer, Exception):
        future.set_exception(answer)
    elif isinstance(answer, str):
        future.set_result(answer)
    asked = SimpleNamespace(remote=lambda: SimpleNamespace(future=lambda: future))
    return SimpleNamespace(actor=SimpleNamespace(check_token=asked), node=SimpleNamespace(address=address))


def test_all_agents_are_asked_and_the_odd_node_is_named() -> None:
    check_agents([agent("one", ""), agent("two", ""), agent("three", OSError("its poll tells"))], 5.0)
    with pytest.raises(UsageError, match="node two cannot read x"):
        check_agents([agent("one", ""), agent("two", "cannot read x"), agent("three", None)], 0.01)
    with pytest.raises(OrchestratorError, match="agents on three have not said"):
        check_agents([agent("one", ""), agent("three", None)], 0.01)


def test_what_ray_says_at_length_is_told_whole(tmp_path: Path, committer: Committer) -> None:
    console = Console()
    served = shell(tmp_path, committer, console)

    def fail() -> None:
        raise RayError("the head is gone\nand this is how")

    served._look = fail  # type: ignore[method-assign]
    assert served.run().why == "RayError: the head is gone"
    assert console.failures == ["RayError: the head is gone\nand this is how"]


def test_waiting_for_a_node_lets_signals_through(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> bool:
        waits.append(seconds)
        now[0] += seconds
        return False

    assert _wait(SimpleNamespace(wait=wait), 2.5) is False
    assert waits == [1.0, 1.0, 0.5]
    assert _wait(SimpleNamespace(wait=lambda seconds: True), 2.5) is True


@pytest.mark.parametrize(("gpu_ids", "visible"), [((), ""), (("2", "3"), "2,3")])
def test_workers_see_the_gpus_that_their_agent_was_given(gpu_ids: tuple[str, ...], visible: str) -> None:
    settings = AgentSettings(
        name="agent-0", host="127.0.0.1", slots=1, run_name="train", run_uri="/r", log_dir="/logs", script="train.py",
        args=(), module=False, cwd="/", options={}, gpu_ids=gpu_ids,
    )  # fmt: skip
    start = {
        "attempt": 3, "ranks": [0], "world_size": 1, "node_rank": 0, "nodes": 1, "restarts": 0, "resume": None,
        "store": {"host": "127.0.0.1", "port": 1}, "faults": [],
    }  # fmt: skip
    env = worker_spec(settings, {"CUDA_VISIBLE_DEVICES": "7"}, start, 0, 0, "/logs/a0003/rank-00000.log", [], [])["env"]
    assert env["CUDA_VISIBLE_DEVICES"] == visible
    assert env["TORCHELASTIC_ERROR_FILE"] == "/logs/a0003/error-0.json"
