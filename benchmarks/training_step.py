"""How long is a training step, and how long its `opt.step()` alone, beside the same with the plain optimizer?

python benchmarks/training_step.py
python benchmarks/training_step.py --rounds 3    a quick look

Plain and wrapped steps take turns on one model with one optimizer: two copies of a model differ in speed by where their
memory lies. Forward and backward leave torch's threads spinning for a while: a step in training meets them.
"""

import sys
import time
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from common import WARM_UP, Table, arguments, duration, moved, ratio
from torch import Tensor, nn

from cwd_wrap import CautiousDecay

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from language_model import GPT, decayed_weights, load_text, windows

WIDTH, LAYERS, CONTEXT, BATCH = 64, 2, 64, 16  # those of `make demo`
Model = tuple[nn.Module, list[nn.Parameter], Callable[[], Tensor]]
CASES = [({}, None), ({"fused": True}, None), ({"fused": True}, "direction"), ({"fused": True}, "snapshot")]


def demo() -> Model:
    """The demo's model, what of it decays, and a function that gives the loss on another batch at each call."""
    model, text = GPT(WIDTH, LAYERS, CONTEXT), load_text().train
    return (
        model,
        decayed_weights(model),
        lambda: model.loss(*windows(text, torch.randint(len(text) - CONTEXT, (BATCH,)), CONTEXT)),
    )


def mlp() -> Model:
    """Six square layers, 6.3 M weights."""
    model = nn.Sequential(*(layer for _ in range(6) for layer in (nn.Linear(1024, 1024), nn.GELU())))
    inputs, targets = torch.randn(2, 64, 1024)
    return model, [p for p in model.parameters() if p.dim() > 1], lambda: (model(inputs) - targets).square().mean()


MODELS = {"the demo's model": (demo, 200), "MLP, 6.3 M weights": (mlp, 60)}


def measured(model: Model, options: dict[str, bool], path: str | None, rounds: int) -> list[str]:
    """The cells of the whole step and of `opt.step()` alone."""
    net, decayed, loss_of_a_batch = model
    chosen = {id(p) for p in decayed}
    rest = [p for p in net.parameters() if id(p) not in chosen]
    groups = [{"params": decayed}, {"params": rest, "weight_decay": 0.0}]
    base = torch.optim.AdamW(groups, lr=1e-4, weight_decay=0.1, **options)
    optimizers = [base, CautiousDecay(base, path=path)]
    whole, alone = ([[], []], [[], []])

    def step(which: int) -> None:
        opt = optimizers[which]
        began = time.perf_counter()
        opt.zero_grad()
        loss_of_a_batch().backward()
        before = time.perf_counter()
        opt.step()
        ended = time.perf_counter()
        whole[which].append(ended - began)
        alone[which].append(ended - before)

    turns = cycle([0, 1, 1, 0])
    for _ in range(2 * (rounds + WARM_UP)):
        step(next(turns))
    for which in (0, 1):
        moved(base, lambda which=which: step(which))
    cells = []
    for times in (whole, alone):
        plain, wrapped = (each[WARM_UP : WARM_UP + rounds] for each in times)
        cells += [duration(plain), ratio(wrapped, plain)]
    return cells


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    options = parser.parse_args()
    for threads in options.threads:
        torch.set_num_threads(threads)
        table = Table(f"training-{threads}", "", "a step, plain", "wrapped", "`opt.step()`, plain", "wrapped")
        for name, (make, usual) in MODELS.items():
            for settings, path in CASES:
                torch.manual_seed(0)
                row = f"{name}, AdamW({'fused=True' if settings else ''}){f', {path}' if path else ''}"
                table.row(row, *measured(make(), settings, path, options.rounds or usual))
        if options.write:
            table.write()


if __name__ == "__main__":
    main()
