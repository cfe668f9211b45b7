"""The loop under Ray Train V2, saving and resuming through its own checkpoints."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import ray
import ray.train
import torch
from ray.train.torch import TorchTrainer, prepare_model

from benchmarks.loops.work import StepLog, build_model, options, train_step


def save(rank: int, model: torch.nn.Module, optimizer: torch.optim.Optimizer, step: int) -> None:
    with tempfile.TemporaryDirectory() as directory:
        checkpoint = None
        if rank == 0:
            state = {"model": model.module.state_dict(), "optimizer": optimizer.state_dict(), "step": step}
            torch.save(state, Path(directory) / "checkpoint.pt")
            checkpoint = ray.train.Checkpoint.from_directory(directory)
        ray.train.report({"step": step}, checkpoint=checkpoint)


def loop(config: dict[str, Any]) -> None:
    rank = ray.train.get_context().get_world_rank()
    model = prepare_model(build_model())
    optimizer = torch.optim.AdamW(model.parameters())
    start, checkpoint = 0, ray.train.get_checkpoint()
    if checkpoint is not None:
        with checkpoint.as_directory() as directory:
            saved = torch.load(Path(directory) / "checkpoint.pt")
        model.module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        start = saved["step"]
    log = StepLog(config["log_dir"], rank, config["step_ms"])
    for step in range(start, config["steps"]):
        train_step(model, optimizer, config["passes"])
        if config["save_every"] and (step + 1) % config["save_every"] == 0:
            save(rank, model, optimizer, step + 1)
        log.finished(step)


def main() -> None:
    args = options()
    ray.init(num_cpus=4, include_dashboard=False, configure_logging=False)
    failures = ray.train.FailureConfig(max_failures=3)
    trainer = TorchTrainer(
        loop,
        train_loop_config=vars(args),
        scaling_config=ray.train.ScalingConfig(num_workers=2, use_gpu=False),
        run_config=ray.train.RunConfig(name="peer", storage_path=args.save_dir, failure_config=failures),
    )
    try:
        trainer.fit()
    finally:
        ray.shutdown()


if __name__ == "__main__":
    main()
