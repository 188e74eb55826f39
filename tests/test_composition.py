"""One wrapper around another: what each layer sees, what is refused, and how nested wrappers act as optimizers."""

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import reference
import torch
from support import PathOptions, loss_of, net, param, same, train, values, weight
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cwd_wrap import CautiousDecay, CautiousUpdate, PNormDecay

F64 = torch.float64
LR, LAM, P = 0.05, 0.5, 0.8


def nested(outer: Any, inner: dict[str, Any], **options: Any) -> Callable[..., Any]:
    """A function that wraps a base twice; its ``on`` holds further options, the outer's and the inner's."""
    return lambda base, on=({}, {}): outer(CautiousUpdate(base, **inner, **on[1]), **options, **on[0])


NESTED: dict[str, Callable[..., Any]] = {
    "decay(update)": nested(CautiousDecay, {}),
    "p-norm(update)": nested(PNormDecay, {}, p=P),
    "all(update)": nested(CautiousDecay, {"scale": "numel"}, mask="all"),
    "gradient(update)": nested(CautiousDecay, {"scale": None}, mask="gradient"),
}
nestings = pytest.mark.parametrize("wrap", NESTED.values(), ids=list(NESTED))


# ------------------------------------------------------------------------------------ by hand, in float64


# The outer method, and the scale of the inner one.
LAYERS = {
    "decay(update)": (reference.decay(), "mean"),
    "p-norm(update)": (reference.p_norm(P), "mean"),
    "all(update)": (reference.decay("all"), "numel"),
    "gradient(update)": (reference.decay("gradient"), None),
}


def by_hand(name: str, x: Tensor, w: Tensor, g: Tensor, eta_lam: float) -> Tensor:
    """Both layers in float64: the outer's w is the result of the inner layer, which has its decay off."""
    outer, scale = LAYERS[name]
    return outer(x, reference.update(scale)(x, w, g, 0.0), g, eta_lam)


def lookahead(base: Optimizer) -> Optimizer:
    return pytest.importorskip("timm.optim").Lookahead(base, alpha=0.5, k=2)


BASES: dict[str, Callable[..., Optimizer]] = {
    "SGD": lambda p, lam: SGD([p], lr=LR, momentum=0.9, weight_decay=lam),
    "Adam": lambda p, lam: Adam([p], lr=LR, weight_decay=lam),
    "AdamW": lambda p, lam: AdamW([p], lr=LR, weight_decay=lam),
    "AdamW-maximize": lambda p, lam: AdamW([p], lr=LR, weight_decay=lam, maximize=True),
    "Muon": lambda p, lam: torch.optim.Muon([p], lr=LR, weight_decay=lam),
    "Lookahead": lambda p, lam: lookahead(AdamW([p], lr=LR, weight_decay=lam)),
}
if not hasattr(torch.optim, "Muon"):  # up to torch 2.8
    del BASES["Muon"]


BACKENDS = [PathOptions(backend=backend) for backend in ("eager", "numba")]
INNER = [param(path, path=path) for path in (*BACKENDS, *(PathOptions(path="snapshot", **path) for path in BACKENDS))]


