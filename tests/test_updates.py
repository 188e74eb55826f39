"""The updates that kernels compute are those of the papers, and of the optimizers themselves.

The Triton kernels need the interpreter, in a process of its own:

TRITON_INTERPRET=1 pytest tests/test_updates.py
"""

import copy
import os
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import reference
import torch
import torch.optim as o
from support import same
from test_directions import make
from torch import Tensor, nn
from torch.optim import Optimizer

from cwd_wrap import CautiousDecay, kernels
from cwd_wrap.bases import updates

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
SIZE, LR, LAM = 300, 0.01, 0.5
BETAS = {"betas": (0.8, 0.9), "eps": 1e-8}

# (class, or its path where the library may be missing; options; the update as in the paper)
ROWS: dict[str, tuple[Any, dict[str, Any], Callable[..., Tensor]]] = {
    "SGD": (o.SGD, {}, reference.sgd),
    "SGD-momentum": (o.SGD, {"momentum": 0.9}, reference.sgd),
    "SGD-dampening": (o.SGD, {"momentum": 0.9, "dampening": 0.5}, reference.sgd),
    "SGD-nesterov": (o.SGD, {"momentum": 0.9, "nesterov": True}, reference.sgd),
    "Adam": (o.Adam, BETAS, reference.adam),
    "AdamW": (o.AdamW, BETAS, reference.adam),
    "AdamW-amsgrad": (o.AdamW, {**BETAS, "amsgrad": True}, reference.adam),
    "NAdam": (o.NAdam, BETAS, reference.nadam),
    "NAdam-decoupled": (o.NAdam, {**BETAS, "decoupled_weight_decay": True}, reference.nadam),
    "NAdam-beta1=0": (o.NAdam, {"betas": (0.0, 0.9), "eps": 1e-8}, reference.nadam),
    "RAdam": (o.RAdam, BETAS, reference.radam),
    "RAdam-beta2=0.99": (o.RAdam, {"betas": (0.8, 0.99), "eps": 1e-8}, reference.radam),
    "Adamax": (o.Adamax, BETAS, reference.adamax),
    "Adagrad": (o.Adagrad, {"eps": 1e-10}, reference.adagrad),
    "Adagrad-lr_decay": (
        o.Adagrad, {"eps": 1e-10, "lr_decay": 0.1, "initial_accumulator_value": 0.5}, reference.adagrad,
    ),
    "Adadelta": (o.Adadelta, {"rho": 0.9, "eps": 1e-6}, reference.adadelta),
    "RMSprop": (o.RMSprop, {"alpha": 0.9, "eps": 1e-8}, reference.rmsprop),
    "RMSprop-momentum": (o.RMSprop, {"alpha": 0.9, "eps": 1e-8, "momentum": 0.8}, reference.rmsprop),
    "RMSprop-centered": (o.RMSprop, {"alpha": 0.9, "eps": 1e-3, "centered": True}, reference.rmsprop),
    "RMSprop-centered-momentum": (
        o.RMSprop, {"alpha": 0.9, "eps": 1e-3, "centered": True, "momentum": 0.8}, reference.rmsprop,
    ),
    "timm.AdamWLegacy": ("timm.optim.AdamWLegacy", BETAS, reference.adam),
    "timm.NAdamW": ("timm.optim.NAdamW", BETAS, reference.nadamw),
    "timm.SGDW": ("timm.optim.SGDW", {"momentum": 0.9}, reference.sgd),
    "timm.RMSpropTF": ("timm.optim.RMSpropTF", {"alpha": 0.9, "eps": 1e-6}, reference.rmsprop_tf),
    "timm.RMSpropTF-momentum": (
        "timm.optim.RMSpropTF", {"alpha": 0.9, "eps": 1e-6, "momentum": 0.8}, reference.rmsprop_tf,
    ),
    "timm.RMSpropTF-centered": (
        "timm.optim.RMSpropTF",
        {"alpha": 0.9, "eps": 1e-3, "momentum": 0.8, "centered": True, "lr_in_momentum": False}, reference.rmsprop_tf,
    ),
    "timm.Lion": ("timm.optim.Lion", {"betas": (0.8, 0.9)}, reference.lion),
    "lion_pytorch.Lion": ("lion_pytorch.Lion", {"betas": (0.8, 0.9)}, reference.lion),
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "maximize": {"maximize": True},
    "tensor-lr": {"lr": torch.tensor(LR, dtype=F64)},
}
UNREAD = ("lr_in_momentum", "decoupled_weight_decay")  # options that a reference needs not
NO_MAXIMIZE = ("lion_pytorch.Lion", "timm.RMSpropTF")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["eager", "numba"]
all_rows = pytest.mark.parametrize("name", ROWS)
NAMED_VARIANTS = [(n, v) for n in ROWS for v in VARIANTS if not (v == "maximize" and n.startswith(NO_MAXIMIZE))]
all_variants = pytest.mark.parametrize(("name", "variant"), NAMED_VARIANTS)


def on(backend: str, *values: Any) -> Any:
    """A case, skipped where its backend cannot run."""
    can_run = kernels.obstacle(backend, torch.device("cpu")) is None
    return pytest.param(*values, backend, marks=() if can_run else pytest.mark.skip)


