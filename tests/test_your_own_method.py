"""The rules of docs/your_own_method.md, around plain optimizers and wrappers, on every path and on two ranks."""

import copy
import re
from functools import partial
from pathlib import Path
from typing import Any

import engines
import pytest
import torch
from ranks import spawn
from support import PathOptions, loss_of, net, same, train, values, weight
from torch import Tensor, nn
from torch import distributed as dist
from torch.optim import SGD, AdamW, Optimizer

from cwd_wrap import CautiousDecay

PAGE = Path(__file__).parents[1] / "docs/your_own_method.md"


def of_page(name: str) -> Any:
    """The class or function of that name on the page."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    (source,) = (block for block in blocks if re.search(rf"^(class|def) {name}\b", block, flags=re.MULTILINE))
    namespace: dict[str, Any] = {}
    exec(source, namespace)
    return namespace[name]


def length_of(name: str) -> int:
    """Lines of the class on the page, without empty ones."""
    (source,) = re.findall(rf"^class {name}:\n((?:(?: .*)?\n)*)", PAGE.read_text(), flags=re.MULTILINE)
    return 1 + sum(bool(line.strip()) for line in source.splitlines())


# ------------------------------------------------------------------------------------ the rules


def test_the_pages_own_test_passes_and_can_fail() -> None:
    """The test on the page passes for the page's rule, and fails for a rule that pulls nothing."""
    of_page("test_pull")(of_page("PullToAverage"))

    with pytest.raises(AssertionError):
        of_page("test_pull")(lambda opt, lam: of_page("PullToAverage")(opt, lam=0.0))


def test_the_brake_halves_growth() -> None:
    """A step from norm 5 to norm 6 ends at 5.5, in the same direction; a step inwards stays as it is."""
    p, q = weight(3.0, 4.0, grad=[-6.0, -8.0]), weight(3.0, 4.0, grad=[6.0, 8.0])
    opt = SGD([p, q], lr=0.1)
    of_page("Brake")(opt)
    opt.step()

    assert torch.allclose(p, torch.tensor([3.3, 4.4]))
    assert torch.allclose(q, torch.tensor([2.4, 3.2]))


def test_the_rules_are_short() -> None:
    """The rule has at most 25 lines, as its heading says, and names nothing that is not public."""
    source = "".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE))

    assert 15 < length_of("PullToAverage") <= 25
    assert not re.search(r"\._[a-z]", source)


def test_pulling_is_the_formula(every_path: PathOptions) -> None:
    """Around a wrapper that does not decay, three steps follow the formula, computed in float64."""
    model, plain = net().double(), net().double()
    opt = CautiousDecay(SGD(model.parameters(), lr=0.1, weight_decay=0.0, **every_path.base), lam=1e-300, **every_path)
    of_page("PullToAverage")(opt, lam=2.0, beta=0.5)
    base = SGD(plain.parameters(), lr=0.1)
    averages = [p.detach().clone() for p in plain.parameters()]
    for step in range(3):
        for of in (model, plain):
            of.zero_grad()
            loss_of(of.float(), step).backward()
            of.double()
        opt.step()
        before = [p.detach().clone() for p in plain.parameters()]
        base.step()
        for p, x, a in zip(plain.parameters(), before, averages, strict=True):
            mask = (x - p) * (x - a) >= 0
            p.data -= 0.1 * 2.0 * mask * (x - a)
            a += 0.5 * (p.data - a)

    torch.testing.assert_close(values(model), values(plain))


# ------------------------------------------------------------------------------------ with the wrapper


def trained(path: PathOptions, name: str | None, on: Any = net, steps: range = range(4)) -> tuple[nn.Module, Any]:
    """A net after some steps of the wrapper on a path, with a rule of the page around it."""
    model = on()
    opt = CautiousDecay(AdamW(model.parameters(), lr=0.05, weight_decay=0.5, **path.base), **path)
    if name is not None:
        of_page(name)(opt, **({"lam": 3.0} if name == "PullToAverage" else {}))
    train(model, opt, steps)
    return model, opt


@pytest.mark.parametrize("name", ["PullToAverage", "Brake"])
def test_the_rules_work_on_every_path(every_path: PathOptions, name: str) -> None:
    """With a rule around it the wrapper takes the same path as without, and the rule changes the training."""
    ours, opt = trained(every_path, name)
    without, plain = trained(every_path, None)

    assert [group.path for group in plain.paths()] == [group.path for group in opt.paths()] == [every_path["path"]]
    assert not torch.equal(values(ours), values(without))
    reference, _ = trained(PathOptions(path="snapshot", backend="eager"), name)
    torch.testing.assert_close(values(ours), values(reference), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["PullToAverage", "Brake"])
