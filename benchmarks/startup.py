"""From the command to the first finished step: `orchestrator launch` against torchrun plus what `ray.init` alone takes.

    python -m benchmarks.startup [--trials 7] [--json]
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import harness
from benchmarks.harness import RANKS

ARGUMENTS = ["--steps", "5"]
RAY_INIT = """
import ray, time
started = time.monotonic()
ray.init(num_cpus=4, include_dashboard=False, configure_logging=False)
print("took", time.monotonic() - started, flush=True)
ray.shutdown()
"""


def first_step_s(command: list[str], directory: Path) -> float:
    """Seconds from starting the command until every rank has finished its first step."""
    with harness.running(command, directory, harness.environment()) as run:
        run.wait_for_end(180)
        return (max(run.steps(rank)[0].end_ns for rank in RANKS) - run.started_ns) / 1e9


def ray_init_s() -> float:
    """Seconds inside `ray.init`, without the import of ray."""
    argv = [sys.executable, "-c", RAY_INIT]
    output = subprocess.check_output(argv, env=harness.environment(), stderr=subprocess.DEVNULL, text=True, timeout=180)
    return next(float(line.split()[1]) for line in output.splitlines() if line.startswith("took "))


def trial(number: int, scratch: Path) -> dict[str, float]:
    """One of each; the order alternates so that a drift of the machine hits both sides alike."""
    measured: dict[str, float] = {}

    def ours() -> None:
        directory = scratch / f"orchestrator-{number}"
        measured["orchestrator_s"] = first_step_s(harness.orchestrator_command(directory, ARGUMENTS), directory)

    def peers() -> None:
        directory = scratch / f"torchrun-{number}"
        measured["torchrun_s"] = first_step_s(harness.torchrun_command(directory, ARGUMENTS), directory)
        measured["ray_init_s"] = ray_init_s()

    for measure in (ours, peers) if number % 2 == 0 else (peers, ours):
        measure()
    measured["ratio"] = measured["orchestrator_s"] / (measured["torchrun_s"] + measured["ray_init_s"])
    return measured


def report(trials: list[dict[str, float]]) -> str:
    rows = []
    for key in ("orchestrator_s", "torchrun_s", "ray_init_s", "ratio"):
        spread = harness.spread([trial[key] for trial in trials])
        rows.append([key, *(f"{spread[part]:.2f}" for part in ("median", "min", "max"))])
    return harness.table(("command to first step", "median", "min", "max"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.startup", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=7)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.trials < 1:
        parser.error("--trials is at least 1")
    harness.die_tidily()
    described: dict[str, Any] = harness.machine()
    trials = []
    with tempfile.TemporaryDirectory(prefix="startup-") as scratch:
        for number in range(args.trials):
            trials.append(trial(number, Path(scratch)))
            print(f"{number}: " + "  ".join(f"{k} {v:.2f}" for k, v in trials[-1].items()), file=sys.stderr)
    harness.emit({"machine": described, "trials": trials}, args.json, report(trials))
    return 0


if __name__ == "__main__":
    sys.exit(main())
