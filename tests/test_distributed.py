"""ZeroRedundancyOptimizer around and inside the wrapper, and optimizers that step within backward."""

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import PathOptions, loss_of, net, train, values
from torch import distributed as dist
from torch.optim import SGD, AdamW

from cwd_wrap import CautiousDecay

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")

OPTIONS: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.5}


@pytest.fixture
def one_process(tmp_path: Path) -> Iterator[None]:
    """A process group with this process as its only member."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def zero(params: Any, cls: Any, **options: Any) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls deprecated functions of its own
        return ZeroRedundancyOptimizer(params, optimizer_class=cls, **OPTIONS, **options)


def alone(path: PathOptions) -> torch.Tensor:
    """The weights after three steps of the wrapper alone."""
    model = net()
    train(model, CautiousDecay(AdamW(model.parameters(), **OPTIONS, **path.base), **path), range(3))
    return values(model)


@pytest.mark.usefixtures("one_process")
def test_zero_around_the_wrapper(every_path: PathOptions) -> None:
    """ZeRO builds a class from over(); training equals that of the wrapper alone, bit for bit."""
    model = net()
    train(model, zero(model.parameters(), CautiousDecay.over(AdamW, **every_path), **every_path.base), range(3))

    assert torch.equal(alone(every_path), values(model))


@pytest.mark.usefixtures("one_process")
def test_a_schedule_on_zero_reaches_the_wrapper() -> None:
    """A value written into ZeRO's groups reaches the wrapper; the wrapper's temporary 0 does not reach ZeRO."""
    model = net()
    opt = zero(model.parameters(), CautiousDecay.over(AdamW))
    opt.param_groups[0]["weight_decay"] = 0.25
    train(model, opt, range(3))
    expected = net()
    train(expected, CautiousDecay(AdamW(expected.parameters(), **OPTIONS), lam=0.25), range(3))

    assert torch.equal(values(expected), values(model))
    assert 0.25 == opt.param_groups[0]["weight_decay"]


@pytest.mark.usefixtures("one_process")
def test_the_wrapper_around_zero() -> None:
    """The wrapper around a ZeRO optimizer takes a snapshot; training equals the snapshot path, bit for bit."""
    model = net()
    train(model, CautiousDecay(zero(model.parameters(), AdamW)), range(3))

    assert torch.equal(alone(PathOptions(path="snapshot")), values(model))


@pytest.mark.filterwarnings("ignore")
def test_steps_within_backward(every_path: PathOptions) -> None:
    """With one optimizer per parameter, stepped by torch inside backward, training is the same, bit for bit."""
    from torch.distributed.optim import _apply_optimizer_in_backward

    model = net()
    cls = CautiousDecay.over(AdamW, **every_path)
    _apply_optimizer_in_backward(cls, model.parameters(), OPTIONS | every_path.base)
    for step in range(3):
        loss_of(model, step).backward()

    assert torch.equal(alone(every_path), values(model))
    assert [None] * 4 == [p.grad for p in model.parameters()]


def test_steps_within_gradient_hooks(every_path: PathOptions) -> None:
    """With one wrapper per parameter, stepped by a gradient hook, training is the same."""
    model = net()
    for p in model.parameters():
        each = CautiousDecay(AdamW([p], **OPTIONS, **every_path.base), **every_path)

        def release(_: torch.Tensor, opt: CautiousDecay = each) -> None:
            opt.step()
            opt.zero_grad()

        p.register_post_accumulate_grad_hook(release)
    for step in range(3):
        loss_of(model, step).backward()

    assert torch.equal(alone(every_path), values(model))


def test_over_takes_positional_parameters_and_groups() -> None:
    """A class from over() takes the base's arguments: parameters or groups first, then the others."""
    model = net()
    cls = CautiousDecay.over(SGD, lam=0.25)
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "weight_decay": 0.0}]
    opt = cls(groups, 0.1, weight_decay=0.5)

    assert [0.25, 0.0] == [group["weight_decay"] for group in opt.param_groups]
    assert isinstance(opt.base_optimizer, SGD)
    assert opt.base_optimizer.param_groups[0]["lr"] == 0.1
