"""A step inside torch.compile does what it does outside."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import BASES, both_paths, weight
from torch.optim import SGD

from cwd_wrap import CautiousDecay

FACTORS = (1.0, 1.0, 0.5, 2.0)  # on the learning rate, step by step
GRADIENTS = ([1.0, 1.0, -1.0, 0.0], [1.0, -3.0, 0.5, 0.0], [-1.0, -1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0])


def compiled(opt: CautiousDecay, compiler: str) -> Callable[[], object]:
    torch._dynamo.reset()
    return torch.compile(lambda: opt.step(), backend=compiler)


def run(build: Any, path: str, compiler: str | None) -> tuple[list[float], float]:
    """Four weights after four steps under a schedule, and the strength that the group has then."""
    p = weight(1, -1, 2, 3)
    opt = CautiousDecay(build([p]), path=path)
    step = opt.step if compiler is None else compiled(opt, compiler)
    lr = opt.param_groups[0]["lr"]
    for factor, grad in zip(FACTORS, GRADIENTS, strict=True):
        opt.param_groups[0]["lr"] = lr * factor
        p.grad = torch.tensor(grad)
        step()
    return p.tolist(), opt.param_groups[0]["weight_decay"]


@both_paths
def test_each_compiled_step_decays(path: str) -> None:
    """With a zero gradient, three compiled steps take 0.95, 0.95^2, 0.95^3, and weight_decay is 0.5 after each."""
    p = weight(1.0, grad=[0.0])
    opt = CautiousDecay(SGD([p], lr=0.1, weight_decay=0.5), path=path)
    step, seen = compiled(opt, "eager"), []
    for _ in range(3):
        step()
        seen.append((p.item(), opt.param_groups[0]["weight_decay"]))

    assert [(pytest.approx(0.95**n), 0.5) for n in (1, 2, 3)] == seen


@both_paths
@pytest.mark.parametrize(
    ("name", "compiler"), [("SGD-momentum", "aot_eager"), ("AdamW", "eager")], ids=["SGD-aot_eager", "AdamW-eager"]
)
def test_compiled_steps_equal_eager_ones(name: str, compiler: str, path: str) -> None:
    """Four compiled steps under a schedule give the weights, and leave the strength, of four eager ones."""
    weights, strength = run(BASES[name], path, None)

    # Compiled, Adam's bias corrections may be computed in another order.
    assert (pytest.approx(weights, rel=1e-5), strength) == run(BASES[name], path, compiler)


def test_the_comparison_can_fail() -> None:
    """Weights that do not decay end elsewhere: the tests above compare something."""
    weights, _ = run(BASES["AdamW"], path="direction", compiler=None)
    others, _ = run(lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=1e-9), path="direction", compiler=None)

    assert pytest.approx(weights, rel=1e-3) != others
