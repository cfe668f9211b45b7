"""State as users hold it (nested dicts, lists, scalars, tensors) ↔ a JSON tree plus named tensors. Pure, and no pickle.

Plain values stand for themselves. Everything JSON has no word for is an object whose first key starts with ``$``:

=====================================================  =====================================================
``{"$tensor": "model.fc1.weight"}``, also with "as"    a tensor, by its full name; "as" is the caller's kind
``{"$dict": [[key, value], …]}``                       a dict with keys that are not strings or start with $
``{"$ordered": {…} or [[key, value], …]}``             an OrderedDict; "meta" is its `_metadata`, if it has one
``{"$counter": pairs}``, ``{"$defaultdict": pairs}``   with "factory" for the latter
``{"$tuple": […]}``, ``{"$set": […]}``, ``{"$frozenset": […]}``, ``{"$deque": […], "maxlen": n}``
``{"$float": "7ff0000000000000"}``                     inf and nan, bit for bit (IEEE 754, big-endian, hex)
``{"$complex": [re, im]}``, ``{"$bytes": base64}``, ``{"$bytearray": base64}``, ``{"$int": hex}`` (beyond 64 bits)
=====================================================  =====================================================
"""

from __future__ import annotations

import base64
import math
import struct
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from orchestrator.errors import CheckpointDamagedError, UsageError

MAX_DEPTH = 100
MAX_BYTES = 1 << 20
_INT64 = 1 << 63
_FACTORIES: dict[str, Callable[[], Any]] = {
    "dict": dict, "list": list, "set": set, "tuple": tuple, "int": int, "float": float, "str": str, "bool": bool,
}  # fmt: skip

Plain = Callable[[Any], Any]


def flatten(
    value: Any,
    path: str,
    is_tensor: Callable[[Any], bool | str],
    *,
    plain: Plain | None = None,
    suffix: str = "",
) -> tuple[Any, dict[str, Any]]:
    """Split `value` into a JSON tree and its tensors, named `<path>.<key>.<index>…<suffix>` (unique within the call).

    `is_tensor(x)` is asked about every value of no built-in type; a string instead of True is a kind ("numpy",
    "complex" …) that comes back in `unflatten`'s `convert`. `plain(x)` may turn a value into one we know (a numpy
    scalar into a float) or return NotImplemented. Floats survive bit for bit.

    Raises UsageError naming key and type for what is neither tensor nor JSON, and for what contains itself.
    """
    encoder = _Encoder(path, is_tensor, plain, suffix)
    return encoder.encode(value), encoder.tensors


