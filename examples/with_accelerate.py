"""accelerate with CautiousDecay: wrap first, then prepare. It takes seconds on a CPU and downloads nothing.

    python examples/with_accelerate.py
    torchrun --standalone --nproc-per-node 2 examples/with_accelerate.py   # FSDP2 on GPUs, DDP on the CPU

Needs: pip install cwd-wrap accelerate
"""

import os

import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from torch import nn
from torch.optim import AdamW
from torch.utils.data import DataLoader, TensorDataset

from cwd_wrap import CautiousDecay


def main() -> None:
    torch.manual_seed(0)
    sharded = int(os.environ.get("WORLD_SIZE", "1")) > 1
    plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False) if sharded else None
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2, fsdp_plugin=plugin)
    x = torch.randn(64, 3)
    loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=8)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = CautiousDecay(AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)
    assert type(optimizer.optimizer) is CautiousDecay
    how = str(accelerator.distributed_type)
    accelerator.print(f"type(optimizer): {type(optimizer)} around {type(optimizer.optimizer)}, {how}")
    for epoch in range(5):
        for inputs, targets in loader:
            with accelerator.accumulate(model):
                loss = nn.functional.mse_loss(model(inputs), targets)
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        accelerator.print(f"epoch {epoch}: loss {loss.item():.4f}, lr {optimizer.param_groups[0]['lr']:.2e}")
    accelerator.wait_for_everyone()
    if sharded:
        os._exit(0)  # on the CPU gloo's threads can abort an orderly exit, also without this library


if __name__ == "__main__":
    main()
