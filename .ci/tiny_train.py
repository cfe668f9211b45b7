"""The smallest training run that uses every part of an installation; .ci/run starts it plainly and under launch."""

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import orchestrator

run = orchestrator.init()
x = torch.linspace(-1, 1, 256).unsqueeze(1)
model = run.prepare(torch.nn.Linear(1, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
run.track(model=model, optimizer=optimizer)

for inputs, targets in run.batches(TensorDataset(x, 3 * x + 1), batch_size=32, epochs=8):
    loss = F.mse_loss(model(inputs), targets)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)

assert run.mean(loss.detach()) < 0.01, "a straight line was not learned"
if run.is_main:
    print(f"trained on {run.world_size} rank{'s' * (run.world_size > 1)}: loss {loss.item():.2g}")
