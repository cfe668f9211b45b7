"""A Lightning script with its own checkpoints; nothing in it is ours."""

import time

import lightning as L
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset


class Regression(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(8, 1)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return F.mse_loss(self.layer(x), y)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), lr=1e-2)


class Tell(Callback):
    def on_train_epoch_start(self, trainer, module):
        kind = type(trainer.strategy.cluster_environment).__name__
        print(f"epoch {trainer.current_epoch} rank {trainer.global_rank}/{trainer.world_size} {kind}", flush=True)

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        time.sleep(0.02)


if __name__ == "__main__":
    L.seed_everything(1)
    x = torch.randn(128, 8)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8, shuffle=True)
    trainer = L.Trainer(
        accelerator="cpu", devices=2, strategy="ddp", max_epochs=10, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[ModelCheckpoint(dirpath="lit", save_last=True), Tell()],
    )  # fmt: skip
    trainer.fit(Regression(), loader, ckpt_path="last")
    print(f"rank {trainer.global_rank} ends at step {trainer.global_step}", flush=True)
