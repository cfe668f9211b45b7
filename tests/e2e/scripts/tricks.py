"""What else people do to a model: compile, autocast, a scaler that is off, checkpoints inside, an own Function."""

import torch
import torch.nn.functional as F
from strike import strike
from torch import nn
from torch.utils.checkpoint import checkpoint

import orchestrator


class Square(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        (x,) = ctx.saved_tensors
        return 2 * x * gradient


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.middle = nn.Linear(12, 24), nn.Sequential(nn.Linear(24, 24), nn.GELU(), nn.Dropout(0.2))
        self.last = nn.Linear(24, 4)

    def forward(self, x):
        x = checkpoint(self.middle, self.first(x), use_reentrant=False)
        return self.last(Square.apply(0.5 * x))


run = orchestrator.init()
model = torch.compile(run.prepare(Net()), backend="aot_eager")
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=True)
scaler = torch.amp.GradScaler("cpu", enabled=False)
run.track(model=model, optimizer=optimizer, scaler=scaler)
x = torch.randn(128, 12, generator=torch.Generator().manual_seed(9))
data = torch.utils.data.TensorDataset(x, x[:, :4].argmax(1))
for inputs, labels in run.batches(data, batch_size=16, epochs=2):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = F.cross_entropy(model(inputs), labels)
    optimizer.zero_grad()
    scaler.scale(loss).backward()
    strike("before step", run.rank, run.step)
    scaler.unscale_(optimizer)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    scaler.step(optimizer)
    scaler.update()
    strike("stepped", run.rank, run.step)
    run.log(loss=loss)
