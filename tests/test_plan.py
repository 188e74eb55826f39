"""A plan that is kept from step to step gives the bits of one that is made anew, whatever happens in between.

The random part compares the two, step by step, over sequences of events (events.py). `make fuzz` looks for new ones.
"""

import copy
import gc
import importlib.util
import re
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import Any
from unittest import mock

import fuzz
import pytest
import support
import torch
from events import EVENTS, PLACES, Happening, World, history
from hypothesis import strategies as st
from support import ALL_PATHS, PathOptions, param, weight
from torch import nn
from torch.optim import SGD, Adagrad, AdamW, NAdam, Optimizer, RMSprop

from cwd_wrap import CautiousDecay, CautiousUpdate, PNormDecay
from cwd_wrap.kernels import buckets
from cwd_wrap.methods import wrapper
from cwd_wrap.step import paths
from cwd_wrap.step.choice import Method
from cwd_wrap.step.plan import Plan, _Group, compile_plan

SHAPES = [(2, 3), (4,), (3, 2), (1, 2, 2)]
MATRICES = [(2, 3), (3, 2), (4, 1), (2, 2)]
STEPS, MANY = 12, 15


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
    Case("AdamW", _update(path="one_pass", backend="eager")),
    Case("SGD-nesterov", _update(scale=None)),
    Case("AdamW-amsgrad", _p_norm(path="one_pass", backend="eager")),
    Case("NAdam", _p_norm()),
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


def sgd(path: PathOptions, *weights: nn.Parameter, **options: Any) -> CautiousDecay:
    return CautiousDecay(SGD(weights, **{"lr": 0.1, "weight_decay": 0.5, **path.base, **options}), **path)


# ------------------------------------------------------------------------------------ what a kept plan takes over


def test_new_learning_rates_and_decays_are_used(every_path: PathOptions, made: list[Plan]) -> None:
    """A kept plan steps and decays by the numbers of the coming step: 0.85 - 0.2 * 1 - 0.2 * 0.1 * 0.85 = 0.633."""
    weights = [weight(1.0, 1.0, 1.0, grad=[1.0, 1.0, 1.0]), weight(1.0, 1.0, grad=[1.0, 1.0])]  # two pieces
    opt = sgd(every_path, *weights)
    opt.step()
    opt.param_groups[0].update(lr=0.2, weight_decay=0.1)
    opt.step()

    for w in weights:
        torch.testing.assert_close(w.detach(), torch.full_like(w, 0.633))
    assert len(made) == 1


def test_a_tensor_that_is_filled_in_place_is_read(every_path: PathOptions, made: list[Plan]) -> None:
    """A schedule may write into a tensor lr: 0.85 - 0.2 * 1 - 0.2 * 0.5 * 0.85 = 0.565."""
    w, lr = weight(1.0, grad=[1.0]), torch.tensor(0.1)
    opt = sgd(every_path, w, lr=lr)
    opt.step()
    lr.fill_(0.2)
    opt.step()

    torch.testing.assert_close(w.detach(), torch.tensor([0.565]))
    assert len(made) == 1


def test_a_learning_rate_of_zero_stands_still(every_path: PathOptions) -> None:
    """A step with lr 0 changes nothing; the next one with lr 0.1 gives 0.85 - 0.1 - 0.05 * 0.85 = 0.7075."""
    w = weight(1.0, grad=[1.0])
    opt = sgd(every_path, w)
    seen = []
    for lr in (0.1, 0.0, 0.1):
        opt.param_groups[0]["lr"] = lr
        opt.step()
        seen.append(w.item())

    assert seen == pytest.approx([0.85, 0.85, 0.7075])


def test_new_gradients_are_read(every_path: PathOptions, made: list[Plan]) -> None:
    """A new tensor of gradients is read, and one that is written in place: 0.85 + 0.1, then 0.95 - 0.1 - 0.0475."""
    w = weight(1.0, grad=[1.0])
    opt = sgd(every_path, w)
    opt.step()
    w.grad = gradient = torch.tensor([-1.0])
    opt.step()
    gradient.fill_(1.0)
    before = w.item()
    opt.step()

    assert before == pytest.approx(0.95)
    assert w.item() == pytest.approx(0.8025)
    assert len(made) == 1


