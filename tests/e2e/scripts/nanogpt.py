"""nanoGPT's training loop, ported: `while True` became `run.steps`, and batches are drawn at the top of their own step.

    orchestrator launch --workers 2 nanogpt.py loop|api DATA.bin
"""

import math
import sys

import numpy as np
import torch
import torch.nn.functional as F
from strike import strike
from torch import nn

import orchestrator

how, data_path = sys.argv[1:]
batch_size, block_size, dim, vocab = 4, 16, 32, 64
max_iters, warmup_iters, eval_interval, eval_iters = 16, 4, 4, 2
learning_rate, min_lr, grad_clip, gradient_accumulation_steps = 1e-2, 1e-3, 1.0, 3


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.proj = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim), nn.Dropout(0.1))

    def forward(self, x):
        q, k, v = self.qkv(self.ln_1(x)).split(dim, dim=2)
        x = x + self.proj(F.scaled_dot_product_attention(q, k, v, is_causal=True))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    def __init__(self):
        super().__init__()
        self.wte, self.wpe = nn.Embedding(vocab, dim), nn.Embedding(block_size, dim)
        self.h = nn.ModuleList([Block(), Block()])
        self.ln_f, self.lm_head = nn.LayerNorm(dim), nn.Linear(dim, vocab, bias=False)
        self.wte.weight = self.lm_head.weight  # tied, as in nanoGPT

    def forward(self, idx, targets):
        x = self.wte(idx) + self.wpe(torch.arange(idx.shape[1]))
        for block in self.h:
            x = block(x)
        logits = self.lm_head(self.ln_f(x))
        return logits, F.cross_entropy(logits.view(-1, vocab), targets.view(-1))


def get_batch(split):
    data = np.memmap(data_path, dtype=np.uint16, mode="r")
    cut = int(0.9 * len(data))
    data = data[:cut] if split == "train" else data[cut:]
    ix = torch.randint(len(data) - block_size, (batch_size,))
    x = torch.stack([torch.from_numpy(data[i : i + block_size].astype(np.int64)) for i in ix])
    y = torch.stack([torch.from_numpy(data[i + 1 : i + 1 + block_size].astype(np.int64)) for i in ix])
    return x, y


def get_lr(it):
    if it < warmup_iters:
        return learning_rate * (it + 1) / (warmup_iters + 1)
    ratio = (it - warmup_iters) / (max_iters - warmup_iters)
    return min_lr + 0.5 * (1.0 + math.cos(math.pi * ratio)) * (learning_rate - min_lr)


@torch.no_grad()
def estimate_loss():
    out = {}
    model.eval()
    for split in ["train", "val"]:
        losses = torch.zeros(eval_iters)
        for k in range(eval_iters):
            _, loss = model(*get_batch(split))
            losses[k] = loss.item()
        out[split] = losses.mean().item()
    model.train()
    return out


run = orchestrator.init()
model = GPT()
decay = [p for p in model.parameters() if p.dim() >= 2]
no_decay = [p for p in model.parameters() if p.dim() < 2]
model = run.prepare(torch.compile(model, backend="eager"))
groups = [{"params": decay, "weight_decay": 0.1}, {"params": no_decay, "weight_decay": 0.0}]
optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95))
run.track(model=model, optimizer=optimizer)

loop = run.steps(max_iters, accumulate=gradient_accumulation_steps) if how == "api" else run.steps(max_iters)
for iter_num in loop:
    lr = get_lr(iter_num)
    for param_group in optimizer.param_groups:
        param_group["lr"] = lr
    if iter_num % eval_interval == 0 and run.is_main:
        losses = estimate_loss()
        strike("evaluated", run.rank, run.step)
        if losses["val"] < run.state.get("best_val_loss", 1e9):
            run.state["best_val_loss"] = losses["val"]
            run.save("best")
    for micro_step in range(gradient_accumulation_steps):
        if how == "loop":
            model.require_backward_grad_sync = micro_step == gradient_accumulation_steps - 1
        X, Y = get_batch("train")
        _, loss = model(X, Y)
        loss = loss / gradient_accumulation_steps
        strike(f"micro-{micro_step}", run.rank, run.step)
        loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    strike("stepped", run.rank, run.step)
    run.log(loss=loss.item() * gradient_accumulation_steps)
if run.is_main:
    print(f"best {run.state['best_val_loss']:.4f}")
