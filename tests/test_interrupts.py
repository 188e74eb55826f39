"""Interrupts inside a step: at each line of the package, on each path, nothing stays changed and nothing is half saved.

`lines_of` runs a step under a trace function, which is called before each line of the package that the step executes.
There it raises (Ctrl-C, a handler that raises), or saves (a handler that writes a checkpoint).
"""

import contextlib
import copy
import gc
import itertools
import os
import pickle
import random
import signal
import sys
import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from processes import call
from support import ALL_PATHS, PathOptions, can_run, same, stopped_in_a_step, weight
from torch import Tensor
from torch.optim import SGD, AdamW, Optimizer

import cwd_wrap
from cwd_wrap import CautiousDecay, CautiousUpdate, MaskMonitor, PNormDecay
from cwd_wrap.step import paths

HERE = Path(__file__).parent
PACKAGE = str(Path(cwd_wrap.__file__).parent)

pytestmark = pytest.mark.filterwarnings(
    "ignore:always_adapt of param group", "ignore:weight_decay of param group", "ignore:Sparse invariant checks"
)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paths, "PIECE", 16)


# ------------------------------------------------------------------------------------ what is interrupted


class Own(AdamW):
    """In no table, so it takes the path snapshot, and calls its closure itself."""


class Unhooked(Optimizer):
    """Skips Optimizer.__init__ and with it the hooks, as Lookahead does."""

    def __init__(self, inner: Optimizer) -> None:
        self.inner, self.defaults = inner, inner.defaults

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)

    param_groups = property(lambda self: self.inner.param_groups)
    state = property(lambda self: self.inner.state)


def fused(groups: Any, lr: float) -> Optimizer:
    return AdamW(groups, lr=lr, fused=True)


class Case(NamedTuple):
    """A wrapper over three weights in two groups, one of which does not decay, and how to step it."""

    wrap: Callable[[Optimizer], Any]
    base: Callable[..., Optimizer] = AdamW
    closure: bool = False
    hooks: bool = False
    sparse: bool = False
    done: int = 2  # steps before the one that is interrupted

    def build(self) -> Any:
        a = weight(1.0, 2.0, -1.0, -2.0, 0.5, grad=[1.0, -1.0, 0.5, -2.0, 1.0])
        b, c = weight(1.0, 2.0, grad=[2.0, -0.5]), weight(1.0, 2.0, grad=[1.0, 1.0])
        if self.sparse:
            a.grad = torch.sparse_coo_tensor(torch.tensor([[0, 3]]), torch.tensor([1.0, -1.0]), (5,))
        decays = {"params": [a, b], "weight_decay": 0.5, "always_adapt": False}  # which is on while the decay is off
        opt = self.wrap(self.base([decays, {"params": [c], "weight_decay": 0.0}], lr=0.1))
        if self.hooks:
            opt.register_step_pre_hook(lambda *_: None)
            opt.base_optimizer.register_step_post_hook(lambda *_: None)
            opt.observer = MaskMonitor()
        for _ in range(self.done):
            self.step(opt)
        return opt

    def step(self, opt: Any) -> None:
        opt.step(*[lambda: 0.0] * self.closure)


def on(path: PathOptions) -> Case:
    return Case(lambda base: CautiousDecay(base, **path), fused if path.base else AdamW)


PATHS = {str(path): on(path) for path in ALL_PATHS if can_run(path)}
CASES = PATHS | {
    "first": Case(CautiousDecay, fused, done=0),
    "first-own": Case(CautiousDecay, Own, done=0),
    "gradient": Case(lambda base: CautiousDecay(base, mask="gradient", strict=True)),
    "update": Case(CautiousUpdate),
    "p-norm": Case(PNormDecay, Own),
    "closure": Case(CautiousDecay, Own, closure=True),
    "hooks": Case(CautiousDecay, hooks=True),
    "rows": Case(CautiousDecay, SGD, sparse=True),
    "unhooked": Case(CautiousDecay, lambda groups, lr: Unhooked(AdamW(groups, lr=lr))),
}
every_case = pytest.mark.parametrize("name", list(CASES))

# ------------------------------------------------------------------------------------ how


