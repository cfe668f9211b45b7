"""A small convolutional network on scikit-learn's handwritten digits: epochs, validation, a best value, a schedule.

    python examples/digits.py                                   # plain Python, one process
    orchestrator launch --workers 2 examples/digits.py          # the same script on two workers; lose any of them
"""

import argparse

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn

import orchestrator


class Digits(torch.utils.data.Dataset):
    """8 x 8 grey images, scaled to [0, 1]; while training each is moved by up to one pixel in both directions."""

    def __init__(self, images, labels, augment):
        self.images, self.labels, self.augment = images, labels, augment

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        image = self.images[i]
        if self.augment:
            top, left = torch.randint(0, 3, (2,)).tolist()
            image = F.pad(image, (1, 1, 1, 1))[:, top : top + 8, left : left + 8]
        return image, self.labels[i]


def build_model():
    def block(channels_in, channels_out):
        convolution = nn.Conv2d(channels_in, channels_out, 3, padding=1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(channels_out), nn.ReLU())

    head = nn.Sequential(nn.Flatten(), nn.Dropout(0.3), nn.Linear(32 * 4 * 4, 10))
    return nn.Sequential(block(1, 16), block(16, 32), nn.MaxPool2d(2), block(32, 32), head)


def accuracy(run, model, dataset):
    """Share of right answers over the whole dataset; each rank looks at its part."""
    model.eval()
    right = seen = 0
    with torch.no_grad():
        for images, labels in run.batches(dataset, batch_size=256, train=False):
            right += (model(images).argmax(1) == labels).sum().item()
            seen += len(labels)
    model.train()
    return run.mean(right / max(seen, 1), weight=seen)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch-size", type=int, default=64, help="samples a step, over all workers")
    parser.add_argument("--lr", type=float, default=3e-3)
    args = parser.parse_args()

    images, labels = load_digits(return_X_y=True)
    images = torch.tensor(images, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
    labels = torch.tensor(labels)
    held_out = torch.arange(len(labels)) % 5 == 4
    training = Digits(images[~held_out], labels[~held_out], augment=True)
    validation = Digits(images[held_out], labels[held_out], augment=False)

    run = orchestrator.init()
    model = run.prepare(build_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    run.track(model=model, optimizer=optimizer, scheduler=scheduler)

    for _ in run.epochs(args.epochs):
        for x, y in run.batches(training, batch_size=args.batch_size):
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad(); loss.backward(); optimizer.step()
            run.log(loss=loss)
        scheduler.step()
        run.state["accuracy"] = accuracy(run, model, validation)
        run.state["best_accuracy"] = max(run.state["accuracy"], run.state.get("best_accuracy", 0.0))

    if run.is_main:
        print(f"held-out accuracy {run.state['accuracy']:.2%} (best {run.state['best_accuracy']:.2%})")


if __name__ == "__main__":
    main()
