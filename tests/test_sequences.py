"""Random sequences of what programs do with an optimizer: after each, the wrapper is a plain one and the rule by hand.

Steps, new groups and strengths, saved and loaded state, copies and pickles. `make fuzz` looks for new sequences.
"""

import copy
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import fuzz
import pytest
import reference
import torch
from hypothesis import strategies as st
from support import ALL_PATHS, BASES, PathOptions, in_turn, same
from torch import nn
from torch.optim import Optimizer

from cwd_wrap import CautiousDecay

NAMES = ["AdamW", "SGD", "Adam", "SGD-momentum"]  # not fused: that raises if only some have a momentum
F64 = torch.float64


class Twins:
    """A wrapped optimizer, and a plain one of equal parameters after whose steps the rule is applied by hand."""

    def __init__(self, base: str, path: PathOptions) -> None:
        self.build, self.path, self.random = BASES[base].on(path), path, torch.Generator().manual_seed(0)
        self.ours, self.theirs = self.parameters(), self.parameters()
        for p, q in zip(self.ours, self.theirs, strict=True):
            q.data.copy_(p.data)
        self.opt, self.plain = self.wrap(self.build(self.groups(self.ours))), self.build(self.groups(self.theirs))
        self.saved = self.state()

    def parameters(self) -> list[nn.Parameter]:
        return [nn.Parameter(torch.randn(shape, generator=self.random, dtype=F64)) for shape in ((2, 3), (4,), (3,))]

    @staticmethod
    def groups(params: list[nn.Parameter]) -> list[dict[str, Any]]:
        return [{"params": params[:2]}, {"params": params[2:], "weight_decay": 0.0}]

    def wrap(self, base: Optimizer) -> CautiousDecay:
        return CautiousDecay(base, **self.path)

    # ---- what programs do, to both

    def step(self) -> None:
        """With new gradients; some parameters have none."""
        for i, (p, q) in enumerate(zip(self.ours, self.theirs, strict=True)):
            g = torch.randn(p.shape, generator=self.random, dtype=F64)
            p.grad, q.grad = (g, g.clone()) if (i + g.sign().sum()) % 4 else (None, None)
        self.step_again()

    def step_again(self) -> None:
        """With the gradients as they are."""
        before = [p.detach().clone() for p in self.theirs]
        lams = [group["weight_decay"] for group in self.plain.param_groups]
        for group in self.plain.param_groups:
            group["weight_decay"] = 0.0
        self.opt.step()
        self.plain.step()
        for group, lam in zip(self.plain.param_groups, lams, strict=True):
            group["weight_decay"] = lam
            for p, x in zip(self.theirs, before, strict=True):
                if p.grad is not None and any(p is each for each in group["params"]):
                    p.data.copy_(reference.ruled(x, p.detach(), group["lr"] * lam))

    def zero_grad(self) -> None:
        for optimizer in (self.opt, self.plain):
            optimizer.zero_grad()

    def gradients_of_zero(self) -> None:
        for optimizer in (self.opt, self.plain):
            optimizer.zero_grad(set_to_none=False)

    def lr(self) -> None:
        for optimizer in (self.opt, self.plain):
            optimizer.param_groups[0]["lr"] *= 0.5

    def lam(self) -> None:
        """It goes into the groups that decay."""
        self.opt.lam = 0.75
        for group in self.plain.param_groups:
            if group["weight_decay"]:
                group["weight_decay"] = 0.75

    def weight_decay(self) -> None:
        for optimizer in (self.opt, self.plain):
            optimizer.param_groups[0]["weight_decay"] = 0.25

    def add_param_group(self) -> None:
        p = nn.Parameter(torch.randn(3, generator=self.random, dtype=F64))
        for params, optimizer in ((self.ours, self.opt), (self.theirs, self.plain)):
            params.append(nn.Parameter(p.detach().clone()))
            optimizer.add_param_group({"params": [params[-1]], "weight_decay": 0.5})

    def save(self) -> None:
        self.saved = self.state()

    def load(self) -> None:
        """What was saved last; with a group more than it had, both refuse it."""
        for optimizer, state in zip((self.opt, self.plain), copy.deepcopy(self.saved), strict=True):
            if len(state["param_groups"]) == len(optimizer.param_groups):
                optimizer.load_state_dict(state)
            else:
                with pytest.raises(ValueError, match="different number of parameter groups"):
                    optimizer.load_state_dict(state)

    def load_each_others(self) -> None:
        ours, theirs = self.state()
        self.opt.load_state_dict(theirs)
        self.plain.load_state_dict(ours)

    def resume(self) -> None:
        """In a new wrapper, from a file."""
        file = io.BytesIO()
        torch.save(self.opt.state_dict(), file)
        file.seek(0)
        groups = [{**group, "params": group["params"]} for group in self.opt.param_groups]
        self.opt = self.wrap(self.build([{"params": group["params"]} for group in groups]))
        self.opt.load_state_dict(torch.load(file, weights_only=True))

    def deepcopy(self) -> None:
        self._go_on_with(copy.deepcopy((self.ours, self.opt)))

    def pickle(self) -> None:
        self._go_on_with(pickle.loads(pickle.dumps((self.ours, self.opt))))

    def _go_on_with(self, copies: tuple[list[nn.Parameter], CautiousDecay]) -> None:
        self.ours, self.opt = copies
        for p, q in zip(self.ours, self.theirs, strict=True):  # copies of parameters have no gradients
            p.grad = None if q.grad is None else q.grad.clone()

    # ---- what must hold

    def state(self) -> tuple[Any, Any]:
        return copy.deepcopy((self.opt.state_dict(), self.plain.state_dict()))

    def differences(self) -> list[str]:
        """What differs between the two, by name."""
        ours, theirs = self.state()
        found = [] if same(theirs, ours, 1e-9) else ["state dict"]
        weights = zip(self.ours, self.theirs, strict=True)
        return found + [f"weight {i}" for i, (p, q) in enumerate(weights) if not torch.allclose(p, q, 1e-9, 1e-12)]


