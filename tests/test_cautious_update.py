"""CautiousUpdate against the printed algorithm and timm's own cautious optimizers, for every kind of gradient."""

import copy
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any

import pytest
import reference
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import net, values, weight
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, AdamW, Optimizer

from cwd_wrap import CautiousUpdate

all_scales = pytest.mark.parametrize("scale", ["mean", "numel", None])
F64 = torch.float64


def masked(x: Tensor, w: Tensor, g: Tensor, eta_lam: float) -> Tensor:
    """The `reference` of weights of any type, in float64."""
    return reference.update()(x.detach().double(), w.detach().double(), g.double(), eta_lam)


class Moves(Optimizer):
    """Subtracts lr * u from the weights, with an update ``u`` that the test sets. It ignores the gradient."""

    def __init__(self, params: Iterable[Tensor], u: Tensor, **options: Any) -> None:
        super().__init__(params, {"lr": 0.5, "weight_decay": 0.0, **options})
        self.u = u

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(group["lr"] * self.u)


class Spoils(Optimizer):
    """Heavy-ball SGD that negates the gradients in place after the step, which raises their version counter."""

    silent = False

    def __init__(self, params: Iterable[Tensor], lr: float) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": 0.0})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("momentum", torch.zeros_like(p)).mul_(0.9).add_(p.grad)
                p.sub_(group["lr"] * m)
                (p.grad.data if self.silent else p.grad).neg_()


class SpoilsSilently(Spoils):
    """The same through ``.data``, as in many older optimizers, which leaves the version counter unchanged."""

    silent = True


# ------------------------------------------------------------------------------------ by eye

FOUR = torch.tensor([1.0, -1.0, 1.0, -1.0])
BY_EYE = [("mean", 2.0), ("numel", 4 / 3), (None, 1.0)]


@pytest.mark.parametrize(("scale", "alpha"), BY_EYE)
def test_four_numbers(scale: str | None, alpha: float) -> None:
    """Of the updates 1, -1, 1, -1 under gradients 1, 1, -1, -1 the first and the last are kept, and scaled up."""
    p = weight(0, 0, 0, 0, grad=[1, 1, -1, -1])
    CautiousUpdate(Moves([p], FOUR), scale=scale).step()

    assert pytest.approx([-0.5 * alpha, 0, 0, 0.5 * alpha]) == p.tolist()


@all_scales
def test_zero_update_and_zero_gradient_are_masked(scale: str | None) -> None:
    """u*g > 0 is strict: a weight with gradient 0 or update 0 does not move and is not counted in the mean."""
    p = weight(1, 1, grad=[0, 1])
    CautiousUpdate(Moves([p], torch.tensor([1.0, 0.0])), scale=scale).step()

    assert [1.0, 1.0] == p.tolist()


@pytest.mark.parametrize(("scale", "alpha"), [("mean", 1000.0), ("numel", 4000 / 2), (None, 1.0)])
def test_one_of_many(scale: str | None, alpha: float) -> None:
    """One kept weight of 4000 is scaled by 1000, not 4000: the mean is clamped at 1e-3. The paper's factor is 2000."""
    g = -torch.ones(4000)
    g[7] = 1
    p = weight(*[0.0] * 4000, grad=g)
    CautiousUpdate(Moves([p], torch.ones(4000)), scale=scale).step()

    assert [7] == p.nonzero().flatten().tolist()
    assert pytest.approx(-0.5 * alpha) == p[7].item()


@all_scales
def test_all_masked_is_no_step(scale: str | None) -> None:
    """If the whole update of a parameter goes up the gradient, the parameter only decays."""
    p, q = weight(1, 2, grad=[-1, -1]), weight(1, 2, grad=[-1, -1])
    CautiousUpdate(Moves([p], torch.ones(2)), scale=scale).step()
    CautiousUpdate(Moves([q], torch.ones(2), weight_decay=0.25), scale=scale).step()

    assert [1.0, 2.0] == p.tolist()
    assert [0.875, 1.75] == q.tolist()