def test_training_resumes_bit_for_bit(every_path: PathOptions, name: str) -> None:
    """The average is part of the checkpoint: two steps, save, load, and two more are four steps."""
    whole, _ = trained(every_path, name)
    model, opt = trained(every_path, name, steps=range(2))
    again, resumed = trained(every_path, name, steps=range(0))
    again.load_state_dict(model.state_dict())
    resumed.load_state_dict(copy.deepcopy(opt.state_dict()))
    train(again, resumed, range(2, 4))

    assert torch.equal(values(whole), values(again))


@pytest.mark.parametrize("base", [AdamW, SGD])
def test_a_parameter_without_a_gradient_joins_later(base: Any) -> None:
    """A parameter that has no gradient at first is left alone, and the optimizer's state for it is set up later."""
    early, late = weight(1.0, grad=[1.0]), weight(2.0)
    opt = CautiousDecay(base([early, late], lr=0.1, weight_decay=0.5))
    of_page("PullToAverage")(opt, lam=1.0)
    opt.step()

    assert late.tolist() == [2.0]
    assert "average" not in opt.state.get(late, {})
    late.grad = torch.ones(1)
    opt.step()

    assert late.tolist() != [2.0]
    assert set(opt.state[early]) == set(opt.state[late])


def test_plain_optimizers_take_the_rules_too() -> None:
    """Around plain AdamW a rule does what it does around a wrapper whose groups do not decay."""
    models = net(), net()
    plain: Optimizer = AdamW(models[0].parameters(), lr=0.05, weight_decay=0.0)
    wrapped = CautiousDecay(AdamW(models[1].parameters(), lr=0.05, weight_decay=0.5))
    wrapped.param_groups[0]["weight_decay"] = 0.0
    for model, opt in zip(models, (plain, wrapped), strict=True):
        of_page("PullToAverage")(opt, lam=3.0)
        train(model, opt, range(3))

    assert torch.equal(values(models[0]), values(models[1]))
    assert same(plain.state_dict()["state"], wrapped.state_dict()["state"])


def test_skipped_steps_and_closures() -> None:
    """GradScaler skips a step with its hooks; the pre-hook runs before the closure."""
    p = weight(1.0)
    opt = CautiousDecay(SGD([p], lr=0.1, weight_decay=0.5))
    events: list[str] = []
    opt.register_step_pre_hook(lambda *_: events.append("before"))
    opt.register_step_post_hook(lambda *_: events.append("after"))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    scaler.scale(p.sum() * torch.inf).backward()
    scaler.step(opt)
    scaler.update()

    def closure() -> Tensor:
        events.append("closure")
        p.grad = torch.ones(1)
        return p.sum()

    opt.step(closure)

    assert ["before", "closure", "after"] == events


# ------------------------------------------------------------------------------------ sharded weights


def with_rule(name: str, parameters: Any) -> CautiousDecay:
    opt = CautiousDecay(AdamW(parameters, lr=0.05, weight_decay=0.5))
    of_page(name)(opt, **({"lam": 3.0} if name == "PullToAverage" else {}))
    return opt


def sharded(rank: int, name: str) -> Any:
    """The weights after three steps under FSDP2 with the rule, gathered."""
    del rank
    model, parts = engines.fsdp2()
    opt = with_rule(name, model.parameters())
    for step in range(engines.STEPS):
        opt.zero_grad()
        engines.loss_of(model, engines.part_of(engines.batch(model, step), parts)).backward()
        opt.step()
    return engines.flat(model.parameters()).numpy()


@pytest.mark.skipif(not dist.is_available(), reason="this torch is built without torch.distributed")
@pytest.mark.parametrize("name", ["PullToAverage", "Brake"])
def test_fsdp2(name: str) -> None:
    """On two ranks under FSDP2 the rules give the weights of one process."""
    if not hasattr(pytest.importorskip("torch.distributed.fsdp"), "fully_shard"):
        pytest.skip("this torch has no fully_shard")
    expected = engines.alone(engines.net(), partial(with_rule, name))
    for weights in spawn(2, sharded, name):
        torch.testing.assert_close(torch.from_numpy(weights), expected, rtol=0, atol=1e-13)
