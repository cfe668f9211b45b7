"""A small byte-level transformer that learns to write Python from the source text of Python's own standard library.

    python examples/bytes_lm.py                                 # plain Python, one process
    orchestrator launch --workers 2 examples/bytes_lm.py        # the same script on two workers; lose any of them
"""

import argparse
import math
import sysconfig
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import orchestrator


def read_source(limit_bytes):
    """The top-level modules of the standard library as one tensor of byte values (uint8)."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    text = b"\n".join(file.read_bytes() for file in files)[:limit_bytes]
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


class Windows(torch.utils.data.Dataset):
    """Consecutive windows of `width` bytes and, as targets, the same moved by one."""

    def __init__(self, data, width):
        self.data, self.width = data, width

    def __len__(self):
        return (len(self.data) - 1) // self.width

    def __getitem__(self, i):
        window = self.data[i * self.width : (i + 1) * self.width + 1].long()
        return window[:-1], window[1:]


class Block(nn.Module):
    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.norm_1, self.norm_2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))

    def forward(self, x):  # (batch, width, dim)
        parts = self.qkv(self.norm_1(x)).chunk(3, -1)
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(-2))
        return x + self.mlp(self.norm_2(x))


class ByteTransformer(nn.Module):
    def __init__(self, width, dim, layers, heads=4):
        super().__init__()
        self.bytes, self.places = nn.Embedding(256, dim), nn.Parameter(0.02 * torch.randn(width, dim))
        self.blocks = nn.Sequential(*(Block(dim, heads) for _ in range(layers)))
        self.norm, self.head = nn.LayerNorm(dim), nn.Linear(dim, 256)

    def forward(self, x):  # (batch, width) byte values -> (batch, width, 256) logits
        return self.head(self.norm(self.blocks(self.bytes(x) + self.places[: x.shape[1]])))


def bits_per_byte(run, model, dataset):
    """Mean cost of a byte over the whole dataset; each rank looks at its part."""
    model.eval()
    nats = windows = 0
    with torch.no_grad():
        for x, y in run.batches(dataset, batch_size=128, train=False):
            nats += F.cross_entropy(model(x).flatten(0, 1), y.flatten()).item() * len(x)
            windows += len(x)
    model.train()
    return run.mean(nats / max(windows, 1) / math.log(2), weight=windows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--batch-size", type=int, default=32, help="windows a step, over all workers")
    parser.add_argument("--width", type=int, default=64, help="bytes a window")
    parser.add_argument("--dim", type=int, default=64)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--lr", type=float, default=1e-2)
    args = parser.parse_args()

    data = read_source(limit_bytes=4_000_000)
    split = len(data) * 49 // 50
    training, validation = Windows(data[:split], args.width), Windows(data[split:], args.width)

    run = orchestrator.init()
    model = run.prepare(ByteTransformer(args.width, args.dim, args.layers))
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, args.lr, total_steps=args.steps)
    run.track(model=model, optimizer=optimizer, scheduler=scheduler)

    epochs = math.ceil(args.steps / (len(training) // args.batch_size))
    for x, y in run.batches(training, batch_size=args.batch_size, epochs=epochs, max_steps=args.steps):
        loss = F.cross_entropy(model(x).flatten(0, 1), y.flatten())
        optimizer.zero_grad(); loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(); scheduler.step()
        run.log(loss=loss)

    bits = bits_per_byte(run, model, validation)
    if run.is_main:
        print(f"held-out source text: {bits:.2f} bits per byte")


if __name__ == "__main__":
    main()
