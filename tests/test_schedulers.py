"""Learning-rate schedulers and weight-decay schedules work on the wrapper as on any optimizer, without a warning."""

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import Base, PathOptions, in_turn, loss_of, net, values, weight
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import (
    ChainedScheduler,
    ConstantLR,
    CosineAnnealingLR,
    CyclicLR,
    ExponentialLR,
    LambdaLR,
    OneCycleLR,
    ReduceLROnPlateau,
    SequentialLR,
    StepLR,
)

from cwd_wrap import CautiousDecay

pytestmark = [
    pytest.mark.filterwarnings("error"),
    pytest.mark.filterwarnings("ignore:.*own decay is coupled"),  # SGD with momentum
    # SequentialLR calls its own schedulers with the epoch, for which torch itself warns.
    pytest.mark.filterwarnings("ignore:The epoch parameter in `scheduler.step:UserWarning"),
]

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "StepLR": lambda opt: StepLR(opt, step_size=2, gamma=0.1),
    "LambdaLR": lambda opt: LambdaLR(opt, lambda step: 1 / (step + 1)),
    "CosineAnnealingLR": lambda opt: CosineAnnealingLR(opt, T_max=5),
    "OneCycleLR": lambda opt: OneCycleLR(opt, max_lr=0.1, total_steps=8),
    "CyclicLR": lambda opt: CyclicLR(opt, base_lr=0.01, max_lr=0.1, step_size_up=2),
    "SequentialLR": lambda opt: SequentialLR(
        opt, [ConstantLR(opt, factor=0.1, total_iters=2), ExponentialLR(opt, 0.5)], milestones=[2]
    ),
    "ChainedScheduler": lambda opt: ChainedScheduler([ConstantLR(opt, 0.5, total_iters=2), ExponentialLR(opt, 0.5)]),
}
MOMENTA = {"SGD": Base("SGD", SGD, lr=0.05, momentum=0.9), "AdamW": Base("AdamW", AdamW, lr=0.05)}


def scheduled(optimizer: Optimizer, model: torch.nn.Module, make: Callable[[Optimizer], Any]) -> list[Any]:
    """Train under a scheduler; return the first group's learning rate and momenta after each step."""
    scheduler, seen = make(optimizer), []
    for step in range(6):
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()
        scheduler.step()
        group = optimizer.param_groups[0]
        seen.append((group["lr"], group.get("momentum"), group.get("betas")))
    return seen


# OneCycleLR, which writes momenta too, on each path, and each other scheduler on one.
NAMES = sorted(SCHEDULERS, key=lambda name: name != "OneCycleLR")
every_scheduler = pytest.mark.parametrize(("name", "path_in_turn"), in_turn(NAMES))


@every_scheduler
@pytest.mark.parametrize("build", MOMENTA.values(), ids=list(MOMENTA))
def test_schedule_is_that_of_the_plain_optimizer(name: str, path_in_turn: PathOptions, build: Any) -> None:
    """A scheduler on the wrapper gives the learning rates and momenta that it gives the plain optimizer."""
    ours, theirs, make = net(), net(), SCHEDULERS[name]
    opt = CautiousDecay(build(ours.parameters(), **path_in_turn.base), **path_in_turn)

    assert scheduled(build(theirs.parameters()), theirs, make) == scheduled(opt, ours, make)


@every_scheduler
def test_the_step_uses_the_scheduled_values(name: str, path_in_turn: PathOptions) -> None:
    """Weights under a scheduler equal those of a run with the same values written by hand."""
    ours, byhand, make = net(), net(), SCHEDULERS[name]
    opt, other = (
        CautiousDecay(MOMENTA["AdamW"](model.parameters(), **path_in_turn.base), **path_in_turn)
        for model in (ours, byhand)
    )
    make(other)  # sets the first values; those of later steps come from `scheduled`
    for step, (lr, _, betas) in enumerate(scheduled(opt, ours, make)):
        other.zero_grad()
        loss_of(byhand, step).backward()
        other.step()
        other.param_groups[0].update(lr=lr, betas=betas)

    assert torch.equal(values(byhand), values(ours))


