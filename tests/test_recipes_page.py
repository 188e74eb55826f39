"""The recipes of docs/recipes.md are short, and do what the page says. test_docs.py runs each of them alone."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support import same
from torch import Tensor, nn

from cwd_wrap import CautiousDecay

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text(encoding="utf-8")
PARTS = dict(re.findall(r"^## (.*?)\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE))
RECIPES = {
    f"{title}, {number}": source
    for title, part in PARTS.items()
    for number, source in enumerate(re.findall(r"^```python\n(.*?)^```", part, flags=re.DOTALL | re.MULTILINE))
}


def run(name: str) -> dict[str, Any]:
    """The names that a recipe leaves behind."""
    (source,) = (source for title, source in RECIPES.items() if title.startswith(name))
    for package in re.findall(r"^# needs (\w+)", source, flags=re.MULTILINE):
        pytest.importorskip(package)
    namespace: dict[str, Any] = {}
    exec(compile(source, name, "exec"), namespace)
    return namespace


def counts(opt: torch.optim.Optimizer) -> list[int]:
    """How many steps each parameter has taken."""
    return [int(opt.state[p]["step"]) for group in opt.param_groups for p in group["params"]]


def decayed(opt: torch.optim.Optimizer, lr: float) -> list[float]:
    """What a step without gradients, at this learning rate, takes off weights of 1 in each group: 1 - w."""
    for group in opt.param_groups:
        group["lr"] = lr
    params = [p for group in opt.param_groups for p in group["params"]]
    with torch.no_grad():
        for p in params:
            p.fill_(1)
            p.grad = torch.zeros_like(p)
    opt.step()
    return [1 - p.max().item() for p in params]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_short(name: str) -> None:
    """A recipe has 5 to 15 lines, empty ones not counted."""
    assert 5 <= len([line for line in RECIPES[name].splitlines() if line.strip()]) <= 15


def test_every_part_has_a_recipe() -> None:
    """Each of at least a dozen headings of the page has a recipe."""
    assert len(PARTS) >= 12
    assert {name.rpartition(",")[0] for name in RECIPES} == set(PARTS)


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="this torch has no Muon")
def test_muon_and_adamw_share_the_parameters() -> None:
    """Each parameter of the model is in one of the two optimizers, once; both are wrapped."""
    found = run("Muon for matrices, AdamW for the rest, 0")
    muon, adamw = found["muon"], found["adamw"]
    held = [p for opt in (muon, adamw) for group in opt.param_groups for p in group["params"]]

    assert {id(p) for p in held} == {id(p) for p in found["model"].parameters()}
    assert len(held) == 5
    assert isinstance(muon, CautiousDecay)
    assert isinstance(adamw, CautiousDecay)
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.1, 0]


def test_the_muon_of_pytorch_optimizer_takes_both_kinds() -> None:
    """The matrix is in the group that decays, the vector in the other."""
    opt = run("Muon for matrices, AdamW for the rest, 1")["opt"]

    assert [of_group.path == "plain" for of_group in opt.paths()] == [False, True]


def test_accumulation_decays_once_an_update() -> None:
    """Twelve batches, four to an update: three steps."""
    assert counts(run("Gradient accumulation")["opt"]) == [3, 3]


def test_the_average_follows_the_steps() -> None:
    """The average has seen three steps and differs from the last weights."""
    found = run("Averages of the weights")

    assert found["ema"].n_averaged.item() == 3
    assert not torch.equal(found["ema"].module.weight, found["model"].weight)


def test_layers_that_are_added_later_decay() -> None:
    """The body takes the last three of six steps, and its group has AdamW's weight_decay."""
    opt = run("Frozen layers")["opt"]

    assert counts(opt) == [6, 6, 3, 3]
    assert [group["weight_decay"] for group in opt.param_groups] == [0.1, 0.1]


def test_lora_trains_the_adapters_alone() -> None:
    """The layer has no gradient; both adapters have taken three steps."""
    found = run("LoRA")

    assert found["layer"].weight.grad is None
    assert counts(found["opt"]) == [3, 3]


