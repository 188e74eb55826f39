"""For every row of the table of directions, the predicted sign is the sign of the step."""

import importlib
from typing import Any

import pytest
import torch
import torch.optim as o
from support import PathOptions, can_run
from torch.optim import Optimizer

from cwd_wrap import CautiousDecay, rules
from cwd_wrap.bases import directions
from cwd_wrap.bases.directions import Direction

SIZE, STEPS = 4000, 6
BETAS = {"betas": (0.8, 0.9)}
PLAIN, FOREACH, FUSED = {}, {"foreach": True}, {"fused": True}

# (class, or its path where the library may be missing; options). Each class in all its forms in torch.
ROWS: list[tuple[type[Optimizer] | str, dict[str, object]]] = [
    *((o.SGD, flags) for flags in (PLAIN, FOREACH, FUSED, {"maximize": True})),
    *((o.SGD, {"momentum": 0.9, **flags}) for flags in (PLAIN, FOREACH, FUSED, {"maximize": True}, {"dampening": 0.5})),
    *((o.SGD, {"momentum": 0.9, "dampening": 1.5, **flags}) for flags in (PLAIN, {"maximize": True})),
    (o.SGD, {"momentum": 0.9, "dampening": 1.0}),
    *((o.SGD, {"momentum": 0.9, "nesterov": True, **flags}) for flags in (PLAIN, FOREACH, FUSED, {"maximize": True})),
    *((o.Adam, {**BETAS, **flags}) for flags in (PLAIN, FOREACH, FUSED, {"amsgrad": True}, {"maximize": True})),
    *((o.AdamW, {**BETAS, **flags}) for flags in (PLAIN, FOREACH, FUSED, {"amsgrad": True}, {"maximize": True})),
    *(
        (o.NAdam, {**BETAS, **flags})
        for flags in (PLAIN, FOREACH, {"maximize": True}, {"decoupled_weight_decay": True})
    ),
    *((o.RAdam, {**BETAS, **flags}) for flags in (PLAIN, FOREACH, {"maximize": True})),
    *((o.Adamax, {**BETAS, **flags}) for flags in (PLAIN, FOREACH, {"maximize": True})),
    *((o.Adadelta, flags) for flags in (PLAIN, FOREACH, {"maximize": True})),
    *((o.Adagrad, flags) for flags in (PLAIN, FOREACH, FUSED, {"lr_decay": 0.1}, {"maximize": True})),
    *((o.RMSprop, flags) for flags in (PLAIN, FOREACH, {"centered": True}, {"maximize": True})),
    *(("timm.optim.Lion", {**BETAS, **flags}) for flags in (PLAIN, FOREACH, {"maximize": True})),
    *(
        ("timm.optim.AdamWLegacy", {**BETAS, **flags})
        for flags in (PLAIN, {"amsgrad": True}, {"clipping_threshold": 1.0})
    ),
    *(("timm.optim.NAdamW", {**BETAS, **flags}) for flags in (PLAIN, FOREACH, {"maximize": True})),
    *(("timm.optim.SGDW", flags) for flags in (PLAIN, {"momentum": 0.9}, {"momentum": 0.9, "nesterov": True})),
    ("lion_pytorch.Lion", BETAS),
]
IDS = [f"{c if isinstance(c, str) else c.__name__}-{'-'.join(f'{k}={v}' for k, v in f.items())}" for c, f in ROWS]

# The rows take them in turn: a backend gets numbers and tensors, and does not know whose.
BACKENDS = [*filter(can_run, (PathOptions(backend=backend) for backend in ("eager", "numba")))]

# Gradient and state do not give the sign of their update, so they take a copy.
UNKNOWN = [
    (o.Rprop, {}, "Rprop"),
    (o.ASGD, {}, "ASGD"),
    ("torch.optim.Adafactor", {}, "Adafactor"),
    (o.RMSprop, {"momentum": 0.9}, "past gradient"),
    (o.NAdam, {"capturable": True}, "capturable"),
    ("timm.optim.Lion", {"caution": True}, "caution=True"),
]


def make(cls: type[Optimizer] | str, p: torch.nn.Parameter, flags: dict[str, object]) -> Optimizer:
    if isinstance(cls, str):
        module, name = cls.rsplit(".", 1)
        if not hasattr(pytest.importorskip(module), name):
            pytest.skip(f"{module} has no {name} in this version")
        cls = getattr(importlib.import_module(module), name)
    return cls([p], lr=1e-3, **flags)


def gradient(generator: torch.Generator) -> torch.Tensor:
    """A random gradient of mixed sizes, with some zeros."""
    size = 10.0 ** torch.randint(-3, 3, (SIZE,), generator=generator)
    return torch.randn(SIZE, generator=generator) * size * (torch.rand(SIZE, generator=generator) < 0.9)