def test_the_decay_follows_the_learning_rate(every_path: PathOptions) -> None:
    """With zero gradients only the decay acts: the factor is 1 - 0.1*0.5, and after StepLR 1 - 0.01*0.5."""
    p = weight(1.0, grad=[0.0])
    opt = CautiousDecay(SGD([p], lr=0.1, weight_decay=0.5, **every_path.base), **every_path)
    scheduler = StepLR(opt, step_size=1, gamma=0.1)
    for expected in (0.95, 0.95 * 0.995):
        opt.step()
        scheduler.step()

        assert pytest.approx(expected) == p.item()


def test_plateau(every_path: PathOptions) -> None:
    """ReduceLROnPlateau on the wrapper lowers the learning rate that the base uses."""
    opt = CautiousDecay(SGD([weight(1.0, grad=[1.0])], lr=0.1, weight_decay=0.5, **every_path.base), **every_path)
    scheduler = ReduceLROnPlateau(opt, patience=0, factor=0.5)
    for loss in (1.0, 2.0):
        opt.step()
        scheduler.step(loss)

    assert 0.05 == opt.base_optimizer.param_groups[0]["lr"]


def test_a_scheduler_on_the_base_works(every_path: PathOptions) -> None:
    """A scheduler made for the base before it was wrapped schedules the wrapper's steps, without a warning."""
    p = weight(1.0, grad=[0.0])
    base = SGD([p], lr=0.1, weight_decay=0.5, **every_path.base)
    scheduler = StepLR(base, step_size=1, gamma=0.1)
    opt = CautiousDecay(base, **every_path)
    for _ in range(2):
        opt.step()
        scheduler.step()

    assert pytest.approx(0.95 * 0.995) == p.item()


def test_a_missing_step_gives_a_warning() -> None:
    """torch warns if scheduler.step() comes before the wrapper's step(), so the tests above could have warned."""
    opt = CautiousDecay(SGD([weight(1.0)], lr=0.1, weight_decay=0.5))
    scheduler = StepLR(opt, step_size=1)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        scheduler.step()


def test_a_tensor_learning_rate_is_scheduled_in_place(every_path: PathOptions) -> None:
    """The scheduler fills a tensor lr in place: it stays the same object, and the decay follows it."""
    p, lr = weight(1.0, grad=[0.0]), torch.tensor(0.1)
    options = every_path.base or {"foreach": False}
    opt = CautiousDecay(Adam([p], lr=lr, weight_decay=0.5, **options), **every_path)
    scheduler = StepLR(opt, step_size=1, gamma=0.1)
    for _ in range(2):
        opt.step()
        scheduler.step()

    assert opt.param_groups[0]["lr"] is lr
    assert pytest.approx(0.95 * 0.995) == p.item()


@pytest.mark.parametrize("make", [SCHEDULERS["OneCycleLR"], SCHEDULERS["CosineAnnealingLR"]])
def test_an_optimizer_under_a_scheduler_can_be_pickled(make: Any) -> None:
    """An optimizer with a step patched by a scheduler can be pickled, and so can the scheduler's state dict."""
    model = net()
    opt = CautiousDecay(MOMENTA["AdamW"](model.parameters()))
    scheduler = make(opt)
    scheduled(opt, model, lambda _: scheduler)
    twin = pickle.loads(pickle.dumps((opt, scheduler.state_dict())))[0]

    assert opt.param_groups[0]["lr"] == twin.param_groups[0]["lr"]


# ------------------------------------------------------------------------------------ weight-decay schedules

SCHEDULE = (0.5, 0.25, 0.0, 1.0)
DECAYED = (0.95, 0.95 * 0.975, 0.95 * 0.975, 0.95 * 0.975 * 0.9)  # with lr 0.1 and zero gradients


def from_the_loop(opt: CautiousDecay, group: dict[str, Any], value: float) -> None:
    group["weight_decay"] = value
    opt.step()


def from_a_closure(opt: CautiousDecay, group: dict[str, Any], value: float) -> None:
    def closure() -> float:
        group["weight_decay"] = value
        return 0.0

    opt.step(closure)


def from_a_hook(opt: CautiousDecay, group: dict[str, Any], value: float) -> None:
    handle = opt.register_step_pre_hook(lambda *_: group.update(weight_decay=value))
    opt.step()
    handle.remove()


