"""Cautious weight decay inside the steps of schedule-free optimizers (arXiv 2405.15682).

The decay enters with the update at y: mask and decay use y, and y and z both take the sum.

The Triton kernels need the interpreter, in a process of its own:

TRITON_INTERPRET=1 pytest tests/test_schedule_free.py -k triton
"""

import copy
import importlib
import os
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import reference
import torch
from support import same, weight
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from cwd_wrap import CautiousDecay, CautiousUpdate, MaskMonitor, PNormDecay, kernels, schedule_free, updates

lib = pytest.importorskip("schedulefree")

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16
LR, LAM, SIZE = 0.05, 0.5, 40
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "SGD": ("SGDScheduleFree", {"momentum": 0.8}),
    "SGD-warmup": ("SGDScheduleFree", {"warmup_steps": 7, "r": 1.0, "weight_lr_power": 1.0}),
    "AdamW": ("AdamWScheduleFree", {"betas": (0.8, 0.9)}),
    "AdamW-warmup": ("AdamWScheduleFree", {"betas": (0.9, 0.99), "warmup_steps": 7, "r": 0.5}),
    "AdamW-power=0": ("AdamWScheduleFree", {"warmup_steps": 20, "weight_lr_power": 0.0, "eps": 1e-3}),
    "AdamW-betas=0": ("AdamWScheduleFree", {"betas": (0.0, 0.0)}),
    "AdamW-beta1=1": ("AdamWScheduleFree", {"betas": (1.0, 0.99999)}),
    "RAdam": ("RAdamScheduleFree", {"betas": (0.8, 0.9)}),
    "RAdam-loud": ("RAdamScheduleFree", {"betas": (0.9, 0.999), "silent_sgd_phase": False, "r": 1.0}),
    "RAdam-never": ("RAdamScheduleFree", {"betas": (0.9, 0.5)}),
}
CLASSES = {"SGD", "AdamW", "RAdam"}
OTHERS = sorted(
    name for name, cls in vars(lib).items() if isinstance(cls, type) and issubclass(cls, Optimizer)
    and name not in {name for name, _ in BASES.values()}
)  # fmt: skip
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKENDS = ["triton"] if INTERPRETED else ["eager", "numba"]
MANY = 30 if INTERPRETED else 300  # the interpreter is slow
all_backends = pytest.mark.parametrize(
    "backend",
    [
        pytest.param(each, marks=() if kernels.obstacle(each, torch.device("cpu")) is None else pytest.mark.skip)
        for each in BACKENDS
    ],
)
all_bases = pytest.mark.parametrize("name", BASES)
all_classes = pytest.mark.parametrize("name", sorted(CLASSES))
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")  # numpy's, of roots of negative numbers


def built(name: str, params: Any, **options: Any) -> Any:
    """The plain optimizer in train mode."""
    cls, own = BASES[name]
    base = getattr(lib, cls)(params, **{"lr": LR, **own, **options})
    base.train()
    return base


def wrapped(name: str, params: Any, lam: float | None = LAM, **options: Any) -> Any:
    """The wrapped optimizer in train mode; the wrapper takes ``strict``, ``backend`` and ``rounding``."""
    own = {key: options.pop(key) for key in ("strict", "backend", "rounding", "path") if key in options}
    return CautiousDecay(built(name, params, **options), lam=lam, **own)


def gradient(step: int, dtype: torch.dtype = F64, size: int = SIZE) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(step), dtype=F64).to(dtype)


def a_weight(dtype: torch.dtype = F64, size: int = SIZE) -> nn.Parameter:
    return nn.Parameter(gradient(999, dtype, size))


def run(opt: Any, p: nn.Parameter, steps: Any) -> None:
    for step in steps:
        p.grad = gradient(step, p.dtype, p.numel())
        opt.step()


def schedule(opt: Any) -> list[dict[str, Any]]:
    """All of the groups but their parameters and decay."""
    return [{k: v for k, v in group.items() if k not in {"params", "weight_decay"}} for group in opt.param_groups]


# ---- numbers that a reader can check