ACTS: list[Callable[[Twins], None]] = [
    Twins.step, Twins.step_again, Twins.zero_grad, Twins.gradients_of_zero, Twins.lr, Twins.lam, Twins.weight_decay,
    Twins.add_param_group, Twins.save, Twins.load, Twins.load_each_others, Twins.resume, Twins.deepcopy, Twins.pickle,
]  # fmt: skip
NAMED = {act.__name__: act for act in ACTS}
SEQUENCES = st.lists(st.sampled_from(list(NAMED)), min_size=2, max_size=12)
CASES = in_turn(NAMES)


def check(base: str, path: PathOptions, sequence: list[str]) -> None:
    """Raise AssertionError at the first act after which the two differ."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        twins = Twins(base, path)
        for i, name in enumerate(["step", *sequence, "step"]):
            NAMED[name](twins)

            assert not (found := twins.differences()), f"{base} on {path}, {name} (act {i}): {found}"


@pytest.mark.parametrize(("base", "path_in_turn"), CASES)
def test_random_sequences_make_no_difference(base: str, path_in_turn: PathOptions) -> None:
    """After any sequence of acts the weights and the state dict are those of a plain optimizer and the rule by hand."""
    fuzz.look(lambda sequence: check(base, path_in_turn, sequence), SEQUENCES, f"{base}-{path_in_turn}", len(CASES))


def test_every_act_is_checked() -> None:
    """The list of acts holds all that the twins can do."""
    beside = {"parameters", "groups", "wrap", "state", "differences"}

    assert {name for name in vars(Twins) if not name.startswith("_")} - beside == set(NAMED)


def test_the_check_finds_a_lost_decay(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """If loading forgot the decay, a search with new seeds would print its seed and the shortest sequence."""
    loading = CautiousDecay.load_state_dict

    def forgets(self: CautiousDecay, state_dict: dict[str, Any]) -> None:
        loading(self, state_dict)
        self.param_groups[0]["weight_decay"] = 0.0

    monkeypatch.setattr(CautiousDecay, "load_state_dict", forgets)
    monkeypatch.setenv("FUZZ_SECONDS", "60")
    with pytest.raises(AssertionError, match="state dict") as caught:
        fuzz.look(lambda sequence: check("SGD", ALL_PATHS[2], sequence), SEQUENCES, "", 1)

    assert "FUZZ_SEED=" in capsys.readouterr().out
    (shown,) = (note for note in caught.value.__notes__ if "sequence=" in note)
    assert shown.count("'") == 4  # two acts