def test_each_parameter_has_its_own_mean() -> None:
    """A parameter with half its update kept takes double steps; the other parameter takes plain ones."""
    p, q = weight(0, 0, grad=[1, -1]), weight(0, 0, grad=[1, 1])
    CautiousUpdate(Moves([p, q], torch.ones(2))).step()

    assert [[-1.0, 0.0], [-0.5, -0.5]] == [p.tolist(), q.tolist()]


# ------------------------------------------------------------------------------------ the printed algorithm


def printed_c_adamw(w: Tensor, gradients: Iterable[Tensor], lr: float, lam: float, scale: str | None) -> list[Tensor]:
    """Algorithm 2 of arXiv 2411.16085, in float64."""
    beta1, beta2, eps = 0.9, 0.99, 1e-8
    m, v, out = torch.zeros_like(w), torch.zeros_like(w), []
    for t, g in enumerate(gradients, 1):
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g**2
        u = m / (1 - beta1**t) / ((v / (1 - beta2**t)).sqrt() + eps)
        phi = (u * g > 0).double()
        alpha = {"mean": 1 / phi.mean().clamp(min=1e-3), "numel": phi.numel() / (phi.sum() + 1), None: 1.0}[scale]
        w = w - lr * alpha * phi * u
        w = w - lr * lam * w
        out.append(w)
    return out


@all_scales
@pytest.mark.parametrize("lam", [0.0, 0.5])
@pytest.mark.parametrize("maximize", [False, True])
def test_equals_the_printed_algorithm(maximize: bool, lam: float, scale: str | None) -> None:
    """Around AdamW in float64 it equals the printed C-AdamW at each of thirty steps, to 1e-12."""
    start, gradients = torch.randn(40, dtype=F64), list(torch.randn(30, 40, dtype=F64))
    p = nn.Parameter(start.clone())
    base = AdamW([p], lr=0.05, betas=(0.9, 0.99), eps=1e-8, weight_decay=lam, maximize=maximize)
    opt = CautiousUpdate(base, scale=scale)
    for g, expected in zip(gradients, printed_c_adamw(start, gradients, 0.05, lam, scale), strict=True):
        p.grad = -g if maximize else g.clone()
        opt.step()
        torch.testing.assert_close(expected, p.detach(), rtol=1e-12, atol=1e-13)


# ------------------------------------------------------------------------------------ timm's own

# These differ in what timm's cautious version masks; all others are equal. The last test removes the difference.
DIFFER = {
    "cadan": "masks the first moment only, not the term of gradient differences",
    "cadanw": "the same",
    "cadamp": "projects the masked update once more, and masks by the projected gradient",
    "csgdp": "the same",
}
SHAPES = [(4, 3), (6,), (2, 3, 3, 3), (1,)]


def timms(name: str, shapes: list[tuple[int, ...]], dtype: torch.dtype = F64, **options: Any) -> Any:
    factory = pytest.importorskip("timm.optim").create_optimizer_v2
    generator = torch.Generator().manual_seed(1)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in shapes]
    return factory(params, name, lr=0.05, weight_decay=0.0, **options)


def apart(name: str, shapes: list[tuple[int, ...]] = SHAPES, dtype: torch.dtype = F64, **options: Any) -> float:
    """The largest difference over all steps between timm's cautious optimizer and the wrapped plain one."""
    own = timms(name, shapes, dtype, **options)
    wrapped = CautiousUpdate(timms(name, shapes, dtype, caution=False, **options))
    plain = timms(name, shapes, dtype, caution=False, **options)
    generator = torch.Generator().manual_seed(3)
    worst = masked_anything = 0.0
    for _ in range(20):
        for a, b, c in zip(*(o.param_groups[0]["params"] for o in (own, wrapped, plain)), strict=True):
            a.grad = torch.randn(a.shape, generator=generator, dtype=dtype)
            b.grad, c.grad = a.grad.clone(), a.grad.clone()
        for opt in (own, wrapped, plain):
            opt.step()
        for a, b, c in zip(*(o.param_groups[0]["params"] for o in (own, wrapped, plain)), strict=True):
            worst = max(worst, (a - b).abs().max().item())
            masked_anything = max(masked_anything, (a - c).abs().max().item())
    assert masked_anything > 0.01  # otherwise the comparison is empty
    return worst