def test_two_steps_by_hand() -> None:
    """With lr 0.1, lam 0.5 and momentum 0.9, the first and the last of four weights decay.

    The first step takes all of z: 1 - 0.1 * (1 + 0.5 * 1) = 0.85. In the second one z goes from 0.85 to
    0.85 - 0.1 * (1 + 0.5 * 0.85) = 0.7075. The average of both is 0.77875, and y lies a tenth of the way to z.
    """
    w = weight(1.0, 1.0, -1.0, -1.0, dtype=F64)
    opt = CautiousDecay(lib.SGDScheduleFree([w], lr=0.1), lam=0.5)
    opt.train()
    for _ in range(2):
        w.grad = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=F64)
        opt.step()
        if opt.param_groups[0]["k"] == 1:
            assert w.tolist() == pytest.approx([0.85, 1.1, -1.1, -0.85])

    assert opt.state[w]["z"].tolist() == pytest.approx([0.7075, 1.2, -1.2, -0.7075])
    assert w.tolist() == pytest.approx([0.9 * 0.77875 + 0.1 * 0.7075, 1.155, -1.155, -0.771625])
    opt.eval()
    assert w.tolist() == pytest.approx([0.77875, 1.15, -1.15, -0.77875])


def test_four_weights_with_a_leak() -> None:
    """The weights that grow take a fifth of the decay, in y and in z."""
    w = weight(1.0, 1.0, -1.0, -1.0, grad=[1.0, -1.0, 1.0, -1.0], dtype=F64)
    opt = CautiousDecay(lib.SGDScheduleFree([w], lr=0.1), lam=0.5, leak=0.2)
    opt.train()
    opt.step()

    assert w.tolist() == opt.state[w]["z"].tolist() == pytest.approx([0.85, 1.09, -1.09, -0.85])


@pytest.mark.parametrize(("strict", "left"), [(False, 0.95), (True, 1.0)])
def test_zero_update(strict: bool, left: float) -> None:
    """A weight whose gradient is 0 decays, unless strict."""
    w = weight(1.0, -1.0, grad=[0.0, 0.0])
    wrapped("SGD", [w], lr=0.1, strict=strict).step()

    assert w.tolist() == pytest.approx([left, -left])


# ---- the paper


def direction(name: str, options: dict[str, Any]) -> Callable[[reference.Gradients], Tensor]:
    """u of the optimizer, from all gradients."""
    if name.startswith("SGD"):
        return lambda gradients: gradients[-1]
    beta2, eps = options["betas"][1], options["eps"]
    adam = partial(reference.normalized, beta2=beta2, eps=eps)
    if name.startswith("AdamW"):
        return adam
    tractable = lambda gradients: reference.rectification(len(gradients), beta2) is not None
    return lambda gradients: adam(gradients) if tractable(gradients) else gradients[-1]


def learning_rate(name: str, options: dict[str, Any], t: int) -> float:
    """eta of step ``t``: warmed up, or rectified."""
    if not name.startswith("RAdam"):
        return LR * min(1.0, t / max(1, options["warmup_steps"]))
    factor = reference.rectification(t, options["betas"][1])
    return LR * (float(not options["silent_sgd_phase"]) if factor is None else factor)


