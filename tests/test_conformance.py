"""The table: every optimizer of torch, timm, torch_optimizer, pytorch_optimizer and seven others obeys the rule.

After each step the wrapped weights must be those of the base without decay, plus the rule. A second instance, built
without decay, takes the base's step with the same weights, gradients and random numbers.
"""

import copy
import importlib.util
import math
import sys
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import LIBRARIES, NOTES, Case, Groups, cases

from cwd_wrap import CautiousDecay, rules

LAM, STEPS, GIVEN_ETA = 0.1, 3, 1e-3
CASES = cases()
HOLDING = [case for case in CASES if case.refused is None and not case.averages]
AVERAGING = [case for case in CASES if case.averages]
SPECIAL = torch.tensor([0.0, -0.0, 1e-30, -1e-30, 1e4, -1e4])


def make_groups(case: Case, lam: float) -> Groups:
    """Three groups, the last without decay. The last parameter of the first group never gets a gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = {1: (11,), 2: (6, 5), 4: (4, 3, 3, 2)}
    groups: Groups = []
    for decay in (lam, lam, 0.0):
        weights = [torch.randn(shapes[d], generator=generator) * 0.1 for d in (*case.dims, case.dims[-1])]
        for w in weights:
            w.view(-1)[: len(SPECIAL)] = SPECIAL
        group: dict[str, object] = {"params": [torch.nn.Parameter(w) for w in weights]}
        groups.append(group | {"weight_decay": decay} if case.decay_key else group)
    return groups


def parameters(groups: Groups) -> list[torch.nn.Parameter]:
    return [p for group in groups for p in group["params"]]


def seed(number: int) -> None:
    """Seed torch's generator, and numpy's, from which Kron of pytorch_optimizer draws whether it rebalances."""
    torch.manual_seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number)


def set_gradients(case: Case, groups: Groups, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    silent = groups[0]["params"][-1]
    for p in parameters(groups):
        scale = 10.0 ** torch.randint(-3, 2, p.shape, generator=generator)
        g = torch.randn(p.shape, generator=generator) * scale
        g.view(-1)[-1] = 0.0
        if p is silent:
            continue
        if case.create_graph:
            (p.grad,) = torch.autograd.grad((g * p + 0.01 * p**2).sum(), p, create_graph=True)
        elif case.sparse:
            p.grad = g.to_sparse(1)
        else:
            p.grad = g


def eta(case: Case, group: dict[str, Any]) -> float:
    """eta, by the formula in the zoo's note for this optimizer."""
    names = {"sqrt": math.sqrt, "t": (group.get("step") or 0) + 1, **group}
    return GIVEN_ETA if case.eta == "given" else float(eval(case.eta, names))


