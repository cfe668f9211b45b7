"""A classifier as its author would port it: epochs, validation, a schedule that follows it, early stopping."""

import torch
import torch.nn.functional as F
from strike import strike
from torch import nn

import orchestrator

run = orchestrator.init()
generator = torch.Generator().manual_seed(5)
x = torch.randn(236, 10, generator=generator)
y = (x[:, :5].sum(1) > x[:, 5:].sum(1)).long()
training = torch.utils.data.TensorDataset(x[:180], y[:180])
validation = torch.utils.data.TensorDataset(x[180:], y[180:])

model = run.prepare(nn.Sequential(nn.Linear(10, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 2)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9, weight_decay=1e-3)
scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, factor=0.3, patience=0)
run.track(model=model, optimizer=optimizer, scheduler=scheduler)


def validate():
    model.eval()
    total = seen = 0
    with torch.no_grad():
        for inputs, labels in run.batches(validation, batch_size=24, train=False):
            strike("validating", run.rank, run.step)
            total += F.cross_entropy(model(inputs), labels, reduction="sum").item()
            seen += len(labels)
    model.train()
    return run.mean(total / seen, weight=seen)


for epoch in run.epochs(30):
    if epoch == 2:
        for group in optimizer.param_groups:
            group["lr"] *= 0.7
    for inputs, labels in run.batches(training, batch_size=25, drop_last=False):
        loss = F.cross_entropy(model(inputs), labels)
        optimizer.zero_grad()
        loss.backward()
        strike("before step", run.rank, run.step)
        optimizer.step()
        run.log(loss=loss)
    val_loss = validate()
    scheduler.step(val_loss)
    strike("after validation", run.rank, run.step)
    run.state.setdefault("history", []).append([epoch, val_loss, optimizer.param_groups[0]["lr"]])
    if val_loss < run.state.get("best", float("inf")):
        run.state.update(best=val_loss, since=0)
        run.save("best")
    else:
        run.state["since"] += 1
    if run.state["since"] >= 3:
        break
if run.is_main:
    print(f"stopped after epoch {epoch}, best {run.state['best']:.4f}, {len(run.state['history'])} epochs noted")
