"""How long is a step with CautiousDecay, as a ratio to the plain optimizer in the same run?

python benchmarks/step_time.py            all tables, about five minutes
python benchmarks/step_time.py --quick    shapes a quarter as wide
python benchmarks/step_time.py --only small

Each round steps every candidate once; the ratio is to the plain optimizer's step in the same round. If a candidate does
not move its weights, the run ends with an error.
"""

import argparse
import gc
import importlib.util
from collections.abc import Callable

import torch
from common import gpt2_small, interleaved_steps, many_small, print_ratios, where
from torch.optim import SGD, Adam, AdamW, Optimizer

from cwd_wrap import CautiousDecay, rules

Parameters = Callable[[], list[torch.nn.Parameter]]
Build = Callable[[list[torch.nn.Parameter]], Optimizer]
BACKENDS = ("numba", "eager") if importlib.util.find_spec("numba") else ("eager",)


class ByHand(AdamW):
    """The usual code by hand: clone all weights, step, then apply the rule to whole tensors."""

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        before = [p.clone() for p in parameters]
        lam, self.param_groups[0]["weight_decay"] = self.param_groups[0]["weight_decay"], 0.0
        super().step(closure)
        self.param_groups[0]["weight_decay"] = lam
        for p, x in zip(parameters, before, strict=True):
            mask = rules.moved_towards_zero(x, p, strict=False)
            p.copy_(rules.decay(p, x, mask, self.param_groups[0]["lr"] * lam))


def compare(title: str, make: Parameters, build: Build, rounds: int, paths: dict[str, tuple[str, ...]]) -> None:
    """Time the plain optimizer and each path with each of its backends."""
    print(f"\n{title}", flush=True)
    plain = build(make())
    candidates: dict[str, Optimizer] = {"plain": plain}
    for path, backends in paths.items():
        for backend in backends:
            if backend in BACKENDS:
                candidates[f"{path}, {backend}"] = CautiousDecay(build(make()), path=path, backend=backend)
    if "by hand" in title:
        candidates["clone and mask by hand"] = ByHand(make(), lr=1e-4, weight_decay=0.1, fused=True)
    print_ratios(interleaved_steps(candidates, rounds), "plain")
    gc.collect()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--only", choices=["adamw", "others", "small"])
    arguments = parser.parse_args()
    rounds = arguments.rounds
    settings = {"lr": 1e-4, "weight_decay": 0.1}
    every = {"one_pass": ("numba",), "direction": BACKENDS, "snapshot": BACKENDS}

    def big() -> list[torch.nn.Parameter]:
        return gpt2_small(4 if arguments.quick else 1)

    print(where())
    if arguments.only in (None, "adamw"):
        title = "GPT-2 small, float32, AdamW(fused=True)"
        compare(title, big, lambda p: AdamW(p, **settings, fused=True), rounds, every)
        compare(f"{title}, and by hand", big, lambda p: AdamW(p, **settings, fused=True), max(rounds // 3, 3), {})
        foreach = {"direction": BACKENDS, "snapshot": BACKENDS, "pieces": BACKENDS}
        compare(f"{title[:-12]}(foreach=True)", big, lambda p: AdamW(p, **settings, foreach=True), rounds, foreach)
    if arguments.only in (None, "others"):
        one = {"one_pass": ("numba",)}
        compare("GPT-2 small, Adam(fused=True)", big, lambda p: Adam(p, **settings, fused=True), rounds, one)
        for name, flags in {"momentum=0.9": {"momentum": 0.9}, "no momentum": {}}.items():
            title = f"GPT-2 small, SGD(fused=True), {name}"
            compare(title, big, lambda p, flags=flags: SGD(p, **settings, fused=True, **flags), rounds, one)
        if importlib.util.find_spec("timm"):
            from timm.optim import Lion

            compare(
                "GPT-2 small, timm's Lion(foreach=True)", big, lambda p: Lion(p, **settings, foreach=True), rounds, one
            )
    if arguments.only in (None, "small"):
        for form in ("fused", "foreach"):
            title = f"1,000 tensors of 64, AdamW({form}=True)"
            paths = every if form == "fused" else {"direction": BACKENDS, "snapshot": BACKENDS}
            compare(title, many_small, lambda p, form=form: AdamW(p, **settings, **{form: True}), 10 * rounds, paths)


if __name__ == "__main__":
    main()