def cautious_names() -> list[str]:
    """All optimizers of timm that have a cautious version, by its name."""
    try:
        from timm.optim import list_optimizers
    except ImportError:
        return []
    names = set(list_optimizers())
    return sorted(name for name in names if name.startswith("c") and name[1:] in names)


def test_timms_names_are_found() -> None:
    """timm has cautious versions of two dozen optimizers; the list contains those that differ."""
    pytest.importorskip("timm")

    assert {"cadamw", "clion", "csgdw", "cnadamw", "cadafactorbv", "clamb", "cmars", *DIFFER} <= {*cautious_names()}


@pytest.mark.parametrize("name", [n for n in cautious_names() if n not in DIFFER])
def test_equals_timms_own(name: str) -> None:
    """The wrapper around timm's plain optimizer is timm's cautious one, at each of twenty steps in float64."""
    assert apart(name) < 1e-11


@pytest.mark.parametrize("name", ["cadamw", "clion", "csgdw"])
def test_equals_timms_own_in_float32(name: str) -> None:
    """In float32 they differ by roundings of w - x: less than a millionth of a weight a step."""
    assert apart(name, dtype=torch.float32) < 2e-5


@pytest.mark.parametrize("name", DIFFER)
def test_differs_from_timms_own(name: str) -> None:
    """Where timm masks something other than the update, the two differ, as listed in `DIFFER`."""
    assert apart(name) > 1e-3


@pytest.mark.parametrize("name", DIFFER)
def test_equals_timms_own_without_the_differing_term(name: str) -> None:
    """With options or shapes that remove the differing term, these are equal too."""
    if name.startswith("cadan"):
        assert apart(name, betas=(0.98, 0.0, 0.99)) < 1e-11
    else:
        assert apart(name, [(6,), (1,)]) < 1e-11


# ------------------------------------------------------------------------------------ gradients

GRADIENTS = [[1.0, 2.0, -3.0], [-1.0, 2.0, 1.0], [0.5, -2.0, 1.0], [0.5, -2.0, -1.0]]


def spoiled(cls: Any) -> None:
    p, q = weight(1, 1, 1, dtype=F64), weight(1, 1, 1, dtype=F64)
    spoils, sound = CautiousUpdate(cls([p], lr=0.1)), CautiousUpdate(SGD([q], lr=0.1, momentum=0.9))
    for g in GRADIENTS:
        p.grad, q.grad = torch.tensor(g, dtype=F64), torch.tensor(g, dtype=F64)
        spoils.step()
        sound.step()

    assert pytest.approx(q.tolist(), rel=1e-14) == p.tolist()


def test_gradients_changed_in_place_are_copied() -> None:
    """If a base changes gradients in place, the mask still uses the original ones, from the first step on."""
    spoiled(Spoils)


def test_gradients_changed_through_data_are_copied() -> None:
    """The same holds for changes through ``.data`` (torch_optimizer's NovoGrad), which no version counter shows."""
    spoiled(SpoilsSilently)


def test_gradients_changed_for_the_first_time_later_are_warned_of() -> None:
    """If a base changes gradients for the first time after copying has stopped, one warning names the base."""

    class Later(SGD):
        spoils = False

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            super().step(closure)
            if self.spoils:
                self.param_groups[0]["params"][0].grad.neg_()

    p = weight(1, 1, 1, dtype=F64, grad=[1, 1, 1])
    base = Later([p], lr=0.1)
    opt = CautiousUpdate(base)
    opt.step()
    base.spoils = True
    with pytest.warns(UserWarning, match=r"Later modified gradients in place.* copied from the next step on") as caught:
        opt.step()
        p.grad = torch.ones(3, dtype=F64)
        opt.step()

    assert [__file__] == [warning.filename for warning in caught]
    assert 2 * 24 == opt.snapshot_bytes