class Trio:
    """The wrapped optimizer on the path snapshot and on its default path, and a plain one that is built without decay.

    Each step begins at the weights of the first one for all three.
    """

    def __init__(self, case: Case) -> None:
        self.case = case
        self.plain_groups = make_groups(case, 0.0)
        seed(0)
        self.plain = case.build(self.plain_groups)
        self.wrapped = {"snapshot": self.wrap("snapshot"), "default": self.wrap(None)}
        if {group.path for group in self.wrapped["default"][0].paths()} == {"snapshot"}:
            del self.wrapped["default"]
        for group, plain_group in zip(self.wrapped["snapshot"][0].param_groups, self.plain.param_groups, strict=True):
            decays = group.get("weight_decay", LAM) != 0
            if case.adapts and decays:
                plain_group[case.adapts] = True
            elif case.adapts == "" and decays:
                plain_group["weight_decay"] = 1e-300
            if "weight_decay_1d" in plain_group:
                plain_group["weight_decay_1d"] = 0.0 if decays else plain_group["weight_decay_1d"]

    def wrap(self, path: str | None) -> tuple[CautiousDecay, Groups]:
        groups = make_groups(self.case, LAM)
        seed(0)
        base = self.case.build(groups)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            opt = CautiousDecay(
                base,
                None if self.case.decay_key else LAM,
                step_size=(lambda _: GIVEN_ETA) if self.case.eta == "given" else None,
                path=path,
            )
        return opt, groups

    def step(self, number: int) -> dict[str, list[tuple[Tensor, Tensor, Tensor, float, Tensor]]]:
        """(x, the plain optimizer's w, the wrapped one's w, eta*lam, where there is a gradient) of each parameter."""
        before = [p.detach().clone() for p in parameters(self.wrapped["snapshot"][1])]
        strengths = {name: self.strengths(opt) for name, (opt, _) in self.wrapped.items()}
        for optimizer, groups in (*self.wrapped.values(), (self.plain, self.plain_groups)):
            with torch.no_grad():
                for p, x in zip(parameters(groups), before, strict=True):
                    p.copy_(x)
            set_gradients(self.case, groups, number)
            stepped = [has_gradient(p) for p in parameters(groups)]  # before: heavyball takes the gradients away
            seed(number)
            if self.case.closure:
                optimizer.step(lambda groups=groups: self.loss(groups, number))
            else:
                optimizer.step()
        plain = [p.detach() for p in parameters(self.plain_groups)]
        return {
            name: [
                (x, w, p.detach(), strengths[name][id(p)], of_p)
                for x, w, p, of_p in zip(before, plain, parameters(groups), stepped, strict=True)
            ]
            for name, (_, groups) in self.wrapped.items()
        }

    def strengths(self, opt: CautiousDecay) -> dict[int, float]:
        """eta*lam of each parameter in the coming step."""
        return {
            id(p): 0.0
            if self.case.leaves_vectors and p.ndim < 2
            else eta(self.case, group) * group.get("weight_decay", LAM)
            for group in opt.param_groups
            for p in group["params"]
        }

    def loss(self, groups: Groups, number: int) -> Tensor:
        set_gradients(self.case, groups, number)
        return torch.tensor(1.0)


def has_gradient(p: Tensor) -> Tensor:
    """Where a step happened: nowhere without a gradient, and only in the rows of a sparse one."""
    if p.grad is None or not p.grad.is_sparse:
        return torch.full(p.shape, p.grad is not None)
    rows = torch.zeros(p.shape, dtype=torch.bool)
    rows[tuple(p.grad.coalesce().indices())] = True
    return rows


def tolerance(x: Tensor, w: Tensor, roundings: int) -> Tensor:
    """``roundings`` float32 roundings of the largest term."""
    size = torch.maximum(x.abs(), w.abs()).double()
    return roundings * torch.finfo(torch.float32).eps * size + 1e-45


@pytest.mark.parametrize("case", HOLDING, ids=str)
def test_a_step_is_the_plain_step_plus_the_rule(case: Case) -> None:
    """With a snapshot, each step gives w - eta*lam*1[u*x>=0]*x to one rounding, where w is the plain optimizer's.

    The default path gives the same where the step moved the weight; other weights decay fully or not at all.
    """
    trio = Trio(case)
    decayed = 0
    for number in range(STEPS):
        for path, stepped_weights in trio.step(number).items():
            for x, plain, wrapped, eta_lam, stepped in stepped_weights:
                mask = rules.moved_towards_zero(x.double(), plain.double(), strict=False) & stepped
                expected = plain.double() - eta_lam * mask * x.double()
                off = (wrapped.double() - expected).abs()
                if path == "snapshot":
                    assert (off <= tolerance(x, plain, 1)).all(), (number, off.max())
                    visible = eta_lam > torch.finfo(torch.float32).eps  # D-Adaptation starts with steps of 1e-6
                    decayed += int((wrapped != plain).sum()) if visible else 1
                    continue
                # One pass rounds in another order, and a momentum is a difference of terms as large as the step size.
                terms = torch.full_like(x, float(eta_lam) / LAM)
                near = off <= tolerance(x, plain, 4) + tolerance(terms, terms, 4)
                in_place = (plain == x) & ((wrapped == x) | (wrapped == x - eta_lam * stepped * x))

                assert (in_place | near).all(), (number, off.max())
    assert decayed > 0
    if case.decay_key:
        for opt, _ in trio.wrapped.values():
            assert sorted({group["weight_decay"] for group in opt.param_groups}) == [0.0, LAM]


