"""The four paths: which group takes which and why, that they agree, and that they change nothing else."""

import copy
import itertools
import os
import re
import subprocess
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import call
from support import ALL_PATHS, Base, PathOptions, can_run, net, param, same, train, values, weight
from test_directions import make, terms_of
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer, RMSprop, Rprop
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cwd_wrap import CautiousDecay, CautiousUpdate, PNormDecay
from cwd_wrap.bases import directions
from cwd_wrap.step import paths
from cwd_wrap.step.choice import PathOfGroup


def last_reason(of_group: PathOfGroup) -> str:
    return re.split(r"(?:^not|\. Not) [\w ]+: ", of_group.reason)[-1]


NO_KERNEL = "no compiled kernel runs on cpu: backend='eager'"


def sizes(*numbers: int) -> list[nn.Parameter]:
    return [weight(*[1.0] * n, grad=[1.0] * n) for n in numbers]


# ------------------------------------------------------------------------------------ which, and why


def mixed(**options: Any) -> CautiousDecay:
    """RMSprop with a group of 4 weights with momentum, one of 1000 without, and one of 10 that does not decay."""
    few, many, idle = sizes(4, 1000, 10)
    groups = [{"params": [few], "momentum": 0.9}, {"params": [many]}, {"params": [idle], "weight_decay": 0.0}]
    return CautiousDecay(RMSprop(groups, lr=0.1, weight_decay=0.5), backend="eager", **options)


def test_each_group_takes_its_own_path() -> None:
    """The group with momentum in RMSprop takes pieces, the group without takes the direction."""
    why = "RMSprop with momentum divides each past gradient by its own scale"
    no_kernel = NO_KERNEL

    assert [
        (0, "pieces", f"not one_pass: {no_kernel}. Not direction: {why}"),
        (1, "direction", f"not one_pass: {no_kernel}"),
        (2, "plain", "weight_decay is 0: a plain step, without decay"),
    ] == mixed().paths()


def test_a_group_costs_the_memory_of_its_own_path() -> None:
    """Only the 4 weights of 4 bytes are copied, as repr shows, and the buffer is no larger."""
    opt = mixed()
    opt.step()

    assert 16 == opt.snapshot_bytes
    assert (
        "CautiousDecay(RMSprop, lam=[0.5, 0.5, 0.0], path=['pieces', 'direction'], backend='eager', snapshot_bytes=16)"
    ) == repr(opt)
    assert {} == opt._buffers._whole
    assert [32] == [buffer.numel() for buffer in opt._buffers._piece.values()]  # rounded up for alignment


def test_a_snapshot_beside_a_direction_costs_its_own_group_only() -> None:
    """A group that masks its own update takes a copy of its own weights only."""
    timm = pytest.importorskip("timm.optim")
    few, many = sizes(4, 1000)
    base = timm.NAdamW([{"params": [few], "caution": True}, {"params": [many]}], lr=0.1, weight_decay=0.5)
    opt = CautiousDecay(base)
    opt.step()
    copying = [path for path in opt.paths() if path.path not in ("one_pass", "direction")]

    assert [(0, "NAdamW masks its own update in a group with caution=True")] == [
        (path.group, last_reason(path)) for path in copying
    ]
    assert 16 == opt.snapshot_bytes


@pytest.mark.parametrize(
    ("base", "options", "expected"),
    [
        (AdamW, {"fused": True}, ("direction", NO_KERNEL)),
        (AdamW, {}, ("direction", NO_KERNEL)),
        (AdamW, {"fused": False}, ("direction", "fused=False was passed, so AdamW's own step runs")),
        (SGD, {"foreach": True}, ("direction", "foreach=True was passed, so SGD's own step runs")),
        (SGD, {"foreach": False}, ("direction", "foreach=False was passed, so SGD's own step runs")),
        (Adagrad, {"fused": True}, ("direction", NO_KERNEL)),
        (
            Rprop,
            {},
            ("pieces", "the sign of Rprop's step is not known before it"),
        ),
    ],
)
def test_paths_gives_the_reason(base: Any, options: dict[str, Any], expected: tuple[str, str]) -> None:
    """paths() says why a group does not take an earlier path."""
    (of_group,) = CautiousDecay(base([weight(1.0)], **options), lam=0.1, backend="eager").paths()

    assert expected == (of_group.path, last_reason(of_group))


