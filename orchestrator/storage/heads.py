"""The JSON half of a checkpoint: from what a rank records at boundaries to what a manifest holds. Pure.

A slot's JSON part is ``{"tensors": […], "attempt", "step", "rank", …, "trees": {…}, "head": {…}}``. `trees` is the
structure of all tracked state as of the copy; `head["small"]` the part that is cheap to record at every boundary, and
counts over `trees`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any


def checkpoint_head(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """Merge slots' JSON parts into one checkpoint head (docs/architecture.md, section 4). Merging what is merged is
    fine.

    `parts` come in the order of authority: the first head with content counts; structures are taken from the first part
    that has them; what ranks hold on their own is collected from all.
    """
    head: dict[str, Any] = {}
    tracked: dict[str, Any] = {}
    per_rank: dict[str, Any] = {}
    own_trees: dict[str, Any] = {}
    for part in parts:
        own = part.get("head") or {}
        head = head or dict(own)
        for name, tree in {**part.get("trees", {}), **own.get("tracked", {})}.items():
            tracked.setdefault(name, tree)
        for rank, held in own.get("per_rank", {}).items():
            per_rank.setdefault(rank, held)
        for rank, trees in part.get("own_trees", {}).items():
            own_trees.setdefault(rank, trees)
    head["tracked"] = overlay(tracked, head.pop("small", {}))
    for rank, trees in own_trees.items():
        held = per_rank.setdefault(rank, {})
        per_rank[rank] = {**held, "tracked": overlay(trees, held.get("tracked", {}))}
    head["per_rank"] = per_rank
    return head


def overlay(tracked: Mapping[str, Any], small: Mapping[str, Any]) -> dict[str, Any]:
    """`tracked` with the recorded parts put in: whole trees, or an optimizer's ``{"$hyper": [hyperparameters of a
    group, …]}``.
    """
    merged = dict(tracked)
    for name, tree in small.items():
        if "$hyper" not in tree:
            merged[name] = tree
        elif name in merged:
            groups = zip(merged[name]["groups"], tree["$hyper"], strict=True)
            merged[name] = {**merged[name], "groups": [{**group, "hyper": hyper} for group, hyper in groups]}
    return merged
