"""What a step costs under `orchestrator launch`, against the same loop under torchrun beside an idle Ray.

    python -m benchmarks.overhead [--pairs 6] [--json]

Two paired experiments on two ranks, the order of each pair alternating:
    wall   steps of about 50 ms of pure computing: ratio of the mean step times (torchrun runs beside a Ray with three
           idle actors, because any system on Ray pays for an idle Ray)
    cpu    short steps, padded to 10 ms: difference of CPU time a step and worker, all threads of the worker counted
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import mean, median
from typing import Any

from benchmarks import harness
from benchmarks.harness import RANKS, Running

WARM_UP_STEPS = 20
IDLE_RAY = """
import ray, sys, time
ray.init(num_cpus=4, include_dashboard=False, configure_logging=False)
@ray.remote(num_cpus=0)
class Idle:
    def ready(self): return True
actors = [Idle.remote() for _ in range(3)]
ray.get([actor.ready.remote() for actor in actors])
print("ready", flush=True)
sys.stdin.read()
"""


@contextmanager
def idle_ray() -> Iterator[None]:
    """A local Ray with three actors that do nothing, for as long as the block lasts."""
    argv = [sys.executable, "-c", IDLE_RAY]
    pipe = subprocess.PIPE
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=harness.environment()) as ray:
        assert ray.stdin is not None and ray.stdout is not None
        try:
            if not any(line == b"ready\n" for line in ray.stdout):
                raise harness.BenchmarkError("Ray did not start; try `python -c 'import ray; ray.init()'`")
            yield
        finally:
            ray.stdin.close()
            ray.wait(60)


def calibrate(step_ms: float) -> int:
    """How many `--passes` make a step of about `step_ms` on this machine, two ranks computing at a time."""
    import torch

    from benchmarks.loops.work import build_model, train_step

    torch.set_num_threads(1)
    model = build_model()
    optimizer = torch.optim.AdamW(model.parameters())
    passes = 200
    for _ in range(3):
        started = time.perf_counter()
        train_step(model, optimizer, passes)
        elapsed_ms = (time.perf_counter() - started) * 1e3
        passes = max(1, round(passes * step_ms / elapsed_ms))
    return passes


def per_step(run: Running) -> tuple[float, float]:
    """(mean step time in ms, CPU time a step and worker in ms) after the warm-up, mean over ranks."""
    wall, cpu = [], []
    for rank in RANKS:
        steps = run.steps(rank)[WARM_UP_STEPS:]
        count = steps[-1].step - steps[0].step
        wall.append((steps[-1].end_ns - steps[0].end_ns) / count / 1e6)
        cpu.append((steps[-1].cpu_ns - steps[0].cpu_ns) / count / 1e6)
    return mean(wall), mean(cpu)


def ours(directory: Path, arguments: list[str]) -> tuple[float, float]:
    with harness.running(harness.orchestrator_command(directory, arguments), directory, harness.environment()) as run:
        run.wait_for_end(600)
        return per_step(run)


def peer(directory: Path, arguments: list[str]) -> tuple[float, float]:
    command = harness.torchrun_command(directory, arguments)
    with idle_ray(), harness.running(command, directory, harness.environment()) as run:
        run.wait_for_end(600)
        return per_step(run)


def pairs(name: str, count: int, arguments: list[str], scratch: Path) -> list[dict[str, float]]:
    """`count` runs of each, alternating which goes first so that a drift of the machine hits both alike."""
    results = []
    for number in range(count):
        measured: dict[str, tuple[float, float]] = {}
        order = [("ours", ours), ("peer", peer)]
        for who, measure in order if number % 2 == 0 else reversed(order):
            measured[who] = measure(scratch / f"{name}-{who}-{number}", arguments)
        (our_wall, our_cpu), (peer_wall, peer_cpu) = measured["ours"], measured["peer"]
        pair = {"ours_wall_ms": our_wall, "peer_wall_ms": peer_wall, "wall_ratio": our_wall / peer_wall}
        pair |= {"ours_cpu_ms": our_cpu, "peer_cpu_ms": peer_cpu, "own_cpu_ms": our_cpu - peer_cpu}
        results.append(pair)
        print(f"{name} {number}: " + "  ".join(f"{key} {value:.3f}" for key, value in pair.items()), file=sys.stderr)
    return results


def report(wall: list[dict[str, float]], cpu: list[dict[str, float]]) -> str:
    ratio = harness.spread([pair["wall_ratio"] for pair in wall])
    own = harness.spread([pair["own_cpu_ms"] for pair in cpu])
    rows = [
        ["step, orchestrator, ms", f"{median(p['ours_wall_ms'] for p in wall):.2f}", "", ""],
        ["step, torchrun beside idle Ray, ms", f"{median(p['peer_wall_ms'] for p in wall):.2f}", "", ""],
        ["ratio, paired", *(f"{ratio[key]:.4f}" for key in ("median", "min", "max"))],
        ["own CPU a step and worker, ms", *(f"{own[key]:.3f}" for key in ("median", "min", "max"))],
    ]
    return harness.table(("per-step cost", "median", "min", "max"), rows)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.overhead", description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--steps", type=int, default=400, help="steps a run, after the warm-up")
    parser.add_argument("--step-ms", type=float, default=50.0)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.pairs < 1 or args.steps < 2:
        parser.error("--pairs is at least 1, --steps at least 2")
    harness.die_tidily()
    described, passes = harness.machine(), calibrate(args.step_ms)
    steps = ["--steps", str(args.steps + WARM_UP_STEPS)]
    with tempfile.TemporaryDirectory(prefix="overhead-") as scratch:
        wall = pairs("wall", args.pairs, [*steps, "--passes", str(passes)], Path(scratch))
        cpu = pairs("cpu", args.pairs, [*steps, "--step-ms", "10"], Path(scratch))
    result: dict[str, Any] = {"machine": described, "passes": passes, "wall": wall, "cpu": cpu}
    harness.emit(result, args.json, report(wall, cpu))
    return 0


if __name__ == "__main__":
    sys.exit(main())