def test_replaced_state_is_read(every_path: PathOptions) -> None:
    """Another momentum buffer, -4, gives u = 0.5 * -4 + 1 = -1 and no decay: 0.85 + 0.1 = 0.95."""
    w = weight(1.0, grad=[1.0])
    opt = sgd(every_path, w, momentum=0.5)
    opt.step()
    opt.state[w]["momentum_buffer"] = torch.tensor([-4.0])
    opt.step()

    assert w.item() == pytest.approx(0.95)


def test_other_memory_is_read(every_path: PathOptions, made: list[Plan]) -> None:
    """A weight that was set to 2 with ``.data =`` goes to 2 - 0.1 - 0.05 * 2 = 1.8."""
    w = weight(1.0, grad=[1.0])
    opt = sgd(every_path, w)
    opt.step()
    w.data = torch.tensor([2.0])
    opt.step()

    assert w.item() == pytest.approx(1.8)
    assert len(made) == 1


@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_are_let_go(every_path: PathOptions, groups: int) -> None:
    """After a step nothing holds the gradients: the next backward pass needs their memory."""
    weights = [weight(1.0, 2.0) for _ in range(groups)]
    of_groups = [{"params": [w], "lr": 0.1 * (i + 1)} for i, w in enumerate(weights)]
    opt = CautiousDecay(SGD(of_groups, momentum=0.9, **every_path.base), lam=0.5, **every_path)
    for _ in range(3):
        for w in weights:
            w.grad = torch.ones(2)
        gradients = [weakref.ref(w.grad) for w in weights]
        opt.step()
        opt.zero_grad()

        assert [gradient() for gradient in gradients] == [None] * groups


# ------------------------------------------------------------------------------------ what a plan does not outlive


def test_state_that_someone_has_made_empty_is_not_taken_for_none(every_path: PathOptions) -> None:
    """With an empty state before the first step the second reads the momentum: u = 0.9 - 0.5 = 0.4, so w decays."""
    w = weight(1.0, grad=[1.0])
    opt = sgd(every_path, w, momentum=0.9)
    assert opt.state[w] == {}
    opt.step()
    w.grad = torch.tensor([-0.5])
    opt.step()

    assert w.item() == pytest.approx(0.85 - 0.1 * 0.4 - 0.05 * 0.85)


@pytest.mark.parametrize("path", [param(path, path=path) for path in ALL_PATHS if path["path"] == "one_pass"])
def test_a_list_of_betas_that_is_written_to_is_read(path: PathOptions, made: list[Plan]) -> None:
    """With betas[0] = 0 the average is the gradient itself. A list that stays as it is does not end the plan."""
    w = weight(1.0, grad=[1.0])
    opt = CautiousDecay(AdamW([w], weight_decay=0.1), **path)
    betas = opt.param_groups[0]["betas"] = [0.9, 0.99]
    for _ in range(5):
        opt.step()
    plans = len(made)
    betas[0] = 0.0
    w.grad = torch.tensor([-3.0])
    opt.step()

    assert opt.state[w]["exp_avg"].item() == -3.0
    assert [plans, len(made)] == [2, 3]


def test_a_step_that_fails_leaves_no_plan_behind(every_path: PathOptions) -> None:
    """Group 0 loses its momentum in a step that group 1 makes fail. The next step has none: 0.85 - 0.1 - 0.0425."""
    one, other = weight(1.0, grad=[1.0]), weight(1.0, grad=[1.0])
    opt = CautiousDecay(
        SGD([{"params": [one]}, {"params": [other]}], lr=0.1, weight_decay=0.5, momentum=0.9), **every_path
    )
    opt.step()
    decay = opt.param_groups[1]["weight_decay"]
    opt.param_groups[0]["momentum"], opt.param_groups[1]["weight_decay"] = 0.0, -1.0
    with pytest.raises(ValueError, match=r"-1\.0"):
        opt.step()
    opt.param_groups[1]["weight_decay"] = decay
    opt.step()

    assert one.item() == pytest.approx(0.7075)