@pytest.mark.parametrize("name", ["Ranger", "NovoGrad", "LARS", "OrthoGrad", "StableSPAM", "GrokFastAdamW"])
def test_pytorch_optimizers_that_change_gradients(name: str) -> None:
    """Around these optimizers, the mask uses the gradient from before the step."""
    lib = pytest.importorskip("pytorch_optimizer")

    def build(p: nn.Parameter) -> Optimizer:
        made = lib.OrthoGrad(AdamW([p], lr=0.01)) if name == "OrthoGrad" else getattr(lib, name)([p], lr=0.01)
        made.param_groups[0]["weight_decay"] = 0.0
        return made

    p = nn.Parameter(torch.randn(4, 3))
    q = nn.Parameter(p.detach().clone())
    opt, twin = CautiousUpdate(build(p)), build(q)
    for _ in range(6):
        g, x = torch.randn(4, 3), p.detach().clone()
        p.grad, q.grad = g.clone(), g.clone()
        twin.step()
        opt.step()
        torch.testing.assert_close(masked(x, q, g, 0.0).float(), p.detach(), rtol=1e-5, atol=1e-6)
        q.data.copy_(p.data)


@pytest.mark.parametrize("name", ["Lion", "AdaBelief"])
def test_pytorch_optimizers_maximize(name: str) -> None:
    """pytorch_optimizer keeps maximize in the optimizer, not in its groups; the weights still climb at each step."""
    lib = pytest.importorskip("pytorch_optimizer")
    p = weight(1, -1, 2)
    opt = CautiousUpdate(getattr(lib, name)([p], lr=0.1, weight_decay=0.0, maximize=True))
    for _ in range(4):
        before, p.grad = p.tolist(), torch.tensor([1.0, -1.0, 1.0])
        opt.step()

        assert [True, True, True] == [abs(new) > abs(old) for new, old in zip(p.tolist(), before, strict=True)]


@pytest.mark.parametrize(("cls", "expected"), [("Spoils", 2 * 12), ("SGD", 12)])
def test_copies_of_gradients_count_as_memory(cls: str, expected: int) -> None:
    """Gradients are copied until a step leaves them unchanged, and `snapshot_bytes` counts the copies."""
    p = weight(1, 1, 1, grad=[1, 1, 1])
    opt = CautiousUpdate({"Spoils": Spoils, "SGD": SGD}[cls]([p], lr=0.1), path="snapshot")
    before = opt.snapshot_bytes
    opt.step()

    assert (2 * 12, expected) == (before, opt.snapshot_bytes)


