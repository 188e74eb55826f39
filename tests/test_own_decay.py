"""eta, measured: the wrapper's eta is the factor on the optimizer's own decoupled decay.

Three instances get the same weights, gradients and random numbers at each step: one with its own decay, one without,
and one in `CautiousDecay(mask="all")`, plain decoupled decay. The difference to the one without is what decay took off
a weight; divided by lam and the weight it is the factor. If the differences are no multiple of the weights, the decay
is coupled and has no factor, and eta is the learning rate.
"""

import itertools
import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor
from zoo import LIBRARIES, Case, Groups, cases

from cwd_wrap import CautiousDecay
from cwd_wrap.bases import quirks

LAM = 0.25
SHAPES = {1: (7,), 2: (6, 5), 4: (4, 3, 3, 2)}
SCHEDULE = (0.25, 0.5, 1.0, 0.5, 0.75, 1.0, 0.25)  # of the learning rate; RAdam makes no step before its sixth
SIZES = (1.0, 1 / 8, 1 / 64, 1.0, 1 / 8, 1 / 64, 1.0)  # of the weights
EXACT = 1e-3

SWITCHES = re.compile(r"decay|decoupl|wd|fixed|corrected|scale_parameter|bias_correction|no_prox")
VALUES: dict[str, tuple[Any, ...]] = {
    "fallback_lr_scale": (0.5,),
    "momentum": (0.9,),
    "wd_ratio": (1.0,),
    "wd_schedule": (True, 2e-3),
    "weight_decay_type": ("decoupled", "stable", "direct"),
}
CHOICES = {"ApolloDQN": ("l2", "decoupled", "stable"), "QHM": ("grad", "direct")}  # of weight_decay_type

# In plain gradient descent, coupled and decoupled decay are the same; this one uses the lr of the previous step.
COUPLED_DESCENT = ("torch.ASGD",)

# These compute their update from decayed weights, so it contains the decay; in AdaSmooth it is too small to measure.
UPDATE_CONTAINS_DECAY = ("pytorch_optimizer.AdaSmooth", "pytorch_optimizer.ApolloDQN")


def option_sets(case: Case) -> Iterator[dict[str, Any]]:
    """The options that affect decay, one and two at a time, as differences from the defaults."""
    choices: dict[str, list[Any]] = {}
    for name, default in case.options.items():
        if name in VALUES:
            values = [v for v in VALUES[name] if v != default]
            if name == "weight_decay_type":
                values = [v for v in CHOICES[case.name.split(".")[1]] if v != default]
            choices[name] = [default, *values]
        elif isinstance(default, bool) and SWITCHES.search(name):
            choices[name] = [default, not default]
    if "scale_parameter" in choices and case.options["lr"] is None:
        choices["lr"] = [None, 1e-3]
    for values in itertools.product(*choices.values()):
        changed = {k: v for k, v in zip(choices, values, strict=True) if v != case.options[k]}
        if len(changed) > 2:
            continue
        if "lr" in changed and "relative_step" in case.options:
            changed["relative_step"] = False
        yield changed


def rows() -> Iterator[Any]:
    """Each optimizer with its defaults, and each class with each pair of its options once, whatever its name.

    heavyball takes gradients away and rounds at random; test_weight_decay.py tests its step sizes. The decay of
    schedule-free optimizers enters their steps; test_schedule_free.py compares it with their own.
    """
    seen = set()
    for case in cases(tuple(library for library in LIBRARIES if library != "heavyball")):
        if case.refused or case.averages or not case.decay_key:
            continue
        for options in option_sets(case):
            values = {k: v for k, v in {**case.options, **options}.items() if k in VALUES or SWITCHES.search(k)}
            key = case.kind, repr(sorted(values.items()))
            if options and key in seen:
                continue
            seen.add(key)
            name = "-".join((case.name, *(f"{k}={v}" for k, v in options.items())))
            yield pytest.param(case, options, id=name)


@dataclass
class Factors:
    """What decay took off the weights of one parameter in one step, divided by lam * weight: own and wrapped."""

    lr: float | None
    shape: tuple[int, ...]
    own: float
    coupled: bool
    stood_still: bool
    wrapped: float | None


