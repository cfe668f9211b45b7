"""What all systems share: the options, the model, one training step, the log of finished steps."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

DIM = 256


def options() -> argparse.Namespace:
    """The loop's command line, the same for every system."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--log-dir", required=True, help="where `steps-RANK.log` are written")
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--passes", type=int, default=1, help="forward passes a step: its amount of computing")
    parser.add_argument("--step-ms", type=float, default=0.0, help="a shorter step sleeps until this time has passed")
    parser.add_argument("--save-every", type=int, default=0, help="steps between checkpoints (peers; 0: never)")
    parser.add_argument("--save-dir", help="where the peers keep their checkpoint")
    return parser.parse_args()


def build_model() -> nn.Module:
    """An MLP of about 200,000 parameters, equal on every rank."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM), nn.ReLU(), nn.Linear(DIM, DIM))


def train_step(model: Callable[[torch.Tensor], torch.Tensor], optimizer: torch.optim.Optimizer, passes: int) -> None:
    """One optimizer step on random data; all but the last of the `passes` only burn time."""
    x = torch.randn(64, DIM)
    with torch.no_grad():
        burned = x
        for _ in range(passes - 1):
            burned = torch.tanh(burned @ x.T @ x / DIM)
    loss = F.mse_loss(model(x), burned)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


class StepLog:
    """`steps-RANK.log`: a line "pid step monotonic_ns cpu_ns" for each finished step, whole even if we are killed."""

    def __init__(self, directory: str, rank: int, step_ms: float = 0.0) -> None:
        self._fd = os.open(Path(directory) / f"steps-{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self._step_ns = int(step_ms * 1e6)
        self._last_ns = time.monotonic_ns()

    def finished(self, step: int) -> None:
        left_ns = self._last_ns + self._step_ns - time.monotonic_ns()
        if left_ns > 0:
            time.sleep(left_ns / 1e9)
        self._last_ns = time.monotonic_ns()
        os.write(self._fd, f"{os.getpid()} {step} {self._last_ns} {time.process_time_ns()}\n".encode())
