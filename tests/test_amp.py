"""GradScaler treats the wrapper as a plain optimizer: it unscales the gradients, and skips the step on overflow."""

import copy
from typing import Any

import pytest
import torch
from support import BASES, Base, Method, PathOptions, all_bases, loss_of, net, same, values
from torch.amp import GradScaler

from cwd_wrap import CautiousDecay


def scaler() -> GradScaler:
    """A scaler with a power of two, so that unscaling is exact."""
    return GradScaler("cpu", init_scale=1024.0)


def scaled_step(model: torch.nn.Module, opt: Any, scale: GradScaler, step: int, *, clip: bool = False) -> None:
    opt.zero_grad()
    scale.scale(loss_of(model, step)).backward()
    if clip:
        scale.unscale_(opt)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scale.step(opt)
    scale.update()


def plain_step(model: torch.nn.Module, opt: Any, step: int, *, clip: bool = False) -> None:
    opt.zero_grad()
    loss_of(model, step).backward()
    if clip:
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    opt.step()


@all_bases
def test_the_wrapper_does_not_claim_to_unscale(build: Any) -> None:
    """Fused bases have a flag that says that they unscale gradients; the wrapper never has this flag."""
    opt = CautiousDecay(build(net().parameters()))

    assert not getattr(opt, "_step_supports_amp_scaling", False)


@pytest.mark.parametrize("clip", [False, True], ids=["step", "unscale-clip-step"])
def test_training_with_a_scaler_equals_training_without(every_base: Base, clip: bool, every_path: PathOptions) -> None:
    """Gradients scaled by 1024 and unscaled again give the same weights, bit for bit, clipped or not.

    After it the base has neither the scaler's grad_scale nor its found_inf.
    """
    ours, plain = net(), net()
    opt, other = (CautiousDecay(every_base(m.parameters()), **every_path) for m in (ours, plain))
    scale = scaler()
    for step in range(3):
        scaled_step(ours, opt, scale, step, clip=clip)
        plain_step(plain, other, step, clip=clip)

    assert torch.equal(values(plain), values(ours))
    assert [None, None] == [getattr(opt.base_optimizer, name, None) for name in ("grad_scale", "found_inf")]


def test_an_overflow_changes_nothing(every_method: Method) -> None:
    """A step with a gradient of inf or NaN is skipped: weights and state keep their bits, and nothing decays."""
    model, scale = net(), scaler()
    opt = every_method.wrap(BASES["AdamW"](model.parameters(), **every_method.base))
    scaled_step(model, opt, scale, 0)
    before, state = values(model), copy.deepcopy(opt.state_dict())
    for bad, smaller in ((float("inf"), 512.0), (float("nan"), 256.0)):
        opt.zero_grad()
        scale.scale(loss_of(model, 1)).backward()
        next(model.parameters()).grad[0, 0] = bad
        scale.step(opt)
        scale.update()

        assert torch.equal(before, values(model))
        assert same(state, opt.state_dict())
        assert smaller == scale.get_scale()


def test_training_goes_on_after_an_overflow(every_method: Method) -> None:
    """The step after a skipped step is the same as without the skipped step."""
    ours, plain = net(), net()
    opt, other = (every_method.wrap(BASES["AdamW"](m.parameters(), **every_method.base)) for m in (ours, plain))
    scale = scaler()
    scale.scale(loss_of(ours, 0)).backward()
    next(ours.parameters()).grad[0, 0] = float("inf")
    scale.step(opt)
    scale.update()
    torch.manual_seed(1)
    scaled_step(ours, opt, scale, 1)
    torch.manual_seed(1)
    plain_step(plain, other, 1)

    assert torch.equal(values(plain), values(ours))


def test_a_disabled_scaler_steps_the_wrapper(every_path: PathOptions) -> None:
    """GradScaler(enabled=False) scales nothing: the wrapper steps and decays."""
    ours, plain = net(), net()
    opt, other = (CautiousDecay(BASES["AdamW"](m.parameters(), **every_path.base), **every_path) for m in (ours, plain))
    scaled_step(ours, opt, GradScaler("cpu", enabled=False), 0)
    plain_step(plain, other, 0)

    assert torch.equal(values(plain), values(ours))
