"""How long is a whole training step, forward and backward included, with CautiousDecay? The demo's language model.

python benchmarks/training_step.py

It prints ratios to the same step with the plain optimizer, in interleaved rounds. All models train on the same batches.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import torch
from common import interleaved, print_ratios, where

from cwd_wrap import CautiousDecay

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from language_model import GPT, decayed_weights, load_text, windows

WIDTH, LAYERS, CONTEXT, BATCH, ROUNDS = 64, 2, 64, 16, 200


def training(fused: bool, path: str | None) -> Callable[[], None]:
    """A function that makes one training step: with AdamW where ``path`` is None, else with CautiousDecay(AdamW)."""
    torch.manual_seed(0)
    model, text = GPT(WIDTH, LAYERS, CONTEXT), load_text().train
    decayed = decayed_weights(model)
    chosen = {id(p) for p in decayed}
    groups = [
        {"params": decayed},
        {"params": [p for p in model.parameters() if id(p) not in chosen], "weight_decay": 0},
    ]
    opt = torch.optim.AdamW(groups, lr=1e-3, weight_decay=0.1, fused=fused)
    if path is not None:
        opt = CautiousDecay(opt, path=path)
    generator = torch.Generator().manual_seed(0)

    def step() -> None:
        starts = torch.randint(len(text) - CONTEXT, (BATCH,), generator=generator)
        loss = model.loss(*windows(text, starts, CONTEXT))
        opt.zero_grad()
        loss.backward()
        opt.step()

    return step


def main() -> None:
    torch.set_num_threads(1)
    print(where())
    for fused, paths in ((True, ("one_pass", "direction", "snapshot")), (False, ("direction", "snapshot"))):
        print(f"\nAdamW(fused={fused}), the demo's model")
        steps = {"plain": training(fused, None), **{path: training(fused, path) for path in paths}}
        print_ratios(interleaved(steps, ROUNDS), "plain")


if __name__ == "__main__":
    main()
