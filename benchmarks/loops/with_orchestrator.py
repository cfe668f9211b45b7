"""The loop under `orchestrator launch`."""

from __future__ import annotations

import torch

import orchestrator
from benchmarks.loops.work import StepLog, build_model, options, train_step


def main() -> None:
    args = options()
    run = orchestrator.init()
    model = run.prepare(build_model())
    optimizer = torch.optim.AdamW(model.parameters())
    run.track(model=model, optimizer=optimizer)
    log = StepLog(args.log_dir, run.rank, args.step_ms)
    for step in run.steps(args.steps):
        train_step(model, optimizer, args.passes)
        log.finished(step)


if __name__ == "__main__":
    main()
