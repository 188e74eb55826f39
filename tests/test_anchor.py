"""The recipe of docs/anchor.md, run from the page: it follows the formula on every path, resumes and folds back."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PathOptions, train
from test_docs import snippets
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from cwd_wrap import CautiousDecay

ROOT = Path(__file__).parents[1]
F64 = torch.float64
LR, LAM, STEPS = 0.125, 0.5, 20
SOURCE = snippets(ROOT / "docs" / "anchor.md")[0].partition("\n\n\n# Load the pre-trained weights")[0]
RECIPE: dict[str, Any] = {}
exec(SOURCE, RECIPE)
decay_towards_start, fold = RECIPE["decay_towards_start"], RECIPE["fold"]


def net() -> nn.Sequential:
    """A small net. Its biases are not 0."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def wrapped(model: nn.Module, path: PathOptions) -> CautiousDecay:
    """CautiousDecay(AdamW) that decays tensors of two or more dimensions."""
    weights, others = [], []
    for p in model.parameters():
        (weights if p.ndim > 1 else others).append(p)
    groups = [{"params": weights}, {"params": others, "weight_decay": 0.0}]
    return CautiousDecay(AdamW(groups, lr=0.05, weight_decay=LAM, **path.base), **path)


# ------------------------------------------------------------------------------------ the formula


def momentum() -> Callable[[Tensor], Tensor]:
    """u of SGD with momentum 0.9: m <- 0.9*m + g."""
    m = torch.zeros(())

    def u(g: Tensor) -> Tensor:
        nonlocal m
        m = 0.9 * m + g
        return m

    return u


def adam() -> Callable[[Tensor], Tensor]:
    """u of Adam, arXiv 1412.6980, Algorithm 1."""
    m, v, t = torch.zeros(()), torch.zeros(()), 0

    def u(g: Tensor) -> Tensor:
        nonlocal m, v, t
        t += 1
        m = 0.9 * m + 0.1 * g
        v = 0.999 * v + 0.001 * g * g
        return m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)

    return u


OPTIMIZERS = {
    "SGD with momentum": (lambda p, path: SGD(p, lr=LR, momentum=0.9, weight_decay=LAM, **path.base), momentum),
    "AdamW": (lambda p, path: AdamW(p, lr=LR, weight_decay=LAM, **path.base), adam),
}


def gradients() -> Iterator[Tensor]:
    """Gradients of both signs. The first weight's is always 0; the last weight's is NaN after the tenth step."""
    draws = torch.Generator().manual_seed(0)
    for step in range(STEPS):
        g = torch.randn(3, 4, dtype=F64, generator=draws)
        g[0, 0] = 0
        if step >= 10:
            g[2, 3] = torch.nan
        yield g


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_formula(name: str, every_path: PathOptions) -> None:
    """x <- x - eta*(u + lam*1[u*(x-a) >= 0]*(x-a)), by hand in float64, at each of 20 steps."""
    build, make_u = OPTIMIZERS[name]
    model = nn.Linear(4, 3, bias=False, dtype=F64)
    a = model.weight.detach().clone()
    decay_towards_start(model)
    opt = CautiousDecay(build(model.parameters(), every_path), **every_path)
    x, u_of = a, make_u()
    for g in gradients():
        opt.zero_grad()
        (model.weight * g).sum().backward()
        opt.step()
        u = u_of(g)
        mask = torch.sign(u) * torch.sign(x - a) >= 0
        x = torch.where(mask, x - LR * (u + LAM * (x - a)), x - LR * u)

        torch.testing.assert_close(x, model.weight.detach(), rtol=1e-12, atol=1e-12, equal_nan=True)
    assert a[0, 0] == model.weight[0, 0]
    assert torch.isnan(x).nonzero().tolist() == [[2, 3]]


def test_by_hand(every_path: PathOptions) -> None:
    """With start 2, lr 1/8, lam 1/2, gradient 1: 2.5 moves to the start and decays by 0.5/16; 1.5 and 2 only step."""
    model = nn.Linear(3, 1, bias=False, dtype=F64)
    nn.init.constant_(model.weight, 2)
    decay_towards_start(model)
    (difference,) = model.parameters()
    difference.data = torch.tensor([[0.5, -0.5, 0.0]], dtype=F64)
    opt = CautiousDecay(SGD([difference], lr=LR, weight_decay=LAM, **every_path.base), **every_path)
    model.weight.sum().backward()
    opt.step()

    assert [[2.5 - 1 / 8 - 0.5 / 16, 1.5 - 1 / 8, 2 - 1 / 8]] == model.weight.tolist()


