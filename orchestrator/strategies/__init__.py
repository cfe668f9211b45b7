"""How a model is spread over ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from orchestrator.errors import UsageError

if TYPE_CHECKING:
    from orchestrator.strategies.base import Strategy

NAMES = ("auto", "ddp", "fsdp", "hsdp", "none")


def choose(name: str, world_size: int) -> tuple[Strategy, str]:
    """Return the strategy for `--strategy name` at this world size, and why it is this one.

    Raises UsageError for a name that does not exist or that this version does not offer.
    """
    if name not in NAMES:
        raise UsageError(f"`--strategy {name}` does not exist; choose one of {', '.join(NAMES)}.")
    if name in ("fsdp", "hsdp"):
        raise UsageError(f"`--strategy {name}` is not available in this version; use `ddp`, or `auto`.")
    if name == "none":
        return _none(), "asked for"
    if world_size == 1:
        return _none(), "one rank has nothing to exchange"
    return _ddp(), "asked for" if name == "ddp" else f"{world_size} ranks, each holding the whole model"


def _none() -> Strategy:
    from orchestrator.strategies.none import NoneStrategy

    return NoneStrategy()


def _ddp() -> Strategy:
    from orchestrator.strategies.ddp import DdpStrategy

    return DdpStrategy()
