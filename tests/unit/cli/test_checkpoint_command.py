"""`orchestrator checkpoint …` on a run that storage's own code wrote."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from safetensors import safe_open

from orchestrator.cli import checkpoint
from orchestrator.cli.main import cli
from orchestrator.errors import StorageError
from orchestrator.storage.commitlog import CommitLog, checkpoint_entry, outcome_entry
from orchestrator.storage.local import LocalStore
from orchestrator.storage.lock import RunLock
from orchestrator.storage.runs import RunIdentity, open_or_create
from tests.unit.storage.helpers import save


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Steps 40, 80 (named good) and 120 (final) of a completed run."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ORCHESTRATOR_STORAGE", raising=False)
    place = tmp_path / "runs" / "train"
    store = LocalStore(place)
    open_or_create(store, RunIdentity("train", "/train.py", (), 0, 1.0))
    log = CommitLog(store)
    log.take_over()
    for step, reason, name in [(40, "periodic", ""), (80, "requested", "good"), (120, "final", "")]:
        record, _ = save(store, step, f"t{step}", reason, name)
        log.append(checkpoint_entry(record))
    log.append(outcome_entry("completed", 0, 120))
    return place


def call(*words: str) -> Result:
    return CliRunner().invoke(cli, ["checkpoint", *words])


def facts(*words: str) -> Any:
    result = call(*words, "--json")
    assert result.stderr == ""
    return json.loads(result.stdout)


def shard(run: Path, step: int) -> Path:
    return next((run / "checkpoints").glob(f"step-{step:09d}-*/rank-00001.safetensors"))


def test_list(run: Path) -> None:
    lines = call("list", "train").stdout.splitlines()
    assert lines[0].split() == ["STEP", "EPOCH", "REASON", "NAME", "SIZE", "SAVED", "METRICS"]
    assert [line.split()[:4] for line in lines[1:]] == [
        ["40", "2", "periodic", "-"],
        ["80", "2", "requested", "good"],
        ["120", "2", "final", "-"],
    ]
    assert [item["step"] for item in facts("list", "runs/train")] == [40, 80, 120]


def test_show(run: Path) -> None:
    said = call("show", "train@good").stdout
    assert "step      80, epoch 2" in said
    assert "3 tensors:" in said
    assert "model.fc.weight  F32  2x3" in said
    shown = facts("show", "train")
    assert (shown["step"], shown["world_size"], shown["user"]) == (120, 2, {"best": "Infinity"})
    assert shown["tensors"]["scheduler.count"] == {"dtype": "I64", "shape": []}


def test_a_damaged_last_one_is_passed_over_aloud(run: Path) -> None:
    shard(run, 120).unlink()
    result = call("show", "train")
    assert "step      80, epoch 2" in result.stdout
    assert result.stderr.startswith("warning: The checkpoint of step 120 is damaged and passed over")


def test_verify_reads_every_byte_and_names_the_bad_file(run: Path) -> None:
    result = call("verify", "train")
    assert result.exit_code == 0
    assert result.stdout.splitlines()[-1].startswith("3 checkpoints sound (")
    bad = shard(run, 80)
    data = bytearray(bad.read_bytes())
    data[-1] ^= 1
    bad.chmod(0o644)
    bad.write_bytes(data)
    result = call("verify", "train")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: 1 checkpoint of 3 damaged: ")
    assert bad.name in result.stderr
    assert call("verify", "train", "--step", "120").exit_code == 0
    assert call("verify", "train", "--json").exit_code == 1
    assert [item["ok"] for item in facts("verify", "train")["checkpoints"]] == [True, False, True]


def test_export(run: Path, tmp_path: Path) -> None:
    result = call("export", "train", "--step", "good", "--output", "out.safetensors")
    assert result.stdout.startswith("step 80 of train: 3 tensors, ")
    with safe_open(tmp_path / "out.safetensors", "numpy") as file:
        assert sorted(file.keys()) == ["model.fc.bias", "model.fc.weight", "scheduler.count"]
        assert file.get_tensor("model.fc.weight").tolist() == [[0, 1, 2], [3, 4, 5]]
    assert facts("export", "train", "--format", "torch", "-o", "out.pt")["step"] == 120


def test_prune_keeps_what_rules_names_and_the_end_keep(run: Path) -> None:
    assert "needs a rule of what to keep" in call("prune", "train").stderr
    assert (
        call("prune", "train", "--keep-last", "1", "--dry-run")
        .stdout.splitlines()[-1]
        .startswith("1 checkpoint would be removed")
    )
    assert [item["step"] for item in facts("list", "train")] == [40, 80, 120]
    with RunLock(run):
        refused = call("prune", "train", "--keep-last", "1")
    assert (refused.exit_code, "is live" in refused.stderr) == (2, True)
    assert call("prune", "train", "--keep-last", "1").exit_code == 0
    assert [item["step"] for item in facts("list", "train")] == [80, 120]
    outcome = CommitLog(LocalStore(run)).outcome()
    assert outcome is not None and outcome.body["outcome"] == "completed"


def test_a_prune_that_fails_leaves_the_runs_end_as_it_was(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise StorageError("disk gone")

    monkeypatch.setattr(checkpoint, "prune", fail)
    assert call("prune", "train", "--keep-last", "1").exit_code == 1
    outcome = CommitLog(LocalStore(run)).outcome()
    assert outcome is not None and outcome.body["outcome"] == "completed"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["list", "trian"], "There is no run 'trian'"),
        (["show", "train", "--step", "7"], "there are steps 40, 80, 120 and names good"),
        (["show", "train", "--step", "best"], "without --keep-best"),
        (["export", "train"], "Missing option '--output'"),
        (["export", "train", "-o", "nowhere/x"], "a directory that exists"),
        (["export", "train", "--format", "onnx", "-o", "x"], "'onnx' is not one of"),
        (["prune", "train", "--keep-last", "0"], "--keep-last 0: write a whole number from 1 on"),
        (["fork", "train", "--to", "b"], "`orchestrator checkpoint fork` is not available yet"),
        (["import", "x"], "`orchestrator checkpoint import` is not available yet"),
    ],
)
def test_refusals(run: Path, words: list[str], says: str) -> None:
    result = call(*words)
    assert result.exit_code == 2
    assert says in result.stderr
    assert result.stderr.startswith("error: ")
