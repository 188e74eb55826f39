"""The recipes of docs/schedules.md, run from the page: lam and p at each step, on every path and after a resume."""

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from support import PathOptions, loss_of, net, train, values, weight
from test_clients import CHOSEN, fit, lightning_module
from test_docs import snippets
from torch import nn
from torch.optim import SGD, AdamW

from cwd_wrap import CautiousDecay, PNormDecay

PAGE = Path(__file__).parents[1] / "docs" / "schedules.md"
LR, LAM = 0.125, 0.5


@pytest.fixture(scope="module")
def recipe() -> dict[str, Any]:
    """The names that the page's blocks define."""
    names: dict[str, Any] = {}
    for source in snippets(PAGE):
        exec(source, names)
    return names


def decayed(path: PathOptions, schedule: Callable[[Any], object], gradients: list[float]) -> tuple[Any, list[float]]:
    """The optimizer, and a weight that starts at 1 after each step of SGD with one of the gradients."""
    p = weight(1.0, dtype=torch.float64)
    opt = CautiousDecay(SGD([p], lr=LR, weight_decay=LAM, **path.base), **path)
    schedule(opt)
    seen = []
    for g in gradients:
        p.grad = torch.tensor([g], dtype=torch.float64)
        opt.step()
        seen.append(p.item())
    return opt, seen


# ------------------------------------------------------------------------------------ lam, a function of the step


def test_the_factor_of_the_page_is_a_cosine(recipe: dict[str, Any]) -> None:
    """The factor is 1 at the first step, 1/2 in the middle, 0 at the end and after it."""
    cosine = recipe["cosine"]

    assert [1, 0.5, 0, 0] == pytest.approx([cosine(step) for step in (0, 50, 100, 150)], abs=1e-15)
    assert [0.1, 0] == recipe["lams"]


def test_off_then_on(recipe: dict[str, Any], every_path: PathOptions) -> None:
    """With gradient 0 and lam on from the third step, a weight of 1 is 1, 1, 15/16 and (15/16)**2."""
    schedule = lambda opt: recipe["schedule_lam"](opt, recipe["from_step"](2))
    _, seen = decayed(every_path, schedule, [0.0] * 4)

    assert [1, 1, 15 / 16, (15 / 16) ** 2] == seen


def test_off_then_on_is_the_rule_with_the_lam_of_the_step(recipe: dict[str, Any], every_path: PathOptions) -> None:
    """With gradients 1, -1, 1, -1 only the third step has lam and moves towards 0, so only it decays."""
    schedule = lambda opt: recipe["schedule_lam"](opt, recipe["from_step"](2))
    _, seen = decayed(every_path, schedule, [1.0, -1.0, 1.0, -1.0])

    assert [7 / 8, 1, 7 / 8 - 1 / 16, 1 - 1 / 16] == seen


def test_cosine(recipe: dict[str, Any], every_path: PathOptions) -> None:
    """With the cosine of 100 steps and gradient 0, each step takes lr * lam * cosine(step) off its weight."""
    _, seen = decayed(every_path, lambda opt: recipe["schedule_lam"](opt, recipe["cosine"]), [0.0] * 100)
    expected, x = [], 1.0
    for step in range(100):
        x -= LR * LAM * (1 + math.cos(math.pi * step / 100)) / 2 * x
        expected.append(x)

    assert expected == pytest.approx(seen, rel=1e-13)


def test_the_hook_keeps_the_zeros_of_groups(recipe: dict[str, Any]) -> None:
    """Each group is scheduled from its own lam, and a lam of 0 stays 0."""
    groups = [{"params": [weight(1, grad=[0])], "weight_decay": lam} for lam in (0.5, 0.25, 0.0)]
    opt = CautiousDecay(SGD(groups, lr=LR))
    recipe["schedule_lam"](opt, lambda step: 1 / (step + 1))
    for share in (1, 1 / 2, 1 / 3):
        opt.step()

        assert [0.5 * share, 0.25 * share, 0] == [group["weight_decay"] for group in opt.param_groups]


