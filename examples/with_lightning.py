"""Lightning with CautiousDecay: in `configure_optimizers`, or named in a config file. Seconds on a CPU, no download.

    python examples/with_lightning.py
    python examples/with_lightning.py fit --config examples/with_lightning.yaml

Needs: pip install cwd-wrap lightning 'jsonargparse[signatures]'
"""

import sys

import lightning as L
import torch
from lightning.pytorch.cli import LightningCLI
from torch import Tensor, nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from cwd_wrap import CautiousDecay


class CautiousAdamW(CautiousDecay.over(AdamW)):
    """A class with AdamW's constructor and a name, for configs."""


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
    L.Trainer(max_epochs=10, log_every_n_steps=1, **options).fit(Sums())


if __name__ == "__main__":
    main()
