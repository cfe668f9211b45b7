"""What one tracked value is: its live tensors, its JSON tree, and how it takes both back. Plain values and objects."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import torch

from orchestrator.errors import ConfigRefusedError, UsageError
from orchestrator.storage.codec import flatten, tensor_names, unflatten
from orchestrator.worker.copying import DTYPE_NAMES

Named = list[tuple[str, torch.Tensor]]
Tree = dict[str, Any]
Fetched = Mapping[str, torch.Tensor]


class Item(Protocol):
    """One tracked value. Tensors are live references; `at` prefixes their names (see `TrackedState`)."""

    name: str
    at: str
    small: bool  # its tree may change between boundaries without an optimizer step, and is cheap to make

    def tensors(self) -> Named:
        """Everything but module buffers, the same objects in the same order as long as nothing was replaced."""
        ...

    def buffers(self) -> Named:
        """Persistent module buffers."""
        ...

    def tree(self) -> Tree:
        """The JSON half. `kind` and `at` are always there."""
        ...

    def check(self, tree: Tree, partial: bool) -> list[str]:
        """How the stored `tree` does not fit, one line each; empty if it does."""
        ...

    def wanted(self, tree: Tree) -> list[str]:
        """Names of the stored tensors that `restore` needs."""
        ...

    def restore(self, tree: Tree, tensors: Fetched) -> list[str]:
        """Take the stored state over, in place. Returns what the user should be told."""
        ...


def storable(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """`tensor`, or a view of its memory in a dtype that checkpoints hold (complex128 as pairs of float64).

    Raises UsageError for sparse, quantized and meta tensors.
    """
    if tensor.layout is not torch.strided or tensor.is_quantized or tensor.device.type == "meta":
        what = "quantized" if tensor.is_quantized else f"{tensor.layout} on {tensor.device.type}"
        raise UsageError(f"`{name}` is a tensor of kind {what}, which checkpoints cannot hold; convert it.")
    if tensor.dtype in DTYPE_NAMES:
        return tensor
    if tensor.is_complex():
        return torch.view_as_real(tensor.detach())
    raise UsageError(f"`{name}` is of dtype {tensor.dtype}, which checkpoints cannot hold; convert it.")


def copy_in_place(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Copy each second tensor into the first. Values convert, shapes must be equal."""
    if pairs:
        with torch.no_grad():
            torch._foreach_copy_([target for target, _ in pairs], [source for _, source in pairs])


def owned(tensor: torch.Tensor) -> torch.Tensor:
    """`tensor`, cloned if its memory belongs to somebody else (a shared segment, a mapped file)."""
    return tensor if tensor.untyped_storage().resizable() else tensor.clone()


def shape_text(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape)) if shape else "scalar"


class TensorItem:
    """A plain tensor or numpy array, restored into the same memory."""

    small = False

    def __init__(self, name: str, at: str, value: Any) -> None:
        self.name, self.at, self._value = name, at, value
        self._live = storable(value if isinstance(value, torch.Tensor) else _of_array(value, name), name)

    @property
    def holds_tensors(self) -> bool:
        """Whether it takes a look at the content to notice a write: numpy counts none."""
        return isinstance(self._value, np.ndarray)

    def raw(self) -> list[Any]:
        return [self._value]

    def tensors(self) -> Named:
        return [(self.at, self._live)]

    def buffers(self) -> Named:
        return []

    def tree(self) -> Tree:
        return {"kind": "tensor", "at": self.at, "shape": list(self._live.shape)}

    def check(self, tree: Tree, partial: bool) -> list[str]:
        stored, here = list(tree["shape"]), list(self._live.shape)
        if stored == here:
            return []
        return [f"{self.name}: {shape_text(stored)} in the checkpoint, {shape_text(here)} here"]

    def wanted(self, tree: Tree) -> list[str]:
        return [tree["at"]]

    def restore(self, tree: Tree, tensors: Fetched) -> list[str]:
        copy_in_place([(self._live, tensors[tree["at"]])])
        return []


def _of_array(array: np.ndarray[Any, Any], name: str) -> torch.Tensor:
    try:
        return torch.from_numpy(array)
    except (TypeError, ValueError) as error:
        raise UsageError(f"`track({name}=…)`: this array of {array.dtype} cannot be held ({error}).") from None


class GeneratorItem:
    """A random generator of torch, numpy or Python. Its state is JSON, so that it is part of the boundary record."""

    small = True

    def __init__(self, name: str, at: str, value: Any) -> None:
        self.name, self.at, self._value = name, at, value
        self._get, self._set, self._sort = _generator_access(value)

    def tensors(self) -> Named:
        return []

    def buffers(self) -> Named:
        return []

    def tree(self) -> Tree:
        state, _ = flatten(self._get(), self.at, lambda value: False)
        return {"kind": "generator", "at": self.at, "sort": self._sort, "state": state}

    def check(self, tree: Tree, partial: bool) -> list[str]:
        if tree["sort"] == self._sort:
            return []
        return [f"{self.name}: a generator of {tree['sort']} in the checkpoint, of {self._sort} here"]

    def wanted(self, tree: Tree) -> list[str]:
        return []

    def restore(self, tree: Tree, tensors: Fetched) -> list[str]:
        self._set(unflatten(tree["state"], {}))
        return []


