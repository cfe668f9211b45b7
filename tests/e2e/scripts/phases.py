"""Two phases in one script: train everything, then a new head with a new optimizer on a frozen body."""

import torch
import torch.nn.functional as F
from strike import strike
from torch import nn

import orchestrator


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.1))
        self.head = nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.body(x))


run = orchestrator.init()
net = Net()
model = run.prepare(net, find_unused_parameters=True)  # the body gets no gradients in the second phase
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
run.track(model=model, optimizer=optimizer)
x = torch.randn(96, 8, generator=torch.Generator().manual_seed(8))
data = torch.utils.data.TensorDataset(x, x.sum(1).gt(0).long())

for inputs, labels in run.batches(data, batch_size=16, epochs=2, name="warm"):
    loss = F.cross_entropy(model(inputs), labels)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    run.log(loss=loss)

strike("between", run.rank, run.step)
for parameter in net.body.parameters():
    parameter.requires_grad_(False)
with torch.no_grad():
    net.head.weight.mul_(0.5).add_(0.01 * torch.randn_like(net.head.weight))  # twice would not be the same as once
    net.head.bias.zero_()
for group in optimizer.param_groups:
    group["lr"] *= 0.5
run.state["phases"] = run.state.get("phases", 0) + 1
tuner = torch.optim.SGD(net.head.parameters(), lr=0.1, momentum=0.9)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(tuner, 12)
run.track(tuner=tuner, scheduler=scheduler)
print(f"tuning from step {run.step}", flush=True)

for inputs, labels in run.batches(data, batch_size=16, epochs=2, name="tune"):
    loss = F.cross_entropy(model(inputs), labels)
    tuner.zero_grad()
    loss.backward()
    strike("tuning", run.rank, run.step)
    tuner.step()
    scheduler.step()
    run.log(loss=loss)
if run.is_main:
    alike = torch.tensor(run.state.setdefault("head", net.head.bias.tolist())).equal(net.head.bias)
    print(f"phases begun: {run.state['phases']}, heads alike: {alike}")