def test_sparse_gradients_are_refused_before_anything_changes() -> None:
    """The error names both optimizers; weights, state and groups are unchanged, dense parameters included."""
    embedding, dense = nn.Embedding(4, 2, sparse=True), weight(1, grad=[1])
    base = SGD([dense, *embedding.parameters()], lr=0.1, momentum=0.0, weight_decay=0.5)
    opt = CautiousUpdate(base)
    embedding(torch.tensor([1, 2])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(
        ValueError, match=r"CautiousUpdate needs dense gradients, but SGD has sparse ones: pass sparse=False"
    ):
        opt.step()

    assert torch.equal(before, embedding.weight)
    assert [1.0] == dense.tolist()
    assert {} == dict(base.state)
    assert [0.5] == [group["weight_decay"] for group in base.param_groups]


def test_sparse_gradients_from_a_closure_are_refused_too() -> None:
    """Sparse gradients that a closure makes are refused too, before the base steps."""
    embedding = nn.Embedding(4, 2, sparse=True)
    opt = CautiousUpdate(SGD(embedding.parameters(), lr=0.1, weight_decay=0.5))
    before = embedding.weight.detach().clone()

    def closure() -> Tensor:
        opt.zero_grad()
        loss = embedding(torch.tensor([1, 2])).sum()
        loss.backward()
        return loss

    with pytest.raises(ValueError, match="sparse"):
        opt.step(closure)

    assert torch.equal(before, embedding.weight)
    assert 0.5 == opt.param_groups[0]["weight_decay"]


class MovesAfterItsParent(SGD):
    """Takes its parent's step, then subtracts lr, and adds twice the group's weight_decay."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        super().step(closure)
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(2 * group["weight_decay"] - group["lr"])


def test_a_base_that_moves_weights_after_its_parents_step() -> None:
    """The mask covers the whole step of a subclass, not only its parent's; the decay stays off until the end."""
    p = weight(1, 1, grad=[1, -3])
    CautiousUpdate(MovesAfterItsParent([p], lr=0.125, weight_decay=0.5), scale=None).step()

    assert [0.75 * 0.9375, 1.25 * 0.9375] == p.tolist()


def test_a_nan_stays_in_its_own_weight() -> None:
    """A NaN gradient makes its own weight NaN; the other weights step, scaled as if that one were masked."""
    p = weight(1, 1, 1, 1, grad=[float("nan"), 1, 1, -1])
    CautiousUpdate(Moves([p], torch.tensor([float("nan"), 1.0, 1.0, 1.0]))).step()

    assert p[0].isnan()
    assert [0.0, 0.0, 1.0] == p[1:].tolist()


# ------------------------------------------------------------------------------------ properties

numbers = st.floats(-1e3, 1e3, width=32)
lists = st.lists(st.tuples(numbers, numbers, numbers), min_size=1, max_size=8)


@all_scales
@given(weights=lists)
@settings(max_examples=50, deadline=None)
def test_never_up_the_gradient(scale: str | None, weights: list[tuple[float, float, float]]) -> None:
    """For any update a weight moves down its gradient or not at all; masked weights keep their bits."""
    x, u, g = (torch.tensor(column) for column in zip(*weights, strict=True))
    p = nn.Parameter(x.clone())
    p.grad = g
    CautiousUpdate(Moves([p], u), scale=scale).step()
    moved = x - 0.5 * u - x

    assert bool(((p.detach() - x) * g.sign() <= 0).all())
    assert torch.equal(x[moved * g.sign() >= 0], p.detach()[moved * g.sign() >= 0])


@given(weights=lists)
@settings(max_examples=50, deadline=None)
def test_the_mean_step_is_kept(weights: list[tuple[float, float, float]]) -> None:
    """With scale="mean" the kept coordinates move by 1/ratio times the update, as computed in float64."""
    x, u, g = (torch.tensor(column, dtype=F64) for column in zip(*weights, strict=True))
    p = nn.Parameter(x.clone())
    p.grad = g
    CautiousUpdate(Moves([p], u), scale="mean").step()

    torch.testing.assert_close(masked(x, x - 0.5 * u, g, 0.0), p.detach(), rtol=1e-12, atol=1e-9)


# ------------------------------------------------------------------------------------ in use

SIGNED: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda params: SGD(params, lr=0.1),
    "Adagrad": lambda params: Adagrad(params, lr=0.1),
    "RMSprop": lambda params: torch.optim.RMSprop(params, lr=0.01),
}


@pytest.mark.parametrize("build", SIGNED.values(), ids=list(SIGNED))
def test_without_momentum_nothing_is_masked(build: Any) -> None:
    """Where the update always has the gradient's sign, the wrapper changes only roundings."""
    a, b = net().double(), net().double()
    for step in range(5):
        for model in (a, b):
            for p in model.parameters():
                p.grad = torch.randn(p.shape, dtype=F64, generator=torch.Generator().manual_seed(step))
        if step == 0:
            plain, wrapped = build(a.parameters()), CautiousUpdate(build(b.parameters()))
        plain.step()
        wrapped.step()

    torch.testing.assert_close(values(a), values(b), rtol=1e-13, atol=1e-14)


