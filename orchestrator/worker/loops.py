"""The user's loops: generators whose every `next` is a step boundary."""

from __future__ import annotations

import dis
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import TYPE_CHECKING, Any

from orchestrator.errors import UsageError
from orchestrator.worker.data_item import Cursor, Item, LoopIterator, LoopSource

if TYPE_CHECKING:
    from orchestrator.worker.run import Run

DEFAULT_NAME = "main"


@dataclass
class LoopRecord:
    """Where a training loop stands, as checkpoints hold it. `outer`: the epoch of `run.epochs` it belongs to, or -1.

    `restored`: it had begun when the state was written that this process started from.
    """

    cursor: Cursor | None = None
    done: str = ""
    outer: int = -1
    index: int = 0
    restored: bool = False

    def to_json(self) -> dict[str, Any]:
        cursor = {key: value for key, value in (self.cursor or {}).items() if key != "reader"} or None
        return {"cursor": cursor, "done": self.done, "outer": self.outer, "index": self.index}

    @property
    def reader(self) -> Any:
        """The state of an iterable's reader: this rank's own, so it travels among the per-rank state."""
        return (self.cursor or {}).get("reader")


@dataclass
class LoopBook:
    """All loops of a run by name, which of them were opened in this process, and which is running."""

    records: dict[str, LoopRecord] = field(default_factory=dict)
    opened: set[str] = field(default_factory=set)
    running: str = ""
    outer_epoch: int = -1
    outer_total: int = 1

    @classmethod
    def restore(cls, head: dict[str, Any], readers: dict[str, Any]) -> LoopBook:
        book = cls()
        for name, item in head.get("loops", {}).items():
            record = LoopRecord(**item)
            record.restored = bool(record.done or record.cursor)
            if name in readers and record.cursor is not None:
                record.cursor["reader"] = readers[name]
            book.records[name] = record
        return book

    def open(self, name: str | None, what: str) -> tuple[str, LoopRecord]:
        """Claim the loop `name`. Raises UsageError for a second loop of one name, and for one inside another."""
        key = name or DEFAULT_NAME
        if self.running:
            raise UsageError(
                f"`{what}` at {_call_site()} begins inside the training loop {self.running!r}; one training loop runs "
                "at a "
                "time. For validation pass `train=False`."
            )
        if key in self.opened:
            which = "Second" if name is None else f"Second {name!r}"
            raise UsageError(
                f"{which} `{what}` at {_call_site()}: for validation pass `train=False`; for epochs use "
                "`run.epochs(n)`; "
                "for a new phase pass `name=`."
            )
        self.opened.add(key)
        record = self.records.setdefault(key, LoopRecord())
        if self.outer_epoch >= 0 and record.outer != self.outer_epoch:
            record = self.records[key] = LoopRecord(outer=self.outer_epoch, index=record.index)
        return key, record


def closed_by_break(frame: FrameType | None) -> bool:
    """Whether a generator is being closed because its loop was left by `break` or `return`, not by an exception.

    `frame` is the one that let go of the generator. CPython says the difference nowhere else: leaving a loop pops its
    iterator by an instruction of its own, unwinding drops it while the failing instruction is the current one.
    """
    while frame is not None and 0 <= frame.f_lasti < len(frame.f_code.co_code):
        name = dis.opname[frame.f_code.co_code[frame.f_lasti]]
        if name in ("POP_TOP", "POP_ITER", "END_FOR"):
            return True
        suspended = name in ("YIELD_VALUE", "RESUME", "SEND", "YIELD_FROM", "RESUME_CHECK")
        if not (frame.f_code.co_flags & inspect.CO_GENERATOR and suspended):
            return False
        frame = frame.f_back  # a generator around ours (tqdm's, the user's own) is being closed: what closes it?
    return False


def _call_site() -> str:
    return _place(sys._getframe(1))


def _place(frame: FrameType | None) -> str:
    """The innermost line of the user's own code at or above `frame`, as train.py:31."""
    from orchestrator.worker.report import is_user_file

    while frame is not None and frame.f_back is not None and not is_user_file(frame.f_code.co_filename):
        frame = frame.f_back
    return f"{frame.f_code.co_filename.rpartition('/')[2]}:{frame.f_lineno}" if frame is not None else "an unknown line"


class StepsSource:
    """`run.steps(total)`: a LoopSource that yields indices."""

    steps_per_epoch: int | None = None
    global_batch_text = ""

    def __init__(self, total: int) -> None:
        self.length = total

    def config(self) -> dict[str, Any]:
        return {"kind": "steps"}

    def open(self, cursor: Cursor | None = None) -> LoopIterator:
        return _StepsIterator(self.length, (cursor or {}).get("index", 0))


class _StepsIterator:
    def __init__(self, total: int, index: int) -> None:
        self._total, self._index = total, index

    def __iter__(self) -> _StepsIterator:
        return self

    def has_next(self) -> bool:
        return self._index < self._total

    def __next__(self) -> Item:
        if self._index >= self._total:
            raise StopIteration
        self._index += 1
        return Item(self._index - 1, 0, 0, (1, 1), 0, True)

    def cursor(self) -> Cursor:
        return {"index": self._index, "epoch": 0, "position": 0, "samples": 0}

    def close(self) -> None:
        pass


class TrainingLoop:
    """What `run.batches` and `run.steps` return: iterate once; `len()` is the whole loop, also after a resume."""

    def __init__(
        self, run: Run, name: str, record: LoopRecord, source: LoopSource, accumulate_forwards: int = 1
    ) -> None:
        self._run = run
        self.name = name
        self.record = record
        self.source = source
        self.accumulate_forwards = accumulate_forwards
        self._at_hand: tuple[LoopIterator, Item] | None = None

    def __len__(self) -> int:
        if self.source.length is None:
            raise TypeError("this loop's length is known only to its source")
        return self.source.length

    def __iter__(self) -> Iterator[Any]:
        return self._iterate()

    @property
    def rng_key(self) -> str:
        """Names this loop's stream of random numbers."""
        return self.name if self.record.outer < 0 else f"{self.name}@{self.record.outer}"

    def _iterate(self) -> Iterator[Any]:
        run = self._run
        if run.finishing and not self.record.done:
            return
        if self.record.done and self.record.done != "end":
            run.undo_reruns(self)
            run.loop_ends(self)
            return
        iterator = self.source.open(self.record.cursor)
        run.book.running = self.name
        run.loop_begins(self)
        try:
            yield from self._steps(iterator)
        finally:
            run.book.running = ""
            iterator.close()
        run.loop_ends(self)

    def _steps(self, iterator: LoopIterator) -> Iterator[Any]:
        run = self._run
        while run.agree_on_next(self, iterator):
            item = next(iterator)
            self._at_hand = (iterator, item)
            run.step_begins(self, item)
            try:
                yield item.batch
            except GeneratorExit:
                leaver = sys._getframe().f_back
                if closed_by_break(leaver):
                    run.left_by_break(_place(leaver))
                raise
            self.advance()
            if not run.boundary(self, item):
                return
        self.record.done = "end"

    def advance(self) -> None:
        """The item at hand is consumed."""
        if self._at_hand is None:
            return
        iterator, item = self._at_hand
        self._at_hand = None
        self.record.cursor = iterator.cursor()
        self.record.index += 1
        self._run.samples += item.samples