all_backends = pytest.mark.parametrize("backend", [on(each) for each in BACKENDS])
# A compiled kernel converts 16-bit numbers column by column, whatever the update: these have 0, 1, 2 and 3 of state.
OF_EACH_SIZE = ("SGD", "SGD-momentum", "AdamW", "AdamW-amsgrad", "RMSprop-centered-momentum")
in_16_bits = pytest.mark.parametrize(
    ("name", "backend"),
    [on(each, name) for each in BACKENDS for name in ROWS if each == "eager" or name in OF_EACH_SIZE],
)
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of infinities and NaN


def built(name: str, p: Tensor, variant: str = "") -> Optimizer:
    cls, options, _ = ROWS[name]
    options = {**options, **VARIANTS[variant]}
    lr = options.pop("lr", LR)
    base = make(cls, p, options)
    base.param_groups[0].update(lr=lr, weight_decay=0.0)
    return base


def one_pass(name: str, p: Tensor, backend: str, variant: str = "", **options: Any) -> CautiousDecay:
    return CautiousDecay(built(name, p, variant), lam=LAM, path="one_pass", backend=backend, **options)


def gradient(step: int, dtype: torch.dtype = F64, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(step), dtype=F64).to(dtype)


def a_weight(dtype: torch.dtype = F64, size: int = SIZE) -> nn.Parameter:
    return nn.Parameter(gradient(99, dtype, size))


def precision(name: str) -> float:
    """How far steps may be apart in float64: NAdam keeps a product of coefficients in float32."""
    return 1e-6 if name.startswith("NAdam") else 1e-9


def decayed(x: Tensor, w: Tensor) -> Tensor:
    """The weights after a step of the method, for a step of the base from ``x`` to ``w``."""
    return reference.ruled(x.double(), w.double(), LR * LAM)


@all_backends
@all_variants
def test_one_pass_is_the_update_of_the_paper(name: str, variant: str, backend: str) -> None:
    """Eight steps from the first one on are those of the paper, computed in float64 from all gradients."""
    _, options, update = ROWS[name]
    of_paper = partial(update, lr=LR, **{k: v for k, v in options.items() if k not in UNREAD})
    p = a_weight()
    opt = one_pass(name, p, backend, variant)
    w, gradients = p.detach().clone(), []
    for step in range(8):
        p.grad = gradient(step)
        gradients.append(-p.grad if variant == "maximize" else p.grad)
        w = decayed(w, w - of_paper(gradients))
        opt.step()

        torch.testing.assert_close(p.detach(), w, rtol=precision(name), atol=0.1 * precision(name))


@pytest.mark.parametrize(
    ("name", "variant", "dtype", "backend"),
    [
        on(each, name, variant, dtype)
        for each in BACKENDS
        for name, variant in NAMED_VARIANTS
        for dtype in ([F64, F32, BF16] if variant == "" else [F64])
        if dtype is not BF16 or each == "eager" or name in OF_EACH_SIZE
    ],
    ids=str,
)
def test_one_pass_is_the_optimizers_own_step(name: str, variant: str, dtype: torch.dtype, backend: str) -> None:
    """From equal weights and state, one pass is the plain optimizer's step and the rule, its state included.

    Up to some roundings: the plain optimizer rounds 16-bit numbers after each operation, so both have float32 state.
    """
    p = a_weight(dtype)
    opt = one_pass(name, p, backend, variant)
    for step in range(5):
        p.grad = gradient(step, dtype)
        x, q = p.detach().clone(), nn.Parameter(p.detach().to(torch.promote_types(dtype, torch.float32), copy=True))
        q.grad = p.grad.to(q.dtype)
        plain = built(name, q, variant)
        plain.load_state_dict(copy.deepcopy(opt.state_dict()))
        plain.param_groups[0]["weight_decay"] = 0.0
        plain.step()
        opt.step()
        roundings = max(8 * torch.finfo(dtype).eps, precision(name) if name.startswith("NAdam") else 0)

        moved = q.detach() != x  # a step that is lost in rounding has a direction all the same
        expected = decayed(x, q.detach())

        torch.testing.assert_close(p.detach().double()[moved], expected[moved], rtol=roundings, atol=roundings)
        assert same(widened(opt.state[p]), widened(plain.state[q]), roundings)


def widened(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.double() if isinstance(value, Tensor) else value for key, value in state.items()}


@pytest.mark.parametrize(
    ("name", "backend"), [on(BACKENDS[turn % len(BACKENDS)], name) for turn, name in enumerate(ROWS)]
)
def test_a_thousand_steps(name: str, backend: str) -> None:
    """A thousand steps in one pass end where a thousand steps of the plain optimizer with the rule end."""
    size = 20
    p, q = a_weight(size=size), a_weight(size=size)
    opt, plain = one_pass(name, p, backend), built(name, q)
    for step in range(1000):
        p.grad = q.grad = gradient(step, size=size)
        x = q.detach().clone()
        opt.step()
        plain.step()
        q.data.copy_(decayed(x, q.detach()))

    torch.testing.assert_close(p.detach(), q.detach(), rtol=10 * precision(name), atol=precision(name))
    assert same(opt.state[p], plain.state[q], 10 * precision(name))


