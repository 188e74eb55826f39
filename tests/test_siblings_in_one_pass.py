"""CautiousUpdate and PNormDecay in one pass: by eye, against the papers in float64, and against the path with a copy.

The Triton kernels need the interpreter, in a process of its own:

TRITON_INTERPRET=1 pytest tests/test_siblings_in_one_pass.py
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import reference
import torch
from support import net, train, values, weight
from test_updates import BACKENDS, LAM, LR, ROWS, UNREAD, a_weight, all_backends, built, gradient, on, precision
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from cwd_wrap import CautiousUpdate, PNormDecay

F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16
Wrap = Callable[..., Any]
METHODS: dict[str, tuple[Wrap, reference.Reference]] = {
    "mean": (CautiousUpdate, reference.update("mean")),
    "numel": (partial(CautiousUpdate, scale="numel"), reference.update("numel")),
    "unscaled": (partial(CautiousUpdate, scale=None), reference.update(None)),
    "p-norm": (PNormDecay, reference.p_norm(0.8)),
    "p-norm-1": (partial(PNormDecay, p=1.0), reference.p_norm(1.0)),
    "p-norm-2": (partial(PNormDecay, p=2.0), reference.p_norm(2.0)),
}
all_methods = pytest.mark.parametrize("method", METHODS)
OF_ALL_ROWS = ("mean", "p-norm")
MAXIMIZED = ("AdamW", "SGD-momentum", "RMSprop-centered")  # to maximize is the same for all: it negates the gradient


def cases() -> Iterator[Any]:
    """AdamW with every method; every other row with both of two, or, where a kernel is compiled, with one in turn."""
    for backend in BACKENDS:
        for turn, name in enumerate(ROWS):
            some = OF_ALL_ROWS if backend == "eager" else [OF_ALL_ROWS[turn % 2]]
            for method in METHODS if name == "AdamW" else some:
                for maximize in (False, True) if name in MAXIMIZED else (False,):
                    yield on(backend, name, method, maximize)


pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of infinities and NaN


def sgd(wrap: Wrap, backend: str, *weights: nn.Parameter, **options: Any) -> Any:
    return wrap(SGD(weights, **{"lr": 0.125, "weight_decay": 0.5, **options}), path="one_pass", backend=backend)


# ------------------------------------------------------------------------------------ by eye


@all_backends
@pytest.mark.parametrize(("scale", "alpha"), [("mean", 2.0), ("numel", 4 / 3), (None, 1.0)])
def test_four_updates(scale: str | None, alpha: float, backend: str) -> None:
    """With momentum 1 the updates are 1, 1, -1, -1; under gradients 1, -1, 1, -1 the outer two are kept and scaled."""
    p = weight(0, 0, 0, 0, grad=[0, 2, -2, 0])
    opt = sgd(partial(CautiousUpdate, scale=scale), backend, p, momentum=1.0, weight_decay=0.0)
    opt.step()
    p.data.zero_()
    p.grad = torch.tensor([1.0, -1.0, 1.0, -1.0])
    opt.step()

    assert p.tolist() == pytest.approx([-0.125 * alpha, 0.0, 0.0, 0.125 * alpha])


@all_backends
def test_the_decay_of_a_cautious_update(backend: str) -> None:
    """Half of the update is kept: 1 - 2 * 0.125 = 0.75; then both weights lose the share 1/16, the masked one too."""
    p = weight(1, 1, grad=[1, 0])
    sgd(CautiousUpdate, backend, p).step()

    assert p.tolist() == [0.75 * 0.9375, 0.9375]


@all_backends
def test_p_1(backend: str) -> None:
    """From 1 to 3 with the factor of a weight of 1, 1 / (1 + 1/2), and from 3 to 1 with that of 3, 1 / (1 + 1/6)."""
    p = weight(1, 3, grad=[-2, 2], dtype=F64)
    sgd(partial(PNormDecay, p=1.0), backend, p, lr=1.0).step()

    assert p.tolist() == pytest.approx([3 / 1.5, 1 / (1 + 1 / 6)], rel=1e-15)


@all_backends
@pytest.mark.parametrize("p", [0.8, 1.0, 2.0])
def test_a_tensor_of_zeros_trains_and_zeros_of_others_stay(p: float, backend: str) -> None:
    """A tensor of zeros takes a plain step. Below p = 2 a zero beside another weight stays 0, also in the last row."""
    zeros, mixed = weight(0, 0, grad=[1, -1]), weight(0, 1, 0, grad=[1, 1, 1])
    sgd(partial(PNormDecay, p=p), backend, zeros, mixed).step()

    assert zeros.tolist() == [-0.125, 0.125]
    assert (mixed[::2] != 0).tolist() == [p == 2.0] * 2


@all_backends
@all_methods
def test_two_groups(method: str, backend: str) -> None:
    """A group with weight_decay 0 takes the plain step of PNormDecay, and the masked one of CautiousUpdate."""
    p, q = weight(1, 1, grad=[1, 0]), weight(1, 1, grad=[1, 0])
    wrap, rule = METHODS[method]
    base = SGD([{"params": [p]}, {"params": [q], "weight_decay": 0.0}], lr=0.125, weight_decay=0.5)
    opt = wrap(base, path="one_pass", backend=backend)
    x, w, g = torch.ones(2), torch.tensor([0.875, 1.0]), torch.tensor([1.0, 0.0])
    opt.step()

    torch.testing.assert_close(p.detach(), rule(x, w, g, 0.0625), check_dtype=False)
    torch.testing.assert_close(q.detach(), rule(x, w, g, 0.0), check_dtype=False)
    assert ["one_pass", "one_pass" if issubclass(type(opt), CautiousUpdate) else "plain"] == [
        of_group.path for of_group in opt.paths()
    ]


@all_backends
@all_methods
def test_nothing_is_copied(method: str, backend: str) -> None:
    """Over a row of the table there is no copy, of weights or gradients, and the repr says so."""
    opt = sgd(METHODS[method][0], backend, weight(1.0, grad=[1.0]))
    opt.step()

    assert opt.snapshot_bytes == 0
    assert "path='one_pass'" in repr(opt)


# ------------------------------------------------------------------------------------ the papers


@pytest.mark.parametrize(("name", "method", "maximize", "backend"), cases())
def test_one_pass_is_the_method_of_the_paper(name: str, method: str, maximize: bool, backend: str) -> None:
    """Six steps from the first one on are those of both papers, computed in float64 from all gradients."""
    _, options, update = ROWS[name]
    wrap, rule = METHODS[method]
    of_paper = partial(update, lr=LR, **{k: v for k, v in options.items() if k not in UNREAD})
    p = a_weight()
    p.data[:3] = 0
    base = built(name, p, "maximize" if maximize else "")
    base.param_groups[0]["weight_decay"] = LAM
    opt = wrap(base, path="one_pass", backend=backend)
    w, gradients = p.detach().clone(), []
    for step in range(6):
        p.grad = gradient(step)
        gradients.append(-p.grad if maximize else p.grad)
        w = rule(w, w - of_paper(gradients), gradients[-1], LR * LAM)
        opt.step()

        torch.testing.assert_close(p.detach(), w, rtol=10 * precision(name), atol=precision(name))


def eight_steps(method: str, name: str, dtype: torch.dtype, **options: Any) -> Tensor:
    """The weights after eight steps in ``dtype``, from weights and along gradients that bfloat16 holds."""
    wrap, _ = METHODS[method]
    p = torch.nn.Parameter(a_weight(BF16).detach().to(dtype))
    base = built(name, p)
    base.param_groups[0]["weight_decay"] = LAM
    opt = wrap(base, **options)
    for step in range(8):
        p.grad = gradient(step, BF16).to(dtype)
        opt.step()
    return p.detach().double()


@all_backends
@pytest.mark.parametrize("name", ["AdamW", "SGD-momentum", "RMSprop-momentum"])
@all_methods
def test_one_pass_is_the_path_with_a_copy(method: str, name: str, backend: str) -> None:
    """Eight steps in one pass and from a copy differ by roundings."""
    one_pass = eight_steps(method, name, F32, path="one_pass", backend=backend)
    copied = eight_steps(method, name, F32, path="snapshot", backend="eager")
    gap = (one_pass - copied).abs() / copied.abs().clamp(min=0.01)

    assert gap.max() <= 1e-4
    assert gap.mean() <= 16 * torch.finfo(F32).eps


@all_backends
@pytest.mark.parametrize("name", ["AdamW", "SGD-momentum", "RMSprop-momentum"])
@all_methods
def test_in_16_bits_one_pass_is_nearer_to_float64_than_a_copy(method: str, name: str, backend: str) -> None:
    """It computes in float32 and rounds once; the base and the comparison round several times."""
    truth = eight_steps(method, name, torch.float64, path="snapshot", backend="eager")
    one_pass = eight_steps(method, name, BF16, path="one_pass", backend=backend)
    copied = eight_steps(method, name, BF16, path="snapshot", backend="eager")

    assert (one_pass - truth).abs().mean() < (copied - truth).abs().mean()


# ------------------------------------------------------------------------------------ in use


@all_backends
@pytest.mark.parametrize(("wrap", "moves"), [(CautiousUpdate, False), (PNormDecay, True)])
def test_a_step_too_small_for_the_weight_counts_by_its_sign(wrap: Wrap, moves: bool, backend: str) -> None:
    """1 - 1e-9 is 1 in float32. The other half is masked, so alpha is 2 in one pass, but no more than 1000 from a copy.

    PNormDecay does not look at the sign.
    """
    ends = []
    for options in ({"path": "one_pass", "backend": backend}, {"path": "snapshot", "backend": "eager"}):
        p = weight(1, 0.5, 1, grad=[1e-9, 1.0, 0.0])
        wrap(SGD([p], lr=1.0, weight_decay=0.25), **options).step()
        ends.append(p.tolist())
    if moves:
        assert ends[0] == pytest.approx(ends[1])
        return
    assert ends[0] == pytest.approx([0.75, 0.75 * (0.5 - 1.5), 0.75])  # two of three are kept
    assert ends[1] == pytest.approx([0.75, 0.75 * (0.5 - 3.0), 0.75])  # one of three


@all_backends
@all_methods
def test_the_sums_for_a_monitor(method: str, backend: str) -> None:
    """An observer gets the share that is kept (or all), the squares of update and weights, and NaN for the rest."""
    wrap, rule = METHODS[method]
    p, reports = weight(1.0, -2.0, 3.0, grad=[1.0, 0.0, -1.0]), []
    opt = sgd(wrap, backend, p)
    opt.observer = reports.append
    opt.step()
    (part,) = reports[0].parts
    active, towards, decayed, step, weights = part.sums[0].tolist()
    x = torch.tensor([1.0, -2.0, 3.0])
    w = rule(x, x - 0.125 * torch.tensor([1.0, 0.0, -1.0]), torch.tensor([1.0, 0.0, -1.0]), 0.0625)

    assert (active, part.path) == (3 if isinstance(opt, PNormDecay) else 2, "one_pass")
    assert [towards != towards, decayed != decayed] == [True, True]
    assert [step, weights] == pytest.approx([2 / 64, float(w.square().sum())], rel=1e-6)


@all_backends
@all_methods
def test_a_first_step_makes_the_state_on_a_path_with_a_copy(method: str, backend: str) -> None:
    """AdamW makes its state in the first step, which is compared with a copy; the others are in one pass."""
    taken: list[str] = []
    p = weight(1.0, -2.0, grad=[1.0, 1.0])
    opt = METHODS[method][0](AdamW([p], lr=0.1, weight_decay=0.5), path="one_pass", backend=backend)
    opt.observer = lambda report: taken.extend(part.path for part in report.parts)
    for _ in range(3):
        opt.step()

    assert taken == ["pieces", "one_pass", "one_pass"]
    assert float(opt.state[p]["step"]) == 3


@all_backends
@all_methods
def test_a_tensor_learning_rate_and_a_schedule(method: str, backend: str) -> None:
    """A tensor lr is read at each step; with lr 0 nothing moves, and steps count as the plain optimizer's."""
    lr = torch.tensor(0.125)
    p = weight(1.0, -2.0, grad=[1.0, 1.0])
    opt = METHODS[method][0](AdamW([p], lr=lr, weight_decay=0.5), path="one_pass", backend=backend)
    opt.step()
    before = p.detach().clone()
    lr.fill_(0.0)
    opt.step()

    assert torch.equal(p.detach(), before)
    lr.fill_(0.125)
    opt.step()

    assert bool((p != before).all())
    assert float(opt.state[p]["step"]) == 3


