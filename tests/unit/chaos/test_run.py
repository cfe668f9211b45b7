"""The parts of `chaos` around the runs: names, saves to strike in, costs from the journal, the kept reference."""

from __future__ import annotations

import json
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from orchestrator.chaos import reference, run
from orchestrator.chaos.faults import Fault, Undisturbed
from orchestrator.chaos.reference import Reference
from orchestrator.chaos.run import Cost, disturbed_spec, fault_line, fresh_name, limit_s, read_costs
from orchestrator.errors import UsageError
from orchestrator.spec import RunSpec

CALM = Undisturbed(2, 100, 0.01)


def test_what_cannot_be_is_refused_before_anything_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "open_cluster", lambda spec: pytest.fail("a cluster was started"))
    with pytest.raises(UsageError, match="there is no rank 2 among 2 workers"):
        run.main(RunSpec("train.py", workers=2), ["kill:rank=2,step=1"], None)  # type: ignore[arg-type]


def test_names_are_fresh_for_both_runs(tmp_path: Path) -> None:
    spec = RunSpec("/somewhere/train.py")
    assert fresh_name(tmp_path, spec) == "train"
    (tmp_path / "train").mkdir()
    (tmp_path / "train-2-calm").mkdir()
    assert fresh_name(tmp_path, spec) == "train-3"
    assert fresh_name(tmp_path, replace(spec, run_name="mine")) == "mine"
    with pytest.raises(UsageError):
        fresh_name(tmp_path, replace(spec, run_name="../mine"))


def test_a_fault_in_a_save_gets_a_save_of_its_own(tmp_path: Path) -> None:
    faults = (
        Fault("a", "kill", 0, 30, "save"),
        Fault("b", "kill", 0, 100, "save"),  # the final save comes by itself
        Fault("c", "kill", 0, 40, "boundary"),
    )
    spec = disturbed_spec(RunSpec("train.py", save_at=(7,)), "name", faults, CALM)
    assert (spec.run_name, spec.save_at) == ("name", (7, 30))
    assert [json.loads(text)["id"] for text in spec.faults] == ["a", "b", "c"]


def test_costs_are_those_of_the_recovery_that_follows(tmp_path: Path) -> None:
    entries = [
        {"event": "fault_fired", "id": "a"},
        {"event": "fault_fired", "id": "b"},
        {"event": "recovered", "recovery_s": 0.1, "lost_steps": 0},
        {"event": "fault_fired", "id": "c"},
        {"event": "recovered", "recovery_s": 0.2, "lost_steps": 3},
        {"event": "fault_fired", "id": "d"},
    ]
    (tmp_path / "journal.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    faults = tuple(Fault(name, "kill", 1, 5, "any") for name in "abcde")
    costs = read_costs(tmp_path, faults)
    assert costs == {
        "a": Cost(True, 0.1, 0), "b": Cost(True, 0.1, 0), "c": Cost(True, 0.2, 3), "d": Cost(True), "e": Cost(),
    }  # fmt: skip
    assert [fault_line(fault, costs[fault.id]) for fault in faults[2:]] == [
        "kill of rank 1 at any moment of step 5: recovered in 0.20 s, 3 steps lost",
        "kill of rank 1 at any moment of step 5: nothing had to recover",
        "kill of rank 1 at any moment of step 5: did not strike",
    ]


def test_a_run_that_hangs_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    said, signals = [], []
    struck = threading.Event()

    class Console:
        def notice(self, text: str, level: str = "info") -> None:
            said.append((text, level))

    monkeypatch.setattr(run.os, "kill", lambda pid, number: (signals.append(number), struck.set()))
    chaos = run._Chaos(RunSpec("train.py"), [], Console(), None)  # type: ignore[arg-type]
    with chaos._deadline(600.0):
        pass
    assert not chaos._hung
    with chaos._deadline(0.0):
        assert struck.wait(10)
    assert (chaos._hung, signals) == (True, [signal.SIGTERM])
    assert said == [("chaos: no end within 0.00 s, so something hangs; stopping it", "error")]
    assert limit_s(CALM, 5) == 170.0


def test_the_reference_is_kept_for_one_program(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text("1")
    spec, place = RunSpec(str(script), workers=2), tmp_path / "reference"
    (place / "undisturbed").mkdir(parents=True)
    assert reference.load(place, spec) is None
    made = Reference(place / "undisturbed", CALM, "accuracy 97 %")
    reference.keep(place, spec, made)
    assert reference.load(place, spec) == made
    assert reference.load(place, replace(spec, max_restarts=3)) == made
    with pytest.raises(UsageError, match="holds the outcome of another run: workers 2 instead of 3"):
        reference.load(place, replace(spec, workers=3))
    script.write_text("2")
    assert reference.load(place, spec) is None, "another program: it is run anew"
    (place / reference.OUTCOME_FILE).write_text("{")
    with pytest.raises(UsageError, match="delete the directory or name another"):
        reference.load(place, spec)
