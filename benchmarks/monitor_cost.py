"""What does a MaskMonitor cost a step? The demo's language model, and larger tensors with --large.

python benchmarks/monitor_cost.py

Each round steps every candidate once, in turns; the ratio is to the wrapped step without a monitor in the same round.
"""

import argparse
import importlib.util
import sys
from pathlib import Path

import torch
from common import gpt2_small, interleaved_steps, print_ratios, where
from torch.optim import AdamW, Optimizer

from cwd_wrap import CautiousDecay, MaskMonitor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from language_model import GPT, decayed_weights

BACKENDS = ("numba", "eager") if importlib.util.find_spec("numba") else ("eager",)
PATHS = {"one_pass": BACKENDS[:1], "direction": BACKENDS, "snapshot": BACKENDS, "pieces": BACKENDS[:1]}


def demo() -> list[dict[str, object]]:
    """The param groups of the demo, with gradients: its matrices decay."""
    torch.manual_seed(0)
    model = GPT(width=64, layers=2, context=64)
    decayed = decayed_weights(model)
    chosen = {id(p) for p in decayed}
    others = [p for p in model.parameters() if id(p) not in chosen]
    for p in model.parameters():
        p.grad = torch.randn_like(p) * 1e-3
    return [{"params": decayed}, {"params": others, "weight_decay": 0.0}]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=200)
    parser.add_argument("--large", action="store_true", help="GPT-2 small's shapes, a quarter as wide")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    print(where())
    for path, backends in PATHS.items():
        for backend in backends:
            candidates: dict[str, Optimizer] = {}
            for monitor in ("none", "none again", "MaskMonitor", "per_parameter", "every=10", "plain AdamW"):
                parameters = gpt2_small(4) if arguments.large else demo()
                base = AdamW(parameters, lr=1e-3, weight_decay=0.1, fused=path == "one_pass")
                opt = base if monitor == "plain AdamW" else CautiousDecay(base, path=path, backend=backend)
                if monitor in ("MaskMonitor", "per_parameter", "every=10"):
                    every, per_parameter = 10 if monitor == "every=10" else 1, monitor == "per_parameter"
                    opt.observer = MaskMonitor(every=every, per_parameter=per_parameter)
                candidates[monitor] = opt
            print(f"\n{path}, {backend}")
            print_ratios(interleaved_steps(candidates, arguments.rounds), "none")


if __name__ == "__main__":
    main()