def test_another_base_is_stepped(every_path: PathOptions) -> None:
    """After an assignment to base_optimizer the new base's weights are stepped, the old ones are not."""
    old, new = weight(1.0, grad=[1.0]), weight(1.0, grad=[1.0])
    opt = sgd(every_path, old)
    opt.step()
    opt.base_optimizer = SGD([new], lr=0.1, weight_decay=0.5, **every_path.base)
    opt.step()

    assert [old.item(), new.item()] == pytest.approx([0.85, 0.85])


@pytest.mark.parametrize("shapes", [((4,), (2, 2)), ((2, 3), (3, 2))], ids=["another rank", "the same rank"])
@pytest.mark.parametrize(
    "path", [param(path, path=path) for path in ALL_PATHS if path["path"] in ("one_pass", "direction")]
)
def test_a_weight_of_another_shape_than_its_state_is_refused(
    path: PathOptions, shapes: tuple[tuple[int, ...], tuple[int, ...]]
) -> None:
    """A weight that was reshaped after a step raises the error that a first step raises."""
    old, new = shapes
    w = nn.Parameter(torch.ones(old))
    w.grad = torch.ones(old)
    opt = sgd(path, w, momentum=0.9)
    for _ in range(3):
        opt.step()
    w.data, w.grad = w.data.view(new), None
    w.grad = torch.ones(new)

    with pytest.raises(ValueError, match=re.escape(f"weight of shape {new} whose gradient or state has shape {old}")):
        opt.step()


@pytest.mark.parametrize("path", [param(path, path=path) for path in ALL_PATHS if path.copies])
def test_a_weight_of_another_shape_is_copied_anew(path: PathOptions) -> None:
    """On the paths with a copy a weight may be reshaped: its copy follows."""
    w = weight(1.0, 1.0, grad=[1.0, 1.0])
    opt = sgd(path, w)
    opt.step()
    w.data, w.grad = w.data.view(2, 1), None
    w.grad = torch.ones(2, 1)
    opt.step()

    torch.testing.assert_close(w.detach(), torch.full((2, 1), 0.7075))


