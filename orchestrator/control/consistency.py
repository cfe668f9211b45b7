"""Which step can a group go on from? The newest one whose pieces the tiers together cover. Pure.

A checkpoint's state is made of *pieces*, named by strings:

* ``all``        every replicated tensor (one clean survivor of a data-parallel group holds them all), or instead
* ``share:i/n``  the i-th of n shares into which replicated tensors were dealt when a snapshot was staged;
* ``head``       the JSON half as rank 0 saw it (cursor, step, run.state, schedulers), and module buffers;
* ``rank:r``     what rank r alone holds (values tracked as `per_rank`, the state of an iterable's reader).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

ALL = "all"
HEAD = "head"


class Tier(IntEnum):
    """Where state is held, newest first."""

    LIVE = 0
    MEMORY = 1
    PEER = 2
    STORAGE = 3


@dataclass(frozen=True)
class Offer:
    """`holder` (for example "agent-0/rank-1/live") can supply `pieces` of resume point `step`, `size_bytes` in all.

    `attempt` is the attempt in which that state was computed (0: the one the answer belongs to). Pieces of two
    attempts are never put together: where a step was computed twice, the two need not be bitwise the same.
    """

    tier: Tier
    step: int
    agent: str
    holder: str
    pieces: frozenset[str]
    size_bytes: int = 0
    attempt: int = 0


@dataclass(frozen=True)
class Choice:
    """The step to go on from, who supplies which pieces, and why. `attempt`: the attempt at whose end it was made."""

    step: int
    picks: tuple[tuple[Offer, frozenset[str]], ...]
    reason: str
    attempt: int = 0

    @property
    def sources(self) -> tuple[str, ...]:
        """Tier names in CONTRACT's spelling, newest first, each once."""
        return tuple(tier.name.lower() for tier in sorted({offer.tier for offer, _ in self.picks}))

    @property
    def agents(self) -> frozenset[str]:
        """The agents whose memory this choice needs."""
        return frozenset(offer.agent for offer, _ in self.picks)

    @property
    def oldest_attempt(self) -> int:
        """The oldest attempt whose memory this choice needs."""
        return min((offer.attempt or self.attempt for offer, _ in self.picks), default=self.attempt)

    @property
    def needs_salvage(self) -> bool:
        """True if a parked survivor must write its state before its process may end."""
        return any(offer.tier is Tier.LIVE for offer, _ in self.picks)


def required_pieces(world_size: int, per_rank: bool) -> frozenset[str]:
    """What one whole state of a run consists of."""
    ranks = (f"rank:{rank}" for rank in range(world_size)) if per_rank else ()
    return frozenset({ALL, HEAD, *ranks})


def choose(offers: Iterable[Offer], required: frozenset[str], attempt: int = 0) -> Choice | None:
    """The newest step whose `required` pieces are covered by offers of one line of computation, or None.

    `all` is covered by one offer of it or by every `share:i/n` of one n. At equal step: newest tier, fewest holders,
    fewest bytes, then the holder's name, so that the answer does not depend on the order of the offers. An offer from
    storage is a whole checkpoint and is never mixed with others. `attempt` is what an offer's attempt 0 stands for.
    """
    lines: dict[tuple[int, int], list[Offer]] = defaultdict(list)
    for offer in offers:
        lines[offer.step, offer.attempt or attempt].append(offer)
    newest: int | None = None
    found: list[tuple[tuple[int, int, int, int], Choice]] = []
    for step, line in sorted(lines, reverse=True):
        if newest is not None and step < newest:
            break
        choice = _cover(step, lines[step, line], required)
        if choice is not None:
            newest = step
            found.append((_cost(choice, line), choice))
    return min(found, key=lambda pair: pair[0])[1] if found else None


def _cost(choice: Choice, attempt: int) -> tuple[int, int, int, int]:
    tier = max(offer.tier for offer, _ in choice.picks)
    return (tier, len(choice.picks), sum(offer.size_bytes for offer, _ in choice.picks), -attempt)


def _cover(step: int, offers: list[Offer], required: frozenset[str]) -> Choice | None:
    stored = [offer for offer in offers if offer.tier is Tier.STORAGE]
    held = sorted((o for o in offers if o.tier is not Tier.STORAGE), key=lambda o: (o.tier, o.size_bytes, o.holder))
    options = [picks for picks in (_assign(whole, held, required) for whole in _wholes(held)) if picks is not None]
    if ALL not in required:
        plain = _assign({}, held, required)
        options += [plain] if plain is not None else []
    if stored:
        options.append({min(stored, key=lambda o: (o.size_bytes, o.holder)): set(required)})
    choices = [_as_choice(step, picks) for picks in options]
    return min(choices, key=lambda choice: _cost(choice, 0), default=None)


def _wholes(held: list[Offer]) -> list[dict[Offer, set[str]]]:
    """Every sensible way of covering `all`: each best single holder, and each complete deal of n shares."""
    ways: list[dict[Offer, set[str]]] = [{offer: {ALL}} for offer in held if ALL in offer.pieces]
    deals: dict[int, dict[int, Offer]] = defaultdict(dict)
    for offer in held:
        for piece in offer.pieces:
            if piece.startswith("share:"):
                number, _, total = piece[len("share:") :].partition("/")
                deals[int(total)].setdefault(int(number), offer)
    for count, deal in sorted(deals.items()):
        if len(deal) == count:
            way: dict[Offer, set[str]] = defaultdict(set)
            for index, offer in deal.items():
                way[offer].add(f"share:{index}/{count}")
            ways.append(dict(way))
    return ways


def _assign(whole: dict[Offer, set[str]], held: list[Offer], required: frozenset[str]) -> dict[Offer, set[str]] | None:
    """Add holders of the other pieces to `whole`; one that supplies something already is preferred."""
    picks = {offer: set(pieces) for offer, pieces in whole.items()}
    for piece in sorted(required - {ALL}):
        able = [offer for offer in held if piece in offer.pieces]
        if not able:
            return None
        best = min(able, key=lambda o: (o not in picks, o.tier, o.size_bytes, o.holder))
        picks.setdefault(best, set()).add(piece)
    return picks


def _as_choice(step: int, picks: dict[Offer, set[str]]) -> Choice:
    ordered = sorted(picks.items(), key=lambda pair: (pair[0].tier, pair[0].agent, pair[0].holder))
    holders = ", ".join(offer.holder for offer, _ in ordered)
    reason = f"step {step} is the newest that is whole: held by {holders}"
    return Choice(step, tuple((offer, frozenset(pieces)) for offer, pieces in ordered), reason)