@all_backends
@all_methods
def test_complex_weights_are_two_real_ones(method: str, backend: str) -> None:
    """A complex weight steps as its real and imaginary part do, and counts as two."""
    z = nn.Parameter(torch.tensor([1 + 2j, -3 + 0.5j]))
    p = nn.Parameter(torch.view_as_real(z.detach()).clone())
    wrap = METHODS[method][0]
    for q in (z, p):
        opt = sgd(wrap, backend, q, momentum=0.9)
        for g in ([[1.0, -1.0], [2.0, 0.0]], [[-0.5, -1.0], [2.0, 1.0]]):
            real = torch.tensor(g)
            q.grad = torch.view_as_complex(real) if q.is_complex() else real
            opt.step()

    torch.testing.assert_close(torch.view_as_real(z.detach()), p.detach())


@all_backends
def test_p_may_change_between_steps(backend: str) -> None:
    """After p = 2 the factor does not depend on the weight: 1 / (1 + 2/16)."""
    q = weight(1.0, 3.0, grad=[0.0, 0.0])
    opt = sgd(partial(PNormDecay, p=1.0), backend, q)
    opt.step()
    opt.p = 2.0
    before = q.detach().clone()
    opt.step()

    torch.testing.assert_close(q.detach(), before / 1.125)


def test_a_monitor_changes_no_bits() -> None:
    """Weights are the same with and without an observer."""
    for method, (wrap, _) in METHODS.items():
        ends: list[Tensor] = []
        for observer in (None, lambda report: None):
            model = net()
            opt = wrap(AdamW(model.parameters(), lr=0.01, weight_decay=0.5))
            opt.observer = observer
            train(model, opt, range(4))
            ends.append(values(model))

        assert torch.equal(*ends), method
