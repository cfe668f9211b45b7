"""Requests for saves as rounds of agreement carry them: a table of rounds, and what every rank does after each."""

from __future__ import annotations

import torch

from orchestrator.worker.agreement import Agreed, Agreement, Wish
from orchestrator.worker.group import Group
from orchestrator.worker.save_requests import SaveRequests


def requests(rank: int = 0, orders: int = 0) -> SaveRequests:
    return SaveRequests(Group(rank, rank, 1, 1, torch.device("cpu")), orders)


def alone(saves: SaveRequests, together: bool = False) -> list[str]:
    """Names that rank 0 stages now."""
    return saves.alone(together)


def round_of(own: dict[Wish, int] | None = None, **others: int) -> Agreed:
    """A round in which this rank posted `own` and the others, at most, `others`."""
    posted = tuple((own or {}).get(wish, 0) for wish in Wish)
    return Agreed(tuple(max(value, others.get(wish.name, 0)) for wish, value in zip(Wish, posted, strict=True)), posted)


def test_any_ranks_clock_makes_a_periodic_save_due_once() -> None:
    saves = requests()
    saves.take(round_of(SAVE=1), fresh=False)
    assert saves.due(together=False)
    assert saves.begin(together=False) == ("periodic", "")
    assert not saves.due(together=False)


def test_an_order_counts_once_however_late_a_rank_sees_it() -> None:
    saves = requests(orders=3)
    saves.take(round_of(ORDER=3), fresh=False)
    assert not saves.due(together=False)
    saves.take(round_of(ORDER=4), fresh=False)
    assert saves.begin(together=False) == ("requested", "")
    saves.take(round_of({Wish.ORDER: 4}), fresh=False)  # this rank's own word came after the others'
    assert not saves.due(together=False)


def test_a_requested_save_makes_up_for_the_periodic_one_of_its_step() -> None:
    saves = requests()
    saves.take(round_of(SAVE=1, ORDER=1), fresh=False)
    assert saves.begin(together=False) == ("requested", "")
    assert not saves.due(together=False)


def test_a_round_posted_before_a_save_neither_repeats_it_nor_calls_the_saver_idle() -> None:
    saves = requests()
    saves.due_now()
    saves.begin(together=False)
    saves.staged(round_pending=True)
    saves.take(round_of(SAVE=1, BUSY=0), fresh=False)
    assert saves.busy
    assert not saves.due(together=False)
    saves.take(round_of(BUSY=0), fresh=False)
    assert not saves.busy


def test_a_round_posted_after_a_save_counts() -> None:
    saves = requests()
    saves.staged(round_pending=True)
    saves.take(round_of(SAVE=1, BUSY=1), fresh=True)
    assert saves.busy
    assert saves.due(together=False)


def test_rank_0_saves_by_itself_what_the_script_asks_for() -> None:
    saves = requests()
    saves.call("best")
    saves.call("")
    assert alone(saves) == ["best", ""]
    assert alone(saves) == []
    saves.take(round_of({Wish.CALLS: 2}), fresh=False)
    assert not saves.due(together=False)
    assert alone(saves) == []


def test_where_ranks_hold_state_of_their_own_all_of_them_save_when_all_have_heard() -> None:
    saves = requests()
    saves.call("best")
    assert alone(saves, together=True) == []
    assert not saves.due(together=True)
    saves.take(round_of({Wish.CALLS: 1}), fresh=False)
    assert saves.due(together=True)
    assert saves.begin(together=True) == ("requested", "best")
    assert not saves.due(together=True)


def test_a_named_order_of_the_driver_is_a_call_of_rank_0() -> None:
    main, other = requests(0), requests(1)
    for saves in (main, other):
        saves.order_named("asked")
    assert main.wishes(0, False, False)[Wish.CALLS] == 1
    assert other.wishes(0, False, False)[Wish.CALLS] == 0
    assert alone(main) == ["asked"]


def test_one_rank_agrees_with_itself_at_once() -> None:
    agreement = Agreement(None)
    agreed = agreement.at_boundary(lambda: {Wish.SAVE: 1, Wish.MOST_STEPS: 5, Wish.LEAST_STEPS: -5})
    assert agreed is not None
    assert (agreed[Wish.SAVE], agreed[Wish.STAYING], agreed[Wish.LEAST_STEPS], agreed.own(Wish.SAVE)) == (1, 0, -5, 1)
    assert not agreement.pending
