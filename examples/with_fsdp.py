"""FSDP2 with CautiousDecay: the demo's language model on two CPU ranks, with a checkpoint to resume from.

    torchrun --standalone --nproc-per-node 2 examples/with_fsdp.py
    torchrun --standalone --nproc-per-node 2 examples/with_fsdp.py   # resumes from the newest checkpoint

The checkpoint is that of plain AdamW. Any number of ranks can resume from it, with the wrapper or without.

Needs: pip install cwd-wrap[cpu] tqdm
"""

import argparse
import os
from pathlib import Path

import torch
from language_model import GPT, decayed_weights, load_text, schedule, windows
from torch import distributed as dist
from torch import nn
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.optim import AdamW
from tqdm import trange

from cwd_wrap import CautiousDecay, MaskMonitor

LR, LAM = 1e-3, 0.1


def sharded(width: int, layers: int, context: int) -> nn.Module:
    """Make the same weights on each rank, and keep this rank's shard."""
    torch.manual_seed(0)
    model = GPT(width, layers, context)
    for block in model.blocks:
        fully_shard(block)
    return fully_shard(model)


def make_optimizer(model: nn.Module) -> CautiousDecay:
    """Shard first, then build, then wrap. Matrices decay; norms, biases and embeddings do not."""
    decayed = decayed_weights(model)
    chosen = set(map(id, decayed))
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed, "weight_decay": LAM}, {"params": others, "weight_decay": 0.0}]
    return CautiousDecay(AdamW(groups, lr=LR, fused=True))


def save(model: nn.Module, optimizer: CautiousDecay, folder: Path) -> None:
    weights, state = get_state_dict(model, optimizer)
    checkpoint.save({"model": weights, "optimizer": state}, checkpoint_id=folder)


def load_newest(model: nn.Module, optimizer: CautiousDecay, folder: Path) -> int:
    """Load the newest whole checkpoint, if there is one; return its step."""
    steps = [int(each.parent.name) for each in folder.glob("*/.metadata")]
    if not steps:
        return 0
    weights, state = get_state_dict(model, optimizer)  # load() fills these
    checkpoint.load({"model": weights, "optimizer": state}, checkpoint_id=folder / str(max(steps)))
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    return max(steps)


def main() -> None:
    parser = argparse.ArgumentParser(description="The demo's language model under FSDP2, on CPU ranks")
    for name, default in (("steps", 200), ("every", 50), ("width", 64), ("layers", 2), ("context", 64), ("batch", 8)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--folder", type=Path, default=Path("runs/fsdp"))
    settings = parser.parse_args()

    dist.init_process_group("gloo")
    rank, ranks = dist.get_rank(), dist.get_world_size()
    model = sharded(settings.width, settings.layers, settings.context)
    optimizer = make_optimizer(model)
    optimizer.observer = monitor = MaskMonitor()
    assert type(optimizer) is CautiousDecay
    if rank == 0:
        print(f"type(optimizer): {type(optimizer)}\n{optimizer}", flush=True)

    text = load_text().train
    first = load_newest(model, optimizer, settings.folder)
    for step in trange(first, settings.steps, disable=rank != 0, unit="step"):
        for group in optimizer.param_groups:
            group["lr"] = LR * schedule(step, settings.steps)
        batches = torch.Generator().manual_seed(step * ranks + rank)  # each rank and step has its own text
        starts = torch.randint(len(text) - settings.context, (settings.batch,), generator=batches)
        inputs, targets = windows(text, starts, settings.context)
        loss = nn.functional.cross_entropy(model(inputs).flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if (step + 1) % settings.every == 0 or step + 1 == settings.steps:
            mask = monitor.read(over_ranks=True)  # all ranks call it
            dist.all_reduce(loss := loss.detach() / ranks)
            if rank == 0:
                print(f"step {step + 1}: loss {loss:.6f}, mask {mask:.6f}", flush=True)
            save(model, optimizer, settings.folder / str(step + 1))
    dist.barrier()
    os._exit(0)  # on the CPU gloo's threads can abort an orderly exit, also without this library


if __name__ == "__main__":
    main()