@all_backends
@pytest.mark.parametrize("strict", [False, True])
@all_bases
def test_the_steps_are_those_of_the_paper(name: str, strict: bool, backend: str) -> None:
    """Thirty steps give y, z and the averaged weights of Algorithm 1 with the decay at y, in float64."""
    p, steps = a_weight(), 30
    start = p.detach().clone()
    opt = wrapped(name, [p], strict=strict, backend=backend)
    options = opt.param_groups[0]
    run(opt, p, range(steps))
    beta = options["momentum"] if "momentum" in options else options["betas"][0]
    etas = [learning_rate(name, options, t) for t in range(1, steps + 1)]
    of_paper = partial(reference.schedule_free, r=options["r"], power=options["weight_lr_power"])
    gradients = [gradient(step) for step in range(steps)]
    y, x, z = of_paper(start, gradients, etas, direction(name, options), beta, LAM, strict)

    torch.testing.assert_close(p.detach(), y, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(opt.state[p]["z"], z, rtol=1e-9, atol=1e-10)
    if beta > 0:  # else the optimizer cannot compute x from y and z
        opt.eval()
        torch.testing.assert_close(p.detach(), x, rtol=1e-8, atol=1e-9)


def test_the_reference_can_fail() -> None:
    """A decay at z in place of y, or one that only y takes, is far from the reference."""
    start, gradients = gradient(999), [gradient(step) for step in range(5)]
    y, _, z = reference.schedule_free(start, gradients, [LR] * 5, lambda g: g[-1], 0.8, LAM)
    plain, _, of_plain = reference.schedule_free(start, gradients, [LR] * 5, lambda g: g[-1], 0.8)

    assert (y - plain).abs().max() > 0.01
    assert (z - of_plain).abs().max() > 0.01


# ---- the optimizer itself


@all_backends
@pytest.mark.parametrize("dtype", [F64, F32], ids=str)
@all_bases
def test_without_decay_it_is_the_plain_optimizer(name: str, dtype: torch.dtype, backend: str) -> None:
    """With a lam that is lost in rounding, hundreds of steps are the plain optimizer's, and the schedule bit for bit.

    Two groups, one of them with other options, and the learning rate follows a schedule.
    """
    some = []
    for make in (partial(wrapped, lam=1e-30, backend=backend), built):
        ps = [a_weight(dtype), a_weight(dtype, 7)]
        opt = make(name, [{"params": ps[:1]}, {"params": ps[1:], "lr": 0.02, "r": 2.0}])
        some.append((opt, ps))
    for step in range(MANY):
        for opt, ps in some:
            opt.param_groups[0]["lr"] = LR * (1 + step % 3)
            for p in ps:
                p.grad = gradient(step, dtype, p.numel())
            opt.step()

        assert schedule(some[0][0]) == schedule(some[1][0])
    roundings = 2000 * torch.finfo(dtype).eps
    for p, q in zip(some[0][1], some[1][1], strict=True):
        torch.testing.assert_close(p, q, rtol=roundings, atol=roundings)
        assert same(dict(some[0][0].state[p]), dict(some[1][0].state[q]), roundings)


@all_backends
@all_bases
def test_where_all_weights_decay_it_is_the_optimizers_own_decay(name: str, backend: str) -> None:
    """Where every weight moves towards zero, the step is the plain optimizer's with the same weight_decay."""
    p, q = a_weight(), a_weight()
    opt, plain = wrapped(name, [p], None, weight_decay=LAM, backend=backend), built(name, [q], weight_decay=LAM)
    for step in range(12):
        for each, w in ((opt, p), (plain, q)):
            w.grad = gradient(step).abs() * w.detach().sign()
            each.step()

    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
    assert same(dict(opt.state[p]), dict(plain.state[q]), 1e-9)
    assert schedule(opt) == schedule(plain)


@all_classes
def test_lr_0_is_left_to_the_optimizer(name: str) -> None:
    """With lr 0 nothing decays; the step is counted, and y still follows the average, as in the plain optimizer."""
    p, q = a_weight(), a_weight()
    opt, plain = wrapped(name, [p], 1e-30), built(name, [q])
    for each, w in ((opt, p), (plain, q)):
        run(each, w, range(8))
        each.param_groups[0].update(lr=0.0, weight_decay=LAM if w is p else 0.0)
    before = p.detach().clone()
    for each, w in ((opt, p), (plain, q)):
        run(each, w, range(8, 10))

    assert not torch.equal(p, before)
    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
    assert schedule(opt) == schedule(plain)


@all_classes
def test_the_group_counts_as_in_the_plain_optimizer(name: str) -> None:
    """A group without gradients, or with lam 0, counts its steps too, once a step."""
    p, q, r = (a_weight() for _ in range(3))
    opt = wrapped(
        name, [{"params": [p]}, {"params": [q], "weight_decay": 0.0}, {"params": [r]}], None, weight_decay=LAM
    )
    for step in range(3):
        p.grad, q.grad = gradient(step), gradient(step)
        opt.step()

    assert [group["k"] for group in opt.param_groups] == [3, 3, 3]
    assert [opt.state.get(w, {}).keys() != set() for w in (p, q, r)] == [True, True, False]
    assert opt.param_groups[0]["weight_sum"] == opt.param_groups[2]["weight_sum"]


@all_backends
@all_classes
@pytest.mark.parametrize("dtype", [F64, BF16], ids=str)
def test_state_is_made_as_the_optimizer_makes_it(name: str, dtype: torch.dtype, backend: str) -> None:
    """The first step makes z and the second moments in the weight's type and layout, as the plain optimizer does."""
    p, q = (
        nn.Parameter(gradient(9, dtype, 96).view(2, 3, 4, 4).to(memory_format=torch.channels_last)) for _ in range(2)
    )
    opt, plain = wrapped(name, [p], backend=backend), built(name, [q])
    for each, w in ((opt, p), (plain, q)):
        w.grad = gradient(1, dtype, 96).view(2, 3, 4, 4)
        each.step()
    mine, theirs = opt.state[p], plain.state[q]

    assert list(mine) == list(theirs)
    for key, value in theirs.items():
        assert (type(mine[key]), mine[key].dtype, mine[key].stride()) == (type(value), value.dtype, value.stride())
        assert not mine[key].requires_grad


# ---- modes, checkpoints, copies


@all_classes
def test_train_and_eval(name: str) -> None:
    """The wrapper has the optimizer's train and eval: evaluating between steps changes nothing, as in the plain one."""
    p, q = a_weight(), a_weight()
    opt, plain = wrapped(name, [p], 1e-30), built(name, [q])
    for k in range(3):
        run(opt, p, range(8 * k, 8 * k + 8))
        run(plain, q, range(8 * k, 8 * k + 8))
        opt.eval()
        plain.eval()
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
        opt.train()
        plain.train()

    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("steps", [0, 3])
@all_classes
def test_a_step_in_eval_mode(name: str, steps: int) -> None:
    """In eval mode the step raises the optimizer's own error, and nothing has changed; a closure is not called."""
    p = a_weight()
    opt = wrapped(name, [p])
    run(opt, p, range(steps))
    opt.eval()
    p.grad = gradient(50)
    before = copy.deepcopy((p.detach(), opt.state_dict()))
    for closure in (None, lambda: pytest.fail("called")):
        with pytest.raises(Exception, match="Optimizer was not in train mode when step is called"):
            opt.step(closure)

        assert same(before, (p.detach(), opt.state_dict()))
    opt.train()
    opt.step()

    assert opt.param_groups[0]["k"] == steps + 1


@pytest.mark.filterwarnings("ignore:CautiousDecay.load_state_dict replaced lam")
@all_classes
def test_checkpoints_go_both_ways(name: str) -> None:
    """The plain optimizer continues from a wrapped one's checkpoint, and the reverse: key for key, in eval mode too."""
    runs: list[Any] = []
    for makes in ((built, wrapped), (wrapped, built), (built, built)):
        p, saved = a_weight(), {}
        for k, make in enumerate(makes):
            opt = make(name, [p], **({} if make is built else {"lam": 1e-30}))
            if k:
                opt.load_state_dict(saved)
                opt.param_groups[0]["weight_decay"] = 1e-30 if make is wrapped else 0.0
                opt.train()
            run(opt, p, range(10 * k, 10 * k + 10))
            opt.eval()
            saved = copy.deepcopy(opt.state_dict())
        saved["param_groups"][0]["weight_decay"] = 0.0
        runs.append((p.detach(), saved))

    assert same(runs[0], runs[2], 1e-9)
    assert same(runs[1], runs[2], 1e-9)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda opt: pickle.loads(pickle.dumps(opt))])
