"""A plan that is kept from step to step gives the bits of one that is made anew, whatever happens in between.

The random part compares the two, step by step, over sequences of events (events.py). `make fuzz` looks for new ones.
"""

import os
import secrets
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import pytest
import torch
from events import EVENTS, PLACES, Happening, World, history
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch.optim import SGD, Adagrad, AdamW, NAdam, Optimizer, RMSprop

from cwd_wrap import CautiousDecay, CautiousUpdate, PNormDecay, paths, wrapper
from cwd_wrap.plan import Plan, compile_plan

SHAPES = [(2, 3), (4,), (3, 2), (1, 2, 2)]
MATRICES = [(2, 3), (3, 2), (4, 1), (2, 2)]
EXAMPLES, STEPS = 10, 12


class Own(SGD):
    """An optimizer that no table knows: it calls its closure itself, and takes the path snapshot."""


def lion(groups: Any, **options: Any) -> Optimizer:
    from timm.optim import Lion

    return Lion(groups, **options)


class Case:
    """A base in a wrapper, and the size of its pieces."""

    def __init__(self, base: str, wrap: Callable[[Optimizer], Any] = CautiousDecay, piece: int = paths.PIECE) -> None:
        options = [] if wrap is CautiousDecay else [wrap.func.__name__, *map(str, wrap.keywords.values())]
        self.name = "-".join([base, *options, *(["small pieces"] if piece != paths.PIECE else [])])
        self.base, self.wrap, self.piece = base, wrap, piece

    def world(self) -> World:
        build, options = BASES[self.base]
        return World(
            partial(build, **{"lr": 0.1, "weight_decay": 0.5, **options}),
            self.wrap,
            MATRICES if self.base == "Muon" else SHAPES,
        )

    def history(self, happenings: Sequence[Happening]) -> list[Any]:
        with mock.patch.object(paths, "PIECE", self.piece):
            return history(self.world(), happenings)

    def __str__(self) -> str:
        return self.name


BASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "AdamW": (AdamW, {}),
    "AdamW-fused": (AdamW, {"fused": True}),
    "AdamW-amsgrad": (AdamW, {"amsgrad": True}),
    "AdamW-foreach": (AdamW, {"foreach": True}),
    "SGD": (SGD, {}),
    "SGD-momentum": (SGD, {"momentum": 0.9}),
    "SGD-nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "Lion": (lion, {"lr": 0.01}),
    "Adagrad": (Adagrad, {}),
    "NAdam": (NAdam, {}),
    "RMSprop-momentum": (RMSprop, {"momentum": 0.9}),
    "Own": (Own, {"momentum": 0.9}),
    "Muon": (getattr(torch.optim, "Muon", None), {}),
}
_decay, _update, _p_norm = (partial(partial, method) for method in (CautiousDecay, CautiousUpdate, PNormDecay))
ALL_CASES = [
    *map(Case, BASES),
    Case("AdamW", _decay(path="one_pass", backend="eager")),
    Case("SGD-nesterov", _decay(path="one_pass", backend="eager")),
    Case("AdamW-foreach", _decay(backend="eager")),
    Case("AdamW", _decay(path="direction")),
    Case("AdamW-fused", _decay(path="snapshot")),
    Case("AdamW", _decay(path="snapshot", backend="eager")),
    Case("AdamW", _decay(path="pieces")),
    Case("AdamW-foreach", _decay(path="pieces"), piece=16),
    Case("RMSprop-momentum", piece=16),
    Case("AdamW", _decay(strict=True)),
    Case("SGD-momentum", _decay(mask="gradient")),
    Case("AdamW", _decay(mask="all")),
    Case("AdamW", _decay(mask="random")),
    Case("AdamW", _decay(rounding="stochastic")),
    Case("AdamW", _update()),
    Case("SGD-momentum", _update(path="snapshot", backend="eager")),
    Case("AdamW-foreach", _update(), piece=16),
    Case("RMSprop-momentum", _p_norm()),
    Case("SGD", _p_norm(path="snapshot", backend="eager")),
    Case("AdamW", _p_norm(), piece=16),
]
MISSING = {
    base for base, there in {"Muon": hasattr(torch.optim, "Muon"), "Lion": find_spec("timm")}.items() if not there
}
CASES = [case for case in ALL_CASES if case.base not in MISSING]
every_case = pytest.mark.parametrize("case", CASES, ids=str)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """All plans that are made, in a list that grows."""
    plans: list[Plan] = []

    def compiled(*args: Any, **kwargs: Any) -> Plan:
        plans.append(compile_plan(*args, **kwargs))
        return plans[-1]

    monkeypatch.setattr(wrapper, "compile_plan", compiled)
    return plans


# ------------------------------------------------------------------------------------ random events


@contextmanager
def never_kept() -> Iterator[None]:
    """Inside this context each step makes its plan anew."""
    with mock.patch.object(Plan, "keep", lambda *_: None):
        yield


def check(case: Case, happenings: Sequence[Happening]) -> None:
    """Raise AssertionError if a kept plan makes a difference."""
    kept = case.history(happenings)
    with never_kept():
        anew = case.history(happenings)
    for i, (one, other) in enumerate(zip(kept, anew, strict=True)):
        seen, wanted = dict(enumerate(one)), dict(enumerate(other))
        for j in range(max(len(seen), len(wanted))):
            if seen.get(j) != wanted.get(j):
                msg = f"{case}, step {i}:\n  by a kept plan  {seen.get(j)}\n  by a new plan   {wanted.get(j)}"
                raise AssertionError(msg)


HAPPENINGS = st.lists(
    st.builds(
        Happening,
        st.one_of(st.just("nothing"), st.sampled_from(list(EVENTS))),
        st.sampled_from(["between steps"] * 5 + list(PLACES)),
        st.integers(0, 99),
    ),
    min_size=2,
    max_size=STEPS,
)


def search(case: Case, number: int, examples: int) -> None:
    """Check random sequences, and shrink one that fails. The same ``number`` gives the same sequences."""
    of_run = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )

    @seed(number)
    @of_run
    @given(HAPPENINGS)
    def run(happenings: list[Happening]) -> None:
        check(case, happenings)

    run()


@every_case
def test_random_events_make_no_difference(case: Case) -> None:
    """After each event weights, state, groups, what hooks see, warnings and errors are those without kept plans.

    With FUZZ_SECONDS it looks for new sequences for that time over all cases. FUZZ_SEED repeats those of a run.
    """
    if "FUZZ_SECONDS" not in os.environ:
        search(case, zlib.crc32(case.name.encode()), EXAMPLES)
        return
    end = time.monotonic() + float(os.environ["FUZZ_SECONDS"]) / len(CASES)
    while time.monotonic() < end:
        number = int(os.environ.get("FUZZ_SEED", secrets.randbits(32)))
        print(f"FUZZ_SEED={number}")
        search(case, number, 100)
