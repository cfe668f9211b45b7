"""The table of a segment is a safetensors data area; dealing replicated tensors out needs no talk."""

from __future__ import annotations

import json
import random

import pytest
from safetensors import safe_open
from safetensors.torch import load

from orchestrator.errors import CheckpointDamagedError, UsageError
from orchestrator.storage.segment import DTYPE_BYTES, TensorEntry, deal, layout, nbytes, safetensors_header


def test_larger_elements_come_first_then_names_without_holes() -> None:
    boxes = [("b", "U8", (3,)), ("z", "F64", (2,)), ("a", "F32", ()), ("c", "BF16", (1, 3)), ("e", "F32", (0,))]
    table, size = layout(boxes)
    assert [(entry.name, entry.begin, entry.end) for entry in table] == [
        ("z", 0, 16), ("a", 16, 20), ("e", 20, 20), ("c", 20, 26), ("b", 26, 29),
    ]  # fmt: skip
    assert size == 29


def test_the_order_given_does_not_matter_and_everything_is_aligned() -> None:
    boxes = [(f"t{index}", dtype, (index % 5, 3)) for index, dtype in enumerate(sorted(DTYPE_BYTES) * 3)]
    table, _ = layout(boxes)
    for seed in range(5):
        random.Random(seed).shuffle(boxes)
        assert layout(boxes)[0] == table
    assert all(entry.begin % DTYPE_BYTES[entry.dtype] == 0 for entry in table)


def test_boxes_of_a_split_tensor_have_their_own_keys() -> None:
    lower, upper = ("w", "F32", (4, 3), (2, 0), (2, 3)), ("w", "F32", (4, 3), (0, 0), (1, 3))
    table, size = layout([lower, upper, ("v", "F32", (2,))])
    assert [entry.key for entry in table] == ["v", "w[0:1,0:3]", "w[2:4,0:3]"] and size == 44
    loaded = load(safetensors_header(table) + bytes(size))
    assert {key: tuple(tensor.shape) for key, tensor in loaded.items()} == {
        "v": (2,), "w[0:1,0:3]": (1, 3), "w[2:4,0:3]": (2, 3),
    }  # fmt: skip


def test_header_is_aligned_and_opens_with_the_library(tmp_path: object) -> None:
    table, size = layout([("größe", "I64", ()), ("x.y", "BOOL", (5,))])
    for filler in range(9):
        header = safetensors_header(table, {"format": "pt", "note": "n" * filler})
        assert len(header) % 8 == 0
    path = f"{tmp_path}/file"
    with open(path, "wb") as file:
        file.write(header + bytes(size))
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "note": "n" * 8} and set(opened.keys()) == {"größe", "x.y"}


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([("w", "F32", (2,)), ("w", "F32", (2,))], "Two tensors are called 'w'"),
        ([("__metadata__", "F32", (2,))], "reserved"),
        ([("w", "C128", (2,))], "dtype C128 cannot be stored"),
        ([("w", "F32", (2,), (1,), (2,))], "outside the tensor's shape"),
        ([("w", "F32", (2,), (-1,), (2,))], "outside the tensor's shape"),
        ([("w", "F32", (2,), (0, 0), (2,))], "outside the tensor's shape"),
    ],
)
def test_impossible_tables_are_refused(boxes: list[tuple[str, str, tuple[int, ...]]], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        layout(boxes)


def test_entries_cross_process_boundaries() -> None:
    entry = TensorEntry("w", "F32", (4, 3), (2, 0), (2, 3), 8, 32)
    assert TensorEntry.from_json(json.loads(json.dumps(entry.to_json()))) == entry
    for broken in ({}, {**entry.to_json(), "shape": 3}, {**entry.to_json(), "begin": "x"}):
        with pytest.raises(CheckpointDamagedError):
            TensorEntry.from_json(broken)


def test_bytes_of_a_box() -> None:
    assert (nbytes("F32", (2, 3)), nbytes("BOOL", ()), nbytes("C64", (0, 9))) == (24, 1, 0)


def test_dealing_is_balanced_and_the_same_for_everybody() -> None:
    assert deal({"a": 5, "b": 4, "c": 3, "d": 3, "e": 3}, 2) == {"a": 0, "b": 1, "c": 1, "d": 0, "e": 1}
    assert deal({"a": 1, "b": 1, "c": 1}, 1) == {"a": 0, "b": 0, "c": 0}
    assert deal({}, 3) == {}
    random.seed(1)
    sizes = {f"t{index}": random.randrange(1, 10_000) for index in range(200)}
    shuffled = dict(random.sample(sorted(sizes.items()), len(sizes)))
    owners = deal(sizes, 7)
    assert deal(shuffled, 7) == owners
    loads = [sum(size for name, size in sizes.items() if owners[name] == share) for share in range(7)]
    assert max(loads) - min(loads) <= max(sizes.values())