def lines_of(call: Callable[[], object], act: Callable[[int, str], object]) -> None:
    """Run ``call``, and ``act`` before each line of the package, with the line's number among all and its place."""
    number = itertools.count()

    def in_package(frame: Any, event: str, _: object) -> Any:
        if event == "line":
            act(next(number), f"{Path(frame.f_code.co_filename).name}:{frame.f_lineno}")
        return in_package

    def enter(frame: Any, *_: object) -> Any:
        return in_package if frame.f_code.co_filename.startswith(PACKAGE) else None

    before = sys.gettrace()
    sys.settrace(enter)
    try:
        call()
    finally:
        sys.settrace(before)


def visits(name: str) -> dict[str, list[int]]:
    """The numbers of the lines of a step, for each place in the code."""
    found: dict[str, list[int]] = {}
    opt = CASES[name].build()
    lines_of(lambda: CASES[name].step(opt), lambda number, place: found.setdefault(place, []).append(number))
    return found


@cache
def lines_of_cases() -> dict[str, list[int]]:
    """Numbers of lines of a step of each case: every place in the code in up to two of the cases that come there.

    Each at a random one of its visits.
    """
    of_cases, draw = {name: visits(name) for name in CASES}, random.Random(0)
    chosen: dict[str, list[int]] = {name: [] for name in CASES}
    for place in sorted(set().union(*of_cases.values())):
        there = [name for name, found in of_cases.items() if place in found]
        for name in draw.sample(there, min(2, len(there))):
            chosen[name].append(draw.choice(of_cases[name][place]))
    return {name: sorted(numbers) for name, numbers in chosen.items()}


def raise_at(opt: Any, case: Case, line: int) -> str | None:
    """Step, and raise before the line of that number: as Ctrl-C does, or as a handler may. Returns its place.

    None if the step has fewer lines: a step with a plan that is kept is shorter than one that makes it.
    """
    error, places = (KeyboardInterrupt if line % 2 else TimeoutError), []

    def act(number: int, place: str) -> None:
        if number == line:
            places.append(place)
            raise error

    with contextlib.suppress(error):
        lines_of(lambda: case.step(opt), act)
    return places[0] if places else None


HOOKS = [
    f"_optimizer_{what}_{when}_hooks" for what in ("step", "state_dict", "load_state_dict") for when in ("pre", "post")
]


def between(opt: Any) -> dict[str, Any]:
    """What a step must leave as it was: the values in groups, their lists and members, the hooks.

    It is read through the wrapper first: what an interrupted step has left may be undone on its next use.
    """
    groups = [
        {key: (id(v), [*map(id, v)]) if key == "params" else v for key, v in group.items()}
        for group in opt.param_groups
    ]
    base = opt.base_optimizer
    hooks = {name: [[*getattr(each, name, ())] for each in (opt, base)] for name in HOOKS}
    modes = torch.is_grad_enabled(), torch.is_inference_mode_enabled(), len(vars(base))
    return {"groups": groups, "hooks": hooks, "modes": modes}


def parameters(opt: Any) -> list[Tensor]:
    return [p for group in opt.param_groups for p in group["params"]]


def keys(opt: Any) -> list[list[str]]:
    """The keys of each parameter's state."""
    return [sorted(opt.state.get(p, ())) for p in parameters(opt)]


def made_of(now: list[list[str]], known: list[list[list[str]]]) -> bool:
    """Are the keys of each parameter's state those that it has in one of the ``known`` lists?"""
    lists = list(map(len, known))
    return lists == [len(now)] * len(known) and all(of_one in may for of_one, *may in zip(now, *known, strict=True))


def stepped(opt: Any, case: Case) -> Any:
    """A new wrapper with the same weights and state, one step later."""
    twin = case.build()
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    for p, of_twin in zip(parameters(opt), parameters(twin), strict=True):
        of_twin.data.copy_(p.data)
        of_twin.grad = p.grad
    case.step(twin)
    return twin


def alike(opt: Any, twin: Any) -> bool:
    """Do two wrappers have the same weights and state dicts?"""
    weights = [[p.detach() for p in parameters(each)] for each in (opt, twin)]
    return same(*weights) and same(opt.state_dict(), twin.state_dict())


# ------------------------------------------------------------------------------------ interrupts


