"""torchtitan 0.3 with CautiousDecay, on two CPU ranks: its container of optimizers, with a cautious name for each.

    torchrun --standalone --nproc-per-node 2 examples/with_torchtitan.py

In your own config write ``CautiousOptimizers.Config(param_groups=[ParamGroupConfig(pattern=".*",
optimizer_name="CautiousAdamW", optimizer_kwargs={...})])`` instead of ``OptimizersContainer.Config``.

Needs: pip install cwd-wrap torchtitan==0.3.0
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torchtitan.components.optimizer import OptimizersContainer, ParamGroupConfig

from cwd_wrap import CautiousDecay


class CautiousOptimizers(OptimizersContainer):
    """Has "Cautious" + name for every name in torchtitan, including DistMuon."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """The same fields as torchtitan's own."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., Optimizer]:
        factory = OptimizersContainer._resolve_optimizer_factory(name.removeprefix("Cautious"))
        return CautiousDecay.over(factory) if name.startswith("Cautious") else factory

    def _register_bf16_optimizer_state_hook(self) -> None:
        # torchtitan makes bfloat16 state for the classes Adam and AdamW, so pass it the inner optimizers.
        ours, self.optimizers = self.optimizers, [getattr(each, "base_optimizer", each) for each in self.optimizers]
        super()._register_bf16_optimizer_state_hook()
        self.optimizers = ours


def config(**options: Any) -> OptimizersContainer.Config:
    """AdamW with cautious decay for matrices, plain AdamW without decay for vectors."""
    common = {"lr": 1e-2, "betas": (0.9, 0.95)}
    cautious = ParamGroupConfig(
        pattern=r"weight$", optimizer_name="CautiousAdamW", optimizer_kwargs={**common, "weight_decay": 0.1}
    )
    plain = ParamGroupConfig(pattern=r".*", optimizer_name="AdamW", optimizer_kwargs={**common, "weight_decay": 0.0})
    return CautiousOptimizers.Config(param_groups=[cautious, plain], **options)


def main() -> None:
    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 1))
    fully_shard(model)
    optimizers = config().build(model_parts=[model])
    kinds = [type(each) for each in optimizers]
    assert type(optimizers) is CautiousOptimizers
    assert [issubclass(kind, CautiousDecay) for kind in kinds] == [True, False]
    if rank == 0:
        print(f"type(optimizer): {type(optimizers)} of {kinds}", flush=True)

    for step in range(20):
        x = torch.randn(16, 3, generator=torch.Generator().manual_seed(step * ranks + rank))
        loss = nn.functional.mse_loss(model(x), x.sum(1, keepdim=True))
        optimizers.zero_grad()
        loss.backward()
        optimizers.step()
        if rank == 0 and (step + 1) % 10 == 0:
            print(f"step {step + 1}: loss {loss.item():.4f}", flush=True)
    optimizers.load_state_dict(optimizers.state_dict())  # by parameter name, as in torchtitan's checkpoints
    dist.barrier()
    os._exit(0)  # on the CPU gloo's threads can abort an orderly exit, also without this library


if __name__ == "__main__":
    main()
