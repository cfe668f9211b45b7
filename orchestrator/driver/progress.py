"""What the status line shows: folded from what workers report."""

from __future__ import annotations

import contextlib
import json
import os
import time
from pathlib import Path
from typing import Any

from orchestrator.control.state import MachineView
from orchestrator.driver.console import ConsolePort
from orchestrator.storage.layout import PROGRESS_FILE

_SMOOTHING = 0.3
_WRITE_EVERY_S = 1.0


class ProgressBoard:
    """The latest of every rank, rates, and what restarts have cost so far."""

    def __init__(self, console: ConsolePort, directory: Path) -> None:
        self._console = console
        self._file = directory / PROGRESS_FILE
        self._unwritten: dict[str, Any] | None = None
        self._next_write = 0.0
        with contextlib.suppress(OSError):
            self._file.unlink(missing_ok=True)  # an earlier launch's
        self._metrics: dict[int, dict[str, float]] = {}
        self._main: dict[str, Any] = {}
        self._seen: tuple[float, int] | None = None
        self._rate: float | None = None
        self._facts_told: set[str] = set()
        self._changed = False
        self.lost_s = 0.0
        self.lost_steps = 0
        self.tracked: list[str] = []
        self._accumulate = 1

    def metrics(self, message: dict[str, Any]) -> None:
        """A rank's progress message."""
        self._metrics[message["rank"]] = message["metrics"]
        self._changed = True
        if message["rank"] != 0:
            return
        now = time.monotonic()
        if self._seen is not None and message["samples"] > self._seen[1]:
            rate = (message["samples"] - self._seen[1]) / max(1e-9, now - self._seen[0])
            self._rate = rate if self._rate is None else (1 - _SMOOTHING) * self._rate + _SMOOTHING * rate
        self._seen = (now, message["samples"])
        self._main = message

    @property
    def step_s(self) -> float:
        """Time of a step, smoothed, as rank 0 last measured it; 0 if it never said."""
        return float(self._main.get("step_s", 0.0))

    def facts(self, message: dict[str, Any]) -> None:
        """What only the script knows: told once a loop."""
        self.tracked = message["tracked"]
        self._accumulate = message["accumulate"]
        if message["loop"] in self._facts_told:
            return
        self._facts_told.add(message["loop"])
        facts = {"batch": message["global_batch"] or None, "seed": message["seed"]}
        if len(self._facts_told) > 1:
            facts = {f"batch of {message['loop']}": message["global_batch"] or None}
        self._console.header({key: value for key, value in facts.items() if value is not None})

    def recorded(self, event: str, fields: dict[str, Any]) -> None:
        """Sum up what failures cost."""
        if event == "recovered":
            self.lost_s += float(fields["recovery_s"])
            self.lost_steps += int(fields["lost_steps"])
            self._seen = None

    def latest(self) -> dict[str, float]:
        """Metrics, mean over ranks."""
        names = dict.fromkeys(name for metrics in self._metrics.values() for name in metrics)
        means = {}
        for name in names:
            values = [metrics[name] for metrics in self._metrics.values() if name in metrics]
            means[name] = sum(values) / len(values)
        return means

    def show(self, view: MachineView) -> None:
        """Update the status line, and what `orchestrator status` reads, if there is news."""
        if self._changed:
            self._show(view)
        if self._unwritten is not None and time.monotonic() >= self._next_write:
            self._write(self._unwritten)

    def _show(self, view: MachineView) -> None:
        self._changed = False
        total, index = self._main.get("total"), self._main.get("index", 0)
        left = (total - index) * self._main.get("step_s", 0.0) if total else None
        step = self._main.get("step", 0)
        steps_total = step + (total - index) // self._accumulate if total else None
        reached = {"total": steps_total, "samples_per_s": self._rate, "metrics": self.latest(), "eta_s": left}
        if self._main:
            self._unwritten = {"step": step, **reached}
        self._console.progress(
            step,
            **reached,
            last_checkpoint_step=view.committed_step,
            restarts=view.restarts,
            lost_s=self.lost_s,
        )

    def _write(self, reached: dict[str, Any]) -> None:
        """Whole or not at all. A full disk costs lookers the progress, nothing else."""
        self._unwritten, self._next_write = None, time.monotonic() + _WRITE_EVERY_S
        draft = self._file.with_name(f".tmp-{PROGRESS_FILE}")
        with contextlib.suppress(OSError):
            draft.write_text(json.dumps(reached))
            os.replace(draft, self._file)
