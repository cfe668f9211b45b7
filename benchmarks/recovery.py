"""How long a killed worker holds a run up: this orchestrator, torchrun and Ray Train V2, the same loop, in one run.

    python -m benchmarks.recovery [--trials 10] [--only orchestrator,torchrun,ray_train] [--json]

One of two ranks gets SIGKILL from outside at a random moment of a step. Measured from the kill, by step logs:
    recovery    until every rank has finished its first step in the restarted group
    caught up   until every rank has finished a step that nobody had finished before (peers repeat lost steps first)
    lost        steps that were finished before the kill and had to be done again
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import harness
from benchmarks.harness import RANKS, Running

VICTIM = 1
SAVE_EVERY = 10
STEPS_AFTER = 25  # enough to catch up: the kill falls into steps 20 … 29, Ray Train may start again at 10
SYSTEMS = ("orchestrator", "torchrun", "ray_train")
PHASES = ("detect", "drain", "fork", "connect", "build", "restore", "first_step")


@dataclass(frozen=True)
class Trial:
    """One kill. `recovered`: the journal's own account (orchestrator only)."""

    system: str
    killed_after_step: int
    recovery_s: float
    caught_up_s: float
    lost_steps: int
    recovered: dict[str, Any] = field(default_factory=dict)


def command(system: str, directory: Path, arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    peer = [*arguments, "--save-every", str(SAVE_EVERY)]
    if system == "torchrun":
        # without it a restarted gloo group finds the dead group's addresses in the shared store
        env = harness.environment(TORCH_DISABLE_SHARE_RDZV_TCP_STORE="1")
        return harness.torchrun_command(directory, peer), env
    if system == "ray_train":
        return harness.ray_train_command(directory, peer), harness.environment(RAY_TRAIN_V2_ENABLED="1")
    ours = harness.orchestrator_command(directory, arguments, "--save-every", f"{SAVE_EVERY}steps")
    return ours, harness.environment()


def kill_victim(run: Running, after_step: int, step_s: float, rng: random.Random) -> int:
    """SIGKILL for the victim at a random moment of the step after `after_step`; returns when, in ns."""

    def reached() -> bool:
        return any(step.step >= after_step for step in run.steps(VICTIM))

    run.wait_until(reached, f"step {after_step} of rank {VICTIM}", timeout_s=120, poll_s=0.002)
    time.sleep(rng.random() * step_s)
    killed_ns = time.monotonic_ns()
    os.kill(run.steps(VICTIM)[-1].pid, signal.SIGKILL)
    return killed_ns


def measure(run: Running, killed_ns: int) -> tuple[float, float, int]:
    """(recovery_s, caught_up_s, lost_steps) from the step logs; restarted ranks are new processes in all systems."""
    before, restarted = -1, []
    for steps in map(run.steps, RANKS):
        old_pid = next(s.pid for s in reversed(steps) if s.end_ns <= killed_ns)
        before = max(before, *(s.step for s in steps if s.pid == old_pid))
        restarted.append([s for s in steps if s.end_ns > killed_ns and s.pid != old_pid])
    recovery_ns = max(steps[0].end_ns for steps in restarted) - killed_ns
    caught_up_ns = max(next(s.end_ns for s in steps if s.step > before) for steps in restarted) - killed_ns
    lost = max(0, before + 1 - min(steps[0].step for steps in restarted))
    return recovery_ns / 1e9, caught_up_ns / 1e9, lost


def journal_recovered(directory: Path) -> dict[str, Any]:
    """The journal's `recovered` event of this run."""
    events = [sys.executable, "-m", "orchestrator", "events", str(directory / "runs" / "bench"), "--json"]
    output = subprocess.check_output(events, cwd=harness.ROOT, env=harness.environment(), text=True, timeout=60)
    found = [event for event in map(json.loads, output.splitlines()) if event["event"] == "recovered"]
    if len(found) != 1:
        raise harness.BenchmarkError(f"the journal tells of {len(found)} recoveries where one rank was killed once")
    return found[0]


def trial(system: str, number: int, directory: Path, step_ms: float) -> Trial:
    rng = random.Random(number)  # the same moments for every system
    after_step = 20 + rng.randrange(10)
    arguments = ["--steps", str(after_step + STEPS_AFTER), "--step-ms", str(step_ms)]
    argv, env = command(system, directory, arguments)
    with harness.running(argv, directory, env) as run:
        killed_ns = kill_victim(run, after_step, step_ms / 1e3, rng)
        run.wait_for_end(120)
        recovery_s, caught_up_s, lost = measure(run, killed_ns)
    recovered = journal_recovered(directory) if system == "orchestrator" else {}
    return Trial(system, after_step, recovery_s, caught_up_s, lost, recovered)


def summarize(trials: Sequence[Trial]) -> dict[str, Any]:
    summary: dict[str, Any] = {}
    for system in dict.fromkeys(t.system for t in trials):
        own = [t for t in trials if t.system == system]
        summary[system] = {
            "trials": len(own),
            "recovery_s": harness.spread([t.recovery_s for t in own]),
            "caught_up_s": harness.spread([t.caught_up_s for t in own]),
            "lost_steps": harness.spread([t.lost_steps for t in own]),
        }
    ours = summary.get("orchestrator")
    for row in summary.values() if ours else ():
        row["ratio"] = row["recovery_s"]["median"] / ours["recovery_s"]["median"]
    if ours:
        accounts = [t.recovered for t in trials if t.recovered]
        ours["phases_s"] = {p: median(a["phases"].get(p, 0.0) for a in accounts) for p in PHASES}
        ours["journal_recovery_s"] = harness.spread([a["recovery_s"] for a in accounts])
    return summary


def report(summary: dict[str, Any]) -> str:
    head = ("1 of 2 ranks killed", "trials", "recovery s", "min", "max", "ratio", "caught up s", "steps lost", "max")
    rows = []
    for system, row in summary.items():
        recovery, lost = row["recovery_s"], row["lost_steps"]
        cells = [f"{recovery[key]:.3f}" for key in ("median", "min", "max")]
        cells += [f"{row['ratio']:.1f}" if "ratio" in row else "-", f"{row['caught_up_s']['median']:.3f}"]
        rows.append([system, str(row["trials"]), *cells, f"{lost['median']:g}", f"{lost['max']:g}"])
    lines = [harness.table(head, rows)]
    if "orchestrator" in summary:
        ours = summary["orchestrator"]
        phases = "  ".join(f"{name} {seconds * 1e3:.1f}" for name, seconds in ours["phases_s"].items())
        lines += ["", f"orchestrator by phase, ms (journal, medians): {phases}"]
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recovery", description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=10)
    parser.add_argument("--only", default=",".join(SYSTEMS), help="systems to run, separated by commas")
    parser.add_argument("--step-ms", type=float, default=30.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    systems = args.only.split(",")
    if args.trials < 1 or not set(systems) <= set(SYSTEMS):
        parser.error(f"--trials is at least 1, --only names some of {', '.join(SYSTEMS)}")
    harness.die_tidily()
    described, trials = harness.machine(), []
    with tempfile.TemporaryDirectory(prefix="recovery-") as scratch:
        for number in range(args.trials):
            for system in systems:
                trials.append(trial(system, number, Path(scratch) / f"{system}-{number}", args.step_ms))
                done = trials[-1]
                print(f"{system} {number}: {done.recovery_s:.3f} s, {done.lost_steps} lost", file=sys.stderr)
    summary = summarize(trials)
    result = {"machine": described, "step_ms": args.step_ms, "trials": [asdict(t) for t in trials], "summary": summary}
    harness.emit(result, args.json, report(summary))
    return 0


if __name__ == "__main__":
    sys.exit(main())