def test_copies_continue(how: Callable[[Any], Any]) -> None:
    """A copied or unpickled wrapper continues like the original."""
    p = a_weight()
    opt = wrapped("AdamW-warmup", [p])
    run(opt, p, range(4))
    other = how(opt)
    (q,) = other.param_groups[0]["params"]
    run(opt, p, range(4, 8))
    run(other, q, range(4, 8))

    assert torch.equal(p, q)
    assert schedule(opt) == schedule(other)


def test_a_class_that_takes_parameters() -> None:
    """`CautiousDecay.over` makes a class of it, whose instances have train and eval."""
    opt = CautiousDecay.over(lib.AdamWScheduleFree, strict=True)([a_weight()], weight_decay=LAM)
    opt.train()

    assert opt.param_groups[0]["train_mode"]
    assert [of_group.path for of_group in opt.paths()] == ["one_pass"]


# ---- steps that are kept, and what changes them


@all_classes
def test_the_plan_is_kept(name: str) -> None:
    """From the second step on a step is not planned anew, though the schedule changes the group's numbers."""
    p = a_weight()
    opt = wrapped(name, [p])
    run(opt, p, range(8))
    kept = opt._plan
    run(opt, p, range(8, 12))

    assert kept is not None
    assert opt._plan is kept


def test_numbers_that_are_set_back() -> None:
    """A group's numbers that are set between steps, back to those of the last one too, are those of the next step."""
    p, q = a_weight(), a_weight()
    opt, plain = wrapped("AdamW-warmup", [p], 1e-30), built("AdamW-warmup", [q])
    for each, w in ((opt, p), (plain, q)):
        run(each, w, range(5))
        group = each.param_groups[0]
        numbers = {key: group[key] for key in ("k", "weight_sum", "lr_max", "scheduled_lr")}
        run(each, w, [5])
        group.update(numbers)
        group["lr"] = 0.3
        run(each, w, [6])

    torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-10)
    assert schedule(opt) == schedule(plain)


