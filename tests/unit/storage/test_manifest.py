"""Manifests from strangers: whatever they say, a clear refusal naming file and field, never a wrong read."""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import CheckpointDamagedError
from orchestrator.storage.coverage import coverage
from orchestrator.storage.local import LocalStore
from orchestrator.storage.manifest import CheckpointRecord, Chunk, Manifest, StoredFile, StoredTensor, parse_manifest

from .helpers import save

Edit = Callable[[dict[str, Any]], Any]


@pytest.fixture
def raw(tmp_path: Path) -> dict[str, Any]:
    decoded: dict[str, Any] = json.loads(save(LocalStore(tmp_path))[1].to_bytes())
    return decoded


def weight(raw: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = raw["tensors"]["model.fc.weight"]
    return found


HOSTILE: list[tuple[str, Edit]] = [
    ("has schema 2, this orchestrator reads up to 1: install a newer one", lambda m: m.update(schema=2)),
    ("not a checkpoint manifest of ours", lambda m: m.update(schema="1")),
    ("not a checkpoint manifest of ours", lambda m: m.update(schema=True)),
    ("not a checkpoint manifest of ours", lambda m: m.update(kind="other")),
    ("`step` is '-1', not a count", lambda m: m.update(step=-1)),
    ("`step` is 'True', not a count", lambda m: m.update(step=True)),
    ("`world_size` is '2.0', not a count", lambda m: m.update(world_size=2.0)),
    ("`epoch` is 'None', not a count", lambda m: m.pop("epoch")),
    ("`samples` is '1e.*not a count", lambda m: m.update(samples=1e300)),
    ("`created` is 'x', not a number", lambda m: m.update(created="x")),
    ("`run` is .*not a text", lambda m: m.update(run=["train"])),
    ("`reason` is .*not a text", lambda m: m.update(reason="r" * 20_000)),
    ("`state` is .*not an object", lambda m: m.update(state=[])),
    ("`metrics` holds what is no number", lambda m: m.update(metrics={"loss": "low"})),
    ("file '/etc/passwd' is no plain name", lambda m: m["files"][0].update(path="/etc/passwd")),
    ("file '../../x' is no plain name", lambda m: m["files"][0].update(path="../../x")),
    ("file '..' is no plain name", lambda m: m["files"][0].update(path="..")),
    ("file '.tmp-0' is no plain name", lambda m: m["files"][0].update(path=".tmp-0")),
    ("file 'a.*b' is no plain name", lambda m: m["files"][0].update(path="a\nb")),
    ("`files` names a file twice", lambda m: m["files"].append(m["files"][0])),
    ("`bytes` is .*not a count", lambda m: m["files"][0].update(bytes=1 << 61)),
    ("`crc32c` is 'XY', not eight hex digits", lambda m: m["files"][0].update(crc32c="XY")),
    ("an entry of `files` is '3', not an object", lambda m: m.update(files=[3])),
    ("`files` is .*not a list", lambda m: m.update(files={})),
    ("tensor 'model.fc.weight' is 'None', not an object", lambda m: m["tensors"].update({"model.fc.weight": None})),
    ("has the unknown dtype 'object'", lambda m: weight(m).update(dtype="object")),
    ("`shape` is .*not a shape", lambda m: weight(m).update(shape=[2, -3])),
    ("`shape` is .*not a shape", lambda m: weight(m).update(shape=[True, 3])),
    ("`shape` is .*not a shape", lambda m: weight(m).update(shape=[1] * 65)),
    ("lies outside its shape", lambda m: weight(m)["chunks"][0].update(offset=[9, 0])),
    ("lies outside its shape", lambda m: weight(m)["chunks"][0].update(offset=[0])),
    ("bytes .* of 'rank-9', claimed by .* do not exist", lambda m: weight(m)["chunks"][0].update(file="rank-9")),
    ("claimed by a chunk of .* do not exist", lambda m: weight(m)["chunks"][0].update(begin=1 << 40, end=1 << 41)),
    ("claimed by a chunk of .* do not exist", lambda m: weight(m)["chunks"][0].update(begin=40, end=28)),
    ("cannot be 11 bytes long", lambda m: weight(m)["chunks"][0].update(begin=weight(m)["chunks"][0]["begin"] + 1)),
    ("claim the same bytes", lambda m: m["tensors"].update(copy=copy.deepcopy(weight(m)))),
]  # fmt: skip


@pytest.mark.parametrize(("message", "edit"), HOSTILE)
def test_hostile_manifests_are_refused_naming_the_field(raw: dict[str, Any], message: str, edit: Edit) -> None:
    edit(raw)
    with pytest.raises(CheckpointDamagedError, match=rf"(?s)checkpoints/x/manifest.json: .*{message}"):
        parse_manifest(json.dumps(raw).encode(), "checkpoints/x")


@pytest.mark.parametrize("data", [b"", b"{", b"[]", b"nul", b"\xff\xfe", b"[" * 100_000, b"3"])
def test_what_is_no_json_object_is_refused(data: bytes) -> None:
    with pytest.raises(CheckpointDamagedError, match="manifest.json"):
        parse_manifest(data)


def test_absurd_shapes_do_not_cover(raw: dict[str, Any]) -> None:
    weight(raw)["shape"] = [1 << 59, 1 << 59]
    with pytest.raises(CheckpointDamagedError, match="'model.fc.weight' is not whole: its chunks hold 6 of"):
        coverage(parse_manifest(json.dumps(raw).encode()))


@pytest.mark.parametrize("state", [{"tracked": 3}, {"tracked": {"m": {"kind": "module", "at": "m", "tensors": 3}}},
                                   {"per_rank": {"0": []}}, {"tracked": {"m": {"$tensor": []}}}])  # fmt: skip
def test_a_state_that_nobody_writes_is_refused(raw: dict[str, Any], state: dict[str, Any]) -> None:
    raw["state"] = state
    with pytest.raises(CheckpointDamagedError):
        coverage(parse_manifest(json.dumps(raw).encode()))


def manifest_of(shape: tuple[int, ...], *boxes: tuple[tuple[int, ...], tuple[int, ...]]) -> Manifest:
    chunks, at = [], 0
    for offset, size in boxes:
        chunks.append(Chunk(offset, size, "f", at, at + math.prod(size), 0))
        at += math.prod(size)
    return Manifest(
        "r", 1, 0, 0, "periodic", "", 1, 1, "", 0.0, {}, {}, {}, (StoredFile("f", at, 0),),
        {"w": StoredTensor("U8", shape, tuple(chunks))}, {},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "boxes"),
    [
        ((), [((), ())]),
        ((0, 3), []),
        ((0, 3), [((0, 0), (0, 3))]),
        ((4, 2), [((2, 0), (2, 2)), ((0, 0), (2, 2)), ((4, 0), (0, 2))]),
        ((4, 4), [((0, 0), (2, 3)), ((0, 3), (3, 1)), ((2, 0), (2, 3)), ((3, 3), (1, 1))]),
    ],
)
def test_tilings(shape: tuple[int, ...], boxes: list[Any]) -> None:
    coverage(manifest_of(shape, *boxes))