@all_backends
@all_rows
def test_large_counters(name: str, backend: str) -> None:
    """A resumed counter of 2**24 - 1 or 2**24 + 2, where a float32 counter sticks, is stepped as by the optimizer."""
    for count in (float(2**24 - 1), float(2**24 + 2)):
        p, q = a_weight(), a_weight()
        opt, plain = one_pass(name, p, backend), built(name, q)
        for base, w in ((opt, p), (plain, q)):
            w.grad = gradient(0)
            base.step()
            if "step" in base.state[w]:
                base.state[w]["step"].fill_(count)
        q.data.copy_(p.data)
        p.grad = q.grad = gradient(1)
        x = p.detach().clone()
        opt.step()
        plain.step()

        torch.testing.assert_close(p.detach(), decayed(x, q.detach()), rtol=precision(name), atol=0.1 * precision(name))
        assert same(opt.state[p], plain.state[q], precision(name))


@in_16_bits
def test_stochastic_rounding_is_right_on_average(name: str, backend: str) -> None:
    """Of bfloat16 weights and state, each is one of the two neighbours of the float32 result, and the mean is right."""
    size = 4096
    p, q = (nn.Parameter(torch.ones(size, dtype=dtype)) for dtype in (BF16, torch.float32))
    opt, wide = one_pass(name, p, backend, rounding="stochastic"), one_pass(name, q, backend)
    for step in range(2):
        for each, w in ((opt, p), (wide, q)):
            w.grad = torch.full_like(w, 0.375 + step)
            each.step()
            if step == 0:
                w.data.fill_(1.0)
                for value in each.state[w].values():
                    if isinstance(value, Tensor) and value.numel() > 1:
                        value.fill_(0.25)
    pairs = [(p.detach(), q.detach())]
    pairs += [(value, wide.state[q][key]) for key, value in opt.state[p].items() if value.numel() > 1]
    for narrow, exact in pairs:
        low, high = narrow.float().min(), narrow.float().max()
        gap = float(high - low)

        assert narrow.unique().numel() <= 2
        assert low - 1e-6 <= exact[0] <= high + 1e-6
        assert abs(float(narrow.double().mean() - exact[0])) <= 1e-6 + 5 * gap / 2 / size**0.5


@all_backends
@all_rows
def test_numpys_error_state_does_not_matter(name: str, backend: str) -> None:
    """With numpy.seterr(all="raise"), a step at count 100,000 and with eps 1e-50 works: powers of beta are then 0."""
    numpy = pytest.importorskip("numpy")
    p = a_weight(torch.float32)
    opt = one_pass(name, p, backend)
    for step in range(3):
        p.grad = gradient(step, torch.float32)
        with numpy.errstate(all="raise" if not INTERPRETED else "ignore"):  # the interpreter computes in numpy
            opt.step()
        if "step" in opt.state[p]:
            opt.state[p]["step"].fill_(100_000.0)
        if "eps" in opt.param_groups[0]:
            opt.param_groups[0]["eps"] = 1e-50

    assert p.isfinite().all()


ADAM_STATE = ("exp_avg", "exp_avg_sq")


@all_backends
@pytest.mark.parametrize("counter", [torch.zeros(()).new_empty(0), torch.ones(6), torch.tensor(3, dtype=torch.int64)])
def test_a_counter_that_no_kernel_reads(counter: Tensor, backend: str) -> None:
    """With an empty counter, one of six numbers or an integer, the optimizer's own code steps, or raises its error."""
    p = a_weight()
    opt = one_pass("Adam", p, backend)
    p.grad = gradient(0)
    opt.step()
    opt.state[p]["step"] = counter.clone()
    if counter.numel() == 1:
        opt.step()
        assert opt.state[p]["step"].item() == 4
        return
    with pytest.raises(RuntimeError, match=r"cannot be converted to Scalar|one element"):
        opt.step()


@all_backends
@pytest.mark.parametrize("key", ADAM_STATE)
def test_state_of_a_type_that_no_kernel_reads(key: str, backend: str) -> None:
    """State of integers raises before anything is written; the error names the type."""
    p = a_weight()
    opt = one_pass("Adam", p, backend)
    p.grad = gradient(0)
    opt.step()
    opt.state[p][key] = opt.state[p][key].long()
    x = p.detach().clone()
    with pytest.raises(ValueError, match=r"has the type torch\.int64, but the kernels read only float32"):
        opt.step()

    assert torch.equal(p.detach(), x)
    assert opt.state[p]["step"].item() == 1


def test_every_class_of_the_table_is_tested() -> None:
    """The rows of this file cover every class in the table, but schedule-free ones: test_schedule_free.py."""
    covered = {
        name if isinstance(name, str) else f"{name.__module__}.{name.__qualname__}" for name, *_ in ROWS.values()
    }

    listed = {name for name in updates.TABLE if not name.startswith("schedulefree.")}
    assert {name.rsplit(".", 1)[-1] for name in listed} == {name.rsplit(".", 1)[-1] for name in covered}
