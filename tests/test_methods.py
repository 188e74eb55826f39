"""Every method against its float64 reference: bases, paths, types, shapes, layouts, tensor lr, sparse rows."""

import copy
from typing import Any

import pytest
import torch
from support import Base, Method, weight
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW

from cwd_wrap import CautiousUpdate

F64 = torch.float64
LR, LAM, MU = 0.125, 0.5, 0.5
SHAPES = [(), (1,), (0,), (2, 0), (6, 5), (4, 6, 2, 2), (64, 128, 2, 2)]

BASES = [
    Base("SGD", SGD, lr=0.05),
    Base("SGD-momentum", SGD, lr=0.05, momentum=0.9),
    Base("SGD-nesterov-maximize", SGD, lr=0.05, momentum=0.9, nesterov=True, maximize=True),
    Base("Adam", Adam, lr=0.05),
    Base("AdamW", AdamW, lr=0.05),
    Base("AdamW-amsgrad", AdamW, lr=0.05, amsgrad=True),
    Base("AdamW-maximize", AdamW, lr=0.05, maximize=True),
]


def check_steps(method: Method, base: Base) -> None:
    """Each of six steps is the base's step without decay, then the method, in groups of two strengths."""
    params = [nn.Parameter(torch.randn(shape, dtype=F64)) for shape in SHAPES[:6]]
    groups = [{"params": params[:3]}, {"params": params[3:], "weight_decay": 0.25}]
    opt = method.wrap(base(groups, **method.base))
    sign = -1 if base.options.get("maximize") else 1
    for step in range(6):
        for p in params:
            p.grad = torch.randn_like(p)
        before = [p.detach().clone() for p in params]
        twins, plain = copy.deepcopy((params, opt.base_optimizer))
        for p, q, group in zip(params, twins, [0] * 3 + [1] * 3, strict=True):
            q.grad = p.grad.clone()
            plain.param_groups[group]["weight_decay"] = 0.0
        plain.step()
        torch.manual_seed(step)
        expected = [
            method.reference(x, q.detach(), sign * p.grad, 0.05 * lam)
            for x, q, p, lam in zip(before, twins, params, [0.5] * 3 + [0.25] * 3, strict=True)
        ]
        torch.manual_seed(step)
        opt.step()

        torch.testing.assert_close(expected, [p.detach() for p in params], rtol=1e-12, atol=1e-13)
    assert [0.5, 0.25] == [group["weight_decay"] for group in opt.param_groups]


@pytest.mark.parametrize("base", BASES, ids=str)
def test_a_step_is_that_of_the_base_and_the_method(every_rule: Method, base: Base) -> None:
    """Around each base, each method and each path make the base's step without decay, then the method."""
    check_steps(every_rule, base)


def test_every_method_on_each_of_its_paths(every_formula: Method) -> None:
    """The same holds for every method on each of its paths, around a base that maximizes."""
    (base,) = (base for base in BASES if base.name == "SGD-nesterov-maximize")
    check_steps(every_formula, base)


# ------------------------------------------------------------------------------------ one step of heavy-ball SGD


def between(low: float, high: float, like: Tensor) -> Tensor:
    """Random numbers of both signs, with sizes from ``low`` to ``high``, in the type and the layout of ``like``."""
    size = low + (high - low) * torch.rand_like(like, dtype=F64)
    return size.copysign(torch.randn_like(like, dtype=F64)).to(like.dtype)


def real(t: Tensor) -> Tensor:
    t = t.detach()
    return (torch.view_as_real(t) if t.is_complex() else t).double()


def check(
    method: Method, params: list[Tensor], lr: Any = LR, grads: list[Tensor] | None = None, roundings: float = 8
) -> None:
    """Step once, with random gradients and larger momenta, and compare with the reference.

    Every step is far above a rounding of its weight, so that all paths give the same mask. The state is already there,
    so the path "one_pass" makes this step.
    """
    grads = [between(0.25, 0.5, p.detach()) for p in params] if grads is None else grads
    base = SGD(params, lr=lr, momentum=MU, weight_decay=LAM, **method.base)
    expected = []
    torch.manual_seed(7)
    momenta = [between(2.0, 3.0, g) for g in grads]
    for p, g, m in zip(params, grads, momenta, strict=True):
        p.grad, base.state[p]["momentum_buffer"] = g, m.clone()
        x = real(p)
        expected.append(method.reference(x, x - LR * (MU * real(m) + real(g)), real(g), LR * LAM))
    method.wrap(base).step()

    for p, g, kept, wanted in zip(params, grads, [g.clone() for g in grads], expected, strict=True):
        eps = torch.finfo(p.dtype).eps
        torch.testing.assert_close(real(p), wanted, rtol=roundings * eps, atol=roundings * eps / 4)
        assert p.grad is g
        assert torch.equal(g, kept)


def parameter(shape: tuple[int, ...], dtype: torch.dtype = F64) -> nn.Parameter:
    return nn.Parameter(between(0.5, 1.0, torch.empty(shape, dtype=dtype)))