class _Encoder:
    def __init__(self, root: str, is_tensor: Callable[[Any], bool | str], plain: Plain | None, suffix: str) -> None:
        self.root = root
        self.is_tensor = is_tensor
        self.plain = plain
        self.suffix = suffix
        self.stack: list[Any] = []
        self.tensors: dict[str, Any] = {}

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind is str or kind is bool or value is None:
            return value
        if kind is float:
            return value if math.isfinite(value) else {"$float": struct.pack(">d", value).hex()}
        if kind is int:
            return value if -_INT64 <= value < _INT64 else {"$int": hex(value)}
        handler = _HANDLERS.get(kind)
        return handler(self, value) if handler is not None else self.other(value)

    def other(self, value: Any) -> Any:
        kind = self.is_tensor(value)
        if kind:
            return self.tensor(value, kind)
        if self.plain is not None:
            known = self.plain(value)
            if known is not NotImplemented and type(known) is not type(value):
                return self.encode(known)
        raise self.refused(value)

    def tensor(self, value: Any, kind: bool | str) -> Any:
        name = ".".join([self.root, *map(_name_part, self.stack)])
        name = name.encode("utf-8", "backslashreplace").decode()
        unique, number = name + self.suffix, 1
        while unique in self.tensors:  # {"a.b": t, "a": {"b": t}} would share a name
            number += 1
            unique = f"{name}~{number}{self.suffix}"
        self.tensors[unique] = value
        return {"$tensor": unique} if kind is True else {"$tensor": unique, "as": kind}

    def dict(self, value: Any) -> Any:
        if all(type(key) is str and not key.startswith("$") for key in value):
            return self.object(value)
        return {"$dict": self.pairs(value)}

    def object(self, value: Any) -> Any:
        self.enter()
        tree = {}
        for key, item in value.items():
            self.stack.append(key)
            tree[key] = self.encode(item)
            self.stack.pop()
        return tree

    def pairs(self, value: Any) -> list[Any]:
        self.enter()
        tree = []
        for key, item in value.items():
            self.stack.append(key)
            tree.append([self.key(key), self.encode(item)])
            self.stack.pop()
        return tree

    def key(self, key: Any) -> Any:
        before = len(self.tensors)
        tree = self.encode(key)
        if len(self.tensors) != before:
            raise UsageError(f"`track({self.root}=…)`: {self.where()} has a tensor as its key; use a string or number.")
        return tree

    def items(self, value: Any) -> list[Any]:
        self.enter()
        tree = []
        for index, item in enumerate(value):
            self.stack.append(index)
            tree.append(self.encode(item))
            self.stack.pop()
        return tree

    def ordered(self, value: Any) -> Any:
        plain = all(type(key) is str and not key.startswith("$") for key in value)
        tree = {"$ordered": self.object(value) if plain else self.pairs(value)}
        meta = getattr(value, "_metadata", None)
        if meta is not None:
            self.stack.append("_metadata")
            tree["meta"] = self.encode(meta)
            self.stack.pop()
        return tree

    def defaultdict(self, value: Any) -> Any:
        factory = value.default_factory
        name = None if factory is None else getattr(factory, "__name__", "?")
        if name is not None and _FACTORIES.get(name) is not factory:
            raise self.refused(value)
        return {"$defaultdict": self.pairs(value), "factory": name}

    def set(self, value: Any) -> list[Any]:
        # Sorted, so that equal sets give equal checkpoints whatever the hash seed.
        return self.items(sorted(value, key=lambda item: (type(item).__name__, repr(item))))

    def bytes(self, value: Any) -> str:
        if len(value) > MAX_BYTES:
            raise UsageError(
                f"`track({self.root}=…)`: {self.where()} is {len(value)} bytes long; more than {MAX_BYTES} belong in a "
                "tensor (torch.frombuffer)."
            )
        return base64.b64encode(value).decode("ascii")

    def enter(self) -> None:
        if len(self.stack) >= MAX_DEPTH:
            raise UsageError(
                f"`track({self.root}=…)`: the state is nested deeper than {MAX_DEPTH} levels or contains itself, at "
                f"{self.where()[:200]}…"
            )

    def where(self) -> str:
        return self.root + "".join(f".{part}" if isinstance(part, str) else f"[{part!r}]" for part in self.stack)

    def refused(self, value: Any) -> UsageError:
        kind = type(value)
        name = kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
        article = "an" if name[:1].lower() in "aeiou" else "a"
        return UsageError(
            f"`track({self.root}=…)`: {self.where()} is {article} {name}, neither tensor nor JSON (dict, list, tuple, "
            "number, string, None); leave it out of `state_dict()` and rebuild it in the script."
        )


_HANDLERS: dict[type, Callable[[_Encoder, Any], Any]] = {
    dict: _Encoder.dict,
    list: _Encoder.items,
    tuple: lambda self, value: {"$tuple": self.items(value)},
    OrderedDict: _Encoder.ordered,
    Counter: lambda self, value: {"$counter": self.pairs(value)},
    defaultdict: _Encoder.defaultdict,
    set: lambda self, value: {"$set": self.set(value)},
    frozenset: lambda self, value: {"$frozenset": self.set(value)},
    deque: lambda self, value: {"$deque": self.items(value), "maxlen": value.maxlen},
    complex: lambda self, value: {"$complex": [self.encode(value.real), self.encode(value.imag)]},
    bytes: lambda self, value: {"$bytes": self.bytes(value)},
    bytearray: lambda self, value: {"$bytearray": self.bytes(value)},
}


def _name_part(key: Any) -> str:
    return key if isinstance(key, str) else str(key)


