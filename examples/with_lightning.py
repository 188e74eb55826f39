"""Lightning with CautiousDecay, in `configure_optimizers` or in a config file: seconds on a CPU, no download.

    python examples/with_lightning.py
    torchrun --standalone --nproc-per-node 2 examples/with_lightning.py    # DDP
    python examples/with_lightning.py fit --config examples/with_lightning.yaml

Needs: pip install cwd-wrap lightning 'jsonargparse[signatures]'
"""

import os
import sys

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from cwd_wrap import CautiousDecay


class Sums(L.LightningModule):
    """Learns the sum of three numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        x, y = batch
        loss = nn.functional.mse_loss(self.net(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, object]:
        optimizer = CautiousDecay(AdamW(self.parameters(), lr=1e-2, weight_decay=0.1))
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10)}

    def train_dataloader(self) -> DataLoader:
        x = torch.randn(64, 3, generator=torch.Generator().manual_seed(0))
        return DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=16)


def main() -> None:
    if len(sys.argv) > 1:
        LightningCLI(Sums, save_config_callback=None)
        return
    L.seed_everything(0)
    options = {"logger": False, "enable_checkpointing": False, "accelerator": "cpu"}
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        options |= {"strategy": "ddp", "devices": ranks}
    trainer = L.Trainer(max_epochs=10, log_every_n_steps=1, **options)
    trainer.fit(Sums())
    assert type(trainer.optimizers[0]) is CautiousDecay
    rank_zero_info(f"type(optimizer): {type(trainer.optimizers[0])}, loss {trainer.callback_metrics['loss']:.4f}")
    trainer.strategy.barrier()
    if ranks > 1:
        os._exit(0)  # on the CPU gloo's threads can abort an orderly exit, also without this library


if __name__ == "__main__":
    main()
