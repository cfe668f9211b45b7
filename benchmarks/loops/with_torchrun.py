"""The loop under torchrun, saving and resuming by hand as its documentation shows."""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

from benchmarks.loops.work import StepLog, build_model, options, train_step


def main() -> None:
    args = options()
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    model = torch.nn.parallel.DistributedDataParallel(build_model())
    optimizer = torch.optim.AdamW(model.parameters())
    path, start = f"{args.save_dir}/checkpoint.pt", 0
    if args.save_every and os.path.exists(path):
        saved = torch.load(path)
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    log = StepLog(args.log_dir, rank, args.step_ms)
    for step in range(start, args.steps):
        train_step(model, optimizer, args.passes)
        if args.save_every and (step + 1) % args.save_every == 0 and rank == 0:
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
            torch.save(state, path + ".new")
            os.replace(path + ".new", path)
        log.finished(step)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