def what_is_wrong(opt: Any, before: dict[str, Any], known: list[list[list[str]]]) -> list[str]:
    """What is not as before; a parameter's state may also have the keys that a whole step gives it."""
    now = between(opt)
    wrong = [what for what in before if now[what] != before[what]]
    return wrong if made_of(keys(opt), known) else [*wrong, "state"]


@every_case
def test_an_interrupt_at_any_line_leaves_nothing_changed(name: str) -> None:
    """After an interrupt groups, lists and hooks are as before, states have all keys, and the next step is right."""
    case, opt, wrong = CASES[name], CASES[name].build(), {}
    known = [keys(opt), keys(stepped(opt, case))]
    lines, raised = lines_of_cases()[name], 0
    for i, line in enumerate(lines):
        before = between(opt)
        place = raise_at(opt, case, line)
        if place is None:
            opt = case.build()
            continue
        raised += 1
        found = what_is_wrong(opt, before, known)
        twin = stepped(opt, case) if i % 5 == 0 and not found else None
        case.step(opt)
        if twin is not None and not alike(opt, twin):
            found = ["next step"]
        if found:
            wrong[place] = found
        if found or not case.done:
            opt = case.build()

    assert not wrong
    assert raised > len(lines) / 2


def test_the_comparison_sees_what_stays() -> None:
    """The comparison sees a decay that stays off, a shorter list, a hook that is left, a state without a key."""
    case = CASES["p-norm"]
    for what, change in (
        ("groups", lambda base, _: base.param_groups[0].update(weight_decay=0.0)),
        ("groups", lambda base, p: base.param_groups[0].update(params=[*p])),
        ("hooks", lambda base, _: base.register_step_pre_hook(lambda *_: None)),
        ("state", lambda base, p: base.state[p[1]].pop("step")),
    ):
        opt = case.build()
        before, known = between(opt), [keys(opt)]
        change(opt.base_optimizer, opt.param_groups[0]["params"])
        assert [what] == what_is_wrong(opt, before, known)