def test_built_with_0_and_raised_later(every_path: PathOptions) -> None:
    """A group that starts with weight_decay 0, beside one that decays, needs no lam= to decay later."""
    p, q = weight(1, grad=[0]), weight(1, grad=[0])
    groups = [{"params": [p], "weight_decay": 0.0}, {"params": [q], "weight_decay": LAM}]
    opt = CautiousDecay(SGD(groups, lr=LR, **every_path.base), **every_path)
    opt.step()
    opt.param_groups[0]["weight_decay"] = LAM
    opt.step()

    assert [15 / 16, (15 / 16) ** 2] == [p.item(), q.item()]


def test_lam_at_construction_applies_at_once() -> None:
    """If all groups are built with 0, lam= is written into all of them, so no group starts at 0."""
    opt = CautiousDecay(SGD([{"params": [weight(1)]}, {"params": [weight(1)]}], lr=LR), lam=LAM)

    assert [LAM, LAM] == [group["weight_decay"] for group in opt.param_groups]


# ------------------------------------------------------------------------------------ lam, a function of the gradients


def test_lam_by_norm(recipe: dict[str, Any], every_path: PathOptions) -> None:
    """With reference 1, gradients of norm 1/2 and 1 do not change lam; those of norm 2 and 4 divide it by 2 and 4."""
    for g, share in ((0.5, 1), (1.0, 1), (2.0, 1 / 2), (4.0, 1 / 4)):
        opt, (x,) = decayed(every_path, lambda opt: recipe["lam_by_norm"](opt, reference=1.0), [g])

        assert LAM * share == opt.param_groups[0]["weight_decay"]
        assert 1 - LR * g - LR * LAM * share == x


def test_the_norm_is_that_of_the_group(recipe: dict[str, Any]) -> None:
    """Gradients (3,) and (4,) of one group have norm 5; a parameter without a gradient adds nothing."""
    group = [weight(1, grad=[3]), weight(1, grad=[4]), weight(1)]
    opt = CautiousDecay(SGD([{"params": group}, {"params": [weight(1)]}], lr=LR, weight_decay=LAM))
    recipe["lam_by_norm"](opt, reference=1.0)
    opt.step()

    assert [LAM / 5, LAM] == [group["weight_decay"] for group in opt.param_groups]


def test_a_closure_makes_the_gradients_that_a_hook_of_the_base_reads(
    recipe: dict[str, Any], every_path: PathOptions
) -> None:
    """Registered on the base, the recipe uses the gradients that the closure makes within the step."""
    p = weight(1.0, dtype=torch.float64)
    opt = CautiousDecay(SGD([p], lr=LR, weight_decay=LAM, **every_path.base), **every_path)
    recipe["lam_by_norm"](opt.base_optimizer, reference=1.0)

    def closure() -> float:
        p.grad = torch.full_like(p, 4.0)
        return 0.0

    opt.step(closure)

    assert 1 - LR * 4 - LR * LAM / 4 == p.item()


