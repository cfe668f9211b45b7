"""State as users hold it survives the JSON tree bit for bit; what cannot is refused by key and type."""

from __future__ import annotations

import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from orchestrator.errors import CheckpointDamagedError, UsageError
from orchestrator.storage.codec import MAX_BYTES, flatten, tensor_names, unflatten


class FakeTensor:
    def __init__(self, value: int = 0) -> None:
        self.value = value


ODD_NAN = struct.unpack(">d", bytes.fromhex("fff8000000000123"))[0]


def is_tensor(value: Any) -> bool:
    return isinstance(value, FakeTensor)


def round_trip(value: Any) -> Any:
    tree, tensors = flatten(value, "x", is_tensor)
    return unflatten(json.loads(json.dumps(tree, allow_nan=False)), tensors)


def same(one: Any, other: Any) -> bool:
    """Equal in value and type at every level, floats by their bits."""
    if type(one) is not type(other):
        return False
    if isinstance(one, float):
        return struct.pack(">d", one) == struct.pack(">d", other)
    if isinstance(one, complex):
        return same(one.real, other.real) and same(one.imag, other.imag)
    if isinstance(one, dict):
        return len(one) == len(other) and all(
            same(k, m) and same(v, w) for (k, v), (m, w) in zip(one.items(), other.items(), strict=True)
        )
    if isinstance(one, (list, tuple, deque)):
        return len(one) == len(other) and all(same(v, w) for v, w in zip(one, other, strict=True))
    return bool(one == other)


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, 2**63 - 1, -(2**63), 2**64 + 1, -(2**200), 10**5000, 0.1, -0.0, 5e-324,
        1.7976931348623157e308, math.inf, -math.inf, math.nan, ODD_NAN,
        "", "ü\ud800\x00", "$tensor", b"", b"\x00\xff", bytearray(b"ab"), 1 + 2j, complex(math.nan, -0.0),
        [], {}, (), (1,), [(), [()]], {"a": {"b": [1, {"c": (2, 3)}]}},
        {1: "a", "1": "b", 1.5: "c", None: "d", (1, "x"): "e", False: "f"}, {"$tensor": "not one"}, {"$": 1}, {"": 1},
        OrderedDict(b=1, a=2), OrderedDict([(2, "x")]), Counter({30: 1, 80: 2}), {1, 2}, frozenset({"a"}), set(),
        deque([1, 2], maxlen=5), deque(), [[[[[[[[[[1]]]]]]]]]],
    ],
    ids=lambda value: repr(value)[:30] if not isinstance(value, int) or abs(value) < 1e30 else "large",
)  # fmt: skip
def test_values_survive(value: Any) -> None:
    assert same(round_trip(value), value)


JSONISH = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=8),
    lambda inner: st.lists(inner, max_size=4)
    | st.tuples(inner, inner)
    | st.dictionaries(st.text() | st.integers() | st.tuples(st.integers(), st.text()), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None)
@given(JSONISH)
def test_any_nesting_survives(value: Any) -> None:
    assert same(round_trip(value), value)


def test_default_factories_and_module_metadata_survive() -> None:
    counts: defaultdict[str, list[int]] = defaultdict(list, a=[1])
    again = round_trip(counts)
    assert again == counts and again.default_factory is list
    state = OrderedDict(w=1)
    state._metadata = OrderedDict({"": {"version": 2}})  # type: ignore[attr-defined]
    assert round_trip(state)._metadata == {"": {"version": 2}}


def test_equal_sets_give_equal_trees() -> None:
    assert flatten({"b", "a", "c"}, "x", is_tensor)[0] == {"$set": ["a", "b", "c"]}