def test_with_gradient_0_the_weight_decays_to_its_start(every_path: PathOptions) -> None:
    """With gradient 0, a weight away from its start decays to the start and not to 0."""
    model = nn.Linear(1, 1, bias=False, dtype=F64)
    nn.init.constant_(model.weight, 2)
    decay_towards_start(model)
    (difference,) = model.parameters()
    difference.data.fill_(1)
    difference.grad = torch.zeros_like(difference)
    opt = CautiousDecay(SGD([difference], lr=LR, weight_decay=LAM, **every_path.base), **every_path)
    for _ in range(200):
        opt.step()

    assert pytest.approx(2 + (15 / 16) ** 200, rel=1e-12) == model.weight.item()


# ------------------------------------------------------------------------------------ the model


def test_nothing_changes_at_first() -> None:
    """The recipe changes no output of the model and no bias, bit for bit, and all differences start at 0."""
    plain, model = net(), net()
    decay_towards_start(model)
    x = torch.randn(5, 3)

    assert torch.equal(plain(x), model(x))
    assert {
        "0.parametrizations.weight.original": 0.0,
        "2.parametrizations.weight.original": 0.0,
        "0.bias": plain[0].bias.abs().sum().item(),
        "2.bias": plain[2].bias.abs().sum().item(),
    } == {name: p.abs().sum().item() for name, p in model.named_parameters()}


def test_fold_gives_plain_weights_back(every_path: PathOptions) -> None:
    """After training, the folded model gives the same outputs, and its state dict loads into a plain model."""
    model, plain = net(), net()
    decay_towards_start(model)
    train(model, wrapped(model, every_path), range(3))
    x = torch.randn(5, 3)
    before = model(x)
    fold(model)
    plain.load_state_dict(model.state_dict())

    assert torch.equal(before, model(x))
    assert torch.equal(before, plain(x))


class Tied(nn.Module):
    """An embedding and a head that share their weight."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(4, 3)
        self.head = nn.Linear(3, 4, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.embedding(ids))


def test_tied_weights_stay_tied() -> None:
    """Two modules with one weight have one difference and one start, and one weight again after folding."""
    plain, model, ids = Tied(), Tied(), torch.arange(4)
    decay_towards_start(model)
    (difference,) = model.parameters()

    assert torch.equal(plain(ids), model(ids))
    difference.data.fill_(0.5)
    fold(model)

    assert torch.equal(plain.head.weight + 0.5, model.head.weight)
    assert model.head.weight is model.embedding.weight


# ------------------------------------------------------------------------------------ resuming


def test_resumes_bit_for_bit(every_path: PathOptions) -> None:
    """Six steps give the same bits as three steps, state dicts loaded into a model of another start, and three more."""
    whole = net()
    decay_towards_start(whole)
    train(whole, wrapped(whole, every_path), range(6))

    first = net()
    decay_towards_start(first)
    train(first, opt := wrapped(first, every_path), range(3))
    saved = copy.deepcopy((first.state_dict(), opt.state_dict()))
    second = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))
    decay_towards_start(second)
    second.load_state_dict(saved[0])
    (resumed := wrapped(second, every_path)).load_state_dict(saved[1])
    train(second, resumed, range(3, 6))

    for name, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_a_second_start_is_refused() -> None:
    """A second call raises an error, because `fold` would otherwise leave weights of 0."""
    model = nn.Sequential(nn.Linear(2, 2))
    RECIPE["decay_towards_start"](model)
    with pytest.raises(ValueError, match="has a start or another parametrization already: fold it first"):
        RECIPE["decay_towards_start"](model)


# ------------------------------------------------------------------------------------ the example


def test_the_example_has_the_recipe_of_the_page() -> None:
    """Both show the same code."""
    example = (ROOT / "examples" / "anchor.py").read_text()
    code = SOURCE[SOURCE.index("class Anchored") :].strip()

    assert code in example
