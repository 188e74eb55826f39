"""A step inside torch.compile gives the same weights as outside it."""

from collections.abc import Callable

import pytest
import torch
from support import ALL_PATHS, BASES, Base, PathOptions, in_turn, weight
from torch._dynamo.testing import CompileCounter
from torch.optim import SGD, Optimizer, RAdam, RMSprop

from cwd_wrap import CautiousDecay

FACTORS = (1.0, 1.0, 0.5, 2.0)  # on the learning rate, step by step
GRADIENTS = ([1.0, 1.0, -1.0, 0.0], [1.0, -3.0, 0.5, 0.0], [-1.0, -1.0, 2.0, 0.0], [1.0, 1.0, 1.0, 1.0])


def compiled(opt: CautiousDecay, compiler: str) -> Callable[[], object]:
    torch._dynamo.reset()
    return torch.compile(lambda: opt.step(), backend=compiler)


def run(base: Base, path: PathOptions, compiler: str | None) -> tuple[list[float], float]:
    """Four weights after four steps under a schedule, and the group's weight_decay afterwards."""
    p = weight(1, -1, 2, 3)
    opt = CautiousDecay(base([p], **path.base), **path)
    step = opt.step if compiler is None else compiled(opt, compiler)
    lr = opt.param_groups[0]["lr"]
    for factor, grad in zip(FACTORS, GRADIENTS, strict=True):
        opt.param_groups[0]["lr"] = lr * factor
        p.grad = torch.tensor(grad)
        step()
    return p.tolist(), opt.param_groups[0]["weight_decay"]


def test_each_compiled_step_decays(every_path: PathOptions) -> None:
    """With a zero gradient, three compiled steps give 0.95, 0.95^2 and 0.95^3, and weight_decay is 0.5 after each."""
    p = weight(1.0, grad=[0.0])
    opt = CautiousDecay(SGD([p], lr=0.1, weight_decay=0.5, **every_path.base), **every_path)
    step, seen = compiled(opt, "eager"), []
    for _ in range(3):
        step()
        seen.append((p.item(), opt.param_groups[0]["weight_decay"]))

    assert [(pytest.approx(0.95**n), 0.5) for n in (1, 2, 3)] == seen


@pytest.mark.parametrize(("base", "path"), in_turn([("SGD-momentum", "aot_eager"), ("AdamW", "eager")]))
def test_compiled_steps_equal_eager_ones(base: tuple[str, str], path: PathOptions) -> None:
    """Four compiled steps under a schedule give the weights and the weight_decay of four eager ones."""
    name, compiler = base
    weights, strength = run(BASES[name], path, None)

    # Compiled, Adam's bias corrections may be computed in another order.
    assert (pytest.approx(weights, rel=1e-5), strength) == run(BASES[name], path, compiler)


def test_the_comparison_can_fail() -> None:
    """Without decay the weights differ, so the tests above can fail."""
    along = PathOptions(path="direction")
    weights, _ = run(BASES["AdamW"], along, compiler=None)
    others, _ = run(Base("idle", torch.optim.AdamW, lr=0.01, weight_decay=1e-9), along, compiler=None)

    assert pytest.approx(weights, rel=1e-3) != others


# ------------------------------------------------------------------------------------ a base with a compiled step


def compile_step(base: Optimizer) -> CompileCounter:
    """``base.step = torch.compile(base.step)``; the counter counts its compilations."""
    torch._dynamo.reset()
    counter = CompileCounter()
    base.step = torch.compile(base.step, backend=counter)  # type: ignore[method-assign]
    return counter


@pytest.mark.parametrize(
    ("base_and_lr", "path"),
    in_turn(
        [("SGD-momentum", "float"), ("AdamW", "float"), ("SGD-momentum", "tensor"), ("AdamW", "tensor")],
        [path for path in reversed(ALL_PATHS) if path["path"] != "pieces"],
    ),
)
def test_a_base_with_a_compiled_step(base_and_lr: tuple[str, str], path: PathOptions) -> None:
    """A wrapped compiled base gives the weights of an eager one; a schedule of 12 learning rates compiles twice."""
    name, tensor = base_and_lr[0], base_and_lr[1] == "tensor"
    params, options = [weight(1, -1, 2, 3), weight(1, -1, 2, 3)], path.base or {"foreach": False}
    base, plain = (BASES[name]([p], lr=torch.tensor(0.1) if tensor else 0.1, **options) for p in params)
    counter = compile_step(base)
    optimizers = [CautiousDecay(each, **path) for each in (base, plain)]
    for step in range(12):
        for p, opt in zip(params, optimizers, strict=True):
            p.grad = torch.tensor(GRADIENTS[step % 4])
            (group,) = opt.param_groups
            group["lr"] = group["lr"].fill_(0.1 / (step + 1)) if tensor else 0.1 / (step + 1)
            opt.step()

    torch.testing.assert_close(*(p.detach() for p in params), rtol=1e-5, atol=1e-6)
    assert [0.5, 0.5] == [opt.param_groups[0]["weight_decay"] for opt in optimizers]
    if tensor or torch.__version__ >= "2.6":  # older versions compile again for each float
        assert counter.frame_count <= 2


def test_a_base_with_a_compiled_step_is_not_stepped_in_pieces() -> None:
    """A compiled base takes a snapshot, because pieces would call the plain step on groups set up for compiled code."""
    params = [weight(1, -1, 2, 3), weight(1, -1, 2, 3)]
    base, plain = (RMSprop([p], lr=0.1, momentum=0.9, weight_decay=0.5, foreach=False) for p in params)
    compile_step(base)
    opt, other = CautiousDecay(base), CautiousDecay(plain)
    for grad in GRADIENTS:
        for p, optimizer in zip(params, (opt, other), strict=True):
            p.grad = torch.tensor(grad)
            optimizer.step()

    assert ["snapshot", "pieces"] == [optimizer.paths()[0].path for optimizer in (opt, other)]
    assert opt.paths()[0].reason.endswith("the step of RMSprop is compiled by torch.compile")
    torch.testing.assert_close(*(p.detach() for p in params), rtol=1e-5, atol=1e-6)
    with pytest.raises(
        ValueError, match="path='pieces' does not work for param group 0 of RMSprop: the step of RMSprop is"
    ):
        CautiousDecay(base, path="pieces")


def test_pieces_of_a_class_that_is_not_to_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A class marked as not to be compiled still steps in pieces, and its hooks fire once."""
    monkeypatch.setattr(RAdam, "step", torch._dynamo.disable(RAdam.step))
    params, seen = [weight(1, -1, grad=[1, 1]), weight(1, -1, grad=[1, 1])], []
    opt = CautiousDecay(RAdam(params, lr=0.1, weight_decay=0.5), path="pieces")
    opt.base_optimizer.register_step_post_hook(lambda *_: seen.append("post"))
    for _ in range(2):
        opt.step()

    assert ["post"] * 2 == seen
    assert "pieces" == opt.paths()[0].path
