"""A default device that is not the weights' own, and tensors that have no memory."""

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from support import ALL_PATHS, param, same
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.optim import SGD, Adagrad, AdamW, Optimizer

from cwd_wrap import CautiousDecay, CautiousUpdate, MaskMonitor, PNormDecay, kernels

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is too small for bfloat16"),
    pytest.mark.filterwarnings("error:Accessing the data pointer of FakeTensor"),
]

# ------------------------------------------------------------------------------------ the default device


@contextmanager
def default_device(device: str | None) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


def a_life(
    wrap: Callable[[Optimizer], Any], base: Callable[..., Optimizer], dtype: torch.dtype, at: str = "cpu"
) -> Any:
    """All that a wrapper does, on weights on the device ``at``. Returns what can be compared."""
    generator = torch.Generator(at).manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=at).to(dtype)

    p = [torch.nn.Parameter(some(*shape)) for shape in ((5, 3), (700,), ())]
    opt = wrap(base([{"params": p[:1]}, {"params": p[1:2]}], lr=0.1, weight_decay=0.1))
    opt.observer = monitor = MaskMonitor(per_parameter=True)
    opt.add_param_group({"params": p[2:]})
    for step in range(4):
        for each in p:
            each.grad = some(*each.shape)
        opt.step()
        if step == 1:
            opt.load_state_dict(copy.deepcopy(opt.state_dict()))
            opt.drop_snapshot()
        if step == 2:
            opt = pickle.loads(pickle.dumps(opt))
            p = [each for group in opt.param_groups for each in group["params"]]
            opt.observer = monitor
    numbers = [opt.paths(), opt.snapshot_bytes, repr(opt), repr(monitor.rows()), monitor.read()]
    return [p, opt.state_dict()["state"], numbers, getattr(opt, "sparsity", list)()]


def same_on_a_default_device(wrap: Any, base: Any, dtype: torch.dtype, at: str = "cpu") -> bool:
    """Is the life of a wrapper the same with another default device, which cannot compute?"""
    lives = []
    for device in (None, "meta"):
        with default_device(device):
            lives.append(a_life(wrap, base, dtype, at))
    assert {p.device.type for p in lives[1][0]} == {torch.device(at).type}
    return same(*lives)


STOCHASTIC = {"rounding": "stochastic"}
DEFAULTS = [
    *(param((CautiousDecay, path, {}), path=path) for path in ALL_PATHS),
    *(param((CautiousDecay, path, STOCHASTIC), path=path) for path in ALL_PATHS),
    *(param((CautiousDecay, path, {"mask": "random", **STOCHASTIC}), path=path) for path in ALL_PATHS if path.copies),
    *(
        param((method, path, {}), path=path)
        for method in (CautiousUpdate, PNormDecay)
        for path in ALL_PATHS
        if path.copies
    ),
]


def fused_adamw(*args: Any, **kwargs: Any) -> Optimizer:
    """torch's default AdamW makes its counters on the default device, and cannot step with "meta" there."""
    return AdamW(*args, **kwargs, fused=True)


def sgd(*args: Any, **kwargs: Any) -> Optimizer:
    return SGD(*args, **kwargs, momentum=0.9)


def momentum_fused(*args: Any, **kwargs: Any) -> Optimizer:
    return SGD(*args, **kwargs, momentum=0.9, fused=True)


@pytest.mark.parametrize("case", DEFAULTS)
def test_a_default_device_changes_nothing(case: Any) -> None:
    """With another default device everything works, and to the same numbers; 16-bit weights are rounded at random."""
    method, path, options = case
    dtype = torch.bfloat16 if "rounding" in options else torch.float32
    bases = [fused_adamw, momentum_fused] if path.base else [fused_adamw, sgd]
    for base in bases:
        assert same_on_a_default_device(lambda o: method(o, **path, **options), base, dtype)


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_the_class_from_over_keeps_the_default_device(device: str) -> None:
    """Making a class checks its options on an optimizer of its own, whatever the default device."""
    with default_device(device):
        opt = CautiousDecay.over(SGD, strict=True)([torch.nn.Parameter(torch.ones(2))], lr=0.1, weight_decay=0.1)

    assert opt.param_groups[0]["params"][0].device.type == device


