"""Shared memory that outlives the process that filled it: memfd segments of labelled slots, and the beat page.

The agent keeps a descriptor of every segment, so a snapshot survives the worker. A slot is valid only while its state
word says so; the word is cleared before the first byte changes and set after the last one.
"""

from __future__ import annotations

import mmap
import os
from dataclasses import dataclass

PAGE = 4096
MAGIC = 0x4F524348  # "ORCH"

# words of a slot's header
_STATE, _ATTEMPT, _STEP, _META, _DATA, _PINNED, _ORDER = range(7)


def _round_up(size: int) -> int:
    return (size + PAGE - 1) // PAGE * PAGE


@dataclass(frozen=True)
class SlotLabel:
    """What a slot holds. `index` is its number, `order` grows with every write into the segment."""

    index: int
    attempt: int
    step: int
    order: int


class Segment:
    """`slots` equal slots of a JSON part (at most `meta_cap` bytes) and a data part (at most `data_cap` bytes)."""

    def __init__(self, fd: int) -> None:
        """Attach to the segment behind `fd`, which this object owns from now on. Raises ValueError if it is none."""
        self.fd = fd
        size = os.fstat(fd).st_size
        if size < PAGE:
            raise ValueError("not a segment: shorter than its header")
        self._map = mmap.mmap(fd, size)
        self._words = memoryview(self._map)[:64].cast("q")
        magic, self.slots, self.meta_cap, self.data_cap = (self._words[i] for i in range(4))
        if magic != MAGIC or size != self._size(self.slots, self.meta_cap, self.data_cap):
            raise ValueError("not a segment: its header does not match its size")
        self._headers = [
            memoryview(self._map)[start : start + 64].cast("q") for start in map(self._start, range(self.slots))
        ]
        self._order = max(header[_ORDER] for header in self._headers)

    @staticmethod
    def _size(slots: int, meta_cap: int, data_cap: int) -> int:
        return PAGE + slots * (PAGE + meta_cap + data_cap)

    @classmethod
    def create(cls, name: str, slots: int, meta_bytes: int, data_bytes: int) -> Segment:
        """A new segment with room for `meta_bytes` and `data_bytes` in each slot; memory is taken as it is touched."""
        meta_cap, data_cap = _round_up(meta_bytes), _round_up(data_bytes)
        fd = os.memfd_create(f"orchestrator-{name}", os.MFD_CLOEXEC)
        os.ftruncate(fd, cls._size(slots, meta_cap, data_cap))
        with mmap.mmap(fd, PAGE) as page, memoryview(page)[:64].cast("q") as words:
            words[0], words[1], words[2], words[3] = MAGIC, slots, meta_cap, data_cap
        return cls(fd)

    def _start(self, slot: int) -> int:
        return PAGE + slot * (PAGE + self.meta_cap + self.data_cap)

    def data(self, slot: int) -> memoryview:
        """The writable data area of a slot, whole."""
        start = self._start(slot) + PAGE + self.meta_cap
        return memoryview(self._map)[start : start + self.data_cap]

    def begin(self, slot: int) -> None:
        """Declare the slot invalid; its bytes may now change."""
        self._headers[slot][_STATE] = 0

    def complete(self, slot: int, attempt: int, step: int, meta: bytes, data_bytes: int, pin: bool = False) -> None:
        """Store the JSON part and declare the slot valid. Raises ValueError if `meta` does not fit."""
        if len(meta) > self.meta_cap:
            raise ValueError(f"{len(meta)} bytes of metadata do not fit into {self.meta_cap}")
        start = self._start(slot) + PAGE
        self._map[start : start + len(meta)] = meta
        header = self._headers[slot]
        self._order += 1
        header[_ATTEMPT], header[_STEP], header[_META], header[_DATA] = attempt, step, len(meta), data_bytes
        header[_PINNED], header[_ORDER] = int(pin), self._order
        header[_STATE] = 1

    def unpin(self, slot: int) -> None:
        """The saver is done with the slot: it may be overwritten."""
        self._headers[slot][_PINNED] = 0

    def is_pinned(self, slot: int) -> bool:
        return bool(self._headers[slot][_PINNED])

    @property
    def pinned(self) -> int:
        """How many slots wait for the saver."""
        return sum(bool(header[_PINNED]) for header in self._headers)

    def free_slot(self) -> int | None:
        """The slot to fill next: not pinned, not the newest complete one, oldest first. None if there is none."""
        labels = self.labels()
        newest = max(labels, key=lambda label: label.order).index if labels else -1
        choices = [i for i in range(self.slots) if not self.is_pinned(i) and (i != newest or self.slots == 1)]
        return min(choices, key=lambda i: (self._headers[i][_STATE], self._headers[i][_ORDER])) if choices else None

    def labels(self) -> list[SlotLabel]:
        """All valid slots."""
        return [
            SlotLabel(i, header[_ATTEMPT], header[_STEP], header[_ORDER])
            for i, header in enumerate(self._headers)
            if header[_STATE] == 1
        ]

    def find(self, attempt: int, step: int) -> int | None:
        """The valid slot labelled (attempt, step), the latest written if there are several."""
        hits = [label for label in self.labels() if (label.attempt, label.step) == (attempt, step)]
        return max(hits, key=lambda label: label.order).index if hits else None

    def meta(self, slot: int) -> bytes:
        """The JSON part of a slot."""
        start = self._start(slot) + PAGE
        return self._map[start : start + self._headers[slot][_META]]

    def meta_of(self, label: SlotLabel) -> bytes | None:
        """The JSON part of the slot that `label` describes, or None if its writer, alive, has gone on since."""
        if not self._holds(label):
            return None
        meta = self.meta(label.index)
        return meta if self._holds(label) else None

    def _holds(self, label: SlotLabel) -> bool:
        header = self._headers[label.index]
        now = header[_STATE], header[_ATTEMPT], header[_STEP], header[_ORDER]
        return now == (1, label.attempt, label.step, label.order)

    def data_bytes(self, slot: int) -> int:
        return self._headers[slot][_DATA]

    def take_over(self, older: Segment) -> None:
        """Copy all valid slots of `older`, which has as many slots and no more room in each."""
        for label in sorted(older.labels(), key=lambda label: label.order):
            slot, size = label.index, older.data_bytes(label.index)
            self.data(slot)[:size] = older.data(slot)[:size]
            self.complete(slot, label.attempt, label.step, older.meta(slot), size)

    def close(self) -> None:
        """Give the descriptor back; the mapping goes with the last view of it."""
        os.close(self.fd)


# words of the beat page; the first group is written by the agent, the second by the worker
POISON, ORDER_SAVE, ORDER_STOP = 0, 1, 2
BEAT_NS, RESUME_STEP, DIRTY, STEPS_DONE, PARKED = 8, 9, 10, 11, 12

STOP_SAVE, STOP_NOW, STOP_PREEMPTED = 1, 2, 3


class BeatPage:
    """One page of 64-bit words shared by an agent and one worker: heartbeat, dirty word, poison, orders."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self._map = mmap.mmap(fd, PAGE)
        self.words = memoryview(self._map).cast("q")

    @classmethod
    def create(cls) -> BeatPage:
        fd = os.memfd_create("orchestrator-beat", os.MFD_CLOEXEC)
        os.ftruncate(fd, PAGE)
        page = cls(fd)
        page.words[RESUME_STEP] = -1
        return page

    def close(self) -> None:
        """Give memory and descriptor back. Safe to repeat."""
        self.words.release()
        self._map.close()
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
