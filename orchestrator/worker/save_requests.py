"""Who asked for a save, and what the ranks agreed on: the same decisions at the same boundary on every rank."""

from __future__ import annotations

from collections import Counter, deque

from orchestrator.worker.agreement import Agreed, Wish
from orchestrator.worker.group import Group


class SaveRequests:
    """Three kinds of requests. Periodic ones are agreed on or a function of the step. An order of the driver is a
    counter that every rank sees some time; the highest counts. `run.save` is a counter of calls: rank 0 holds all
    replicated state, so it saves alone at its next resume point, unless it takes all ranks (`together`: they hold
    state of their own), which act when they have agreed. A call that rank 0 does not know of becomes one of its own.
    """

    def __init__(self, group: Group, orders: int) -> None:
        self._group = group
        self._orders_seen = orders
        self._ordered: deque[str] = deque()  # the side thread appends, the main thread takes
        self._names: deque[str] = deque()
        self._known: list[str] = []  # names of all calls so far, on rank 0
        self._calls = self._calls_agreed = self._calls_done = 0
        self._periodic = self._requested = False
        self._stale = False
        self.busy = False

    # -- asking ---------------------------------------------------------------------------------------------------

    def call(self, name: str) -> None:
        """`run.save(name)` on this rank."""
        self._calls += 1
        if self._group.rank == 0:
            self._names.append(name)
            self._known.append(name)
        else:
            self._group.store.set(_called(self._calls), f"={name}")

    def order_named(self, name: str) -> None:
        """`orchestrator save --name`; from the side thread."""
        if self._group.rank == 0:
            self._ordered.append(name)

    def wishes(self, orders: int, in_flight: bool, time_is_up: bool) -> dict[Wish, int]:
        """This rank's part of a round."""
        while self._ordered:
            self.call(self._ordered.popleft())
        return {
            Wish.SAVE: int(time_is_up),
            Wish.ORDER: orders,
            Wish.CALLS: self._calls,
            Wish.BUSY: int(in_flight),
        }

    # -- agreeing -------------------------------------------------------------------------------------------------

    def take(self, agreed: Agreed, fresh: bool) -> None:
        """Take in a round. `fresh`: it was posted just now; an older one may have been posted before the last save."""
        stale, self._stale = self._stale and not fresh, False
        if not stale:
            self._periodic = self._periodic or bool(agreed[Wish.SAVE])
            self.busy = bool(agreed[Wish.BUSY])
        if agreed[Wish.ORDER] > self._orders_seen:
            self._orders_seen = agreed[Wish.ORDER]
            self._requested = True
        unknown = agreed[Wish.CALLS] - agreed.own(Wish.CALLS)
        self._calls += unknown
        if self._group.rank == 0 and unknown:
            new = list((Counter(self._names_elsewhere()) - Counter(self._known)).elements())
            self._names.extend(new)
            self._known.extend(new)
        self._calls_agreed = max(self._calls_agreed, agreed[Wish.CALLS])

    def _names_elsewhere(self) -> list[str]:
        """Names of the calls that other ranks made; ranks that make the same calls number them alike."""
        store = self._group.store
        keys = [_called(number) for number in range(1, self._calls + 1)]
        return [bytes(store.get(key)).decode()[1:] for key in keys if store.check([key])]

    def due_now(self) -> None:
        """A trigger that is a function of the step."""
        self._periodic = True

    # -- acting ---------------------------------------------------------------------------------------------------

    def due(self, together: bool) -> bool:
        """Whether all ranks save together at this resume point."""
        return self._periodic or self._requested or (together and self._calls_done < self._calls_agreed)

    def begin(self, together: bool) -> tuple[str, str]:
        """(reason, name) of the save that is due."""
        name, called = "", together and self._calls_done < self._calls_agreed
        if called:
            self._calls_done += 1
            name = self._group.share(f"save/{self._calls_done}", self._names.popleft() if self._names else "")
        reason = "requested" if called or self._requested else "periodic"
        self._requested = self._requested and called  # a save with a name answers no other request
        self._periodic = False
        return reason, name

    def staged(self, round_pending: bool) -> None:
        """All ranks have staged: what was posted before knows nothing of it."""
        self.busy = True
        self._stale = round_pending

    def alone(self, together: bool) -> list[str]:
        """On rank 0: the names of saves that it makes by itself, now."""
        if together or self._group.rank != 0:
            return []
        names = list(self._names)
        self._names.clear()
        return names


def _called(call: int) -> str:
    return f"orchestrator/save-called/{call}"
