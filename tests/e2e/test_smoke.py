"""The main job in the smallest: train, lose a rank, end in the bitwise same state."""

from __future__ import annotations

import json

from tests.e2e.harness import Launcher, assert_equal_states, state

SCRIPT = """
import time
import torch
import torch.nn.functional as F
import orchestrator

run = orchestrator.init()
net = torch.nn.Sequential(
    torch.nn.Linear(16, 32), torch.nn.BatchNorm1d(32), torch.nn.ReLU(), torch.nn.Dropout(0.1), torch.nn.Linear(32, 4)
)
model = run.prepare(net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 10)
run.track(model=model, optimizer=optimizer, scheduler=scheduler)
generator = torch.Generator().manual_seed(1)
data = torch.utils.data.TensorDataset(
    torch.randn(640, 16, generator=generator), torch.randint(0, 4, (640,), generator=generator)
)
for x, y in run.batches(data, batch_size=32, epochs=4):
    loss = F.cross_entropy(model(x), y)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    time.sleep(0.02)
    run.log(loss=loss)
    if run.is_main and run.step == 20:
        print("under way")
if run.is_main:
    print("finished at", run.step)
"""


def test_a_killed_rank_costs_nothing(launcher: Launcher) -> None:
    launcher.script(SCRIPT)
    undisturbed = launcher.run("--workers", "2", "--run-name", "calm", "train.py", run="calm")
    assert "finished at 80" in undisturbed.output
    disturbed = launcher.start("--workers", "2", "--run-name", "struck", "train.py", run="struck")
    disturbed.until_event("group_started")
    disturbed.until_output("under way")
    disturbed.kill(1)
    assert disturbed.wait() == 0
    recovered = disturbed.until_event("recovered")
    assert recovered["cause"] == "signal:9"
    assert json.loads((disturbed.directory / "progress.json").read_text())["total"] == 80
    assert recovered["lost_steps"] == 0
    assert_equal_states(state(undisturbed.directory), state(disturbed.directory))
