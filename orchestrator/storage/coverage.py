"""Is a checkpoint whole? Chunks must tile their tensors, and the state's tensors must be there. Pure."""

from __future__ import annotations

import math

from orchestrator.errors import CheckpointDamagedError
from orchestrator.storage.manifest import Manifest, Shape, StoredTensor
from orchestrator.storage.trees import all_trees, referred

Box = tuple[Shape, Shape]


def coverage(manifest: Manifest) -> None:
    """Check that every tensor's chunks tile its shape, and that every tensor the state refers to is there.

    Raises CheckpointDamagedError naming the tensor. Safe to repeat; O(n log n) for tensors split along one dimension.
    """
    for name, tensor in manifest.tensors.items():
        why = _untiled(tensor)
        if why:
            raise CheckpointDamagedError(f"Checkpoint of step {manifest.step}: tensor {name!r} {why}.")
    try:
        needed = [name for tree in all_trees(manifest.state) for name in referred(tree)]
        missing = [name for name in needed if name not in manifest.tensors]
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise CheckpointDamagedError(
            f"Checkpoint of step {manifest.step}: its state is none that we write ({error!r:.100})."
        ) from None
    if missing:
        raise CheckpointDamagedError(f"Checkpoint of step {manifest.step}: tensor {missing[0]!r} is in no file of it.")


def _untiled(tensor: StoredTensor) -> str:
    """Empty if the boxes tile the shape: they are disjoint, and their volumes add up to the whole."""
    whole = math.prod(tensor.shape)
    boxes = sorted(((c.offset, c.size) for c in tensor.chunks if math.prod(c.size)), key=lambda box: box[0])
    held = sum(math.prod(size) for _, size in boxes)
    if held != whole:
        return f"is not whole: its chunks hold {held} of {whole} elements"
    active: list[Box] = []
    for offset, size in boxes:
        if offset:  # boxes that end before this one begins cannot meet any later one either
            active = [box for box in active if box[0][0] + box[1][0] > offset[0]]
        if any(_meet(box, (offset, size)) for box in active):
            return "has chunks that overlap"
        active.append((offset, size))
    return ""


def _meet(one: Box, other: Box) -> bool:
    return all(a < b + m and b < a + n for a, n, b, m in zip(*one, *other, strict=True))