def every_nesting() -> Iterator[Any]:
    """Each nesting around each base, and each way to make the inner step with each nesting."""
    for turn, (base, name) in enumerate(itertools.product(BASES, NESTED)):
        for inner in INNER if base == "AdamW-maximize" else [INNER[(turn + turn // len(NESTED)) % len(INNER)]]:
            yield pytest.param(BASES[base], name, *inner.values, marks=inner.marks, id=f"{base}-{name}-{inner.id}")


@pytest.mark.parametrize(("build", "name", "inner"), every_nesting())
def test_each_layer_uses_the_result_of_the_inner_one(build: Any, name: str, inner: PathOptions) -> None:
    """The outer's u is the inner's masked update, and its x the weight before both: ten steps, by hand in float64."""
    p = nn.Parameter(torch.randn(6, 5, dtype=F64))
    q = nn.Parameter(p.detach().clone())
    opt, base = NESTED[name](build(p, LAM), ({"backend": inner["backend"]}, inner)), build(q, 0.0)
    sign = -1 if base.param_groups[0].get("maximize") else 1
    for _ in range(10):
        g, x = torch.randn(6, 5, dtype=F64), p.detach().clone()
        p.grad, q.grad = g.clone(), g.clone()
        opt.step()
        base.step()
        q.data.copy_(by_hand(name, x, q.detach(), sign * g, LR * LAM))
        torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-12, atol=1e-13)
        q.data.copy_(p.data)


@pytest.mark.parametrize(("outer", "rule"), [(CautiousDecay, reference.decay()), (PNormDecay, reference.p_norm(P))])
def test_a_lookahead_between_the_two(outer: Any, rule: Any) -> None:
    """For CautiousDecay(Lookahead(CautiousUpdate)), the step back to the slow weights is part of u."""
    p = nn.Parameter(torch.randn(30, dtype=F64))
    q = nn.Parameter(p.detach().clone())
    opt = outer(lookahead(CautiousUpdate(AdamW([p], lr=LR, weight_decay=LAM))))
    base, slow = AdamW([q], lr=LR, weight_decay=0.0), None
    for step in range(1, 9):
        g, x = torch.randn(30, dtype=F64), p.detach().clone()
        p.grad, q.grad = g.clone(), g.clone()
        opt.step()
        base.step()
        w = reference.update()(x, q.detach(), g, 0.0)
        if step % 2 == 0:
            slow = w if slow is None else slow + 0.5 * (w - slow)
            w = slow.clone()
        q.data.copy_(rule(x, w, g, LR * LAM))
        torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-11, atol=1e-12)
        q.data.copy_(p.data)


def test_four_numbers() -> None:
    """With momenta 4, -4 and gradients of 1 and -1, the weights with a masked update stay in place, so they decay."""
    p = weight(2, 2, -2, -2, grad=[4, 4, -4, -4], dtype=F64)
    opt = CautiousDecay(CautiousUpdate(SGD([p], lr=0.125, momentum=1.0, weight_decay=0.5), scale="mean"))
    opt.step()  # all are kept and move towards zero: 2 - 0.5 - 0.125
    first = p.tolist()
    p.grad = torch.tensor([-1.0, 1.0, 1.0, -1.0], dtype=F64)
    opt.step()  # momenta 3, 5, -3, -5: the first and third are masked, the others take two steps of 5/8

    assert [1.375, 1.375, -1.375, -1.375] == first
    assert pytest.approx([1.375 * 0.9375, 1.375 * 0.9375 - 1.25, -1.375 * 0.9375, -1.375 * 0.9375 + 1.25]) == p.tolist()


def test_strict_leaves_what_the_inner_layer_masked() -> None:
    """With strict=True a weight with a masked update does not decay."""
    p = weight(2, 2, grad=[4, 4], dtype=F64)
    opt = CautiousDecay(CautiousUpdate(SGD([p], lr=0.125, momentum=1.0, weight_decay=0.5), scale=None), strict=True)
    opt.step()
    p.grad = torch.tensor([-1.0, 1.0], dtype=F64)
    opt.step()

    assert [1.375, 1.375 * 0.9375 - 0.625] == p.tolist()


# ------------------------------------------------------------------------------------ which layer decays


class Spy(SGD):
    """Records its groups' weight_decay at each step, and can raise instead of stepping."""

    seen: list[float]
    fails = False

    def step(self, closure: Any = None) -> Any:
        self.seen = [*getattr(self, "seen", []), *(group["weight_decay"] for group in self.param_groups)]
        if self.fails:
            raise RuntimeError("raised by the base")
        return super().step(closure)


@nestings
def test_only_the_outermost_decays(wrap: Any) -> None:
    """While the outer steps, base and inner see weight_decay 0; before and after, all see the user's."""
    p = weight(1, grad=[1])
    base = Spy([p], lr=LR, weight_decay=LAM)
    opt = wrap(base)
    inner, seen = opt.base_optimizer, []
    inner.register_step_pre_hook(lambda *_: seen.append(inner.param_groups[0]["weight_decay"]))
    opt.step()

    assert [0.0] == base.seen
    assert [LAM] * 3 == [o.param_groups[0]["weight_decay"] for o in (opt, inner, base)]


@nestings
def test_an_error_inside_leaves_everything_in_place(wrap: Any) -> None:
    """If the base raises, the decay is back in the groups, the hooks are gone, and the next step works."""
    p, q = weight(1, -1, grad=[1, 1]), weight(1, -1, grad=[1, 1])
    base = Spy([p], lr=LR, weight_decay=LAM)
    opt, other = wrap(base), wrap(Spy([q], lr=LR, weight_decay=LAM))
    base.fails = True
    with pytest.raises(RuntimeError, match="raised by the base"):
        opt.step()

    assert [1.0, -1.0] == p.tolist()
    assert LAM == base.param_groups[0]["weight_decay"]
    assert [0, 0] == [len(o._optimizer_step_pre_hooks) for o in (base, opt.base_optimizer)]
    base.fails = False
    opt.step()
    other.step()
    assert torch.equal(q.detach(), p.detach())


def test_groups_without_decay_are_masked_only() -> None:
    """A group that opted out of the decay still gets cautious updates."""
    p, q = weight(1, grad=[1], dtype=F64), weight(1, grad=[1], dtype=F64)
    groups = [{"params": [p]}, {"params": [q], "weight_decay": 0.0}]
    CautiousDecay(CautiousUpdate(SGD(groups, lr=0.125, weight_decay=0.5), scale="numel")).step()

    assert [1 - 0.125 / 2 - 0.0625, 1 - 0.125 / 2] == [p.item(), q.item()]


def test_lam_reaches_the_base() -> None:
    """lam= of the outer layer is written into the groups, which all layers share."""
    base = AdamW([weight(1.0)], weight_decay=0.1)
    opt = CautiousDecay(CautiousUpdate(base), lam=0.25)

    assert 0.25 == base.param_groups[0]["weight_decay"]
    assert opt.param_groups is base.param_groups
    assert opt.state is base.state


def test_a_later_group_reaches_the_base() -> None:
    """add_param_group reaches the base, and a group without a weight_decay gets the outer's lam."""
    base = AdamW([weight(1.0)], weight_decay=0.1)
    opt = CautiousDecay(CautiousUpdate(base), lam=0.25)
    opt.add_param_group({"params": [weight(2.0)]})
    opt.add_param_group({"params": [weight(3.0)], "weight_decay": 0.0})

    assert [0.25, 0.25, 0.0] == [group["weight_decay"] for group in base.param_groups]


@pytest.mark.parametrize("name", ["lamb", "lars"])
@nestings
def test_trust_ratios_stay_on_through_two_layers(wrap: Any, name: str) -> None:
    """timm's LAMB and LARS adapt their step only in groups that decay; they still do under two wrappers."""
    timm = pytest.importorskip("timm.optim")
    p = nn.Parameter(torch.randn(4, 3, dtype=F64))
    q = nn.Parameter(p.detach().clone())
    opt = wrap(timm.create_optimizer_v2([p], name, lr=LR, weight_decay=LAM))
    adapted = timm.create_optimizer_v2([q], name, lr=LR, weight_decay=0.0, always_adapt=True)
    nested = next(key for key, value in NESTED.items() if value is wrap)
    for _ in range(4):
        g, x = torch.randn(4, 3, dtype=F64), p.detach().clone()
        p.grad, q.grad = g.clone(), g.clone()
        opt.step()
        adapted.step()
        q.data.copy_(by_hand(nested, x, q.detach(), g, LR * LAM))
        torch.testing.assert_close(q.detach(), p.detach(), rtol=1e-10, atol=1e-12)
        q.data.copy_(p.data)

    assert (False, LAM) == (opt.param_groups[0]["always_adapt"], opt.param_groups[0]["weight_decay"])


# ------------------------------------------------------------------------------------ what is refused


def adamw() -> AdamW:
    return AdamW([weight(1.0)], lr=LR, weight_decay=LAM)


MASKED_DECAY = ["masked with the update", "Wrap in the other order:"]
TWICE = ["decay twice", "base_optimizer"]
REFUSED: list[tuple[Any, Callable[[], Optimizer], list[str]]] = [
    (CautiousUpdate, lambda: CautiousUpdate(adamw()), ["CautiousUpdate(AdamW", "mask", "twice", "base_optimizer"]),
    (
        CautiousUpdate,
        lambda: CautiousDecay(adamw()),
        ["CautiousDecay(AdamW", *MASKED_DECAY, "CautiousDecay(CautiousUpdate(optimizer))"],
    ),
    (
        CautiousUpdate,
        lambda: PNormDecay(adamw()),
        ["PNormDecay(AdamW", *MASKED_DECAY, "PNormDecay(CautiousUpdate(optimizer))"],
    ),
    (CautiousDecay, lambda: CautiousDecay(adamw()), ["CautiousDecay(AdamW", *TWICE]),
    (CautiousDecay, lambda: PNormDecay(adamw()), ["PNormDecay(AdamW", *TWICE]),
    (PNormDecay, lambda: CautiousDecay(adamw()), ["CautiousDecay(AdamW", *TWICE]),
    (PNormDecay, lambda: PNormDecay(adamw()), ["PNormDecay(AdamW", *TWICE]),
]


@pytest.mark.parametrize(("outer", "inner", "pieces"), REFUSED)
@pytest.mark.parametrize("between", ["nothing", "Lookahead"])
def test_other_pairs_are_refused(outer: Any, inner: Any, pieces: list[str], between: str) -> None:
    """The error says what is inside, why it is refused and what to do, also with a Lookahead between the two."""
    base = lookahead(inner()) if between == "Lookahead" else inner()
    with pytest.raises(ValueError, match=f"^{outer.__name__} cannot wrap ") as caught:
        outer(base)

    assert [] == [piece for piece in pieces if piece not in str(caught.value)]


@pytest.mark.parametrize("outer", [CautiousDecay, PNormDecay])
@pytest.mark.parametrize("innermost", [CautiousUpdate, CautiousDecay])
def test_a_third_layer_is_refused_as_well(outer: Any, innermost: Any) -> None:
    """No wrapper goes around a pair of wrappers, so nothing decays or masks twice."""
    with pytest.raises(ValueError, match="cannot wrap "):
        outer(CautiousUpdate(lookahead(innermost(adamw()))))
    with pytest.raises(ValueError, match="cannot wrap "):
        outer(CautiousDecay(CautiousUpdate(adamw())))


@nestings
def test_the_allowed_pairs_are_accepted(wrap: Any) -> None:
    """The allowed pairs build without a warning, and repr names both layers."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = wrap(adamw())

    assert "CautiousUpdate" in repr(opt)
    assert isinstance(opt.base_optimizer.base_optimizer, AdamW)


def test_schedule_free_is_refused() -> None:
    """Schedule-free optimizers compute the weights from a copy, so every wrapper refuses them."""
    lib = pytest.importorskip("schedulefree")
    for outer in (CautiousUpdate, PNormDecay):
        with pytest.raises(ValueError, match=f"{outer.__name__} cannot wrap AdamWScheduleFree"):
            outer(lib.AdamWScheduleFree([weight(1.0)], weight_decay=0.1))


@nestings
def test_sparse_gradients_are_refused_before_anything_changes(wrap: Any) -> None:
    """The inner layer refuses sparse gradients; weights, groups and state of all layers stay unchanged."""
    embedding = nn.Embedding(4, 2, sparse=True)
    base = SGD(embedding.parameters(), lr=LR, weight_decay=LAM)
    opt = wrap(base)
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.detach().clone()
    with pytest.raises(ValueError, match="sparse"):
        opt.step()

    assert torch.equal(before, embedding.weight)
    assert (LAM, {}) == (base.param_groups[0]["weight_decay"], dict(base.state))


# ------------------------------------------------------------------------------------ checkpoints and copies


def trained(wrap: Any, steps: int = 3) -> tuple[nn.Module, Any]:
    model = net()
    opt = wrap(AdamW(model.parameters(), lr=0.01, weight_decay=LAM))
    train(model, opt, range(steps))
    return model, opt


@nestings
def test_the_state_dict_is_the_bases_own(wrap: Any) -> None:
    """The state dict is that of the AdamW inside, with the user's weight_decay and no extra key."""
    _, opt = trained(wrap)
    plain = AdamW(net().parameters(), lr=0.01, weight_decay=LAM).state_dict()
    state = opt.state_dict()

    assert same(opt.base_optimizer.base_optimizer.state_dict(), state)
    assert plain["param_groups"] == state["param_groups"]
    assert {"step", "exp_avg", "exp_avg_sq"} == {key for entry in state["state"].values() for key in entry}


@nestings
def test_checkpoints_go_both_ways(wrap: Any) -> None:
    """A nested wrapper's checkpoint loads in plain AdamW, and a plain one loads in the nested wrapper."""
    _, opt = trained(wrap)
    plain = AdamW(net().parameters())
    plain.load_state_dict(copy.deepcopy(opt.state_dict()))
    again = wrap(AdamW(net().parameters(), weight_decay=0.01))
    again.load_state_dict(copy.deepcopy(plain.state_dict()))

    assert same(opt.state_dict(), plain.state_dict())
    assert same(opt.state_dict(), again.state_dict())
    assert LAM == again.param_groups[0]["weight_decay"]


@nestings
def test_a_resumed_run_is_the_uninterrupted_one(wrap: Any) -> None:
    """Training resumed in a new model and optimizer gives the bits of the uninterrupted run."""
    model, opt = trained(wrap)
    saved = copy.deepcopy((model.state_dict(), opt.state_dict()))
    train(model, opt, range(3, 6))
    other = net()
    resumed = wrap(AdamW(other.parameters(), lr=0.01, weight_decay=LAM))
    other.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    train(other, resumed, range(3, 6))

    assert torch.equal(values(model), values(other))


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
@nestings
def test_copies_train_on_like_the_original(wrap: Any, copied: Any) -> None:
    """A deep copy and a pickle of model and optimizer keep both layers and scale, and train on bit for bit."""
    model, opt = trained(wrap)
    twin, other = copied((model, opt))
    train(model, opt, range(3, 6))
    train(twin, other, range(3, 6))

    assert torch.equal(values(model), values(twin))
    assert [type(opt), CautiousUpdate, AdamW] == [
        type(other),
        type(other.base_optimizer),
        type(other.base_optimizer.base_optimizer),
    ]
    assert opt.base_optimizer.scale == other.base_optimizer.scale


OVER: list[tuple[Any, Callable[[Any], Any]]] = [
    (CautiousUpdate.over(AdamW, scale="numel"), lambda base: CautiousUpdate(base, scale="numel")),
    (CautiousUpdate.over(AdamW, scale=None), lambda base: CautiousUpdate(base, scale=None)),
    (PNormDecay.over(AdamW, p=1.5), lambda base: PNormDecay(base, p=1.5)),
    (CautiousDecay.over(AdamW, mask="all"), lambda base: CautiousDecay(base, mask="all")),
    (CautiousDecay.over(CautiousUpdate.over(AdamW)), NESTED["decay(update)"]),
    (PNormDecay.over(CautiousUpdate.over(AdamW), p=P), NESTED["p-norm(update)"]),
]


@pytest.mark.parametrize(("cls", "wrap"), OVER, ids=[cls.__name__ for cls, _ in OVER])
def test_over(cls: Any, wrap: Any) -> None:
    """A class from over(), nested or not, trains as the wrapper; it and its instances pickle, and keep their type."""
    model, opt = trained(wrap)
    other = net()
    built = cls(other.parameters(), lr=0.01, weight_decay=LAM)
    train(other, built, range(3))
    twin, again = pickle.loads(pickle.dumps((other, built)))
    train(model, opt, [3])
    train(twin, again, [3])

    assert torch.equal(values(model), values(twin))
    assert (cls, cls) == (type(again), pickle.loads(pickle.dumps(cls)))
    assert "AdamW" in cls.__name__


def test_over_names_every_layer() -> None:
    """The name of a nested class contains every layer, and the same arguments give the same class."""
    cls = CautiousDecay.over(CautiousUpdate.over(AdamW))

    assert "CautiousDecayCautiousUpdateAdamW" == cls.__name__
    assert cls is CautiousDecay.over(CautiousUpdate.over(AdamW))


# ------------------------------------------------------------------------------------ used like any optimizer


@nestings
def test_a_schedule_reaches_all_layers(wrap: Any) -> None:
    """A scheduler on the nested wrapper acts like learning rates written into AdamW's groups by hand."""
    model = net()
    opt = wrap(AdamW(model.parameters(), lr=0.01, weight_decay=LAM))
    schedule = LambdaLR(opt, lambda step: 1 / (1 + step))
    other = net()
    by_hand = wrap(AdamW(other.parameters(), lr=0.01, weight_decay=LAM))
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # torch warns if the scheduler steps before the optimizer
        for step in range(4):
            train(model, opt, [step])
            schedule.step()
            by_hand.param_groups[0]["lr"] = 0.01 / (1 + step)
            train(other, by_hand, [step])

    assert torch.equal(values(other), values(model))


@nestings
def test_a_scheduler_of_the_base_works_as_well(wrap: Any) -> None:
    """A scheduler made before wrapping still works, and the optimizer can still be copied."""
    model = net()
    base = AdamW(model.parameters(), lr=0.01, weight_decay=LAM)
    schedule = CosineAnnealingLR(base, 4)
    opt = wrap(base)
    for step in range(3):
        train(model, opt, [step])
        schedule.step()

    assert opt.param_groups[0]["lr"] == schedule.get_last_lr()[0] < 0.01
    assert type(pickle.loads(pickle.dumps(opt))) is type(opt)


@nestings
@pytest.mark.parametrize("fused", [False, True])
def test_a_grad_scaler(wrap: Any, fused: bool) -> None:
    """Training with a GradScaler equals training without, bit for bit; all layers skip an overflow."""
    model, other = net(), net()
    opt, plain = (wrap(AdamW(m.parameters(), lr=0.01, weight_decay=LAM, fused=fused)) for m in (model, other))
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for step in range(4):
        opt.zero_grad()
        scaler.scale(loss_of(model, step)).backward()
        if step == 2:
            before = values(model)
            next(model.parameters()).grad[0, 0] = float("inf")
        scaler.step(opt)
        scaler.update()
        if step == 2:
            assert torch.equal(before, values(model))
            continue
        train(other, plain, [step])

    assert torch.equal(values(other), values(model))
    assert 512.0 == scaler.get_scale()


@nestings
def test_hooks_fire_once_each(wrap: Any) -> None:
    """Step hooks on outer, inner and base fire once a step, outer first and last; the global ones fire once."""
    p, order = weight(1, grad=[1]), []
    opt = wrap(SGD([p], lr=LR, weight_decay=LAM))
    layers = {"outer": opt, "inner": opt.base_optimizer, "base": opt.base_optimizer.base_optimizer}
    for name, layer in layers.items():
        layer.register_step_pre_hook(lambda *_, name=name: order.append(f"{name} pre"))
        layer.register_step_post_hook(lambda *_, name=name: order.append(f"{name} post"))
    handles = [
        register_optimizer_step_pre_hook(lambda *_: order.append("global pre")),
        register_optimizer_step_post_hook(lambda *_: order.append("global post")),
    ]
    try:
        opt.step()
    finally:
        for handle in handles:
            handle.remove()
    mine = [entry for entry in order if not entry.startswith("global")]

    assert ["outer pre", "inner pre", "base pre", "base post", "inner post", "outer post"] == mine
    assert [1, 1] == [order.count("global pre"), order.count("global post")]


@nestings
def test_closures_go_through(wrap: Any) -> None:
    """step(closure) returns the loss and trains as step(); the closure runs once and sees the user's weight_decay."""
    model, _ = trained(wrap, 4)
    other = net()
    with_closure = wrap(AdamW(other.parameters(), lr=0.01, weight_decay=LAM))
    seen = []
    for step in range(4):

        def closure(step: int = step) -> Tensor:
            seen.append(with_closure.param_groups[0]["weight_decay"])
            with_closure.zero_grad()
            loss = loss_of(other, step)
            loss.backward()
            return loss

        assert with_closure.step(closure).item() > 0

    assert [LAM] * 4 == seen
    assert torch.equal(values(model), values(other))


@nestings
def test_a_closure_may_schedule_the_decay(wrap: Any) -> None:
    """A weight_decay that a closure writes applies from this step on, and stays."""
    p, q = weight(1, -1, grad=[1, 1], dtype=F64), weight(1, -1, grad=[1, 1], dtype=F64)
    opt, other = wrap(SGD([p], lr=LR, weight_decay=LAM)), wrap(SGD([q], lr=LR, weight_decay=0.25))

    def closure() -> float:
        opt.param_groups[0]["weight_decay"] = 0.25
        return 1.0

    opt.step(closure)
    other.step()

    assert torch.equal(q.detach(), p.detach())
    assert 0.25 == opt.param_groups[0]["weight_decay"]


def test_observers_of_both_layers_get_their_own_reports() -> None:
    """The inner layer's report counts kept updates, the outer layer's counts decayed weights."""
    p = weight(1, 1, 1, -1, grad=[4, 4, 4, 4])
    opt = CautiousDecay(CautiousUpdate(SGD([p], lr=0.125, momentum=1.0, weight_decay=0.5), scale=None))
    opt.step()
    p.grad = torch.tensor([1.0, 1.0, -1.0, -1.0])
    p.data.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    outer, inner = [], []
    opt.observer, opt.base_optimizer.observer = outer.append, inner.append
    opt.step()  # the first two are kept, and the first of them shrinks; the masked two stay in place, so they decay

    assert [(2, 4)] == [(int(r.active), r.total) for r in inner]
    assert [(3, 4)] == [(int(r.active), r.total) for r in outer]


@nestings
def test_gradients_changed_by_the_base_reach_no_layer(wrap: Any) -> None:
    """If the base changes gradients in place, every layer still uses those from before the step."""

    class Spoils(Optimizer):
        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.sub_(group["lr"] * p.grad)
                    p.grad.neg_()

    p, q = weight(1, -2, 3, dtype=F64), weight(1, -2, 3, dtype=F64)
    plain = SGD([q], lr=LR, weight_decay=LAM, foreach=False)  # one pass rounds otherwise
    opt, sound = wrap(Spoils([p], {"lr": LR, "weight_decay": LAM})), wrap(plain)
    for g in [[1.0, 1.0, -1.0], [1.0, -1.0, 2.0], [-1.0, 1.0, 1.0]]:
        p.grad, q.grad = torch.tensor(g, dtype=F64), torch.tensor(g, dtype=F64)
        opt.step()
        sound.step()

    assert torch.equal(q.detach(), p.detach())


@nestings
def test_memory_is_counted_per_layer(wrap: Any) -> None:
    """Each layer reports its own copy, none in one pass; dropping the copies does not change training."""
    model, opt = trained(wrap)
    size = 4 * sum(p.numel() for p in model.parameters())
    in_one_pass = opt.base_optimizer.paths()[0].path == "one_pass"
    opt.drop_snapshot()
    train(model, opt, [3])

    assert [size, 0 if in_one_pass else size] == [opt.snapshot_bytes, opt.base_optimizer.snapshot_bytes]
    assert torch.equal(values(trained(wrap, 4)[0]), values(model))


@nestings
def test_training_lowers_the_loss(wrap: Any) -> None:
    """Sixty steps of a nested wrapper around AdamW bring the loss of a small net below a third."""
    model = net()
    opt = wrap(AdamW(model.parameters(), lr=0.02, weight_decay=0.001))
    before = sum(loss_of(model, step).item() for step in range(10))
    train(model, opt, range(60))

    assert sum(loss_of(model, step).item() for step in range(10)) < before / 3