@pytest.mark.parametrize(
    ("shape", "boxes", "message"),
    [
        ((), [], "hold 0 of 1"),
        ((), [((), ()), ((), ())], "hold 2 of 1"),
        ((4,), [((0,), (3,))], "hold 3 of 4"),
        ((4,), [((0,), (3,)), ((2,), (1,))], "overlap"),
        ((2, 4), [((0, 0), (2, 3)), ((1, 2), (1, 2))], "overlap"),
    ],
)
def test_what_is_no_tiling(shape: tuple[int, ...], boxes: list[Any], message: str) -> None:
    with pytest.raises(CheckpointDamagedError, match=f"tensor 'w' .*{message}"):
        coverage(manifest_of(shape, *boxes))


def test_inf_and_nan_survive_as_strict_json(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    user = {"best": math.inf, "low": [-math.inf, {"x": 1.5}]}
    record, manifest = save(store, user=user, metrics={"loss": math.inf})
    text = (tmp_path / manifest.directory / "manifest.json").read_text()
    assert "Infinity" not in text
    again = parse_manifest(text.encode(), manifest.directory)
    assert again.state["user"] == user and again.metrics == {"loss": math.inf}
    stored = CheckpointRecord.from_json(json.loads(json.dumps(record.to_json(), allow_nan=False)), 7, "here")
    assert stored.metrics == {"loss": math.inf} and stored.sequence == 7


@pytest.mark.parametrize(
    "edit",
    [
        {"directory": "../x"}, {"directory": "checkpoints/../x"}, {"directory": "/etc"}, {"directory": "checkpoints/"},
        {"directory": 3}, {"manifest_crc32c": "0"}, {"step": -1}, {"metrics": []}, {"metrics": {"a": None}},
    ],
)  # fmt: skip
def test_hostile_records_are_refused(tmp_path: Path, edit: dict[str, Any]) -> None:
    raw = save(LocalStore(tmp_path))[0].to_json() | edit
    with pytest.raises(CheckpointDamagedError, match="commits/00000002.json"):
        CheckpointRecord.from_json(raw, 2, "commits/00000002.json")
