"""Starting the systems, reading the ranks' step logs, summing up. All times are CLOCK_MONOTONIC: one clock for all."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RANKS = (0, 1)


class BenchmarkError(RuntimeError):
    """A system did not do what was measured; the message carries the end of its output."""


@dataclass(frozen=True)
class Step:
    """A finished step of one rank."""

    pid: int
    step: int
    end_ns: int
    cpu_ns: int


def environment(**extra: str) -> dict[str, str]:
    """The same for all systems: one thread a process, our sources importable, no usage statistics."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("ORCHESTRATOR_", "RAY_", "TORCHELASTIC_"))}
    fixed = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), "RAY_USAGE_STATS_ENABLED": "0"}
    return {**inherited, **fixed, **extra}


def orchestrator_command(directory: Path, arguments: Sequence[str], *launch_options: str) -> list[str]:
    launch = [sys.executable, "-m", "orchestrator", "launch", "--workers", str(len(RANKS))]
    where = ["--storage", str(directory / "runs"), "--run-name", "bench", *launch_options]
    return [*launch, *where, "-m", "benchmarks.loops.with_orchestrator", "--log-dir", str(directory), *arguments]


def torchrun_command(directory: Path, arguments: Sequence[str]) -> list[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", "3"]
    torchrun += ["--nproc-per-node", str(len(RANKS)), "-m", "benchmarks.loops.with_torchrun"]
    return [*torchrun, "--log-dir", str(directory), "--save-dir", str(directory), *arguments]


def ray_train_command(directory: Path, arguments: Sequence[str]) -> list[str]:
    script = [sys.executable, "-m", "benchmarks.loops.with_ray_train"]
    return [*script, "--log-dir", str(directory), "--save-dir", str(directory), *arguments]


class Running:
    """A started system: its process, its output file, the step logs of its ranks."""

    def __init__(self, command: Sequence[str], directory: Path, env: dict[str, str]) -> None:
        self.directory, self.command = directory, command
        with open(directory / "output.log", "wb") as output:
            self.started_ns = time.monotonic_ns()
            self.process = subprocess.Popen(
                command, cwd=ROOT, env=env, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
            )

    def steps(self, rank: int) -> list[Step]:
        """The rank's finished steps so far; a last line that is still being written is left out."""
        path = self.directory / f"steps-{rank}.log"
        if not path.exists():
            return []
        whole, _, _ = path.read_text().rpartition("\n")
        return [Step(*map(int, line.split())) for line in whole.splitlines()]

    def wait_until(self, reached: Callable[[], bool], what: str, timeout_s: float, poll_s: float = 0.02) -> None:
        deadline = time.monotonic() + timeout_s
        while not reached():
            if self.process.poll() is not None and not reached():
                self.fail(f"ended with exit status {self.process.returncode} before {what}")
            if time.monotonic() > deadline:
                self.fail(f"no sign of {what} within {timeout_s:.0f} s")
            time.sleep(poll_s)

    def wait_for_end(self, timeout_s: float) -> None:
        try:
            status = self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.fail(f"still running after {timeout_s:.0f} s")
        if status:
            self.fail(f"ended with exit status {status}")

    def fail(self, what: str) -> None:
        tail = (self.directory / "output.log").read_text(errors="replace")[-2000:]
        raise BenchmarkError(f"{' '.join(self.command[:6])} …: {what}. Its last output:\n{tail}")


@contextmanager
def running(command: Sequence[str], directory: Path, env: dict[str, str]) -> Iterator[Running]:
    """A system that is ended with its whole process group when the block is left."""
    directory.mkdir(parents=True)
    system = Running(command, directory, env)
    try:
        yield system
    finally:
        end_group(system.process)


def die_tidily() -> None:
    """SIGTERM unwinds like Ctrl-C, so that `running` ends what was started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))


def end_group(process: subprocess.Popen[bytes]) -> None:
    for sign, patience_s in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
        if process.poll() is not None:
            return
        os.killpg(process.pid, sign)
        try:
            process.wait(patience_s)
        except subprocess.TimeoutExpired:
            continue


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def machine() -> dict[str, Any]:
    import torch

    return {
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "load_before": os.getloadavg()[0],
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Left-aligned first column, right-aligned others."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    lines = []
    for row in [head, *rows]:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def emit(result: dict[str, Any], as_json: bool, text: str) -> None:
    print(json.dumps(result, indent=2) if as_json else text)