def from_a_hook_of_the_base(opt: CautiousDecay, group: dict[str, Any], value: float) -> None:
    handle = opt.base_optimizer.register_step_pre_hook(lambda *_: group.update(weight_decay=value))
    opt.step()
    handle.remove()


@pytest.mark.parametrize("write", [from_the_loop, from_a_closure, from_a_hook, from_a_hook_of_the_base])
def test_weight_decay_schedule(write: Any, every_path: PathOptions) -> None:
    """A weight_decay written before a step, by its closure or by a pre hook, applies to that step and stays."""
    for build in (SGD, AdamW):
        p = weight(1.0, grad=[0.0])
        opt = CautiousDecay(build([p], lr=0.1, weight_decay=0.5, **every_path.base), **every_path)
        group = opt.param_groups[0]
        for value, expected in zip(SCHEDULE, DECAYED, strict=True):
            write(opt, group, value)

            assert value == group["weight_decay"]
            assert pytest.approx(expected) == p.item()


def test_a_closure_that_the_base_calls_raises_the_decay_from_0_one_step_late() -> None:
    """If the base itself calls the closure, a rise from 0 acts one step late: weights with decay 0 are not copied."""

    class Mine(SGD):
        pass

    p = weight(1.0, grad=[0.0])
    opt = CautiousDecay(Mine([p], lr=0.1, weight_decay=0.5))
    for value, expected in zip(SCHEDULE, (*DECAYED[:3], DECAYED[2]), strict=True):
        from_a_closure(opt, opt.param_groups[0], value)

        assert (value, pytest.approx(expected)) == (opt.param_groups[0]["weight_decay"], p.item())


def test_a_hook_of_the_base_may_scale_the_decay(every_path: PathOptions) -> None:
    """The base's hooks read the group's own decay and not the temporary 0, so a hook can halve it."""
    p = weight(1.0, grad=[0.0])
    opt = CautiousDecay(SGD([p], lr=0.1, weight_decay=0.5, **every_path.base), **every_path)
    opt.base_optimizer.register_step_post_hook(
        lambda b, *_: b.param_groups[0].update(weight_decay=b.param_groups[0]["weight_decay"] / 2)
    )
    opt.step()
    opt.step()

    assert (0.125, pytest.approx(0.95 * 0.975)) == (opt.param_groups[0]["weight_decay"], p.item())


def test_a_value_written_after_the_step_counts_from_the_next(every_path: PathOptions) -> None:
    """A weight_decay that a post hook of the base writes stays in the group and applies from the next step."""
    p = weight(1.0, grad=[0.0])
    opt = CautiousDecay(SGD([p], lr=0.1, weight_decay=0.5, **every_path.base), **every_path)
    group = opt.param_groups[0]
    opt.base_optimizer.register_step_post_hook(lambda *_: group.update(weight_decay=0.25))
    opt.step()

    assert (0.25, pytest.approx(0.95)) == (group["weight_decay"], p.item())
    opt.step()

    assert pytest.approx(0.95 * 0.975) == p.item()


def test_a_schedule_may_begin_at_zero(every_path: PathOptions) -> None:
    """A group with decay 0 now and 0.5 later decays later; the constructor warns that nothing decays."""
    p = weight(1.0, grad=[0.0])
    with pytest.warns(UserWarning, match="will not decay anything"):
        opt = CautiousDecay(SGD([p], lr=0.1, **every_path.base), **every_path)
    opt.step()
    opt.param_groups[0]["weight_decay"] = 0.5
    opt.step()

    assert pytest.approx(0.95) == p.item()


def test_the_schedule_of_one_group_leaves_the_other(every_path: PathOptions) -> None:
    """A schedule of group 0, as in DINO, does not change the decay of group 1."""
    p, q = weight(1.0, grad=[0.0]), weight(1.0, grad=[0.0])
    opt = CautiousDecay(
        SGD([{"params": [p]}, {"params": [q], "weight_decay": 0.25}], lr=0.1, weight_decay=0.5, **every_path.base),
        **every_path,
    )
    opt.param_groups[0]["weight_decay"] = 1.0
    opt.step()

    assert [pytest.approx(0.9), pytest.approx(0.975)] == [p.item(), q.item()]