def test_a_forced_path_that_does_not_work_is_no_error_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once AdamW's step is someone else's, it takes no path in pieces: a step raises that, if it has a gradient."""
    p = weight(1.0, grad=[1.0])
    opt = CautiousDecay(AdamW([p], lr=0.1, weight_decay=0.5), path="pieces")
    opt.step()
    step = AdamW.step
    monkeypatch.setattr(AdamW, "step", lambda self: step(self))
    opt.zero_grad()
    opt.step()
    opt.step()
    p.grad = torch.ones(1)

    with pytest.raises(ValueError, match="path='pieces' does not work for param group 0 of AdamW"):
        opt.step()


def test_a_parameter_that_stays_on_another_path_gets_new_gradients() -> None:
    """A parameter whose counter one_pass cannot read takes the direction, with the gradients of each step."""
    histories = []
    for dtype in (torch.float64, torch.float32):
        p, q = weight(1.0, 1.0), weight(1.0, 1.0)
        opt = CautiousDecay(AdamW([p, q], lr=0.1, weight_decay=0.5, fused=True), path="one_pass", backend="eager")
        for step, gradient in enumerate([1.0, -4.0, 3.0, -9.0]):
            p.grad, q.grad = torch.full((2,), gradient), torch.full((2,), gradient)
            opt.step()
            if step == 0:
                opt.state[p]["step"] = opt.state[p]["step"].to(dtype)
        histories.append(p.detach())

    torch.testing.assert_close(*histories)


def test_scaled_gradients_end_the_plan_for_one_step(made: list[Plan]) -> None:
    """one_pass leaves a step in which the base is to unscale its gradients to the base, and has the next one again."""
    pytest.importorskip("numba")
    w = weight(1.0, grad=[1.0])
    base = AdamW([w], lr=0.1, weight_decay=0.5, fused=True)
    opt = CautiousDecay(base)
    taken = []
    for scaled in (False, False, True, False):
        base.grad_scale, base.found_inf = (torch.tensor(1.0), torch.tensor(0.0)) if scaled else (None, None)
        opt.step()
        taken.append([type(path) for path in made[-1].paths])

    assert taken[1:] == [[paths.OnePass], [paths.Direction], [paths.OnePass]]


def test_a_coefficient_that_opens_another_path_ends_the_plan(made: list[Plan]) -> None:
    """RMSprop with momentum is compared with a copy; if the momentum becomes 0, its direction is known."""
    w = weight(1.0, grad=[1.0])
    opt = CautiousDecay(RMSprop([w], lr=0.1, weight_decay=0.5, momentum=0.9, foreach=False))
    for momentum in (0.9, 0.9, 0.8, 0.0):
        opt.param_groups[0]["momentum"] = momentum
        opt.step()

    assert [[type(path) for path in plan.paths] for plan in made[-2:]] == [[paths.Pieces], [paths.Direction]]


# ------------------------------------------------------------------------------------ what a plan does not keep alive


@pytest.fixture
def no_collection() -> Iterator[None]:
    """Python collects no cycles, so only what is in none goes at once."""
    SGD([weight(1.0)])  # the first optimizer of a process stays with what torch imports for it
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


@pytest.mark.usefixtures("no_collection")
def test_dropped_copies_are_freed_at_once() -> None:
    """After drop_snapshot nothing holds the copies."""
    for path in ("snapshot", "pieces"):
        opt = sgd(PathOptions(path=path), weight(1.0, grad=[1.0]))
        opt.step()
        copies = [weakref.ref(t) for t in [*opt._buffers._whole.values(), *opt._buffers._piece.values()]]
        opt.drop_snapshot()

        assert [each() for each in copies] == [None]


@pytest.mark.usefixtures("no_collection")
def test_state_is_freed_when_another_is_loaded(every_path: PathOptions) -> None:
    """After load_state_dict nothing holds the old state."""
    w = weight(1.0, grad=[1.0])
    opt = CautiousDecay(AdamW([w], weight_decay=0.5, **every_path.base), **every_path)
    for _ in range(3):
        opt.step()
    old = weakref.ref(opt.state[w]["exp_avg"])
    opt.load_state_dict(copy.deepcopy(opt.state_dict()))

    assert old() is None


@pytest.mark.usefixtures("no_collection")
def test_a_deleted_optimizer_is_freed_at_once(every_method: support.Method) -> None:
    """When the last reference to a wrapper goes, it, its base, its state and the weights go, too."""
    w = weight(1.0, grad=[1.0])
    opt = every_method.wrap(AdamW([w], weight_decay=0.5, **every_method.base))
    for _ in range(3):
        opt.step()
    held = [weakref.ref(each) for each in (opt, opt.base_optimizer, opt.state[w]["exp_avg"], w)]
    del opt, w

    assert [each() for each in held] == [None] * 4


@pytest.mark.usefixtures("no_collection")
def test_a_method_of_ones_own_is_freed_at_once() -> None:
    """A subclass that names its own functions need do nothing for that; what else it names is kept alive."""

    class Halving:
        def after(self, _: Any, buckets: Any, __: bool) -> None:
            for w in buckets[0].w:
                w.mul_(0.5)

    class Halved(CautiousDecay):
        def _method(self) -> Method:
            return Method("Halved", Halving().after, needs_copy="it halves", whole=self._whole)

    w = weight(1.0, grad=[0.0])
    opt = Halved(SGD([w], lr=0.1, weight_decay=0.5), path="snapshot")
    for _ in range(3):
        opt.step()
    held = weakref.ref(opt)
    del opt

    assert w.item() == 0.125
    assert held() is None


# ------------------------------------------------------------------------------------ when a plan is kept


def plans_of(case: Case, made: list[Plan], before_step: Callable[[World, int], None]) -> int:
    """How many plans are made in some steps with new gradients."""
    world = case.world()
    with mock.patch.object(paths, "PIECE", case.piece):
        for i in range(MANY):
            before_step(world, i)
            world.step(Happening("nothing", "between steps", 0))
            assert ("step", "None") in world.noted
    return len(made)


def constant(world: World, step: int) -> None:
    """Nothing changes."""


def schedule(world: World, step: int) -> None:
    """A schedule of lr and weight_decay."""
    for group in world.groups:
        group["lr"], group["weight_decay"] = 0.1 / (step + 1), 0.5 / (step + 1)


def one_cycle(world: World, step: int) -> None:
    """A schedule of lr and of the momentum, as OneCycleLR writes it."""
    for group in world.groups:
        group["lr"] = 0.1 / (step + 1)
        if "betas" in group:
            group["betas"] = (0.9 - 0.01 * step, *group["betas"][1:])
        elif group.get("momentum"):
            group["momentum"] = 0.9 - 0.01 * step


# The coefficients of NAdam's direction change with each step; random numbers are drawn for each step.
ANEW = {
    *([] if importlib.util.find_spec("numba") else ["NAdam"]),
    "AdamW-CautiousDecay-random",
    "AdamW-CautiousDecay-stochastic",
}


@every_case
@pytest.mark.parametrize("before_step", [constant, schedule, one_cycle])
def test_plain_steps_keep_their_plan(case: Case, before_step: Any, made: list[Plan]) -> None:
    """15 steps make two plans: one before there is state, one after. Schedules of numbers change nothing in that."""
    plans = plans_of(case, made, before_step)

    assert plans == MANY if case.name in ANEW else plans <= 2


@pytest.mark.parametrize("happening", ["observer", "sparse gradient", "captured", "scaled"])
def test_some_steps_have_a_plan_of_their_own(happening: str, made: list[Plan]) -> None:
    """A step that is looked at, with a sparse gradient, captured or scaled is planned anew, and so is the next one."""
    world = World(partial(SGD, lr=0.1, weight_decay=0.5), CautiousDecay, SHAPES)
    counts = []
    for event in ("nothing", "nothing", happening, happening, "nothing", "nothing"):
        world.step(Happening(event, "between steps", 0))
        counts.append(len(made))

    assert counts == [1, 1, 2, 3, 4, 4]


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


@every_case
def test_random_events_make_no_difference(case: Case) -> None:
    """After each event weights, state, groups, what hooks see, warnings and errors are those without kept plans."""
    fuzz.look(partial(check, case), HAPPENINGS, case.name, len(CASES))


# ------------------------------------------------------------------------------------ the check can fail


@pytest.mark.parametrize("happening", EVENTS)
def test_each_event_can_happen(happening: str) -> None:
    """Each event does something to some world without an error, so it is no event in name only."""
    for case in (Case("AdamW"), Case("SGD-momentum"), Case("AdamW", _p_norm())):
        for pick in range(8):
            seen = case.history(
                [Happening("lr tensor", "between steps", 0), Happening(happening, "between steps", pick)]
            )
            if ("event", "None") in seen[1] or happening in ("error", "another step"):
                return
    pytest.fail(f"{happening!r} raises an error in every world")


def test_the_check_finds_stale_state(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a plan did not look at the tensors of the state, the check would find it."""
    pytest.importorskip("numba")  # a direction reads one of the tensors only
    happenings = [Happening(event, "between steps", 1) for event in ["nothing"] * 3 + ["tensor of state replaced"]]
    check(Case("AdamW"), happenings)
    monkeypatch.setattr(buckets.Held, "is_same", lambda _: True)
    with pytest.raises(AssertionError, match="by a kept plan"):
        check(Case("AdamW"), happenings)


def test_the_check_finds_a_stale_decay(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a plan did not take over new numbers, the check would find it."""
    happenings = [Happening(event, "between steps", 1) for event in ["nothing"] * 3 + ["no group decays"]]
    check(Case("AdamW"), happenings)
    monkeypatch.setattr(_Group, "_takes", lambda *_: True)
    with pytest.raises(AssertionError, match="by a kept plan"):
        check(Case("AdamW"), happenings)