def test_tensors_are_named_by_their_path() -> None:
    a, b, c, d = (FakeTensor(n) for n in range(4))
    tree, tensors = flatten({"fc1.weight": a, "state": {0: {"exp_avg": b}}, "list": [c, (d,)]}, "optimizer", is_tensor)
    assert tensors == {
        "optimizer.fc1.weight": a, "optimizer.state.0.exp_avg": b, "optimizer.list.0": c, "optimizer.list.1.0": d,
    }  # fmt: skip
    assert list(tensor_names(tree)) == list(tensors)
    assert unflatten(tree, tensors) == {"fc1.weight": a, "state": {0: {"exp_avg": b}}, "list": [c, (d,)]}


def test_a_bare_tensor_and_a_suffix() -> None:
    tensor = FakeTensor()
    tree, tensors = flatten(tensor, "noise", is_tensor, suffix="@rank1")
    assert (tree, tensors) == ({"$tensor": "noise@rank1"}, {"noise@rank1": tensor})


def test_names_that_would_meet_are_kept_apart() -> None:
    one, two, three = FakeTensor(1), FakeTensor(2), FakeTensor(3)
    value = {"a.b": one, "a": {"b": two}, "c": {1: one, "1": three}}
    tree, tensors = flatten(value, "m", is_tensor)
    assert list(tensors) == ["m.a.b", "m.a.b~2", "m.c.1", "m.c.1~2"]
    assert unflatten(tree, tensors) == value


def test_kinds_and_plain_values_are_the_callers() -> None:
    class Scalar(float):
        pass

    tree, tensors = flatten(
        {"t": FakeTensor(4), "s": Scalar(2.5)}, "x",
        lambda value: "numpy" if isinstance(value, FakeTensor) else False,
        plain=lambda value: float(value) if isinstance(value, Scalar) else NotImplemented,
    )  # fmt: skip
    assert tree == {"t": {"$tensor": "x.t", "as": "numpy"}, "s": 2.5}
    assert unflatten(tree, tensors, lambda kind, tensor: (kind, tensor.value)) == {"t": ("numpy", 4), "s": 2.5}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"hooks": [1, 2, lambda: 0]}, r"`track\(foo=…\)`: foo.hooks\[2\] is a function, neither tensor nor JSON"),
        ({"a b": {0: object()}}, r"foo.a b\[0\] is an object,"),
        (FakeTensor, r"foo is a type,"),
        ({"c": defaultdict(lambda: 0)}, r"foo.c is a collections.defaultdict,"),
        ({"c": range(3)}, r"foo.c is a range,"),
        ({FakeTensor(): 1}, r"has a tensor as its key"),
        ({"b": b"0" * (MAX_BYTES + 1)}, r"foo.b is 1048577 bytes long; .* belong in a tensor"),
        ({"e": st}, r"foo.e is a module,"),
    ],
)
def test_what_is_neither_tensor_nor_json_is_refused_by_key_and_type(value: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        flatten(value, "foo", is_tensor)


def test_what_contains_itself_is_refused() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UsageError, match="deeper than 100 levels or contains itself"):
        flatten({"a": loop}, "foo", is_tensor)


@pytest.mark.parametrize(
    "tree",
    [
        {"$tensor": "gone"}, {"$tensor": 3}, {"$pickle": "gASV"}, {"$tuple": 3}, {"$float": "zz"}, {"$float": "00"},
        {"$bytes": "é"}, {"$dict": [[1]]}, {"$dict": [[[1], 2]]}, {"$defaultdict": [], "factory": "eval"},
        {"$complex": []}, {"$set": [[]]}, {"$int": "ten"}, {"$deque": [], "maxlen": "x"}, {"$counter": 1},
    ],
)  # fmt: skip
def test_damaged_trees_are_refused(tree: Any) -> None:
    with pytest.raises(CheckpointDamagedError):
        unflatten({"ok": [tree]}, {})


def test_a_tree_nested_too_deep_is_refused() -> None:
    tree: list[Any] = []
    for _ in range(100_000):
        tree = [tree]
    with pytest.raises(CheckpointDamagedError, match="nested too deep"):
        unflatten(tree, {})