def test_one_pass_is_the_first_choice() -> None:
    """AdamW on the CPU, fused or as it is built by default, and Lion take one pass where numba is installed."""
    pytest.importorskip("numba")
    bases = [AdamW([weight(1.0)], fused=True), AdamW([weight(1.0)])]
    bases += [pytest.importorskip("timm.optim").Lion([weight(1.0)], lr=0.1)]

    for base in bases:
        assert [(0, "one_pass", "a compiled kernel makes the whole step")] == CautiousDecay(base, lam=0.1).paths()


def lookahead(params: list[nn.Parameter]) -> Optimizer:
    return pytest.importorskip("timm.optim").Lookahead(AdamW(params))


IMPOSSIBLE: dict[str, tuple[Any, Any, str, str]] = {
    "not fused": (
        CautiousDecay, lambda params: AdamW(params, fused=False), "one_pass",
        "fused=False was passed, so AdamW's own step runs",
    ),
    "no kernel": (CautiousDecay, Rprop, "one_pass", "no kernel for Rprop"),
    "a subclass": (
        CautiousDecay, type("Mine", (AdamW,), {}), "one_pass",
        "no kernel for Mine",
    ),
    "no direction": (CautiousDecay, Rprop, "direction", "the sign of Rprop's step is not known before it"),
    "no pieces": (CautiousDecay, lookahead, "pieces", "Lookahead is not known to take the same step in pieces"),
    "an ablation": (
        lambda base, **options: CautiousDecay(base, mask="all", **options), SGD, "direction",
        "mask='all' is an ablation, which needs a copy of the weights",
    ),
    "CautiousUpdate": (CautiousUpdate, SGD, "direction", "CautiousUpdate needs a copy of the weights to know"),
    "PNormDecay": (PNormDecay, SGD, "direction", "PNormDecay needs a copy of the weights: its decay depends on"),
}  # fmt: skip


@pytest.mark.parametrize(("wrap", "base", "path", "reason"), IMPOSSIBLE.values(), ids=list(IMPOSSIBLE))
def test_a_path_that_cannot_be_taken_is_refused_with_its_reason(wrap: Any, base: Any, path: str, reason: str) -> None:
    """The error names the path, the group, the optimizer, the reason and the way out."""
    made, lam = base([weight(1.0)]), {} if wrap is CautiousUpdate else {"lam": 0.1}
    text = f"^path='{path}' does not work for param group 0 of {type(made).__name__}: "
    with pytest.raises(ValueError, match=text) as caught:
        wrap(made, path=path, **lam)

    assert reason in str(caught.value)
    assert str(caught.value).endswith("Pass path=None to let the library choose one that works")


def test_an_unknown_path_is_refused() -> None:
    """The error for an unknown path lists the four names and None."""
    with pytest.raises(ValueError, match="unknown path 'fast': pass one of 'one_pass', 'direction', 'pieces', 'snapsh"):
        CautiousDecay(SGD([weight(1.0)], lr=0.1), lam=0.1, path="fast")


def test_a_group_that_cannot_take_the_path_is_not_added() -> None:
    """A forced path is checked for later groups too."""
    opt = CautiousDecay(RMSprop([weight(1.0)], lr=0.1, weight_decay=0.5), path="direction")
    with pytest.raises(
        ValueError, match="path='direction' does not work for param group 1 of RMSprop: RMSprop with mom"
    ):
        opt.add_param_group({"params": [weight(1.0)], "momentum": 0.9})

    assert 1 == len(opt.param_groups)


# ------------------------------------------------------------------------------------ what stays unchanged


def trained(path: PathOptions, steps: int = 2) -> tuple[nn.Module, CautiousDecay]:
    """A net in two groups, each of two pieces or more, and its optimizer with state."""
    model = net()
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters()), "weight_decay": 0.25}]
    opt = CautiousDecay(AdamW(groups, lr=0.01, weight_decay=0.5, **path.base), **path)
    train(model, opt, range(steps))
    return model, opt


def lists(opt: Optimizer) -> list[tuple[int, list[int]]]:
    """The identities of the parameter lists and of the parameters in them."""
    return [(id(group["params"]), [*map(id, group["params"])]) for group in opt.param_groups]


