"""What people do with checkpoints: list, find, load, verify, export."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from orchestrator.errors import CheckpointDamagedError, UsageError
from orchestrator.storage.assemble import assemble
from orchestrator.storage.checkpoints import export, find, find_sound, list_checkpoints, load, open_run, verify
from orchestrator.storage.commitlog import CommitLog, checkpoint_entry
from orchestrator.storage.digest import crc32c
from orchestrator.storage.heads import checkpoint_head
from orchestrator.storage.layout import checkpoint_dir, manifest_path, shard_path
from orchestrator.storage.local import LocalStore
from orchestrator.storage.manifest import CheckpointRecord
from orchestrator.storage.runs import RunIdentity, open_or_create
from orchestrator.storage.segment import layout
from orchestrator.storage.shards import dtype_name, write_shard
from orchestrator.storage.trees import plain_states, referred

from .helpers import save


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "runs/train")
    open_or_create(store, RunIdentity("train", "/train.py", (), 0, 0.0))
    CommitLog(store).take_over()
    return store


def commit(store: LocalStore, step: int, **more: Any) -> CheckpointRecord:
    record, _ = save(store, step, **more)
    log = CommitLog(store)
    log.take_over()
    log.append(checkpoint_entry(record))
    return record


def save_tensors(
    store: LocalStore, tensors: dict[str, torch.Tensor], head: dict[str, Any], world_size: int = 1
) -> None:
    """Commit one shard with these tensors, as step 7."""
    table, _ = layout((name, dtype_name(tensor.dtype), tuple(tensor.shape)) for name, tensor in tensors.items())
    data = b"".join(tensors[entry.name].contiguous().view(-1).view(torch.uint8).numpy().tobytes() for entry in table)
    directory = checkpoint_dir(7, 1, "tok")
    labels = {"attempt": 1, "step": 7, "rank": 0, "world_size": world_size, "head": {"step": 7, **head}}
    shard = write_shard(store, shard_path(directory, 0), labels, table, memoryview(data))
    manifest = assemble([shard], run="train", reason="final", created=1.0)
    store.create_exclusive(manifest_path(directory), manifest.to_bytes())
    log = CommitLog(store)
    log.take_over()
    log.append(checkpoint_entry(CheckpointRecord.of(manifest, crc32c(manifest.to_bytes()))))


# ---------------------------------------------------------------------------------------------------------- finding


def test_selectors(store: LocalStore, tmp_path: Path) -> None:
    for step, more in ((10, {"name": "v1"}), (20, {}), (30, {"name": "v1"})):
        commit(store, step, **more)
    run = open_run("train", str(tmp_path / "runs"))
    assert [record.step for record in list_checkpoints(run)] == [10, 20, 30]
    assert [find(run, text).step for text in ("last", "20", "@10", "v1")] == [30, 20, 10, 30]
    assert find(open_run(f"{tmp_path}/runs/train@20")).step == 20
    with pytest.raises(UsageError, match="no checkpoint @15; there are steps 10, 20, 30 and names v1"):
        find(run, "15")


def test_the_best_one(store: LocalStore) -> None:
    config = {"keep_best": [2, "loss", "min"]}
    for step, loss in ((10, 0.5), (20, 0.25), (30, math.nan), (40, 0.3)):
        commit(store, step, config=config, metrics={"loss": loss})
    assert find(open_run(f"{store.root}@best")).step == 20
    commit(store, 50, config={"keep_best": "1:loss:max"}, metrics={"acc": 1.0})
    assert find(open_run(f"{store.root}@best")).step == 10
    commit(store, 60, config={}, metrics={"acc": 1.0})
    with pytest.raises(UsageError, match="launched without --keep-best and saved.*Metrics in its checkpoints: acc, loss"):
        find(open_run(f"{store.root}@best"))
    for step in (70, 80):
        commit(store, step, name="best", config=config, metrics={"loss": 9.0})
    commit(store, 90, config=config, metrics={"loss": 0.0})
    assert find(open_run(f"{store.root}@best")).step == 80  # the script's own word counts


def test_runs_that_are_not_there(store: LocalStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"There is no run 'tarin' in .*/runs; there are: train"):
        open_run("tarin", str(tmp_path / "runs"))
    with pytest.raises(UsageError, match="nor any other run. Give URI/NAME"):
        open_run(str(tmp_path / "none/train"))
    with pytest.raises(UsageError, match="has no checkpoint yet"):
        find(open_run(str(store.root)))
    monkeypatch.setenv("ORCHESTRATOR_STORAGE", str(tmp_path / "runs"))
    assert open_run("train").identity.name == "train"


# ---------------------------------------------------------------------------------------------------------- loading


def test_load_gives_plain_state(store: LocalStore) -> None:
    commit(store, 10)
    state = load(str(store.root))
    assert list(state) == ["model", "scheduler"]
    assert torch.equal(state["model"]["fc.weight"], torch.arange(6.0).view(2, 3))
    assert state["scheduler"] == {"last_epoch": 2, "count": torch.tensor(7)}


def test_load_passes_a_damaged_last_one_aloud_but_not_the_one_asked_for(store: LocalStore) -> None:
    commit(store, 10)
    damaged = commit(store, 20)
    (store.root / damaged.directory / "rank-00001.safetensors").unlink()
    with pytest.warns(UserWarning, match="step 20 is damaged and passed over: .*rank-00001.safetensors is missing"):
        assert find_sound(open_run(str(store.root)))[0].step == 10
    with pytest.raises(CheckpointDamagedError, match=r"rank-00001.safetensors is missing"):
        load(f"{store.root}@20")


TREES: dict[str, Any] = {
    "model": {
        "kind": "module", "at": "model", "tensors": {"emb.weight": [2], "bn.mean": [1]},
        "aliases": {"head.weight": "model.emb.weight"}, "extra": {"q._extra_state": {"$tuple": [1]}},
    },
    "optimizer": {
        "kind": "optimizer", "at": "optimizer", "state": [[["exp_avg"], ["emb.weight"]]],
        "plain": {"emb.weight": {"step": 3}},
        "groups": [{"hyper": {"lr": 0.1}, "params": ["emb.weight"]}],
    },
    "noise": {"kind": "tensor", "at": "noise@0", "shape": [1]},
    "scaler": {"kind": "object", "at": "scaler", "type": "X", "state": {"a": {"$tensor": "scaler.a", "as": "numpy"}}},
    "reader": {"kind": "object", "at": "reader@0", "type": "X", "state": {"at": 0}},
}  # fmt: skip
TENSORS = {
    "model.emb.weight": torch.tensor([1.0, 2.0]), "model.bn.mean": torch.tensor([3.0]),
    "optimizer.state.emb.weight.exp_avg": torch.tensor([4.0, 5.0]), "noise@0": torch.tensor([6]),
    "noise@1": torch.tensor([7]), "scaler.a": torch.tensor([8]),
}  # fmt: skip
PER_RANK = {"1": {"tracked": {"reader": {"kind": "object", "at": "reader@1", "type": "X", "state": {"at": 1}}}}}


def test_every_kind_of_tracked_value_becomes_plain_state(store: LocalStore) -> None:
    save_tensors(store, TENSORS, {"tracked": TREES, "per_rank": PER_RANK}, world_size=2)
    state = load(str(store.root))
    model = {name: value.tolist() for name, value in state["model"].items() if isinstance(value, torch.Tensor)}
    assert model == {"emb.weight": [1.0, 2.0], "bn.mean": [3.0], "head.weight": [1.0, 2.0]}
    assert state["model"]["q._extra_state"] == (1,)
    optimizer = state["optimizer"]
    assert optimizer["param_groups"] == [{"lr": 0.1, "params": ["emb.weight"]}]
    assert optimizer["state"]["emb.weight"]["step"] == 3
    assert optimizer["state"]["emb.weight"]["exp_avg"].tolist() == [4.0, 5.0]
    assert {rank: value.tolist() for rank, value in state["noise"].items()} == {0: [6], 1: [7]}
    assert type(state["scaler"]["a"]).__name__ == "ndarray"
    assert state["reader"] == {0: {"at": 0}, 1: {"at": 1}}


def test_trees_say_which_tensors_they_need() -> None:
    needed = {name for tree in TREES.values() for name in referred(tree)}
    assert needed == set(TENSORS) - {"noise@1"}
    with pytest.raises(CheckpointDamagedError):
        plain_states({"tracked": {"model": TREES["model"]}}, 1, {})


def test_a_missing_parameter_of_a_module_is_no_checkpoint(store: LocalStore) -> None:
    lost = {name: tensor for name, tensor in TENSORS.items() if name != "model.bn.mean"}
    with pytest.raises(CheckpointDamagedError, match="'model.bn.mean' is in no file"):
        save_tensors(store, lost, {"tracked": TREES, "per_rank": PER_RANK})


def test_heads_are_merged_by_authority() -> None:
    first = {"head": {}, "trees": {"a": {"groups": [{"params": ["w"], "hyper": {"lr": 1}}], "y": 1}}}
    second = {
        "head": {"step": 5, "small": {"a": {"$hyper": [{"lr": 2}]}, "b": {"z": 3}}, "per_rank": {"1": {"r": 1}}},
        "trees": {"a": {"groups": [], "y": 9}},
    }
    third = {"head": {"step": 6, "per_rank": {"0": {"r": 0}, "1": {"r": 9}}}, "own_trees": {"0": {"c": {"x": 4}}}}
    merged = checkpoint_head([first, second, third])
    assert merged == {
        "step": 5,
        "tracked": {"a": {"groups": [{"params": ["w"], "hyper": {"lr": 2}}], "y": 1}, "b": {"z": 3}},
        "per_rank": {"1": {"r": 1}, "0": {"r": 0, "tracked": {"c": {"x": 4}}}},
    }
    assert checkpoint_head([{"head": merged}]) == merged


# ---------------------------------------------------------------------------------------------------------- verifying


def test_verify_names_the_first_bad_file(store: LocalStore) -> None:
    commit(store, 10)
    damaged = commit(store, 20)
    path = store.root / damaged.directory / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    seen: list[int] = []
    verdicts = verify(open_run(str(store.root)), on_verdict=lambda verdict: seen.append(verdict.record.step))
    assert [(verdict.record.step, verdict.ok) for verdict in verdicts] == [(20, False), (10, True)] and seen == [20, 10]
    assert damaged.directory + "/rank-00001.safetensors is damaged" in verdicts[0].why
    assert "'model.fc.weight'" in verdicts[0].why and verdicts[1].bytes_read == damaged.bytes
    assert [verdict.ok for verdict in verify(open_run(str(store.root)), "10")] == [True]


# ---------------------------------------------------------------------------------------------------------- exporting


def test_export_as_one_safetensors_file(store: LocalStore, tmp_path: Path) -> None:
    save_tensors(store, TENSORS, {"tracked": TREES, "per_rank": PER_RANK, "user": {"best": 1}}, world_size=2)
    output = tmp_path / "out.safetensors"
    output.write_text("older")
    export(open_run(str(store.root)), None, "safetensors", output)
    with safe_open(output, "pt") as opened:
        assert set(opened.keys()) == {*TENSORS, "model.head.weight"}
        assert opened.get_tensor("model.head.weight").tolist() == [1.0, 2.0]
        assert opened.get_tensor("optimizer.state.emb.weight.exp_avg").tolist() == [4.0, 5.0]
        metadata = opened.metadata()
    assert (metadata["step"], metadata["run"]) == ("7", "train")
    assert json.loads(metadata["state"])["user"] == {"best": 1}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.safetensors", "runs"]


def test_export_for_torch_loads_without_pickle(store: LocalStore, tmp_path: Path) -> None:
    commit(store, 10)
    export(open_run(str(store.root)), "10", "torch", tmp_path / "out.pt")
    loaded = torch.load(tmp_path / "out.pt", weights_only=True)
    assert set(loaded) == {"model.fc.weight", "model.fc.bias", "scheduler.count"}
    assert torch.equal(loaded["model.fc.weight"], torch.arange(6.0).view(2, 3))


@pytest.mark.parametrize(("file_format", "output"), [("onnx", "x"), ("torch", "none/x"), ("torch", ".")])
def test_exports_that_cannot_be(store: LocalStore, tmp_path: Path, file_format: str, output: str) -> None:
    commit(store, 10)
    with pytest.raises(UsageError, match="--"):
        export(open_run(str(store.root)), None, file_format, tmp_path / output)


def test_a_failed_export_leaves_nothing(store: LocalStore, tmp_path: Path) -> None:
    damaged = commit(store, 20)
    path = store.root / damaged.directory / "rank-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    with pytest.raises(CheckpointDamagedError, match="rank-00001.safetensors is damaged"):
        export(open_run(str(store.root)), "20", "safetensors", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