def test_gradients_stay_as_they_are() -> None:
    """A step in one pass does not change the gradient. The plain optimizer normalizes it in place."""
    p = a_weight()
    opt = wrapped("AdamW", [p])
    run(opt, p, range(2))

    assert torch.equal(p.grad, gradient(1))


def test_a_closure_is_called_once_at_y() -> None:
    """A closure is called once, with gradients enabled, and its loss is returned."""
    p, q = a_weight(), a_weight()
    opt, other, calls = wrapped("SGD", [p]), wrapped("SGD", [q]), []
    for step in range(3):

        def closure(step: int = step) -> Tensor:
            assert torch.is_grad_enabled()
            p.grad = gradient(step)
            calls.append(p.detach().clone())
            return torch.tensor(float(step))

        before = p.detach().clone()

        assert opt.step(closure) == step
        assert torch.equal(calls[-1], before)
    run(other, q, range(3))

    assert len(calls) == 3
    assert torch.equal(p, q)


# ---- types, rounding, monitors


@all_backends
@all_classes
def test_bfloat16_is_the_float32_step_rounded_once(name: str, backend: str) -> None:
    """From equal bfloat16 weights and state, one step is the float32 one rounded to the nearest bfloat16."""
    p, q = a_weight(BF16), a_weight(BF16)
    opt, wide = wrapped(name, [p], backend=backend), None
    run(opt, p, range(6))
    q = nn.Parameter(p.detach().float())
    wide = wrapped(name, [q], backend=backend)
    wide.load_state_dict(copy.deepcopy(opt.state_dict()))
    for each, w in ((opt, p), (wide, q)):
        w.grad = gradient(6, BF16).to(w.dtype)
        each.step()
    roundings = torch.finfo(BF16).eps if backend == "triton" else 0  # the interpreter truncates

    torch.testing.assert_close(p.detach(), q.detach().bfloat16(), rtol=roundings, atol=0)
    for key, value in wide.state[q].items():
        torch.testing.assert_close(opt.state[p][key], value.bfloat16(), rtol=roundings, atol=0)


@all_backends
@all_classes
def test_stochastic_rounding_is_right_on_average(name: str, backend: str) -> None:
    """Weights, z and second moments of bfloat16 are each one of two neighbours of the float32 result, right on average.

    A group that does not decay is rounded so, too.
    """
    size = 4096
    for lam in (LAM, 0.0):
        p, q = (nn.Parameter(torch.ones(size, dtype=dtype)) for dtype in (BF16, F32))
        opt = wrapped(name, [p], lam, backend=backend, rounding="stochastic")
        wide = wrapped(name, [q], lam, backend=backend)
        for each, w in ((opt, p), (wide, q)):
            for step in range(8):
                w.grad = torch.full_like(w, 0.375)
                if step == 7:
                    w.data.fill_(1.0)
                    for value in each.state[w].values():
                        value.fill_(0.75)
                each.step()
        for narrow, exact in [(p.detach(), q.detach()), *((v, wide.state[q][k]) for k, v in opt.state[p].items())]:
            low, high = narrow.float().min(), narrow.float().max()

            assert narrow.unique().numel() <= 2
            assert low - 1e-6 <= exact[0] <= high + 1e-6
            assert abs(float(narrow.double().mean() - exact[0])) <= 1e-6 + 5 * float(high - low) / 2 / size**0.5


@all_backends
def test_what_a_monitor_sees(backend: str) -> None:
    """Decay and update are those of z: eta*lam*y where y decays, and eta*u. RAdam's silent steps report nothing."""
    w = weight(1.0, 2.0, -1.0, dtype=F64)
    opt = wrapped("SGD-warmup", [w], lr=0.7, backend=backend)
    reports: list[Any] = []
    opt.observer = reports.append
    w.grad = torch.tensor([1.0, -3.0, 0.0], dtype=F64)
    opt.step()
    (part,) = reports[0].parts

    assert (part.path, part.eta_lam) == ("one_pass", pytest.approx(0.1 * LAM))  # the first of seven steps of warm-up
    assert part.sums.tolist()[0] == pytest.approx([2, 1, 1 + 1, 0.1**2 * (1 + 9), float(w.detach().square().sum())])
    monitor = MaskMonitor()
    radam = wrapped("RAdam", [p := a_weight()], backend=backend)
    radam.observer = monitor
    run(radam, p, range(3))
    assert monitor.rows() == []
    run(radam, p, range(3, 9))
    assert len(monitor.rows()) > 2