def test_the_norm_is_that_of_unscaled_gradients(recipe: dict[str, Any], every_path: PathOptions) -> None:
    """GradScaler divides the gradients by its scale before the hook, so a gradient of 2 halves lam."""
    p = weight(1.0)
    opt = CautiousDecay(SGD([p], lr=LR, weight_decay=LAM, **every_path.base), **every_path)
    recipe["lam_by_norm"](opt, reference=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(2 * p.sum()).backward()
    scaler.step(opt)

    assert (16.0 / 8, LAM / 2) == (p.grad.item(), opt.param_groups[0]["weight_decay"])


# ------------------------------------------------------------------------------------ p


def p_at(step: int) -> float:
    """The page's p, over four steps."""
    return 2 - 1.2 * step / 3


@pytest.mark.parametrize("path", ["snapshot", "pieces"])
def test_p_falls(path: str) -> None:
    """Each of four steps is the authors' formula with the p of that step: 2, 1.6, 1.2, 0.8."""
    q = weight(1, -0.01, 3, grad=[1, 1, -1], dtype=torch.float64)
    opt = PNormDecay(SGD([q], lr=LR, weight_decay=LAM), p=2.0, path=path)
    x, g = q.detach().clone(), q.grad.clone()
    for step in range(4):
        opt.p = p_at(step)
        opt.step()
        x = reference.p_norm(p_at(step))(x, x - LR * g, g, LR * LAM)

        torch.testing.assert_close(x, q.detach(), rtol=1e-14, atol=0)


def test_p_may_be_set_from_a_hook() -> None:
    """A p set in a pre hook applies to its step: p = 1 halves a weight of 1/16; p = 2 would divide it by 1.125."""
    q = weight(1 / 16, grad=[0], dtype=torch.float64)
    opt = PNormDecay(SGD([q], lr=LR, weight_decay=LAM), p=2.0)
    opt.register_step_pre_hook(lambda opt, *_: setattr(opt, "p", 1.0))
    opt.step()

    assert (1.0, 1 / 32) == (opt.p, q.item())


@pytest.mark.parametrize(
    ("value", "error"), [(0, ValueError), (2.5, ValueError), (math.nan, ValueError), ("1", TypeError)]
)
def test_a_wrong_p_is_refused_when_it_is_set(value: Any, error: type[Exception]) -> None:
    """The error is the constructor's, and p does not change."""
    opt = PNormDecay(SGD([weight(1)], lr=LR, weight_decay=LAM), p=1.5)
    with pytest.raises(error, match=r"p of PNormDecay is .*: pass a number above 0, up to 2"):
        opt.p = value

    assert opt.p == 1.5


def test_a_state_dict_does_not_hold_p() -> None:
    """Loading the state dict of an optimizer with another p does not change p."""
    opt, other = (PNormDecay(SGD([weight(1)], lr=LR, weight_decay=LAM), p=p) for p in (2.0, 0.8))
    other.load_state_dict(opt.state_dict())

    assert (2.0, 0.8) == (opt.p, other.p)


# ------------------------------------------------------------------------------------ checkpoints and clients


def scheduled(model: nn.Module, recipe: dict[str, Any], path: PathOptions = CHOSEN) -> CautiousDecay:
    """CautiousDecay(AdamW) with a lam that is 0 for two steps and then falls."""
    opt = CautiousDecay(AdamW(model.parameters(), lr=0.05, weight_decay=0.5, **path.base), **path)
    recipe["schedule_lam"](opt, lambda step: 0 if step < 2 else 1 / step)
    return opt


@pytest.mark.parametrize("saved", [1, 3], ids=["while off", "while on"])
@pytest.mark.filterwarnings("ignore:.*will not decay anything")
def test_a_schedule_resumes_after_a_checkpoint(recipe: dict[str, Any], saved: int, every_path: PathOptions) -> None:
    """Six steps with a checkpoint in between give the bits of six steps in one run, and the same lam."""
    whole, first, second = net(), net(), net()
    train(whole, ours := scheduled(whole, recipe, every_path), range(6))
    train(first, opt := scheduled(first, recipe, every_path), range(saved))
    (resumed := scheduled(second, recipe, every_path)).load_state_dict(opt.state_dict())
    second.load_state_dict(first.state_dict())
    train(second, resumed, range(saved, 6))

    assert torch.equal(values(whole), values(second))
    assert 0.5 / 5 == ours.param_groups[0]["weight_decay"] == resumed.param_groups[0]["weight_decay"]


def test_a_checkpoint_from_before_the_start_warns(recipe: dict[str, Any]) -> None:
    """Loading a checkpoint with lam 0 warns that nothing decays and mentions schedules; a later one does not warn."""
    opt, other = scheduled(net(), recipe), scheduled(model := net(), recipe)
    train(model, other, range(1))
    with pytest.warns(UserWarning, match=r"will not decay anything: .* Pass lam=.* a schedule raises it later"):
        opt.load_state_dict(other.state_dict())
    train(model, other, range(1, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(other.state_dict())


@pytest.mark.filterwarnings("ignore")
def test_a_schedule_under_lightning(recipe: dict[str, Any], tmp_path: Path) -> None:
    """Two epochs under Lightning, resumed after the first, give the weights of a plain loop."""
    module, again = lightning_module(), lightning_module()
    for each in (module, again):
        each.configure_optimizers = lambda each=each: scheduled(each, recipe)
    fit(module, tmp_path).save_checkpoint(tmp_path / "last.ckpt")
    fit(again, tmp_path, ckpt=tmp_path / "last.ckpt", max_epochs=2)
    plain = net()
    opt = scheduled(plain, recipe)
    for step in range(12):
        opt.zero_grad()
        loss_of(plain, step % 6).backward()
        opt.step()

    assert torch.equal(values(plain), values(again.net))
