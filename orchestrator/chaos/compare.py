"""Are two runs' final states the same, bit for bit? All tensors, and all of the head's JSON that is state."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import OrchestratorError
from orchestrator.storage.checkpoints import RunStore, find_sound, list_checkpoints, open_run
from orchestrator.storage.manifest import Manifest

STATE_KEYS = ("step", "epoch", "samples", "seed", "user", "loops", "tracked", "per_rank", "config")


@dataclass(frozen=True)
class Comparison:
    """What was compared, and where it differs: names of tensors, then paths into the JSON head."""

    tensors: int
    bytes: int
    differences: tuple[str, ...]

    @property
    def equal(self) -> bool:
        """Not a single bit differs."""
        return not self.differences


def final_state(directory: Path) -> tuple[RunStore, Manifest]:
    """A completed run's last checkpoint. Raises OrchestratorError if it is none of a completed run."""
    run = open_run(str(directory))
    if not list_checkpoints(run):
        raise OrchestratorError(
            f"{directory} holds no checkpoint, so there is no final state to compare: the script must call `run.track`."
        )
    _, manifest = find_sound(run)
    if manifest.reason != "final":
        what = f"({manifest.reason}, step {manifest.step})"
        raise OrchestratorError(f"The newest sound checkpoint of {directory} is no final one {what}.")
    return run, manifest


def compare(one: Path, other: Path) -> Comparison:
    """Compare the final states of two runs' directories; every byte is read and verified. Raises OrchestratorError."""
    from orchestrator.storage.shards import read_tensors

    (run_a, a), (run_b, b) = final_state(one), final_state(other)
    tensors_a, tensors_b = read_tensors(run_a.store, a), read_tensors(run_b.store, b)
    missing = sorted(tensors_a.keys() ^ tensors_b.keys())
    common = sorted(tensors_a.keys() & tensors_b.keys())
    differing = [name for name in common if not same_bits(tensors_a[name], tensors_b[name])]
    head_a, head_b = ({key: manifest.state.get(key) for key in STATE_KEYS} for manifest in (a, b))
    heads = different_paths(head_a, head_b)
    size = sum(tensors_a[name].numel() * tensors_a[name].element_size() for name in common)
    return Comparison(len(common), size, (*missing, *differing, *heads))


def same_bits(a: Any, b: Any) -> bool:
    """Same dtype, shape and bytes: unlike `torch.equal`, NaN equals itself and -0.0 is not 0.0."""
    import torch

    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.numel() == 0:
        return True
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)))


def different_paths(a: Any, b: Any, path: str = "state") -> Iterator[str]:
    """Where two JSON values differ, as paths such as "state.user.best"."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in sorted({*a, *b}, key=str):
            if key in a and key in b:
                yield from different_paths(a[key], b[key], f"{path}.{key}")
            else:
                yield f"{path}.{key}"
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        for index, pair in enumerate(zip(a, b, strict=True)):
            yield from different_paths(*pair, f"{path}[{index}]")
    elif json.dumps(a) != json.dumps(b):
        yield path