def test_a_complex_weight_is_two_real_ones() -> None:
    """SGDScheduleFree steps a complex weight as two real ones, as the plain one does. The others are refused."""
    z = torch.tensor([1.0 + 2.0j, -1.0 - 1.0j], dtype=torch.complex128)
    p, q = nn.Parameter(z.clone()), nn.Parameter(torch.view_as_real(z).clone())
    for w, g in ((p, z.conj()), (q, torch.view_as_real(z.conj().resolve_conj()))):
        opt = wrapped("SGD", [w])
        for _ in range(3):
            w.grad = g.clone()
            opt.step()

    assert torch.equal(torch.view_as_real(p.detach()), q.detach())
    with pytest.raises(ValueError, match="squares complex gradients as complex numbers"):
        wrapped("AdamW", [nn.Parameter(z.clone())])


# ---- heavyball


def test_heavyballs_own_cautious_step() -> None:
    """heavyball's SFAdamW with cautious_weight_decay takes the same steps, where both define the same.

    They differ in four places, which this test leaves out. heavyball masks by the sign bit, so at u = 0 and y < 0 it
    does not decay. It has max(sqrt(v), eps) for sqrt(v) + eps. It weighs each step by its own lr, not by the largest so
    far, and warms up from step 2 on another line.
    """
    heavyball = pytest.importorskip("heavyball")
    importlib.import_module("heavyball.utils").compile_mode = None
    p, q = a_weight(F32), a_weight(F32)
    options = {"lr": LR, "betas": (0.9, 0.99), "eps": 1e-12, "weight_decay": LAM, "r": 0.5}
    theirs = heavyball.SFAdamW([q], cautious_weight_decay=True, **options)
    opt = wrapped("AdamW", [p], None, **options)
    for step in range(50):
        p.grad, q.grad = gradient(step, F32), gradient(step, F32)
        opt.step()
        theirs.step()

        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
    plain = built("AdamW", [r := a_weight(F32)], **{**options, "weight_decay": 0.0})
    run(plain, r, range(50))
    assert (p - r).abs().max() > 0.01


# ---- refused


WAY_OUT = "Of schedule-free optimizers, CautiousDecay with mask='update' wraps AdamWScheduleFree, SGDScheduleFree"


@all_classes
@pytest.mark.parametrize(
    "wrap",
    [CautiousUpdate, PNormDecay, *(partial(CautiousDecay, mask=mask) for mask in ("gradient", "random", "all"))],
    ids=["CautiousUpdate", "PNormDecay", "gradient", "random", "all"],
)
def test_other_methods_are_refused(wrap: Any, name: str) -> None:
    """Other methods and masks need a copy of the weights: they refuse these optimizers, and say what can wrap them."""
    with pytest.raises(ValueError, match=WAY_OUT):
        wrap(built(name, [a_weight()], weight_decay=LAM))


@all_classes
@pytest.mark.parametrize("path", ["direction", "pieces", "snapshot"])
def test_other_paths_are_refused(path: str, name: str) -> None:
    """No other path can be forced."""
    with pytest.raises(ValueError, match=f"path='{path}' does not work for param group 0 of {BASES[name][0]}"):
        wrapped(name, [a_weight()], path=path)


@all_classes
@pytest.mark.parametrize("foreach", [True, False, None])
def test_foreach_asks_for_nothing(foreach: bool | None, name: str) -> None:
    """foreach=True is the default of these optimizers. All values take the only path, without numba too."""
    for backend in ("eager", None):
        opt = wrapped(name, [a_weight()], foreach=foreach, backend=backend)

        assert [of_group.path for of_group in opt.paths()] == ["one_pass"]
        assert "path='one_pass'" in repr(opt)


@pytest.mark.parametrize("name", OTHERS)
def test_their_other_optimizers_are_refused(name: str) -> None:
    """The variants with closures, of the paper and of the reference stay refused."""
    cls = getattr(lib, name)
    base = cls(SGD([a_weight()], lr=LR)) if "Wrapper" in name else cls([a_weight()], lr=LR)
    with pytest.raises(ValueError, match=f"cannot wrap {name}: each step computes the weights from a copy"):
        CautiousDecay(base, lam=LAM)


