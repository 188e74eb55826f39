"""The base's own step is left out where it would find nothing to do, but not where somebody would notice."""

import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import pytest
import torch
from support import weight
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import StepLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cwd_wrap import CautiousDecay
from cwd_wrap.report import Report

pytest.importorskip("numba")  # without a compiled backend, one_pass is not chosen


def wrapped(*weights: torch.nn.Parameter, **options: Any) -> CautiousDecay:
    return CautiousDecay(AdamW(weights or [weight(1.0, -2.0)], lr=0.1, weight_decay=0.5), **options)


def entered(opt: Optimizer, step: Callable[[], object]) -> bool:
    """Does ``step`` enter the function that is written in the base's class as its step?"""
    own = type(opt.base_optimizer).step
    while hasattr(own, "__wrapped__"):
        own = own.__wrapped__
    seen = []

    def note(frame: FrameType, event: str, _: object) -> None:
        if event == "call" and frame.f_code is own.__code__:
            seen.append(frame)

    sys.setprofile(note)
    try:
        step()
    finally:
        sys.setprofile(None)
    return bool(seen)


class Bored:
    """An observer that looks at no step."""

    def __init__(self) -> None:
        self.failures = 0

    def looks_at(self, _: list[int]) -> bool:
        return False

    def step_failed(self) -> None:
        self.failures += 1

    def __call__(self, _: Report) -> None:
        raise AssertionError


def interrupted(_: object) -> None:
    raise KeyboardInterrupt


def stepped(opt: CautiousDecay, times: int = 3) -> CautiousDecay:
    """After ``times`` steps with the same gradient: from the second on there is state, and a plan to keep."""
    for _ in range(times):
        for group in opt.param_groups:
            for p in group["params"]:
                p.grad = torch.ones_like(p)
        opt.step()
    return opt


def test_the_own_step_is_left_out_where_nothing_is_left_for_it() -> None:
    """From the third step on one pass steps alone; a group that does not decay is the base's."""
    opt = stepped(wrapped())
    assert not entered(opt, lambda: stepped(opt, 1))

    opt.add_param_group({"params": [weight(3.0)], "weight_decay": 0.0})
    stepped(opt)
    assert entered(opt, lambda: stepped(opt, 1))


@pytest.mark.parametrize("path", ["direction", "pieces", "snapshot"])
def test_the_own_step_is_taken_on_the_other_paths(path: str) -> None:
    """One pass alone makes the update."""
    opt = stepped(wrapped(path=path))

    assert entered(opt, lambda: stepped(opt, 1))


def test_a_step_alone_gives_the_bits_of_a_step_with_the_own_one() -> None:
    """A hook that does nothing makes no difference, through changes of lr, lam, gradients and parameters."""
    runs = []
    for heard in (False, True):
        a, b = weight(1.0, -2.0), weight(0.5)
        opt = wrapped(a, b)
        if heard:
            opt.base_optimizer.register_step_pre_hook(lambda *_: None)
        for i in range(12):
            a.grad = torch.tensor([1.0, 0.5]) * (i % 3 - 1)
            b.grad = None if i < 5 else torch.ones(1)
            opt.param_groups[0]["lr"] = 0.1 / (1 + i // 4)
            opt.lam = 0.5 if i % 5 else 0.0
            if i == 8:
                opt.load_state_dict(opt.state_dict())
            opt.step()
            opt.zero_grad()
        runs.append([a.detach(), b.detach(), *(opt.state[p]["exp_avg_sq"] for p in (a, b)), opt.state[b]["step"]])

    assert all(map(torch.equal, *runs))
    assert runs[0][-1] == 7


def test_a_parameter_that_gets_its_first_gradient_is_stepped() -> None:
    """It is new to the kept plan."""
    a, late = weight(1.0), weight(1.0)
    opt = wrapped(a, late)
    for _ in range(3):
        a.grad = torch.ones(1)
        opt.step()
    late.grad = torch.ones(1)
    opt.step()

    assert late.item() < 1


def test_who_listens_from_some_step_on_hears_each_step() -> None:
    """Hooks of the base, hooks of all optimizers, a step that is replaced, a scheduler on the base, a profiler."""
    opt = stepped(wrapped())
    base, heard = opt.base_optimizer, []

    def note(*_: object) -> None:
        heard.append(1)

    for register in (
        base.register_step_pre_hook,
        base.register_step_post_hook,
        register_optimizer_step_pre_hook,
        register_optimizer_step_post_hook,
    ):
        handle = register(note)
        stepped(opt, 2)
        handle.remove()
        stepped(opt, 2)
        assert [1, 1] == heard, register
        heard.clear()

    own = base.step
    base.step = lambda *args: (note(), own(*args))[1]
    stepped(opt, 2)
    del base.step
    assert [1, 1] == heard


def test_a_scheduler_of_the_base_hears_the_step() -> None:
    """torch's schedulers replace ``step`` to warn if it is never called."""
    opt = stepped(wrapped())
    StepLR(opt.base_optimizer, 1)
    stepped(opt, 1)

    assert opt.base_optimizer._opt_called


def test_a_profiler_sees_the_step_of_the_base() -> None:
    """Its range has the base's name."""
    opt = stepped(wrapped())
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        stepped(opt, 1)

    assert "Optimizer.step#AdamW.step" in {event.name for event in profile.events()}


def test_a_step_of_the_class_that_is_replaced_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """A patch of the class, after the plan was made, skips every step: nothing moves and nothing decays."""
    opt = stepped(wrapped())
    before = opt.param_groups[0]["params"][0].detach().clone()
    monkeypatch.setattr(AdamW, "step", lambda *_: None)
    opt.step()

    assert torch.equal(before, opt.param_groups[0]["params"][0])


def test_a_failed_step_alone_leaves_the_next_one_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """The plan is made anew after an exception, and the observer is told."""
    opt, twin = stepped(wrapped()), stepped(wrapped())
    path = type(opt._plan.alone)
    opt.observer = observer = Bored()
    opt.step()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(path, "act", interrupted)
        opt.step()
    opt.step()
    twin.step()
    twin.step()

    assert observer.failures == 1
    assert opt._plan is not None
    assert torch.equal(opt.param_groups[0]["params"][0], twin.param_groups[0]["params"][0])


def test_a_step_that_waits_for_another_threads_leaves_that_ones_observer_alone() -> None:
    """The observer learns that a step has failed, even if a step of another thread waits that it does not look at."""
    opt = stepped(wrapped())
    opt.observer = observer = Bored()
    waiting = threading.Thread(target=opt.step)

    def fail(*_: object) -> None:
        hook.remove()
        opt.param_groups[0]["lr"] = 0.0  # in such a step nothing is looked at
        waiting.start()
        waiting.join(0.2)
        raise KeyboardInterrupt

    hook = opt.base_optimizer.register_step_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        opt.step()
    waiting.join()

    assert observer.failures == 1


def test_plain_sgd_is_stepped_alone() -> None:
    """A base without state, too."""
    p = weight(1.0)
    opt = CautiousDecay(SGD([p], lr=0.5, weight_decay=0.5))
    for _ in range(3):
        p.grad = torch.zeros(1)
        opt.step()

    assert p.item() == 0.75**3
