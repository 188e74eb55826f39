"""What does a MaskMonitor cost a step? The demo's language model, in training.

python benchmarks/monitor_cost.py

Each step of one training run has a monitor or none, chosen at random. Times are of the optimizer's step alone, on the
one thread that makes it, so that a busy machine adds little.
"""

import argparse
import importlib.util
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from common import where
from torch.optim import AdamW

from cwd_wrap import CautiousDecay, MaskMonitor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from language_model import GPT, decayed_weights, load_text, windows

WIDTH, LAYERS, CONTEXT, BATCH, WARM_UP = 64, 2, 64, 16, 30
BACKENDS = ("numba", "eager") if importlib.util.find_spec("numba") else ("eager",)
PATHS = {"one_pass": BACKENDS[:1], "direction": BACKENDS, "snapshot": BACKENDS, "pieces": BACKENDS[:1]}


def seconds(path: str, backend: str, steps: int) -> dict[str, list[float]]:
    """The seconds of each step, with each kind of monitor and with none."""
    torch.manual_seed(0)
    model, text = GPT(WIDTH, LAYERS, CONTEXT), load_text().train
    decayed = decayed_weights(model)
    chosen = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in chosen]
    groups = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    base = AdamW(groups, lr=1e-3, weight_decay=0.1, fused=path == "one_pass")
    opt = CautiousDecay(base, path=path, backend=backend)
    monitors = {"none": None, "MaskMonitor": MaskMonitor(), "per_parameter": MaskMonitor(per_parameter=True)}
    found: dict[str, list[float]] = {name: [] for name in monitors}
    for step in range(steps + WARM_UP):
        starts = torch.randint(len(text) - CONTEXT, (BATCH,))
        opt.zero_grad()
        model.loss(*windows(text, starts, CONTEXT)).backward()
        name = random.choice(list(monitors))
        opt.observer = monitors[name]
        start = time.thread_time()
        opt.step()
        if step >= WARM_UP:
            found[name].append(time.thread_time() - start)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    print(where())
    print(f"{'':32}{'ms':>8}{'ratio':>8}   (medians)")
    for path, backends in PATHS.items():
        for backend in backends:
            found = {name: statistics.median(each) for name, each in seconds(path, backend, steps).items()}
            for name, median in found.items():
                label = f"{path}, {backend}, {name}"
                print(f"{label:32}{median * 1e3:8.2f}{median / found['none']:8.2f}", flush=True)


if __name__ == "__main__":
    main()