@pytest.mark.parametrize("dtype", [F64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_types(every_rule: Method, dtype: torch.dtype) -> None:
    """In every type a step equals the reference up to some roundings, and weights keep their type."""
    p = parameter((200,), dtype)
    check(every_rule, [p])

    assert dtype == p.dtype


def test_types_mixed_in_one_group(every_formula: Method) -> None:
    """Parameters of four types in one group each obey the method in their own type."""
    types = [F64, torch.float32, torch.bfloat16, torch.float16]
    check(every_formula, [parameter((30,), dtype) for dtype in types for _ in range(2)])


@pytest.mark.parametrize(
    "lr", [LR, torch.tensor(LR, dtype=F64), torch.tensor([LR], dtype=F64)], ids=["float", "0-d", "1-element"]
)
def test_shapes_and_tensor_learning_rates(every_rule: Method, lr: Any) -> None:
    """0-d, empty and one-element parameters step like others, with a number or a tensor as learning rate."""
    if isinstance(lr, Tensor) and lr.dim() == 1 and torch.__version__ < "2.5":
        pytest.skip("SGD of torch 2.4 takes a 0-d learning rate only")
    check(every_rule, [parameter(shape) for shape in SHAPES], lr)


LAYOUTS = {
    "contiguous": lambda t: t,
    "channels_last": lambda t: t.to(memory_format=torch.channels_last),
    "transposed": lambda t: t.transpose(0, 1).contiguous().transpose(0, 1),
    "every other": lambda t: torch.stack([t, t + 1], dim=-1)[..., 0],
    "part of a larger one": lambda t: nn.functional.pad(t, (1, 1, 1, 1))[..., 1:-1, 1:-1],
}


def test_layouts(every_rule: Method) -> None:
    """Weights and gradients of any strides, equal or not, small or large, obey the method and keep their strides."""
    params, grads = [], []
    for of_weight in LAYOUTS.values():
        for of_grad in LAYOUTS.values():
            large = of_weight is of_grad or of_grad is LAYOUTS["contiguous"]
            for shape in ((4, 6, 2, 2), (64, 128, 2, 2), (4, 6, 2, 2)) if large else ((4, 6, 2, 2),):
                params.append(nn.Parameter(of_weight(parameter(shape).detach())))
                grads.append(of_grad(between(0.25, 0.5, torch.empty(shape, dtype=F64))))
    strides = [p.stride() for p in params]
    check(every_rule, params, grads=grads)

    assert strides == [p.stride() for p in params]


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
def test_a_complex_weight_is_its_two_parts(every_rule: Method, dtype: torch.dtype) -> None:
    """The real and the imaginary part are two weights, as in torch."""
    if every_rule.base:
        pytest.skip("torch's fused optimizers take no complex weights")
    parts = [torch.empty(5, 2, dtype=dtype.to_real()) for _ in range(2)]
    p, g = (
        torch.view_as_complex(between(*sizes, t)) for sizes, t in zip([(0.5, 1.0), (0.25, 0.5)], parts, strict=True)
    )
    check(every_rule, [nn.Parameter(p)], grads=[g])


# ------------------------------------------------------------------------------------ which weights take part


def test_a_parameter_without_a_gradient_keeps_its_value(every_rule: Method) -> None:
    """A parameter without a gradient keeps its value, frozen or not; the other parameter steps."""
    p, q, r = weight(1.0), nn.Parameter(torch.ones(1), requires_grad=False), weight(1.0, grad=[1.0])
    expected = every_rule.after_sgd(r, r.grad)
    every_rule.wrap(SGD([p, q, r], lr=0.1, weight_decay=0.5, **every_rule.base)).step()

    assert [1.0, 1.0] == [p.item(), q.item()]
    torch.testing.assert_close(expected, r.detach())


def test_a_group_without_decay(every_rule: Method) -> None:
    """A group with weight_decay 0 takes the base's step only, bit for bit; CautiousUpdate masks it there too."""
    p, q = weight(0.1, 2.0, grad=[0.3, -1.0]), weight(1.0, grad=[1.0])
    expected = p.detach() - 0.125 * p.grad
    groups = [{"params": [p], "weight_decay": 0.0}, {"params": [q]}]
    opt = every_rule.wrap(SGD(groups, lr=0.125, weight_decay=0.5, **every_rule.base))
    after = every_rule.after_sgd(q, q.grad, 0.125)
    opt.step()
    masks = every_rule.wrap.func is CautiousUpdate

    torch.testing.assert_close(
        every_rule.after_sgd(weight(0.1, 2.0), p.grad, 0.125, 0.0) if masks else expected,
        p.detach(),
        rtol=1e-6,
        atol=0,
    )
    assert masks or torch.equal(expected, p.detach())
    torch.testing.assert_close(after, q.detach())


def test_only_rows_in_a_sparse_gradient_take_part(every_rule: Method) -> None:
    """Rows with a gradient obey the method and others keep their bits; methods that read gradients raise an error."""
    if every_rule.base:
        pytest.skip("torch's fused optimizers take no sparse gradients")
    p = nn.Parameter(torch.tensor([[1.0, -2.0]] * 4, dtype=F64))
    before, rows, values = p.detach().clone(), [0, 2], torch.tensor([[1.0, 1.0], [-3.0, 0.5]], dtype=F64)
    p.grad = torch.sparse_coo_tensor([[0, 2, 2]], [[1.0, 1.0], [-1.0, 0.25], [-2.0, 0.25]], (4, 2), dtype=F64)
    opt = every_rule.wrap(SGD([p], lr=0.1, weight_decay=0.5))
    if opt._method().reads_gradient:
        with pytest.raises(ValueError, match=f"{type(opt).__name__} needs dense gradients, but SGD has sparse ones"):
            opt.step()

        assert torch.equal(before, p)
        assert (0.5, {}) == (opt.param_groups[0]["weight_decay"], dict(opt.state))
        return
    expected = every_rule.after_sgd(before[rows], values)
    opt.step()

    torch.testing.assert_close(expected, p.detach()[rows])
    assert torch.equal(before[[1, 3]], p[[1, 3]])
