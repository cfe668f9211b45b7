"""Which node hosts which ranks. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from orchestrator.errors import UsageError


@dataclass(frozen=True)
class NodeShare:
    """What a node can give. `capacity` and `total`: ranks that fit now, and that fit on the empty node."""

    node_id: str
    address: str
    capacity: int
    total: int


def ranks_that_fit(cpus: float, gpus: float, cpus_per_worker: float, gpus_per_worker: float) -> int:
    """How many workers a node with these resources hosts."""
    fits = [int(cpus / cpus_per_worker + 1e-9)] if cpus_per_worker > 0 else []
    if gpus_per_worker > 0:
        fits.append(int(gpus / gpus_per_worker + 1e-9))
    return min(fits, default=0)


def settle_auto(auto: tuple[str, ...], workers: int, gpus_per_worker: float, gpus: int) -> tuple[int, float]:
    """(workers, gpus_per_worker) on a cluster of `gpus` GPUs, where `auto` names which of the two were left open.

    Raises UsageError if workers are to be counted by GPUs and there are none to count.
    """
    if "workers" in auto:
        each = 1.0 if "gpus_per_worker" in auto else gpus_per_worker
        count = int(gpus / each + 1e-9) if each > 0 else 0
        if count == 0:
            there = "has no GPU" if gpus == 0 else f"has {gpus} GPUs of which a worker takes {each:g}"
            raise UsageError(
                f"`--workers auto` means as many as there are GPUs for, and this cluster {there}; say how many workers "
                "with `--workers N`."
            )
        return count, each
    if "gpus_per_worker" in auto:
        return workers, 1.0 if 0 < workers <= gpus else 0.0
    return workers, gpus_per_worker


def place(nodes: list[NodeShare], workers: int) -> list[tuple[NodeShare, int]]:
    """Nodes and their numbers of ranks: few nodes, the roomiest first, evenly filled. What is free now is preferred.

    Raises UsageError if the cluster, even empty, can never hold them.
    """
    total = sum(node.total for node in nodes)
    if workers > total:
        held = ", ".join(f"{node.address}: {node.total}" for node in nodes) or "no live node"
        raise UsageError(
            f"`--workers {workers}` can never be placed: this cluster holds {total} workers of this size at most "
            f"({held}). Lower `--workers`, `--cpus-per-worker` or `--gpus-per-worker`, or add nodes."
        )
    free = sum(node.capacity for node in nodes)
    rooms = {node.node_id: node.capacity if workers <= free else node.total for node in nodes}
    ordered = sorted(nodes, key=lambda node: (-rooms[node.node_id], node.address, node.node_id))
    count, room = 0, 0
    while room < workers:
        room += rooms[ordered[count].node_id]
        count += 1
    return _even(ordered[:count], rooms, workers)


def _even(chosen: list[NodeShare], rooms: dict[str, int], workers: int) -> list[tuple[NodeShare, int]]:
    given = {node.node_id: 0 for node in chosen}
    for _ in range(workers):
        able = [node for node in chosen if given[node.node_id] < rooms[node.node_id]]
        node = min(able, key=lambda node: given[node.node_id])
        given[node.node_id] += 1
    return [(node, given[node.node_id]) for node in chosen if given[node.node_id]]