@every_case
def test_a_handler_that_raises_inside_the_bases_step(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal's handler that raises while the base's own code runs: the error arrives, and nothing stays changed."""
    case = CASES[name]
    opt = case.build()
    if name == "update":
        opt.base_optimizer.register_step_pre_hook(lambda *_: None)  # otherwise the base's own step is left out
    before = between(opt)

    def handler(*_: object) -> None:
        raise TimeoutError

    def interrupted(*_: object) -> None:
        signal.raise_signal(signal.SIGINT)

    cls = SGD if case.base is SGD else AdamW
    handled = signal.signal(signal.SIGINT, handler)
    try:
        with monkeypatch.context() as patched, pytest.raises(TimeoutError):
            patched.setattr(cls, "_init_group", interrupted)
            case.step(opt)
    finally:
        signal.signal(signal.SIGINT, handled)

    assert between(opt) == before


# ------------------------------------------------------------------------------------ handlers that save

SAVES: dict[str, Callable[[Any], Any]] = {
    "wrapper's": lambda opt: opt.state_dict(),
    "base's": lambda opt: opt.base_optimizer.state_dict(),
    "pickle": lambda opt: pickle.loads(pickle.dumps(opt.base_optimizer)),
    "deepcopy": lambda opt: copy.deepcopy(opt.base_optimizer),
}


def saved(made: Any) -> tuple[list[dict[str, Any]], list[list[str]]]:
    """The groups in a state dict or a copy, with the number of parameters, and the keys of the state of each."""
    groups, state = (made["param_groups"], made["state"]) if isinstance(made, dict) else (made.param_groups, made.state)
    values = [{**group, "params": len(group["params"])} for group in groups]
    return values, [sorted(state.get(p, ())) for group in groups for p in group["params"]]


def unpickled(name: str) -> bool:
    return name == "unhooked"  # its step is a bound method of the inner optimizer


# Each case with one of the state dicts and one of the copies, in turn.
CASES_OF_SAVES = [
    (name, how)
    for turn, name in enumerate(CASES)
    for how in list(SAVES)[turn % 2 :: 2]
    if not (how in ("pickle", "deepcopy") and unpickled(name))
]


@pytest.mark.parametrize(("name", "how"), CASES_OF_SAVES)
def test_what_is_saved_at_any_line_is_as_between_steps(name: str, how: str) -> None:
    """What a handler saves in the middle of a step has the decay, all parameters and states; the step ends well."""
    case, save = CASES[name], SAVES[how]
    opt, wrong = case.build(), {}
    twin = stepped(opt, case)
    groups, *known = *saved(save(opt)), keys(twin)
    lines = set(lines_of_cases()[name])

    def act(number: int, place: str) -> None:
        if number not in lines:
            return
        try:
            groups_now, keys_now = saved(save(opt))
        except KeyError as error:
            wrong[place] = error
            return
        if groups_now != groups or not made_of(keys_now, known):
            wrong[place] = groups_now, keys_now

    lines_of(lambda: case.step(opt), act)

    assert not wrong
    assert alike(opt, twin)


# ------------------------------------------------------------------------------------ one pass on two threads


def big(numel: int) -> CautiousDecay:
    """A wrapper on one pass that has stepped one tensor of ones, all of whose elements stay equal."""
    p = torch.nn.Parameter(torch.ones(numel))
    p.grad = torch.ones_like(p)
    opt = CautiousDecay(AdamW([p], fused=True, weight_decay=0.5), path="one_pass")
    opt.step()
    opt.step()
    return opt


def seconds(opt: CautiousDecay) -> float:
    start = time.perf_counter()
    opt.step()
    return time.perf_counter() - start


def on_alarm(handler: Callable[..., None], after: float) -> None:
    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, after)


def interrupted_on_two_threads() -> tuple[int, int]:
    """How many tensors a handler saw half stepped, and how often weights changed after a handler had raised."""
    torch.set_num_threads(2)
    opt = big(1 << 22)
    half = []

    def save(*_: object) -> None:
        state = next(iter(opt.state_dict()["state"].values()))
        half.extend(key for key, t in state.items() if t.min() != t.max())

    one = min(seconds(opt) for _ in range(3))
    for turn in range(12):
        on_alarm(save, one * (1 + turn) / 12)
        opt.step()
        time.sleep(2 * one)

    def stop(*_: object) -> None:
        raise TimeoutError

    written = 0
    for numel, turns in ((1 << 22, 6), (1 << 24, 2)):  # the memory of the larger ones goes back to the system at once
        for turn in range(turns):
            opt = big(numel)
            on_alarm(stop, seconds(opt) * (1 + turn) / turns)
            try:
                while True:
                    opt.step()
            except TimeoutError:
                p = opt.param_groups[0]["params"][0]
                before = p.detach().clone()
                time.sleep(one)
                written += not torch.equal(before, p)
                del p, opt
            gc.collect()
    return len(half), written


@pytest.fixture(scope="module")
def on_two_threads() -> tuple[int, int]:
    pytest.importorskip("numba")
    if not hasattr(signal, "setitimer"):
        pytest.skip("this system has no timers for signals")
    found: tuple[int, int] = call(interrupted_on_two_threads)
    return found


def test_a_handler_that_saves_during_one_pass_sees_no_half_stepped_tensor(on_two_threads: tuple[int, int]) -> None:
    """One pass on two threads: a handler runs before or after it, so each tensor that it saves is of one step."""
    assert on_two_threads[0] == 0


def test_a_handler_that_raises_during_one_pass_stops_all_threads(on_two_threads: tuple[int, int]) -> None:
    """After the error no thread writes to the weights any more, and they can be freed without a crash."""
    assert on_two_threads[1] == 0


# ------------------------------------------------------------------------------------ a child of a process in a step


def go_on_in_children() -> dict[str, bool]:
    """For each path: is a child right that is forked while a thread steps, and does it train on?"""
    torch.set_num_threads(1)
    paths.PIECE = 16
    return {name: goes_on_in_a_child(case) for name, case in PATHS.items()}


def goes_on_in_a_child(case: Case) -> bool:
    opt = case.build()
    before = between(opt)
    with stopped_in_a_step(partial(case.step, opt)):
        child = os.fork()
        if child == 0:
            right = between(opt) == before
            twin = stepped(opt, case)
            case.step(opt)
            os._exit(not (right and alike(opt, twin) and between(opt) == before))
        _, status = os.waitpid(child, 0)
    return status == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_that_is_forked_while_another_thread_steps_can_train() -> None:
    """In the child, where that thread is gone, groups and hooks are as between steps, and the next step is right."""
    assert dict.fromkeys(PATHS, True) == call(go_on_in_children)