class Trio:
    """One optimizer with its own decay, one without, and one wrapped; ``refusal`` is the wrapper's error, if any."""

    def __init__(self, case: Case, options: dict[str, Any], dtype: torch.dtype = torch.float64) -> None:
        self.case, self.dtype = case, dtype
        self.in_group = {k: v for k, v in options.items() if k == "wd_ratio"}  # constructors may not take 1 for it
        self.build = partial(case.build, **{k: v for k, v in options.items() if k not in self.in_group})
        self.own, self.own_params = self.make(LAM)
        self.without, self.without_params = self.make(0.0)
        base, self.wrapped_params = self.make(LAM)
        for group in self.own.param_groups:
            if "weight_decay_1d" in group:
                group["weight_decay_1d"] = LAM
        for group in self.without.param_groups:
            if case.adapts:
                group[case.adapts] = True
            if case.adapts == "":
                group["weight_decay"] = 1e-300
            if "weight_decay_1d" in group:
                group["weight_decay_1d"] = 0.0
        self.refusal: str | None = None
        self.wrapped: CautiousDecay | None = None
        try:
            self.wrapped = CautiousDecay(base, mask="all")
        except ValueError as error:
            self.refusal = str(error)

    def make(self, lam: float) -> tuple[torch.optim.Optimizer, list[torch.nn.Parameter]]:
        params = [torch.nn.Parameter(torch.zeros(SHAPES[d], dtype=self.dtype)) for d in self.case.dims]
        groups: Groups = [{"params": params, "weight_decay": lam, **self.in_group}]
        torch.manual_seed(0)
        optimizer = self.build(groups)
        for group in optimizer.param_groups:
            if group.get("lr") is not None:
                group.setdefault("initial_lr", group["lr"])  # every scheduler sets it
        return optimizer, params

    def step(self, number: int) -> list[Factors]:
        generator = torch.Generator().manual_seed(100 + number)
        befores = []
        for p in self.own_params:
            size, sign = torch.rand(p.shape, generator=generator), torch.randint(0, 2, p.shape, generator=generator)
            befores.append(SIZES[number] * ((1 + size) * (2 * sign - 1)).to(self.dtype))
        trio = ((self.own, self.own_params), (self.without, self.without_params), (self.wrapped, self.wrapped_params))
        for optimizer, params in trio:
            if optimizer is None:
                continue
            for group in optimizer.param_groups:
                if "initial_lr" in group:
                    group["lr"] = group["initial_lr"] * SCHEDULE[number]
            with torch.no_grad():
                for p, x in zip(params, befores, strict=True):
                    p.copy_(x)
            lr = optimizer.param_groups[0].get("lr")  # before the step: ASGD of pytorch_optimizer changes it
            closure = partial(self.set_gradients, params, number)
            closure()
            torch.manual_seed(number)
            optimizer.step(closure) if self.case.closure else optimizer.step()
        triples = zip(befores, self.own_params, self.without_params, self.wrapped_params, strict=True)
        return [self.factors(lr, x, *(w.detach() for w in weights)) for x, *weights in triples]

    def set_gradients(self, params: list[torch.nn.Parameter], number: int) -> Tensor:
        generator = torch.Generator().manual_seed(number)
        for p in params:
            g = torch.randn(p.shape, generator=generator).to(self.dtype)
            if self.case.create_graph:
                (p.grad,) = torch.autograd.grad((g * p + 0.01 * p**2).sum(), p, create_graph=True)
            else:
                p.grad = g
        return torch.tensor(1.0)

    def factors(self, lr: float | None, x: Tensor, own: Tensor, without: Tensor, wrapped: Tensor) -> Factors:
        """Decay made before the update is a multiple of ``x``; decay made after it is a multiple of ``without``."""
        stood_still = torch.equal(without, x)
        single = torch.equal(without, without.float().to(self.dtype)) and not stood_still  # computed in float32
        noise = 4 * torch.finfo(torch.float32 if single else self.dtype).eps * x.abs()
        fits = []
        for weight in (x, without):
            factor = ((without - own) / (LAM * weight)).median()
            off = (without - own - factor * LAM * weight).abs() - noise
            fits.append((float(off.max() / (factor * LAM * weight).abs().max().clamp(min=1e-300)), float(factor)))
        misfit, factor = min(fits)
        return Factors(
            lr,
            tuple(x.shape),
            0.0 if ((own - without).abs() <= noise).all() else factor,
            misfit > EXACT,
            stood_still,
            None if self.wrapped is None else float(((without - wrapped) / (LAM * x)).median()),
        )