def unflatten(tree: Any, tensors: Mapping[str, Any], convert: Callable[[str, Any], Any] | None = None) -> Any:
    """The value that `flatten` took apart. `convert(kind, tensor)` builds what `is_tensor` gave a kind to.

    Raises CheckpointDamagedError for a tensor that is missing and for marks that no version of ours writes.
    """
    try:
        return _Decoder(tensors, convert).decode(tree)
    except RecursionError:
        raise CheckpointDamagedError("The checkpoint's state is nested too deep; it is damaged.") from None


class _Decoder:
    def __init__(self, tensors: Mapping[str, Any], convert: Callable[[str, Any], Any] | None) -> None:
        self.tensors = tensors
        self.convert = convert

    def decode(self, tree: Any) -> Any:
        if isinstance(tree, list):
            return [self.decode(item) for item in tree]
        if not isinstance(tree, dict):
            return tree
        mark = next(iter(tree), "")
        if not mark.startswith("$"):
            return {key: self.decode(item) for key, item in tree.items()}
        if mark == "$tensor":
            return self.tensor(tree)
        try:
            return _MARKS[mark](self, tree[mark], tree)
        except (LookupError, TypeError, ValueError, struct.error) as error:
            raise CheckpointDamagedError(
                f"The checkpoint's state holds a {mark[:40]!r} entry that cannot be read ({error}); it is damaged or "
                "was written by a newer orchestrator."
            ) from error

    def tensor(self, tree: dict[str, Any]) -> Any:
        name, kind = tree["$tensor"], tree.get("as")
        if not isinstance(name, str) or name not in self.tensors:
            raise CheckpointDamagedError(f"The checkpoint's state refers to tensor {name!r}, which it does not hold.")
        tensor = self.tensors[name]
        return tensor if kind is None or self.convert is None else self.convert(kind, tensor)

    def pairs(self, tree: Any) -> Iterator[tuple[Any, Any]]:
        if isinstance(tree, dict):
            return ((key, self.decode(item)) for key, item in tree.items())
        return ((self.decode(key), self.decode(item)) for key, item in tree)

    def ordered(self, tree: Any, whole: dict[str, Any]) -> Any:
        value = OrderedDict(self.pairs(tree))
        if "meta" in whole:
            value._metadata = self.decode(whole["meta"])  # type: ignore[attr-defined]
        return value

    def defaultdict(self, tree: Any, whole: dict[str, Any]) -> Any:
        factory = whole["factory"]
        return defaultdict(None if factory is None else _FACTORIES[factory], self.pairs(tree))


_MARKS: dict[str, Callable[[_Decoder, Any, dict[str, Any]], Any]] = {
    "$dict": lambda self, tree, whole: dict(self.pairs(tree)),
    "$ordered": _Decoder.ordered,
    "$counter": lambda self, tree, whole: Counter(dict(self.pairs(tree))),
    "$defaultdict": _Decoder.defaultdict,
    "$tuple": lambda self, tree, whole: tuple(self.decode(item) for item in tree),
    "$set": lambda self, tree, whole: {self.decode(item) for item in tree},
    "$frozenset": lambda self, tree, whole: frozenset(self.decode(item) for item in tree),
    "$deque": lambda self, tree, whole: deque((self.decode(item) for item in tree), whole["maxlen"]),
    "$float": lambda self, tree, whole: struct.unpack(">d", bytes.fromhex(tree))[0],
    "$complex": lambda self, tree, whole: complex(self.decode(tree[0]), self.decode(tree[1])),
    "$bytes": lambda self, tree, whole: base64.b64decode(tree, validate=True),
    "$bytearray": lambda self, tree, whole: bytearray(base64.b64decode(tree, validate=True)),
    "$int": lambda self, tree, whole: int(tree, 16),
}


def tensor_names(tree: Any) -> Iterator[str]:
    """Full names of all tensors a tree refers to, in the tree's order."""
    if isinstance(tree, list):
        for item in tree:
            yield from tensor_names(item)
    elif isinstance(tree, dict):
        if "$tensor" in tree and next(iter(tree)) == "$tensor":
            yield tree["$tensor"]
        else:
            for item in tree.values():
                yield from tensor_names(item)