def terms_of(direction: Direction, state: dict[str, Any], g: torch.Tensor) -> list[torch.Tensor]:
    """b*g, and a*m where the state has m: the sign of their sum is that of the coming update."""
    m = state.get(direction.state_key)
    if m is None:
        return [direction.first * g.double()]
    a, b = direction.numbers(state)
    return [b * g.double(), a * m.double()]


@pytest.mark.parametrize(("cls", "flags"), ROWS, ids=IDS)
def test_predicted_sign_is_the_sign_of_the_step(cls: type[Optimizer] | str, flags: dict[str, object]) -> None:
    """After a step from w = 0, -w is the update: it has the sign of a*m + b*g, except where rounding cancels it."""
    p = torch.nn.Parameter(torch.zeros(SIZE))
    opt, generator = make(cls, p, flags), torch.Generator().manual_seed(0)
    for _ in range(STEPS):
        p.grad = gradient(generator)
        direction = directions.find(opt, opt.param_groups[0])
        assert isinstance(direction, Direction)
        terms = terms_of(direction, opt.state.get(p, {}), p.grad)
        predicted, size = sum(terms), sum(t.abs() for t in terms)
        torch.nn.init.zeros_(p)
        opt.step()
        clear = predicted.abs() > 1e-6 * size

        assert torch.equal(torch.sign(-p.detach())[clear], torch.sign(predicted)[clear].float())
        assert (p.detach()[size == 0] == 0).all()


@pytest.mark.parametrize(
    ("cls", "flags", "chosen"),
    [
        pytest.param(*row, BACKENDS[number % len(BACKENDS)], id=name)
        for number, (row, name) in enumerate(zip(ROWS, IDS, strict=True))
    ],
)
def test_direction_and_snapshot_agree_where_the_weight_moved(
    cls: type[Optimizer] | str, flags: dict[str, object], chosen: PathOptions
) -> None:
    """From the same weights, both paths give the same step to 4 roundings, wherever the plain step moved the weight."""
    generator = torch.Generator().manual_seed(1)
    ours, theirs, plain = (torch.nn.Parameter(torch.randn(SIZE, generator=generator)) for _ in range(3))
    along = CautiousDecay(make(cls, ours, flags), lam=0.5, path="direction", **chosen)
    copied = CautiousDecay(make(cls, theirs, flags), lam=0.5, path="snapshot", **chosen)
    base = make(cls, plain, flags)
    base.param_groups[0]["weight_decay"] = 0.0
    assert (along.snapshot_bytes, copied.snapshot_bytes) == (0, 4 * SIZE)
    for _ in range(STEPS):
        x, g = ours.detach().clone(), gradient(generator)
        for p, opt in ((ours, along), (theirs, copied), (plain, base)):
            p.data.copy_(x)
            p.grad = g.clone()
            opt.step()
        moved = (plain.detach() - x).abs() > 1e-6 * x.abs()
        rounding = torch.finfo(torch.float32).eps * torch.maximum(x.abs(), plain.detach().abs())

        assert moved.float().mean() > 0.05
        assert ((ours - theirs).detach().abs() <= 4 * rounding)[moved].all()
        assert (ours != plain).any()


@pytest.mark.parametrize(("cls", "flags", "reason"), UNKNOWN)
def test_unknown_direction_gives_its_reason(cls: type[Optimizer] | str, flags: dict[str, object], reason: str) -> None:
    """If gradient and state do not give the sign of the update, `find` returns the reason, and a copy is made."""
    p = torch.nn.Parameter(torch.ones(3))
    opt = make(cls, p, flags)

    assert reason in str(directions.find(opt, opt.param_groups[0]))
    assert CautiousDecay(opt, lam=0.1, backend="eager").snapshot_bytes == 12


def test_a_subclass_is_not_its_parent() -> None:
    """The table is matched by exact class: a subclass may do anything in its step."""

    class Mine(o.AdamW):
        pass

    opt = Mine([torch.nn.Parameter(torch.ones(3))])

    assert "Mine" in str(directions.find(opt, opt.param_groups[0]))


def test_bf16_direction_has_the_sign_of_steps_that_round_away() -> None:
    """At lr 1e-4 most bfloat16 weights do not move: a snapshot gives u = 0, but the direction has the sign."""
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(SIZE).bfloat16())
    opt = o.AdamW([p], lr=1e-4)
    p.grad = torch.randn(SIZE).bfloat16()
    x, wrapped = p.detach().clone(), CautiousDecay(opt, lam=0.1)
    counts = []
    for path in ("direction", "snapshot"):
        wrapped.path = path
        wrapped.observer = counts.append
        wrapped.step()
        p.data.copy_(x)
    truth = rules.aligned(p.grad, x, strict=False).sum()

    assert counts[0].active == truth
    assert counts[1].active > 0.9 * SIZE