def test_sam_inside_and_outside_are_one_method() -> None:
    """SAM around CautiousDecay and CautiousDecay around SAM give the same weights in float64, to rounding."""
    sam = pytest.importorskip("pytorch_optimizer").SAM
    options: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.5}

    def inside(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return sam(params, base_optimizer=CautiousDecay.over(torch.optim.AdamW), **options)

    def outside(params: list[nn.Parameter]) -> torch.optim.Optimizer:
        return CautiousDecay(sam(params, base_optimizer=torch.optim.AdamW, **options))

    ends = []
    for build in (inside, outside):
        p = nn.Parameter(torch.linspace(-1, 1, 8, dtype=torch.float64))
        opt = build([p])

        def closure(p: nn.Parameter = p, opt: torch.optim.Optimizer = opt) -> Tensor:
            opt.zero_grad()
            loss = (p - 0.3).square().sum()
            loss.backward()
            return loss

        for _ in range(5):
            closure()
            opt.step(closure)
        ends.append(p.detach())

    assert same(ends[0], ends[1], roundings=1e-14)
    assert (ends[0] - torch.linspace(-1, 1, 8, dtype=torch.float64)).abs().min() > 0.01
    run("SAM")


@pytest.mark.parametrize("nest", ["inside", "around"])
def test_lookahead_takes_about_half_of_the_decay_back(nest: str) -> None:
    """Without gradients SGD's 50 steps decay a weight of 1 to 0.61; with Lookahead it ends at 0.8."""
    lookahead = pytest.importorskip("pytorch_optimizer").Lookahead
    p = nn.Parameter(torch.ones(1, dtype=torch.float64))
    sgd = torch.optim.SGD([p], lr=0.1)
    opt = lookahead(CautiousDecay(sgd, lam=0.1)) if nest == "inside" else CautiousDecay(lookahead(sgd), lam=0.1)
    for _ in range(50):
        p.grad = torch.zeros_like(p)
        opt.step()

    assert p.item() == pytest.approx(0.80, abs=0.025)
    run("Lookahead")


def test_each_parameter_steps_inside_backward() -> None:
    """After three backward passes each parameter has taken three steps, and no gradient is left."""
    opts = run("A step inside backward")["opts"]

    assert [counts(opt) for opt in opts.values()] == [[3]] * 4
    assert all(p.grad is None for p in opts)


def test_a_resumed_run_has_the_new_lam() -> None:
    """After loading, the weights decay by the new lam; biases still do not."""
    opt = run("Resume with another lam")["opt"]

    assert [group["weight_decay"] for group in opt.param_groups] == [0.4, 0]
    assert decayed(opt, lr=0.1) == pytest.approx([0.04, 0], abs=1e-6)


def test_a_decay_that_follows_the_learning_rate_twice() -> None:
    """At the peak a step takes lr*lam = 1e-4 off a weight; at half the learning rate a quarter of it."""
    opt = run("A decay that follows")["opt"]

    assert decayed(opt, lr=1e-3) == pytest.approx([1e-4] * 2, abs=1e-6)
    assert decayed(opt, lr=5e-4) == pytest.approx([2.5e-5] * 2, abs=1e-6)


@pytest.mark.parametrize("lr", [1e-3, 1e-4])
def test_a_decay_that_does_not_depend_on_the_learning_rate(lr: float) -> None:
    """A step takes 1e-4 off a weight at any learning rate; at 0 there is no step and no decay."""
    opt = run("A decay that does not")["opt"]

    assert decayed(opt, lr) == pytest.approx([1e-4] * 2, abs=1e-6)
    assert decayed(opt, lr=0.0) == [0, 0]


def test_the_brake_halves_growth() -> None:
    """A step that takes a weight from 1 to 3 ends at 2; one that takes it from 3 to 1 ends at 1."""
    namespace = run("A brake")
    p = nn.Parameter(torch.tensor([1.0]))
    opt = torch.optim.SGD([p], lr=1.0)
    namespace["norms"].clear()
    opt.register_step_pre_hook(namespace["before_step"])
    opt.register_step_post_hook(namespace["after_step"])
    p.grad = torch.tensor([-2.0])
    opt.step()

    assert p.item() == 2
    p.grad = torch.tensor([1.0])
    opt.step()
    assert p.item() == 1