# ------------------------------------------------------------------------------------ no memory


def without_memory(p: Tensor) -> torch.nn.Parameter:
    weight = torch.nn.Parameter(p)
    weight.grad = torch.ones_like(weight)
    return weight


def steps(wrap: Callable[[Optimizer], Any], base: Callable[..., Optimizer], make: Callable[..., Tensor]) -> Any:
    """Two steps on weights that ``make`` makes, with a monitor. Returns the wrapper."""
    p = [without_memory(make(3, 4)), without_memory(make(5))]
    opt = wrap(base(p, lr=0.1, weight_decay=0.1))
    opt.observer = MaskMonitor()
    opt.step()
    opt.step()
    return opt


METHODS: list[tuple[Any, dict[str, Any]]] = [
    (CautiousDecay, {}),
    (CautiousDecay, {"strict": True, "rounding": "stochastic"}),
    *((CautiousDecay, {"mask": mask}) for mask in ("gradient", "random", "all")),
    (CautiousUpdate, {}),
    (CautiousUpdate, {"scale": "numel"}),
    (PNormDecay, {}),
]
TYPES = [torch.float32, torch.bfloat16, torch.complex64]
PLAIN = [AdamW, fused_adamw, sgd, momentum_fused, Adagrad]


@pytest.mark.parametrize(
    ("method", "options", "dtype"), [(*row, dtype) for row, dtype in zip(METHODS, itertools.cycle(TYPES), strict=False)]
)
def test_meta_tensors_are_stepped(method: Any, options: dict[str, Any], dtype: torch.dtype) -> None:
    """On the meta device, on which nothing has a value, every method takes its steps, as the plain optimizer does."""
    opt = steps(lambda o: method(o, **options), sgd, lambda *shape: torch.ones(shape, dtype=dtype, device="meta"))

    assert opt.state_dict()["state"][0]["momentum_buffer"].shape == (3, 4)


@pytest.mark.parametrize(
    ("method", "options", "base"),
    [*((*METHODS[0], base) for base in PLAIN), *((*row, sgd) for row in METHODS[1:])],
)
def test_fake_tensors_are_stepped(method: Any, options: dict[str, Any], base: Any) -> None:
    """Under FakeTensorMode every method takes its steps, as the plain optimizer does."""
    with FakeTensorMode():
        opt = steps(lambda o: method(o, **options), base, lambda *shape: torch.ones(shape))

    assert {type(p).__name__ for p in opt.param_groups[0]["params"]} <= {"FakeTensor", "Parameter"}


def test_fake_tensors_take_torch_operations() -> None:
    """Under FakeTensorMode the choice is "eager", and a compiled backend is refused with the reason."""
    pytest.importorskip("numba")
    cpu = torch.device("cpu")
    before = kernels.name(None, cpu)
    with FakeTensorMode():
        opt = steps(CautiousDecay, fused_adamw, lambda *shape: torch.ones(shape))

        assert "eager" == kernels.name(None, cpu)
        assert "direction" == opt.paths()[0].path
        assert "FakeTensorMode" in opt.paths()[0].reason
        with pytest.raises(ValueError, match=r"backend='numba' cannot run on cpu: .*FakeTensorMode.*'eager'"):
            kernels.name("numba", cpu)
    assert before == kernels.name(None, cpu)


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_fake_tensors_of_a_device_that_is_not_there(device: str) -> None:
    """A training step on fake "cuda" tensors can be planned on a machine without a card."""
    with FakeTensorMode():
        p = without_memory(torch.ones(3, 4, device=device))
        opt = CautiousDecay(SGD([p], lr=0.1, momentum=0.9, weight_decay=0.1))
        opt.step()
        opt.step()

    assert opt.state[p]["momentum_buffer"].device.type == device
