"""How long is a step with CautiousDecay, as a ratio to the plain optimizer in the same run?

python benchmarks/step_time.py            GPT-2-small shapes and 1,000 small tensors, about two minutes
python benchmarks/step_time.py --quick    shapes a quarter as wide
"""

import argparse
import gc

import torch
from common import gpt2_small, interleaved, many_small, print_ratios, where

from cwd_wrap import CautiousDecay, rules


def naive(optimizer: torch.optim.Optimizer, lam: float) -> object:
    """What people write by hand: clone everything, step, then the three lines of the rule on whole tensors."""
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0

    @torch.no_grad()
    def step() -> None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        optimizer.step()
        for p, x in zip(parameters, before, strict=True):
            p.copy_(rules.decay(p, x, rules.moved_towards_zero(x, p), optimizer.param_groups[0]["lr"] * lam))

    return step


def compare(title: str, make: object, flags: dict[str, object], rounds: int, with_naive: bool) -> None:
    print(f"\n{title}")
    settings = {"lr": 1e-4, "weight_decay": 0.1, **flags}
    plain = torch.optim.AdamW(make(), **settings)
    candidates = {
        "plain AdamW": plain.step,
        "CautiousDecay(AdamW), direction": CautiousDecay(torch.optim.AdamW(make(), **settings)).step,
        "CautiousDecay(AdamW), snapshot": CautiousDecay(torch.optim.AdamW(make(), **settings), snapshot=True).step,
    }
    if with_naive:
        candidates["clone and mask by hand"] = naive(torch.optim.AdamW(make(), **settings), 0.1)
    print_ratios(interleaved(candidates, rounds), "plain AdamW")
    gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    arguments = parser.parse_args()
    scale = 4 if arguments.quick else 1
    print(where())
    compare("GPT-2 small, float32, fused=True", lambda: gpt2_small(scale), {"fused": True}, arguments.rounds, True)
    compare("GPT-2 small, float32, foreach=True", lambda: gpt2_small(scale), {"foreach": True}, arguments.rounds, False)
    compare("1,000 tensors of 64, foreach=True", many_small, {"foreach": True}, 10 * arguments.rounds, False)
    compare("1,000 tensors of 64, fused=True", many_small, {"fused": True}, 10 * arguments.rounds, False)


if __name__ == "__main__":
    main()
