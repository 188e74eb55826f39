"""A closure runs with gradients enabled, as often as the base calls it, and decides which parameters step."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from reference import ruled
from support import Pair, PathOptions, loss_of, net, train, values, weight
from torch import Tensor
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from cwd_wrap import CautiousDecay


def closing(model: torch.nn.Module, opt: Optimizer, step: int) -> Callable[[], Tensor]:
    def closure() -> Tensor:
        opt.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    return closure


def test_the_closure_runs_once_with_gradients_enabled(every_path: PathOptions) -> None:
    """Called under no_grad, the closure still runs with gradients enabled, and once."""
    opt, enabled = CautiousDecay(SGD([weight(1.0)], lr=0.1, weight_decay=0.5, **every_path.base), **every_path), []
    with torch.no_grad():
        opt.step(lambda: enabled.append(torch.is_grad_enabled()) or 0.0)

    assert [True] == enabled


def test_the_loss_is_returned(every_path: PathOptions) -> None:
    """step(closure) returns what the closure returned, and step() returns None."""
    opt = CautiousDecay(SGD([weight(1.0)], lr=0.1, weight_decay=0.5, **every_path.base), **every_path)

    assert 7.0 == opt.step(lambda: 7.0)
    assert 7.0 == opt.step(closure=lambda: 7.0)
    assert opt.step() is None


def test_a_closure_changes_nothing_else(every_pair: Pair) -> None:
    """Training by closures gives, bit for bit, the weights of training by backward() and step().

    Masks read the gradient that the closure computes.
    """
    ours, plain = net(), net()
    opt, other = (every_pair(m.parameters()) for m in (ours, plain))
    torch.manual_seed(1)
    for step in range(3):
        opt.step(closing(ours, opt, step))
    torch.manual_seed(1)
    train(plain, other, range(3))

    assert torch.equal(values(plain), values(ours))


def test_the_closure_may_make_the_first_gradients(every_path: PathOptions) -> None:
    """If the closure makes the first gradients, as in Lightning, the first step decays too: 1 - 0.1*0.5."""
    p = weight(1.0)
    opt = CautiousDecay(SGD([p], lr=0.1, weight_decay=0.5, **every_path.base), **every_path)
    opt.step(lambda: setattr(p, "grad", torch.zeros(1)) or 0.0)

    assert pytest.approx(0.95) == p.item()


def test_the_closure_may_remove_gradients(every_path: PathOptions) -> None:
    """If the closure sets the gradient of a parameter to None, the parameter keeps its value."""
    p, q = weight(1.0, grad=[0.0]), weight(1.0, grad=[0.0])
    opt = CautiousDecay(SGD([p, q], lr=0.1, weight_decay=0.5, **every_path.base), **every_path)
    opt.step(lambda: setattr(p, "grad", None) or 0.0)

    assert [1.0, pytest.approx(0.95)] == [p.item(), q.item()]


def test_the_closure_sees_the_decay_strength(every_path: PathOptions) -> None:
    """Inside a closure the groups have the weight_decay that the user gave them, not 0."""
    opt, seen = CautiousDecay(SGD([weight(1.0)], lr=0.1, weight_decay=0.5, **every_path.base), **every_path), []
    opt.step(lambda: seen.append(opt.param_groups[0]["weight_decay"]) or 0.0)

    assert [0.5] == seen


def lbfgs(model: torch.nn.Module, **options: Any) -> LBFGS:
    return LBFGS(model.parameters(), lr=0.1, max_iter=5, **options)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_wrapped_lbfgs_calls_its_closure_as_often_as_plain_lbfgs(search: str | None) -> None:
    """A wrapped LBFGS calls the closure as often as a plain one, at the same weights."""
    seen: list[list[Tensor]] = []
    for wrap in (lambda base: base, lambda base: CautiousDecay(base, lam=0.5)):
        model = net()
        opt, points = wrap(lbfgs(model, line_search_fn=search)), []
        closure = closing(model, opt, 0)
        opt.step(lambda c=closure, m=model, at=points: at.append(values(m)) or c())
        seen.append(points)

    assert 1 < len(seen[0]) == len(seen[1])
    assert all(map(torch.equal, *seen))


def test_lbfgs_decays_once_a_step() -> None:
    """After many evaluations the weights are those of plain LBFGS, decayed once by lr * lam where the mask is 1."""
    plain, ours = net(), net()
    before = values(plain)
    alone, opt = lbfgs(plain), CautiousDecay(lbfgs(ours), lam=0.5)
    first, loss = alone.step(closing(plain, alone, 0)), opt.step(closing(ours, opt, 0))

    torch.testing.assert_close(ruled(before, values(plain), 0.1 * 0.5), values(ours), rtol=1e-6, atol=1e-7)
    assert first.item() == loss.item()


class NoEnableGrad(Optimizer):
    """Calls its closure under no_grad, as Prodigy and D-Adaptation do."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for p in self.param_groups[0]["params"]:
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])
        return loss