def measure(case: Case, options: dict[str, Any]) -> tuple[Trio, list[Factors]]:
    steps = range(4) if case.fades else range(len(SCHEDULE))  # Lookahead pulls back at its fifth step
    if case.name in UPDATE_CONTAINS_DECAY:
        steps = range(1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            trio = Trio(case, options)
            return trio, until_it_has_moved(trio, steps)
        except (RuntimeError, AssertionError):  # it does not take float64
            trio = Trio(case, options, torch.float32)
            return trio, until_it_has_moved(trio, steps)


def until_it_has_moved(trio: Trio, steps: range) -> list[Factors]:
    """The factors of the steps, up to the third in which every weight moved."""
    measured, moved = [], 0
    for number in steps:
        measured += (factors := trio.step(number))
        moved += not any(f.stood_still for f in factors)
        if moved == 3:
            break
    return measured


def is_coupled(trio: Trio, measured: list[Factors]) -> bool:
    """Is its own decay coupled, by its options or as measured? One that does not decay at all counts as coupled."""
    said = any(
        trio.own.param_groups[0].get(key) is False for key in ("weight_decouple", "decoupled_decay", "decoupled")
    )
    seen = any(f.coupled for f in measured) or all(f.own == 0 for f in measured)
    if trio.case.name in UPDATE_CONTAINS_DECAY:
        return said or trio.own.param_groups[0].get("weight_decay_type") == "l2"
    return said or seen or trio.case.name in COUPLED_DESCENT


@pytest.mark.parametrize(("case", "options"), list(rows()))
def test_eta_is_the_factor_on_the_optimizers_own_decay(case: Case, options: dict[str, Any]) -> None:
    """At each step and shape the wrapper decays by the optimizer's own factor, or by lr if its decay is coupled.

    If the wrapper refuses the optimizer instead, no single factor follows from lr.
    """
    trio, measured = measure(case, options)
    moved = [f for f in measured if not f.stood_still]
    coupled = is_coupled(trio, moved)
    if trio.refusal is not None:
        assert type(trio.own).__name__ in trio.refusal
        assert "pass step_size=, a function of the group that returns it" in trio.refusal
        assert "lr" not in trio.own.param_groups[0] or any(
            f.lr is None or trio.own.param_groups[0].get("relative_step") or abs(f.own - f.lr) > EXACT * f.lr
            for f in moved
        )
        return
    tolerance = 0.11 if case.fades else EXACT  # a tenth of the decay may be pulled back in the same step
    for f in moved:
        if not (coupled and "d" in trio.own.param_groups[0]):  # eta is d * lr then
            own = f.own
            if case.name.endswith("Adan"):  # divides by 1 + eta*lam where others multiply by 1 - eta*lam
                own /= 1 - LAM * own
            if case.name.endswith("AdaSmooth"):
                own = 1.0 if options.get("fixed_decay") else f.lr
            if coupled and not (case.leaves_vectors and len(f.shape) == 1):
                own = f.lr
            assert own == pytest.approx(f.wrapped, rel=tolerance, abs=0), f


@pytest.mark.parametrize("case", [c for c in cases() if c.eta == "given" and c.decay_key and not c.refused], ids=str)
def test_step_size_is_the_way_out(case: Case) -> None:
    """An optimizer that is refused without step_size= is accepted with it."""
    params = [torch.nn.Parameter(torch.ones(SHAPES[d])) for d in case.dims]
    build = partial(case.build, [{"params": params, "weight_decay": LAM}])
    with pytest.raises(ValueError, match="pass step_size="):
        CautiousDecay(build())

    CautiousDecay(build(), step_size=lambda group: 1e-3)


@pytest.mark.parametrize("name", ["Kron", "LARS"])
def test_exempt_finds_the_parameters_that_the_optimizers_own_decay_skips(name: str) -> None:
    """pytorch_optimizer's Kron and LARS do not decay vectors, also inside Lookahead; AdamW decays all parameters."""
    library = pytest.importorskip("pytorch_optimizer")
    vector, matrix = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(3, 2))
    base = getattr(library, name)([vector, matrix], weight_decay=LAM)
    for optimizer in (base, library.Lookahead(base)):
        leaves_alone = quirks.exempt(optimizer)

        assert leaves_alone is not None
        assert [True, False] == [leaves_alone(vector), leaves_alone(matrix)]
    assert quirks.exempt(torch.optim.AdamW([vector])) is None