def is_generator(value: Any) -> bool:
    return isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random))


def _generator_access(value: Any) -> tuple[Callable[[], Any], Callable[[Any], None], str]:
    if isinstance(value, torch.Generator):
        return (
            lambda: value.get_state().numpy().tobytes(),
            lambda state: _set_torch(value, state),
            f"torch on {value.device.type}",
        )
    if isinstance(value, random.Random):
        return value.getstate, value.setstate, "Python's random"
    if isinstance(value, np.random.RandomState):  # keeps half of a pair of normals outside its bit generator
        return (
            lambda: _plain_arrays(value.get_state(legacy=False)),
            lambda state: value.set_state(_with_arrays(state)),
            "numpy RandomState",
        )
    bits = value.bit_generator
    return lambda: _plain_arrays(bits.state), lambda state: _set_numpy(bits, state), f"numpy {type(bits).__name__}"


def _set_torch(generator: torch.Generator, state: bytes) -> None:
    generator.set_state(torch.frombuffer(bytearray(state), dtype=torch.uint8))


def _plain_arrays(state: Any) -> Any:
    if isinstance(state, dict):
        return {key: _plain_arrays(value) for key, value in state.items()}
    if isinstance(state, np.ndarray):
        return [str(state.dtype), state.tolist()]
    return state.item() if isinstance(state, np.generic) else state


def _with_arrays(state: Any) -> Any:
    """The inverse of `_plain_arrays`."""
    if isinstance(state, dict):
        return {key: _with_arrays(value) for key, value in state.items()}
    return np.array(state[1], dtype=state[0]) if isinstance(state, list) else state


def _set_numpy(bits: Any, state: Any) -> None:
    bits.state = _with_arrays(state)


class ObjectItem:
    """Anything with `state_dict` and `load_state_dict`: schedulers, scalers, averages, the user's own."""

    small = True

    def __init__(self, name: str, at: str, value: Any) -> None:
        self.name, self.at, self._value = name, at, value
        self.holds_tensors = False
        self._flatten()  # refuse now what could not be saved later

    def _flatten(self) -> tuple[Any, dict[str, Any]]:
        tree, found = flatten(self._value.state_dict(), self.at, tensor_kind, plain=plain_value)
        self.holds_tensors = bool(found)
        return tree, found

    def raw(self) -> list[Any]:
        """The tensors and arrays of the state_dict as they are."""
        return list(self._flatten()[1].values())

    def tensors(self) -> Named:
        return [(name, as_stored(value, name)) for name, value in self._flatten()[1].items()]

    def buffers(self) -> Named:
        return []

    def tree(self) -> Tree:
        return {"kind": "object", "at": self.at, "type": type(self._value).__name__, "state": self._flatten()[0]}

    def check(self, tree: Tree, partial: bool) -> list[str]:
        stored, here = tree["type"], type(self._value).__name__
        return [] if stored == here else [f"{self.name}: a {stored} in the checkpoint, a {here} here"]

    def wanted(self, tree: Tree) -> list[str]:
        return list(tensor_names(tree["state"]))

    def restore(self, tree: Tree, tensors: Fetched) -> list[str]:
        # Stored names start with the stored `at`, ours with our own; they differ for per-rank values only.
        devices = {name[len(self.at) :]: value.device for name, value in self.tensors()}
        placed = {
            name: owned(tensor).to(devices.get(name[len(tree["at"]) :], tensor.device))
            for name, tensor in tensors.items()
        }
        state = unflatten(tree["state"], placed, from_stored)
        try:
            self._value.load_state_dict(state)
        except Exception as error:
            raise ConfigRefusedError(
                f"`{self.name}` ({type(self._value).__name__}) refuses its state from the checkpoint: "
                f"{type(error).__name__}: {error}. If the script changed, start a new run with `--run-name`."
            ) from error
        return []


def tensor_kind(value: Any) -> bool | str:
    """For `flatten`: what is held as a tensor, and what has to be made of it again."""
    if isinstance(value, torch.Tensor):
        return True if value.dtype in DTYPE_NAMES or not value.is_complex() else "complex"
    return "numpy" if isinstance(value, np.ndarray) else False


def as_stored(value: Any, name: str) -> torch.Tensor:
    """The tensor that holds `value`, sharing its memory."""
    return storable(value if isinstance(value, torch.Tensor) else _of_array(value, name), name)


def from_stored(kind: str, tensor: torch.Tensor) -> Any:
    """For `unflatten`: the inverse of `tensor_kind` and `as_stored`."""
    return tensor.cpu().numpy() if kind == "numpy" else torch.view_as_complex(tensor)


def plain_value(value: Any) -> Any:
    """For `flatten`: numpy scalars and torch sizes as plain Python values."""
    if isinstance(value, np.generic):
        return value.item()
    return tuple(value) if isinstance(value, torch.Size) else NotImplemented