def test_a_subclass_is_refused() -> None:
    """A subclass may take other steps."""

    class Mine(lib.AdamWScheduleFree): ...

    with pytest.raises(ValueError, match="CautiousDecay cannot wrap Mine: each step computes"):
        CautiousDecay(Mine([a_weight()]), lam=LAM)


def test_one_inside_another_optimizer_is_refused() -> None:
    """Inside another optimizer, its step cannot be replaced."""

    class Outer(SGD):
        def __init__(self, inner: Any) -> None:
            super().__init__(inner.param_groups, lr=LR)
            self.optimizer = inner

    with pytest.raises(ValueError, match="CautiousDecay cannot wrap AdamWScheduleFree: each step computes"):
        CautiousDecay(Outer(built("AdamW", [a_weight()])), lam=LAM)


@pytest.mark.parametrize("closure", [None, lambda: torch.tensor(1.0)])
def test_a_step_that_is_patched_later(closure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """If the class's step is replaced after it was wrapped, the next step raises, and changes nothing."""
    p = a_weight()
    opt = wrapped("AdamW", [p])
    run(opt, p, range(2))
    before = copy.deepcopy((p.detach(), opt.state_dict()))
    own = lib.AdamWScheduleFree.step
    monkeypatch.setattr(lib.AdamWScheduleFree, "step", lambda self, closure=None: own(self, closure))
    with pytest.raises(ValueError, match=r"AdamWScheduleFree: .*each step computes the weights from a copy"):
        opt.step(closure)

    assert same(before, (p.detach(), opt.state_dict()))


def test_another_version_is_refused() -> None:
    """schedulefree's next version has an option inner_momentum, and other steps. Unknown options are refused."""
    base = built("AdamW", [a_weight()])
    base.defaults["inner_momentum"] = 0.0

    assert schedule_free.is_of_another_version(base)
    assert "no kernel for AdamWScheduleFree" == updates.find(base, base.param_groups[0])
    with pytest.raises(ValueError, match=r"of schedulefree 1\.3 and 1\.4"):
        CautiousDecay(base, lam=LAM)


def test_a_tensor_lr_is_refused() -> None:
    """The schedule is computed in Python: with a tensor lr the plain RAdamScheduleFree makes NaN of all weights."""
    with pytest.raises(ValueError, match="the lr of AdamWScheduleFree is a tensor: pass a number"):
        wrapped("AdamW", [a_weight()], lr=torch.tensor(LR))


def test_sparse_gradients_are_refused() -> None:
    """A sparse gradient raises before anything changes. With weight_decay=0 the optimizer itself takes it or not."""
    table, other = nn.Embedding(4, 2, sparse=True, dtype=F64), a_weight()
    opt = wrapped("SGD", [{"params": [other]}, {"params": [table.weight]}])
    other.grad = gradient(0)
    table(torch.tensor([1, 2])).sum().backward()
    before = copy.deepcopy((other.detach(), table.weight.detach(), opt.state_dict()))
    with pytest.raises(ValueError, match="CautiousDecay cannot step SGDScheduleFree: gradients are sparse"):
        opt.step()

    assert same(before, (other.detach(), table.weight.detach(), opt.state_dict()))
    opt.param_groups[1]["weight_decay"] = 0.0
    opt.step()
    assert opt.param_groups[0]["k"] == 1


def test_a_state_that_is_not_whole() -> None:
    """State without second moments, as of another optimizer's checkpoint, raises before anything changes."""
    p = a_weight()
    opt = wrapped("AdamW", [p])
    run(opt, p, range(2))
    del opt.state[p]["exp_avg_sq"]
    before = p.detach().clone()
    with pytest.raises(ValueError, match="CautiousDecay cannot step AdamWScheduleFree: a state"):
        opt.step()

    assert torch.equal(p, before)
    assert opt.param_groups[0]["k"] == 2


def test_every_class_of_the_tables_is_tested() -> None:
    """The rows of this file cover every schedule-free class in the table of updates."""
    listed = {name.rsplit(".", 1)[-1] for name in updates.TABLE if name.startswith("schedulefree.")}

    assert listed == {cls for cls, _ in BASES.values()}
