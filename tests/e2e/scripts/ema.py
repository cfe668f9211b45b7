"""Two shadows of a model: a momentum encoder (MoCo), written before the optimizer's step, an average after it."""

import copy

import torch
import torch.nn.functional as F
from strike import strike
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import orchestrator

run = orchestrator.init()
encoder = nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 8))
keys = copy.deepcopy(encoder).requires_grad_(False)
model = run.prepare(encoder)
ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
queue = F.normalize(torch.randn(8, 32, generator=torch.Generator().manual_seed(6)), dim=0)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
run.track(model=model, keys=keys, ema=ema, queue=queue, optimizer=optimizer)

data = torch.randn(160, 12, generator=torch.Generator().manual_seed(7))
for batch in run.batches(data, batch_size=16, epochs=2):
    with torch.no_grad():
        for own, key in zip(model.parameters(), keys.parameters(), strict=True):
            key.mul_(0.9).add_(own, alpha=0.1)
        k = F.normalize(keys.eval()(batch + 0.1 * torch.randn_like(batch)), dim=1)
    strike("keys written", run.rank, run.step)
    q = F.normalize(model(batch + 0.1 * torch.randn_like(batch)), dim=1)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.clone()], 1) / 0.2
    loss = F.cross_entropy(logits, torch.zeros(len(batch), dtype=torch.long))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    strike("before average", run.rank, run.step)
    ema.update_parameters(model)
    parts = [torch.empty_like(k) for _ in range(run.world_size)]
    torch.distributed.all_gather(parts, k)
    start = run.step * 16 % 32
    queue[:, start : start + 16] = torch.cat(parts).T
    run.log(loss=loss)
