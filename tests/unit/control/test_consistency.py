"""Which step is covered, and by whom: a table."""

from __future__ import annotations

import itertools

import pytest

from orchestrator.control.consistency import Offer, Tier, choose, required_pieces

WHOLE = required_pieces(2, per_rank=False)
RANKED = required_pieces(2, per_rank=True)


def offer(tier: Tier, step: int, holder: str, *pieces: str, size: int = 0, attempt: int = 0) -> Offer:
    return Offer(tier, step, holder.split("/")[0], holder, frozenset(pieces), size, attempt)


LIVE, MEMORY, PEER, STORAGE = Tier.LIVE, Tier.MEMORY, Tier.PEER, Tier.STORAGE
SURVIVOR = offer(LIVE, 7, "a/1/live", "all")
RECORD = offer(LIVE, 7, "a/0/record", "head")
OLD_RECORD = offer(LIVE, 6, "a/0/record", "head")
SHARE_0 = offer(MEMORY, 5, "a/0/slot", "share:0/2", "head", "rank:0")
SHARE_1 = offer(MEMORY, 5, "b/1/slot", "share:1/2", "rank:1")
STORED = offer(STORAGE, 4, "storage")


@pytest.mark.parametrize(
    ("name", "offers", "required", "step", "holders"),
    [
        ("nothing on offer", [], WHOLE, None, []),
        ("a survivor and the record of dead rank 0", [SURVIVOR, RECORD], WHOLE, 7, ["a/0/record", "a/1/live"]),
        ("a survivor without a head is not covered", [SURVIVOR], WHOLE, None, []),
        ("a head of another step does not help", [SURVIVOR, OLD_RECORD], WHOLE, None, []),
        (
            "an older whole state beats a newer half one",
            [SURVIVOR, SHARE_0, SHARE_1],
            WHOLE,
            5,
            ["a/0/slot", "b/1/slot"],
        ),
        ("one share is missing", [SHARE_0], WHOLE, None, []),
        ("storage holds everything", [SHARE_0, STORED], RANKED, 4, ["storage"]),
        ("every rank's own state is needed", [SURVIVOR, RECORD, STORED], RANKED, 4, ["storage"]),
        ("shares carry each rank's own state", [SHARE_0, SHARE_1], RANKED, 5, ["a/0/slot", "b/1/slot"]),
        (
            "shares of two deals do not mix",
            [SHARE_0, offer(MEMORY, 5, "b/1/slot", "share:1/3")],
            WHOLE,
            None,
            [],
        ),
        (
            "live shares with a head from memory",
            [offer(MEMORY, 7, "b/0/slot", "head", "share:0/2"), SURVIVOR],
            WHOLE,
            7,
            ["a/1/live", "b/0/slot"],
        ),
    ],
)
def test_newest_covered_step(
    name: str, offers: list[Offer], required: frozenset[str], step: int | None, holders: list[str]
) -> None:
    for order in itertools.permutations(offers):
        choice = choose(order, required)
        if step is None:
            assert choice is None
        else:
            assert choice is not None
            assert (choice.step, [picked.holder for picked, _ in choice.picks]) == (step, holders)


@pytest.mark.parametrize(
    ("name", "offers", "holders"),
    [
        (
            "the newest tier",
            [offer(MEMORY, 7, "a/0/slot", "all", "head"), offer(LIVE, 7, "b/1/live", "all", "head", size=9)],
            ["b/1/live"],
        ),
        (
            "then the fewest holders",
            [SURVIVOR, RECORD, offer(LIVE, 7, "c/0/live", "all", "head", size=9)],
            ["c/0/live"],
        ),
        (
            "then the fewest bytes",
            [offer(LIVE, 7, "a/0/live", "all", "head", size=2), offer(LIVE, 7, "b/1/live", "all", "head", size=1)],
            ["b/1/live"],
        ),
        (
            "then the name",
            [offer(LIVE, 7, "b/1/live", "all", "head"), offer(LIVE, 7, "a/0/live", "all", "head")],
            ["a/0/live"],
        ),
        (
            "all wins over shares",
            [
                offer(LIVE, 7, "a/0/live", "all", "head"),
                offer(LIVE, 7, "b/0/slot", "share:0/2", "head"),
                offer(LIVE, 7, "c/1/slot", "share:1/2"),
            ],
            ["a/0/live"],
        ),
        ("memory before storage", [offer(STORAGE, 5, "storage"), SHARE_0, SHARE_1], ["a/0/slot", "b/1/slot"]),
    ],
)
def test_preference_at_equal_step(name: str, offers: list[Offer], holders: list[str]) -> None:
    choice = choose(offers, WHOLE)
    assert choice is not None
    assert [picked.holder for picked, _ in choice.picks] == holders


def test_pieces_of_two_attempts_never_mix() -> None:
    first = offer(MEMORY, 5, "a/0/slot", "share:0/2", "head", attempt=1)
    second = offer(MEMORY, 5, "b/1/slot", "share:1/2", attempt=2)
    assert choose([first, second], WHOLE) is None


def test_attempt_zero_stands_for_the_attempt_that_is_asked() -> None:
    head = offer(MEMORY, 7, "a/0/slot", "head", attempt=3)
    assert choose([SURVIVOR, head], WHOLE, attempt=2) is None
    choice = choose([SURVIVOR, head], WHOLE, attempt=3)
    assert choice is not None and choice.sources == ("live", "memory") and choice.needs_salvage


def test_a_choice_says_why_and_who_supplies_what() -> None:
    choice = choose([SURVIVOR, RECORD], WHOLE)
    assert choice is not None
    assert choice.reason == "step 7 is the newest that is whole: held by a/0/record, a/1/live"
    assert [(picked.holder, pieces) for picked, pieces in choice.picks] == [
        ("a/0/record", {"head"}),
        ("a/1/live", {"all"}),
    ]
    assert choice.agents == {"a"}