def test_around_muon_the_mask_applies_after_orthogonalisation() -> None:
    """The mask applies to Muon's orthogonalised step: entries against the gradient are set to zero."""
    p = nn.Parameter(torch.randn(4, 6))
    if not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    opt = CautiousUpdate(torch.optim.Muon([p], lr=0.02, weight_decay=0.1))
    cut = 0
    for _ in range(4):
        x, p.grad = p.detach().clone(), torch.randn(4, 6)
        q, twin = copy.deepcopy((p, opt.base_optimizer))
        twin.param_groups[0]["weight_decay"] = 0.0
        q.grad = p.grad.clone()
        twin.step()
        opt.step()
        cut += int(((x - q.detach()) * p.grad <= 0).sum())
        torch.testing.assert_close(masked(x, q, p.grad, 0.002).float(), p.detach(), rtol=1e-5, atol=1e-6)

    assert cut > 0


def test_without_learning_rate() -> None:
    """An optimizer without a learning rate can be masked if no group decays."""
    timm = pytest.importorskip("timm.optim")
    p = nn.Parameter(torch.randn(4, 3))
    opt = CautiousUpdate(timm.create_optimizer_v2([p], "adafactor", lr=None, weight_decay=0.0))
    x, p.grad = p.detach().clone(), torch.randn(4, 3)
    opt.step()

    assert not torch.equal(x, p)


def test_the_error_for_an_unknown_learning_rate_names_no_missing_argument() -> None:
    """The error about a missing learning rate does not name step_size=, which this class lacks."""
    timm = pytest.importorskip("timm.optim")
    base = timm.create_optimizer_v2([weight(1.0)], "adafactor", lr=None, weight_decay=0.1)
    with pytest.raises(ValueError, match="group 0 of Adafactor") as caught:
        CautiousUpdate(base)

    assert "step_size=" not in str(caught.value)


@pytest.mark.parametrize("scale", ["sum", "", 1.0, False])
def test_unknown_scales(scale: object) -> None:
    """The error for an unknown scale lists the known ones."""
    with pytest.raises(ValueError, match=r"unknown scale .*'mean', 'numel', None"):
        CautiousUpdate(SGD([weight(1.0)], lr=0.1), scale=scale)  # type: ignore[arg-type]


def test_the_report_counts_kept_updates() -> None:
    """The report counts the kept weights, also in groups that do not decay."""
    p, q = weight(0, 0, 0, 0, grad=[1, 1, -1, -1]), weight(0, 0, 0, 0)
    opt, reports = CautiousUpdate(Moves([p, q], FOUR)), []
    opt.observer = reports.append
    opt.step()

    assert [(2, 4)] == [(int(r.active), r.total) for r in reports]


def test_no_warning_without_decay() -> None:
    """A base without weight decay raises no warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = CautiousUpdate(AdamW([weight(1.0, grad=[1.0])], weight_decay=0.0), path="snapshot")
        opt.step()

    assert 4 == opt.snapshot_bytes


def test_the_loss_rarely_rises() -> None:
    """On the paper's toy, 4*a**2 + b**2 from (1, 1), the loss of heavy-ball SGD rises at over 100 of 1,500 steps.

    With CautiousUpdate it rises at fewer than 10, where a step crosses the valley.
    """
    climbs = []
    for wrap in (lambda opt: opt, lambda opt: CautiousUpdate(opt, scale=None)):
        p = weight(1, 1, dtype=F64)
        opt, losses = wrap(SGD([p], lr=0.001, momentum=0.99)), []
        for _ in range(1500):
            opt.zero_grad()
            loss = (torch.tensor([4.0, 1.0]) * p**2).sum()
            loss.backward()
            losses.append(loss.item())
            opt.step()
        climbs.append(sum(new > old for old, new in pairwise(losses)))

    assert climbs[0] > 100
    assert climbs[1] < 10