def test_hooks_get_the_full_lists(every_path: PathOptions) -> None:
    """Every hook (pre or post; wrapper, base or global) fires once and finds all parameters in the groups."""
    model, opt = trained(every_path)
    whole, seen = lists(opt), []
    look = lambda optimizer, *_: seen.append(lists(optimizer))
    for optimizer in (opt, opt.base_optimizer):
        optimizer.register_step_pre_hook(look)
        optimizer.register_step_post_hook(look)
    handles = [register_optimizer_step_pre_hook(look), register_optimizer_step_post_hook(look)]
    try:
        train(model, opt, [2])
    finally:
        for handle in handles:
            handle.remove()

    assert [whole] * 6 == seen
    assert whole == lists(opt)


def test_gradients_are_not_touched(every_path: PathOptions) -> None:
    """After a step each parameter has the same gradient object, with the same values."""
    model, opt = trained(every_path)
    train(model, opt, [2])
    before = [(p.grad, p.grad._version, p.grad.clone()) for p in model.parameters()]
    opt.step()

    for p, (g, version, kept) in zip(model.parameters(), before, strict=True):
        assert p.grad is g
        assert version == g._version
        assert torch.equal(kept, g)


def test_two_paths_that_shorten_the_lists_leave_them_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """A group on one_pass beside one in pieces: after the step each has its own list, and every weight has moved."""
    pytest.importorskip("numba")
    monkeypatch.setattr(paths, "PIECE", 16)
    params = [weight(1.0, 2.0, 3.0, grad=[1.0, 1.0, 1.0]) for _ in range(4)]
    groups = [{"params": params[:2], "momentum": 0.9, "foreach": False}, {"params": params[2:]}]
    opt = CautiousDecay(RMSprop(groups, lr=0.1, weight_decay=0.5))
    before = lists(opt)
    for _ in range(2):
        opt.step()

    assert ["pieces", "one_pass"] == [of_group.path for of_group in opt.paths()]
    assert before == lists(opt)
    assert all((p < torch.tensor([0.9, 1.9, 2.9])).all() for p in params)


def test_gradients_of_several_types_are_let_go(every_path: PathOptions) -> None:
    """After a step nothing holds the gradients, in a group of two types neither: backward needs their memory."""
    params = [weight(1.0, 2.0), weight(1.0, dtype=torch.float64)]
    opt = CautiousDecay(SGD(params, lr=0.1, weight_decay=0.5, **every_path.base), **every_path)
    for _ in range(3):
        for p in params:
            p.grad = torch.ones_like(p)
        held = [weakref.ref(p.grad) for p in params]
        opt.step()
        opt.zero_grad()

        assert [None, None] == [each() for each in held]


