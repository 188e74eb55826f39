"""Training in bfloat16 without master weights: what does the rounding of the step do to the loss?

The demo's language model, with all weights, gradients and all of AdamW's state in bfloat16, beside float32. Every arm
is CautiousDecay(AdamW(fused=True)), with the same seeds, initial weights, batches and schedule; they differ in this:

    float32                  the reference
    bfloat16, nearest        each step is rounded to nearest, as torch rounds it
    bfloat16, stochastic     rounding="stochastic": each step is rounded up or down at random

The loss is computed in float32 at the rounded weights, because many CPUs are slow in bfloat16.

    python examples/bfloat16.py                              # about six minutes, two cores
    python examples/bfloat16.py --steps 4 --seeds 1          # a smoke test

It prints the validation loss of each arm and seed and writes it to --out.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy
from itertools import product
from multiprocessing import get_context
from pathlib import Path

import torch
from language_model import GPT, Settings, load_text, make_optimizer, schedule, validate, windows
from tqdm import tqdm

from cwd_wrap import CautiousDecay

ARMS = {
    "float32": (torch.float32, "nearest"),
    "bfloat16, nearest": (torch.bfloat16, "nearest"),
    "bfloat16, stochastic": (torch.bfloat16, "stochastic"),
}
LAM = 0.1
SETTINGS = {"optimizer": "AdamW", "lr": 4e-3, "width": 64, "layers": 2, "context": 64, "batch": 16, "threads": 1}


def train(arm: str, seed: int, steps: int) -> float:
    """Validation loss after training."""
    torch.set_num_threads(1)
    settings = Settings(steps=steps, **SETTINGS)
    dtype, rounding = ARMS[arm]
    text = load_text()
    torch.manual_seed(seed)
    wide = GPT(settings.width, settings.layers, settings.context)
    model = deepcopy(wide).to(dtype)
    batches = torch.Generator().manual_seed(seed)
    groups = make_optimizer(model, settings, LAM, cautious=False).param_groups
    base = torch.optim.AdamW(
        [{k: g[k] for k in ("params", "weight_decay")} for g in groups], lr=settings.lr, fused=True
    )
    optimizer = CautiousDecay(base, rounding=rounding, path="one_pass")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: schedule(step, steps))
    for _ in range(steps):
        starts = torch.randint(len(text.train) - settings.context, (settings.batch,), generator=batches)
        wide.load_state_dict(model.state_dict())
        wide.zero_grad()
        wide.loss(*windows(text.train, starts, settings.context)).backward()
        for weight, of_loss in zip(model.parameters(), wide.parameters(), strict=True):
            weight.grad = of_loss.grad.to(dtype)
        optimizer.step()
        scheduler.step()
    return validate(model.float(), text.validation, settings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--out", type=Path, default=Path("demo"))
    options = parser.parse_args()
    runs = list(product(range(options.seeds), ARMS))
    losses: dict[str, list[float]] = {arm: [] for arm in ARMS}
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        futures = [pool.submit(train, arm, seed, options.steps) for seed, arm in runs]
        for (_, arm), future in zip(runs, tqdm(futures, unit="run"), strict=True):
            losses[arm].append(future.result())
    options.out.mkdir(parents=True, exist_ok=True)
    with (options.out / "bfloat16.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", *(f"seed {seed}" for seed in range(options.seeds))])
        writer.writerows([arm, *values] for arm, values in losses.items())
    print(f"\n{'validation loss':24}{'mean':>9}{'spread':>9}  by seed")
    for arm, values in losses.items():
        by_seed = " ".join(f"{value:.4f}" for value in values)
        print(f"{arm:24}{statistics.fmean(values):9.4f}{max(values) - min(values):9.4f}  {by_seed}")


if __name__ == "__main__":
    main()
