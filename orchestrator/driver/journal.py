"""The run's journal: one JSON object a line, appended and flushed as things happen."""

from __future__ import annotations

import json
import os
import re
import time
from pathlib import Path
from typing import Any

from orchestrator.storage.layout import JOURNAL

# What a reader must find after a power cut; the rest is history that may lose its last lines.
_DURABLE = frozenset({"run_started", "group_started", "checkpoint_committed", "run_finished", "worker_failed"})


_ATTEMPT = re.compile(rb'"attempt": (\d+)')  # in a string's text the quotes would be escaped


def attempts_in(directory: Path) -> set[int]:
    """Numbers of all attempts that a run's journal tells of; none if there is no journal."""
    try:
        with (directory / JOURNAL).open("rb") as lines:
            return {int(number) for line in lines for number in _ATTEMPT.findall(line)}
    except OSError:
        return set()


class Journal:
    """Appends to `journal.jsonl`. A full disk stops the journal, not the run: `problem` tells the first failure."""

    def __init__(self, directory: Path) -> None:
        path = directory / JOURNAL
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        size = os.fstat(self._fd).st_size
        if size and os.pread(self._fd, 1, size - 1) != b"\n":  # a line that a killed driver left half-written
            os.write(self._fd, b"\n")
        self.problem = ""

    def record(self, event: str, fields: dict[str, Any]) -> dict[str, Any]:
        """Append one event; returns the object as written."""
        entry = {"ts": round(time.time(), 6), "event": event, "attempt": 0, **fields}
        try:
            os.write(self._fd, (json.dumps(entry) + "\n").encode())
            if event in _DURABLE:
                os.fdatasync(self._fd)
        except OSError as error:
            self.problem = self.problem or f"the journal could not be written: {error}"
        return entry

    def close(self) -> None:
        os.close(self._fd)