@pytest.mark.parametrize("call", [0, 1, 2])
def test_an_error_in_the_middle_of_a_step_leaves_the_groups_whole(
    every_path: PathOptions, call: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the base raises in any group, lists and decays are restored and the next step works."""
    model, opt = trained(every_path)
    if every_path["path"] == "one_pass":
        opt.base_optimizer.register_step_pre_hook(lambda *_: None)  # otherwise the base's own step is left out
    before, calls, inner = lists(opt), itertools.count(), AdamW._init_group

    def init_group(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            raise RuntimeError("raised on purpose")
        return inner(*args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(AdamW, "_init_group", init_group)
        if call < 2 or every_path["path"] == "pieces":
            with pytest.raises(RuntimeError, match="raised on purpose"):
                opt.step()
        else:
            opt.step()  # there are two groups only

    assert before == lists(opt)
    assert [0.5, 0.25] == [group["weight_decay"] for group in opt.param_groups]
    train(model, opt, [3])
    assert bool(values(model).isfinite().all())


@pytest.mark.parametrize("where", ["closure", "base's hook"])
def test_an_error_in_a_closure_or_a_hook_leaves_the_groups_whole(every_path: PathOptions, where: str) -> None:
    """The same holds if a closure or a hook of the base raises."""

    def broken(*_: Any) -> Any:
        raise RuntimeError("raised on purpose")

    for register in ("register_step_pre_hook", "register_step_post_hook"):
        _, opt = trained(every_path)
        before = lists(opt)
        if where == "base's hook":
            getattr(opt.base_optimizer, register)(broken)
        with pytest.raises(RuntimeError, match="raised on purpose"):
            opt.step(broken if where == "closure" else None)

        assert before == lists(opt)
        assert [0.5, 0.25] == [group["weight_decay"] for group in opt.param_groups]


def test_one_pass_begins_where_there_is_state() -> None:
    """A late first gradient does not delay other parameters: every parameter's counter is right.

    A parameter without state takes its first step by direction, in which the base makes the state.
    """
    early, late = weight(1.0, -1.0), weight(2.0, -2.0)
    opt = CautiousDecay(AdamW([early, late], lr=0.1, weight_decay=0.5, fused=True), path="one_pass", backend="eager")
    for step in range(4):
        early.grad = torch.ones(2)
        late.grad = torch.ones(2) if step >= 2 else None
        opt.step()

    assert [4.0, 2.0] == [opt.state[p]["step"].item() for p in (early, late)]


# ------------------------------------------------------------------------------------ they agree

F64, BF16 = torch.float64, torch.bfloat16
ADAM = {"betas": (0.8, 0.9)}
UPDATES: dict[str, tuple[Any, dict[str, Any]]] = {
    "Adam": (Adam, ADAM),
    "AdamW": (AdamW, ADAM),
    "AdamW-amsgrad": (AdamW, {**ADAM, "amsgrad": True}),
    "SGD": (SGD, {}),
    "SGD-momentum": (SGD, {"momentum": 0.9}),
    "SGD-dampening": (SGD, {"momentum": 0.9, "dampening": 0.5}),
    "SGD-nesterov": (SGD, {"momentum": 0.9, "nesterov": True}),
    "timm.Lion": ("timm.optim.Lion", ADAM),
    "lion_pytorch.Lion": ("lion_pytorch.Lion", ADAM),
}
VARIANTS: dict[str, dict[str, Any]] = {
    "": {},
    "maximize": {"maximize": True},
    "tensor-lr": {"lr": torch.tensor(0.01, dtype=F64)},
}
ONE_PASS = [path for path in ALL_PATHS if path["path"] == "one_pass"]


def built(name: str, variant: str, p: Tensor) -> Optimizer:
    cls, options = UPDATES[name]
    options = {**options, **VARIANTS[variant]}
    lr = options.pop("lr", 0.01)
    base = make(cls, p, {**options, "fused": True} if not isinstance(cls, str) else options)
    base.param_groups[0].update(lr=lr, weight_decay=0.5)
    return base


@pytest.mark.parametrize("path", [param(path, path=path) for path in ONE_PASS])
@pytest.mark.parametrize(
    ("name", "variant", "dtype"),
    [
        (name, variant, dtype)
        for name in UPDATES
        for variant in VARIANTS
        for dtype in ((F64, torch.float32, BF16) if variant == "" else (F64,))
        if not (name == "lion_pytorch.Lion" and variant == "maximize")
    ],
)
def test_paths_may_change_from_step_to_step(name: str, variant: str, dtype: torch.dtype, path: PathOptions) -> None:
    """From the same weights and state, a step on any other path gives the same as one pass.

    Weights are equal up to a few roundings where the direction of the step is clear, and so is the state. The other
    paths take turns; every second step goes on from the weights and the state dict of the other path.
    """
    if torch.__version__ < "2.5" and dtype is BF16 and name.startswith("SGD-"):
        pytest.skip("torch 2.4's fused SGD begins 16-bit momentum with memory that it did not set")
    if dtype == BF16 and name.startswith("SGD-") and torch.__version__ < "2.14":
        pytest.skip("fused SGD with momentum of torch 2.13 leaves bfloat16 weights on the CPU where they are")
    others = [*filter(can_run, (other for other in ALL_PATHS if other != path))]
    p = nn.Parameter(torch.randn(500, dtype=F64).to(dtype))
    opt = CautiousDecay(built(name, variant, p), **path)
    for step in range(6):
        p.grad = torch.randn(500, dtype=F64).to(dtype)
        direction = directions.find(opt.base_optimizer, opt.param_groups[0])
        terms = terms_of(direction, opt.state.get(p, {}), p.grad)
        clear = sum(terms).abs() > 0.02 * sum(t.abs() for t in terms)
        x = p.detach().double()
        q = nn.Parameter(p.detach().clone())
        q.grad = p.grad.clone()
        twin = CautiousDecay(built(name, variant, q), **others[step % len(others)])
        twin.load_state_dict(copy.deepcopy(opt.state_dict()))
        opt.step()
        twin.step()
        roundings = 4 * torch.finfo(dtype).eps

        far = (q.detach().double() - p.detach().double()).abs() > roundings * (
            1 + torch.maximum(x.abs(), p.detach().abs())
        )
        assert not far[clear].any()
        assert same(twin.state_dict()["state"], opt.state_dict()["state"], roundings)
        if step % 2:  # go on from the other path
            p.data.copy_(q.data)
            opt.load_state_dict(copy.deepcopy(twin.state_dict()))
    assert clear.float().mean() > 0.9


def test_all_paths_end_alike(every_base: Base, every_path: PathOptions) -> None:
    """Twenty steps on any path give the weights of twenty steps by direction, up to roundings."""
    ends = []
    for path in (every_path, PathOptions(path="direction", backend="eager")):
        model = net().double()
        opt = CautiousDecay(every_base(model.parameters()), **path)
        for step in range(20):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator, dtype=F64)
            opt.step()
        ends.append(values(model))

    torch.testing.assert_close(*ends, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("path", [param(path, path=path) for path in ONE_PASS])
@pytest.mark.parametrize("name", UPDATES)
def test_the_plain_optimizer_goes_on_from_one_pass(name: str, path: PathOptions) -> None:
    """The plain optimizer continues from the state dict of one-pass steps, with the state of a plain run."""
    states = []
    for wrapped in (False, True):
        p = nn.Parameter(torch.ones(50, dtype=F64))
        plain, base = built(name, "", p), built(name, "", p)
        base.param_groups[0]["weight_decay"] = 0.0
        opt = CautiousDecay(base, lam=0.5, **path) if wrapped else base
        for step in range(4):
            p.grad = torch.randn(50, dtype=F64, generator=torch.Generator().manual_seed(step))
            if step == 3:
                plain.load_state_dict(opt.state_dict())
                plain.param_groups[0]["weight_decay"] = 0.0  # SGD's decay would enter the state
                opt = plain
            opt.step()
        states.append(opt.state_dict()["state"])

    assert same(*states, 1e-13)


# ------------------------------------------------------------------------------------ threads and forks


def big_step(seed: int) -> Tensor:
    """Three fused steps of a tensor that is large enough for several threads."""
    torch.manual_seed(seed)
    p = nn.Parameter(torch.randn(1 << 19))
    opt = CautiousDecay(AdamW([p], lr=0.1, weight_decay=0.5, fused=True), path="one_pass", backend="numba")
    for _ in range(3):
        p.grad = torch.sin(p.detach() * 100)
        opt.step()
    return p.detach()


@pytest.fixture
def two_threads() -> Any:
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(1)


@pytest.mark.usefixtures("two_threads")
def test_python_threads_step_different_optimizers() -> None:
    """Four threads with one optimizer each give the same bits as steps one after another."""
    pytest.importorskip("numba")
    starts = [nn.Parameter(torch.randn(1 << 18)) for _ in range(4)]

    def run(p: nn.Parameter) -> None:
        opt = CautiousDecay(AdamW([p], lr=0.1, weight_decay=0.5, fused=True), path="one_pass", backend="numba")
        for _ in range(5):
            p.grad = p.detach() * 0.5
            opt.step()

    alone = copy.deepcopy(starts)
    for p in alone:
        run(p)
    threads = [threading.Thread(target=run, args=(p,)) for p in starts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    assert all(map(torch.equal, alone, starts))


def in_a_process(program: str) -> str:
    """The output of a program in a separate process that can import this file."""
    here = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", f"import os, threading, torch\nfrom test_paths import big_step\n{program}"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent)])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.mark.process
def test_a_thread_that_outlives_the_main_thread_can_step() -> None:
    """While Python waits for other threads at its end, no new threads can be started: the step works alone."""
    pytest.importorskip("numba")
    program = """
torch.set_num_threads(2)
def late():
    threading.main_thread().join()
    print(torch.equal(big_step(0), expected))
expected = big_step(0)
threading.Thread(target=late).start()
"""

    assert in_a_process(program) == "True"


def fork_after_a_step(folder: Path) -> None:
    """Step on two threads, then fork; parent and child take the same step and write their weights."""
    torch.set_num_threads(2)
    big_step(0)
    p = nn.Parameter(torch.randn(1 << 19))
    opt = CautiousDecay(AdamW([p], lr=0.1, weight_decay=0.5, fused=True), path="one_pass", backend="numba")
    p.grad = torch.randn(1 << 19)
    opt.step()
    child = os.fork()
    opt.step()
    torch.save(p.detach(), folder / ("parent" if child else "child"))
    if child == 0:
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.process
@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_fork_after_a_step_can_step(tmp_path: Path) -> None:
    """A child process forked after a multi-threaded step takes the same step as its parent."""
    pytest.importorskip("numba")
    call(fork_after_a_step, tmp_path)

    assert torch.equal(*(torch.load(tmp_path / process) for process in ("parent", "child")))


def test_a_parameter_in_two_groups_is_stepped_twice(every_path: PathOptions) -> None:
    """torch steps it once for each group: 1.0 - 0.1 - 0.2. It decays once, with the first: by 0.1 * 0.5."""
    p, q = sizes(1, 1)
    base = SGD([{"params": [p]}, {"params": [q], "lr": 0.2}], lr=0.1, weight_decay=0.5, **every_path.base)
    opt = CautiousDecay(base, **every_path)
    opt.param_groups[1]["params"].append(p)
    opt.step()

    assert pytest.approx(0.65) == p.item()


# ------------------------------------------------------------------------------------ state that would crash a kernel


def stepped_adamw(path: PathOptions, *shapes: tuple[int, ...]) -> tuple[list[nn.Parameter], CautiousDecay]:
    params = [nn.Parameter(torch.ones(shape)) for shape in shapes]
    opt = CautiousDecay(AdamW(params, lr=0.1, weight_decay=0.1, **path.base), **path)
    for p in params:
        p.grad = torch.ones_like(p)
    opt.step()
    return params, opt


BEFORE_THE_STEP = [path for path in ALL_PATHS if path["path"] in ("one_pass", "direction")]
before_the_step = pytest.mark.parametrize("path", [param(path, path=path) for path in BEFORE_THE_STEP])


@before_the_step
def test_state_of_another_shape_is_named(path: PathOptions) -> None:
    """A checkpoint of another model raises an error with both shapes, and nothing changes."""
    _, other = stepped_adamw(path, (4,))
    (p,), opt = stepped_adamw(path, (5, 2))
    opt.load_state_dict(other.state_dict())
    before = p.detach().clone()

    with pytest.raises(
        ValueError, match=r"AdamW has a weight of shape \(5, 2\) whose gradient or state has shape \(4,\)"
    ):
        opt.step()
    assert torch.equal(before, p)
    assert opt.param_groups[0]["weight_decay"] == 0.1
    assert opt.param_groups[0]["params"] == [p]


@before_the_step
def test_state_of_a_transposed_shape_is_refused(path: PathOptions) -> None:
    """State with as many elements as the weight but another shape is refused."""
    _, opt = stepped_adamw(path, (5, 2))
    state_dict = opt.state_dict()
    state_dict["state"][0]["exp_avg"] = state_dict["state"][0]["exp_avg"].t().contiguous()
    opt.load_state_dict(state_dict)

    with pytest.raises(ValueError, match=r"shape \(5, 2\) whose gradient or state has shape \(2, 5\)"):
        opt.step()


@before_the_step
@pytest.mark.parametrize("which", [0, 1])
def test_state_on_the_meta_device_is_refused(path: PathOptions, which: int) -> None:
    """State on the meta device, of the first or second parameter, raises an error and does not crash the process."""
    params, opt = stepped_adamw(path, (4,), (4,))
    opt.state[params[which]]["exp_avg"] = torch.zeros(4, device="meta")

    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match=r"meta|device"):
        opt.step()


@pytest.mark.parametrize("path", [param(path, path=path) for path in ONE_PASS])
@pytest.mark.parametrize("dtype", [F64, torch.int64], ids=str)
def test_counters_of_another_type_are_left_to_the_base(path: PathOptions, dtype: torch.dtype) -> None:
    """If a step counter is not float32, its parameter takes the direction, so the base handles the counter."""
    (p, q), opt = stepped_adamw(path, (4,), (4,))
    opt.state[p]["step"] = opt.state[p]["step"].to(dtype)
    if dtype == F64:
        opt.step()

        assert [2.0, 2.0] == [float(opt.state[each]["step"]) for each in (p, q)]
        torch.testing.assert_close(p, q)
    else:
        with pytest.raises(RuntimeError):
            opt.step()


@pytest.mark.parametrize("path", [param(path, path=path) for path in ONE_PASS])
def test_autograd_notices_the_one_pass(path: PathOptions) -> None:
    """A backward pass through weights stepped after the forward pass raises an error, as with plain Lion."""
    p = nn.Parameter(torch.ones(4))
    opt = CautiousDecay(pytest.importorskip("lion_pytorch").Lion([p], lr=0.1, weight_decay=0.1), **path)
    p.grad = torch.ones(4)
    opt.step()
    loss = (p * p).sum()
    opt.step()

    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# ------------------------------------------------------------------------------------ special weights and coefficients


@pytest.mark.parametrize("path", ["one_pass", "direction", "pieces", "snapshot"])
def test_beta_0_forgets_the_past(path: str) -> None:
    """With beta1 = 0 (usual in GANs) m is the gradient itself, however large the gradient before was."""
    if path == "one_pass":
        pytest.importorskip("numba")
    w = weight(-1.0, -1.0)
    opt = CautiousDecay(AdamW([w], lr=0.1, betas=(0.0, 0.999), weight_decay=0.1, fused=True), path=path)
    for gradient in ([1e3, 1e3], [1e3, 1e3], [1e-5, -1e-5]):
        w.grad = torch.tensor(gradient)
        opt.step()

    assert torch.equal(opt.state[w]["exp_avg"], torch.tensor([1e-5, -1e-5]))


def test_lion_of_complex_weights_takes_no_pass() -> None:
    """lion_pytorch steps a complex weight by u/|u|, so one_pass leaves it to the other paths, which agree."""
    lion_pytorch = pytest.importorskip("lion_pytorch")
    start = torch.tensor([1 + 2j, -1 + 0.5j, 0.1 - 3j])
    ends = []
    for path in (None, "snapshot"):
        w = nn.Parameter(start.clone())
        opt = CautiousDecay(lion_pytorch.Lion([w], lr=0.1, weight_decay=0.1), path=path)
        for gradient in (start.conj(), -start, start * 1j):
            w.grad = gradient.resolve_conj()
            opt.step()
        ends.append((opt.paths()[0].path, w.detach()))

    assert [path for path, _ in ends] == ["direction", "snapshot"]
    torch.testing.assert_close(ends[0][1], ends[1][1])


@pytest.mark.parametrize("path", ["direction", "pieces", "snapshot"])
def test_lazy_modules_can_be_wrapped(path: str) -> None:
    """Parameters without a shape, as lazy modules have before their first call, can be wrapped and then stepped."""
    model = nn.Sequential(nn.LazyLinear(3), nn.Linear(3, 1))
    opt = CautiousDecay(AdamW(model.parameters(), lr=0.1, weight_decay=0.1), path=path)

    assert "CautiousDecay(AdamW" in repr(opt)
    model(torch.ones(2, 5)).sum().backward()
    before = values(model)
    opt.step()
    assert not any(map(torch.equal, before, values(model)))


def test_repr_of_a_path_that_a_checkpoint_rules_out() -> None:
    """repr never raises: it names the path that the user forces, also if loaded options rule it out."""
    pytest.importorskip("numba")
    (w,) = sizes(3)
    opt = CautiousDecay(AdamW([w], weight_decay=0.1, fused=True), path="one_pass")
    opt.load_state_dict(AdamW([w], weight_decay=0.1, fused=False).state_dict())

    assert "path='one_pass'" in repr(opt)
    assert "snapshot_bytes=?" in repr(opt)
    with pytest.raises(ValueError, match="fused=False was passed"):
        opt.step()