def test_a_base_without_enable_grad_can_backward_in_its_closure() -> None:
    """A base that calls its closure under no_grad still gets gradients: w = 1 - 0.1*2 - 0.1*0.5*1."""
    p = weight(1.0)
    opt = CautiousDecay(NoEnableGrad([p]), lam=0.5)

    def closure() -> float:
        p.grad = None
        loss = p.square().sum()
        loss.backward()
        return loss.item()

    assert 1.0 == opt.step(closure)
    assert pytest.approx(0.75) == p.item()
    with pytest.raises(RuntimeError, match="does not require grad"):
        opt.base_optimizer.step(closure)


def test_prodigy_can_backward_in_its_closure() -> None:
    """Prodigy calls its closure under no_grad; in the wrapper, loss.backward() works there."""
    prodigyopt = pytest.importorskip("prodigyopt")
    model = net()
    opt = CautiousDecay(prodigyopt.Prodigy(model.parameters(), weight_decay=0.5))
    before = values(model)
    loss = opt.step(closing(model, opt, 0))

    assert loss_of(net(), 0).item() == pytest.approx(loss.item())
    assert not torch.equal(before, values(model))


def test_the_base_gets_its_closure_with_lam_0() -> None:
    """With lam 0, LBFGS still gets its closure, without which it cannot step."""
    p = weight(1.0, -1.0)
    opt = CautiousDecay(torch.optim.LBFGS([p], lr=0.1), lam=0.0)

    def closure() -> torch.Tensor:
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    opt.step(closure)

    assert bool((p.detach().abs() < 1).all())


def test_frozen_weights_are_not_copied_before_a_closure() -> None:
    """A frozen parameter is not copied before a closure, which cannot give it a gradient."""
    frozen, p = weight(1.0, 1.0, 1.0), weight(1.0)
    frozen.requires_grad_(False)
    opt = CautiousDecay(torch.optim.SGD([frozen, p], lr=0.1), lam=0.5, path="snapshot")

    def closure() -> float:
        p.grad = torch.ones(1)
        return 0.0

    opt.step(closure)

    assert sum(t.numel() for t in opt._buffers._whole.values()) == 1
    assert opt.snapshot_bytes == 4


# ------------------------------------------------------------------------------------ closures from hooks


class CallsItsClosure(SGD):
    """An optimizer that the library does not know."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


def by_position(closure: Any) -> Any:
    return lambda opt, args, kwargs: ((opt, closure), {})


def by_keyword(closure: Any) -> Any:
    return lambda opt, args, kwargs: ((opt,), {"closure": closure})


def around_that_of_the_step(closure: Any) -> Any:
    """Calls that of the step first, if there is one."""

    def both(opt: Optimizer, args: Any, kwargs: Any) -> Any:
        given = args[1] if len(args) > 1 else lambda: 0.0
        return (opt, lambda: (given(), closure())[1]), {}

    return both


@pytest.mark.parametrize("supply", [by_position, by_keyword, around_that_of_the_step])
@pytest.mark.parametrize("cls", [SGD, CallsItsClosure, LBFGS])
@pytest.mark.parametrize("old", [None, [-5.0, 5.0]], ids=["no gradient before", "another gradient before"])
@pytest.mark.parametrize("with_another", [False, True], ids=["alone", "beside that of the step"])
def test_a_hook_of_the_base_may_supply_the_closure(supply: Any, cls: Any, old: Any, with_another: bool) -> None:
    """The step is that of the plain base with this hook, and the decay; masks follow the new gradients."""
    p, q = (weight(1.0, -2.0, 3.0) for _ in range(2))
    wrapped, plain = cls([p], lr=0.1), cls([q], lr=0.1)
    opt = CautiousDecay(wrapped, lam=0.5)
    for base, x in ((wrapped, p), (plain, q)):
        base.register_step_pre_hook(
            supply(lambda x=x: setattr(x, "grad", x.detach() * torch.tensor([1.0, -1.0, 0])) or 0.0)
        )
        x.grad = None if old is None else torch.tensor([*old, 1.0])
    for _ in range(3):
        before = p.detach().clone()
        q.data.copy_(p)
        for optimizer in (opt, plain):
            optimizer.step(*([lambda: 7.0] if with_another else []))

        torch.testing.assert_close(ruled(before, q.detach(), 0.05), p.detach())
        assert 0.5 == opt.lam
        if cls is LBFGS:
            break  # it keeps gradients of the weights that it left


@pytest.mark.parametrize("register", ["register_optimizer_step_pre_hook", "a hook that takes the closure away"])
def test_other_hooks_with_closures(register: str) -> None:
    """A global hook may supply one, too; and one that drops the step's leaves the gradients as they are: 0.95."""
    p = weight(1.0, grad=[0.0])
    opt = CautiousDecay(CallsItsClosure([p], lr=0.1), lam=0.5)
    if register == "register_optimizer_step_pre_hook":
        p.grad = torch.tensor([-9.0])
        handle = register_optimizer_step_pre_hook(by_position(lambda: setattr(p, "grad", torch.zeros(1)) or 0.0))
    else:
        handle = opt.base_optimizer.register_step_pre_hook(lambda opt, args, kwargs: ((opt,), {}))
    with handle_removed(handle):
        opt.step(lambda: 1 / 0) if "away" in register else opt.step()

    assert pytest.approx(0.95) == p.item()


@contextlib.contextmanager
def handle_removed(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
