"""DeepSpeed's ZeRO with CautiousDecay, on two CPU ranks. It takes seconds and downloads nothing.

    torchrun --standalone --nproc-per-node 2 examples/with_deepspeed.py --stage 2

DeepSpeed refuses optimizers that are not on its list, unless ``zero_allow_untested_optimizer`` is set. ZeRO steps flat
pieces of master weights, in which each weight decays as usual. CautiousUpdate needs ``scale=None`` there.

Needs: pip install cwd-wrap deepspeed
"""

import argparse
import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed
import torch
from torch import distributed as dist
from torch import nn
from torch.optim import AdamW

from cwd_wrap import CautiousDecay, MaskMonitor


def main() -> None:
    parser = argparse.ArgumentParser(description="DeepSpeed's ZeRO with CautiousDecay, on CPU ranks")
    parser.add_argument("--stage", type=int, default=2)
    settings = parser.parse_args()

    deepspeed.init_distributed("gloo", verbose=False)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
    optimizer = CautiousDecay(AdamW(model.parameters(), lr=1e-2, weight_decay=0.1))
    optimizer.observer = monitor = MaskMonitor()
    engine, _, _, _ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config={
            "train_batch_size": 16 * ranks,
            "zero_optimization": {"stage": settings.stage},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        },
    )
    inner = engine.optimizer
    while not isinstance(inner, CautiousDecay):  # DeepSpeed's optimizer is around ours
        inner = inner.optimizer
    assert inner is optimizer
    if rank == 0:
        print(f"type(optimizer): {type(engine.optimizer)} around {type(inner)}", flush=True)

    for step in range(20):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step * ranks + rank))
        loss = nn.functional.mse_loss(engine(x), x.sum(1, keepdim=True))
        engine.backward(loss)
        engine.step()
        if (step + 1) % 10 == 0:
            mask = monitor.read(over_ranks=True)  # over all calls since the last reading; ZeRO calls once per group
            if rank == 0:
                print(f"step {step + 1}: loss {loss.item():.4f}, mask {mask:.4f}", flush=True)
    dist.barrier()
    os._exit(0)  # on the CPU gloo's threads can abort an orderly exit, also without this library


if __name__ == "__main__":
    main()
