"""`python -m tests.sim --seeds 1000000 [--first N]`, or `--seed K` to see one schedule event by event."""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter

from .schedule import run_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many schedules")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="run and print this one")
    options = parser.parse_args()
    if options.seed is not None:
        print(run_seed(options.seed, print))
        return 0
    began, outcomes = time.monotonic(), Counter[str]()
    for seed in range(options.first, options.first + options.seeds):
        try:
            finish = run_seed(seed)
        except Exception:
            traceback.print_exc()
            print(f"failed: python -m tests.sim --seed {seed}", file=sys.stderr)
            return 1
        outcomes[f"{finish.outcome} {finish.exit_code}"] += 1
    print(f"{options.seeds} schedules in {time.monotonic() - began:.1f} s: {dict(outcomes)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