@pytest.mark.parametrize("case", AVERAGING, ids=str)
def test_a_schedule_free_step_is_the_plain_one_and_the_decay_at_y(case: Case) -> None:
    """z is the plain optimizer's less the decay at y, and y takes 1 - beta1*(1 - c) of that; c: the newest z's weight.

    Both steps begin with the same weights and state. RAdam is silent in its first four.
    """
    groups, plain_groups = make_groups(case, LAM), make_groups(case, 0.0)
    wrapped, plain_one = CautiousDecay(case.build(groups)), case.build(plain_groups)
    decayed = 0
    for number in range(8):
        plain_one.load_state_dict(copy.deepcopy(wrapped.state_dict()))
        for group in plain_one.param_groups:
            group["weight_decay"] = 0.0
        sums = [group["weight_sum"] for group in plain_one.param_groups]
        before = {p: p.detach().clone() for p in parameters(groups)}
        for optimizer, of_one in ((plain_one, plain_groups), (wrapped, groups)):
            with torch.no_grad():
                for p, x in zip(parameters(of_one), before.values(), strict=True):
                    p.copy_(x)
            set_gradients(case, of_one, number)
            optimizer.step()
        for group, plain_group, total in zip(wrapped.param_groups, plain_one.param_groups, sums, strict=True):
            beta = group["momentum"] if "momentum" in group else group["betas"][0]
            c = 1 - total / group["weight_sum"] if group["weight_sum"] else 0.0
            for p, q in zip(group["params"], plain_group["params"], strict=True):
                if p.grad is None:
                    assert torch.equal(p, before[p])
                    continue
                mask = rules.aligned(p.grad, before[p], strict=False)
                taken = eta(case, group) * group["weight_decay"] * mask * before[p].double()
                z, plain_z = wrapped.state[p]["z"], plain_one.state[q]["z"]
                for mine, plain, share in ((p.detach(), q.detach(), 1 - beta * (1 - c)), (z, plain_z, 1.0)):
                    terms = torch.maximum(plain.abs(), before[p].abs()) + torch.maximum(z.abs(), p.detach().abs())
                    off = (mine.double() - plain.double() + share * taken).abs() - tolerance(terms, terms, 4)

                    assert off.max() <= 0, (number, off.max())
                decayed += int((z != plain_z).sum())
    assert decayed > 0


def test_the_table_covers_more_than_230_optimizers() -> None:
    """More than 230 optimizers are discovered, every refused one has a reason, and every note is of a case."""
    missing = [name for name in ("timm", *LIBRARIES) if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")

    assert len(HOLDING) > 230
    assert all(case.refused for case in CASES if case not in HOLDING + AVERAGING)
    assert set(NOTES) <= {case.name for case in CASES}


def test_all_optimizers_draw_the_same_numbers_from_numpy() -> None:
    """They draw the same: if only one Kron rebalanced (1 draw of 100), they would differ by roundings."""
    numpy = pytest.importorskip("numpy")
    pytest.importorskip("pytorch_optimizer")
    trio = Trio(next(case for case in CASES if case.name == "pytorch_optimizer.Kron"))
    drawn = []
    for optimizer in (trio.wrapped["snapshot"][0], trio.plain):
        optimizer.register_step_pre_hook(lambda *_: drawn.append(numpy.random.random()))
    trio.step(0)

    assert drawn[0] == drawn[1]


@pytest.mark.parametrize("case", [c for c in CASES if c.refused and "recompute" in c.refused], ids=str)
def test_optimizers_that_recompute_their_weights_are_refused(case: Case) -> None:
    """An optimizer that computes the weights from its own copy would lose the decay, so it is refused by name."""
    base = case.build(make_groups(case, LAM))
    with pytest.raises(ValueError, match=f"{type(base).__name__}: each step computes the weights from a copy"):
        CautiousDecay(base, lam=LAM)


def test_the_check_can_fail() -> None:
    """A base with its own decay on does not pass."""
    case = next(case for case in CASES if case.name == "torch.AdamW")
    trio = Trio(case)
    trio.wrapped["snapshot"][0].base_optimizer.register_step_pre_hook(
        lambda opt, *_: opt.param_groups[0].update(weight_decay=LAM)
    )
    worst = max(
        float(((wrapped - plain).abs() - tolerance(x, plain, 1)).max())
        for x, plain, wrapped, eta_lam, stepped in trio.step(0)["snapshot"]
        if not (rules.moved_towards_zero(x, plain, strict=False) | ~stepped).all()
    )

    assert worst > 0
