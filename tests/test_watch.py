"""`MaskMonitor.watch`: it finds the wrapper behind what trainers make of it, and names the rows after the model."""

from typing import Any

import pytest
import torch
from support import net, train
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from cwd_wrap import CautiousDecay, CautiousUpdate, MaskMonitor


def wrapped(model: nn.Module | None = None) -> CautiousDecay:
    return CautiousDecay(AdamW((model or net()).parameters(), lr=0.01, weight_decay=0.5))


class Around(SGD):
    """An optimizer that keeps another under an attribute of the given name, as engines do."""

    def __init__(self, inner: Optimizer, attribute: str) -> None:
        super().__init__(inner.param_groups, lr=0.1)
        setattr(self, attribute, inner)


# ------------------------------------------------------------------------------------ finding the wrapper


def test_two_steps() -> None:
    """A monitor that watches an optimizer has one row for each step."""
    model = net()
    monitor = MaskMonitor().watch(opt := wrapped(model))
    train(model, opt, range(2))

    assert opt.observer is monitor
    assert [1, 2] == [row["step"] for row in monitor.rows()]


@pytest.mark.parametrize("attribute", ["optimizer", "_optimizer", "_base_optimizer", "base_optimizer"])
def test_it_looks_inside(attribute: str) -> None:
    """The wrapper is found under the attribute names of accelerate, Lightning, timm's Lookahead and SAM."""
    opt = wrapped()

    assert MaskMonitor().watch(Around(Around(opt, attribute), "optimizer")) is opt.observer


def test_the_outer_of_two_wrappers_is_watched() -> None:
    """Of a wrapper around a wrapper, the outer one reports."""
    inner = CautiousUpdate(SGD(net().parameters(), lr=0.1))
    outer = CautiousDecay(inner, lam=0.1)
    monitor = MaskMonitor().watch(outer)

    assert (monitor, None) == (outer.observer, inner.observer)


def test_an_observer_set_in_the_wrong_place_does_not_mislead() -> None:
    """An ``observer`` that was set on the engine's own object does not make that object the wrapper."""
    opt = wrapped()
    engine: Any = Around(opt, "optimizer")
    engine.observer = MaskMonitor()
    monitor = MaskMonitor().watch(engine)

    assert opt.observer is monitor


def cycle() -> Any:
    one = Around(SGD(net().parameters(), lr=0.1), "optimizer")
    one.optimizer = one
    return one


@pytest.mark.parametrize(
    ("build", "found"),
    [
        (lambda: AdamW(net().parameters()), "AdamW"),
        (lambda: Around(AdamW(net().parameters()), "optimizer"), "Around around AdamW"),
        (lambda: None, "None"),
        (cycle, "Around"),
        (lambda: wrapped, "function"),
    ],
    ids=["plain", "engine", "None", "cycle", "no optimizer"],
)
def test_no_wrapper_is_an_error(build: Any, found: str) -> None:
    """Where there is no wrapper, the error names what was looked through."""
    text = f"^MaskMonitor.watch found no CautiousDecay, CautiousUpdate or PNormDecay in {found}: pass the optimizer"
    with pytest.raises(TypeError, match=text):
        MaskMonitor().watch(build())


def test_accelerate() -> None:
    """Setting `observer` on accelerate's optimizer does nothing; `watch` reaches the wrapper."""
    accelerate = pytest.importorskip("accelerate")
    accelerate.state.AcceleratorState._reset_state(True)  # left over from a Trainer of an earlier test
    accelerate.state.GradientState._reset_state()
    model = net()
    model, optimizer = accelerate.Accelerator(cpu=True).prepare(model, wrapped(model))
    optimizer.observer = lost = MaskMonitor()
    monitor = MaskMonitor().watch(optimizer)
    train(model, optimizer, range(2))

    assert (0, 2) == (len(lost.rows()), len(monitor.rows()))


@pytest.mark.filterwarnings("ignore")
def test_fabric_and_lightning() -> None:
    """Fabric's and Lightning's optimizers claim to be the wrapper; `watch` reaches the one that steps."""
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.core.optimizer import LightningOptimizer

    model = net()
    _, optimizer = lightning.Fabric(accelerator="cpu").setup(model, wrapped(model))
    monitor = MaskMonitor().watch(optimizer)
    train(model, optimizer, range(2))
    opt = wrapped()

    assert isinstance(optimizer, CautiousDecay)
    assert 2 == len(monitor.rows())
    assert MaskMonitor().watch(LightningOptimizer(opt)) is opt.observer


@pytest.mark.parametrize(("library", "name"), [("timm.optim", "Lookahead"), ("pytorch_optimizer", "Lookahead")])
def test_lookahead(library: str, name: str) -> None:
    """The wrapper inside Lookahead is found."""
    cls = getattr(pytest.importorskip(library), name)
    opt = wrapped()

    assert MaskMonitor().watch(cls(opt)) is opt.observer


# ------------------------------------------------------------------------------------ names


def layers() -> nn.Sequential:
    """Two blocks of a weight and a bias each, and a head."""
    torch.manual_seed(0)
    block = lambda: nn.Sequential(nn.Linear(3, 3), nn.Tanh())
    model = nn.Sequential()
    model.add_module("blocks", nn.Sequential(block(), block()))
    model.add_module("head", nn.Linear(3, 1))
    return model


def names(opt: Optimizer, model: nn.Module, per_parameter: bool = False, known: bool = True) -> list[str]:
    monitor = MaskMonitor(per_parameter=per_parameter).watch(opt, model if known else None)
    train(model, opt, range(1))
    return [row["name"] for row in monitor.rows()]


def layer_decay(model: nn.Sequential) -> list[dict[str, Any]]:
    """A group for each block and one for the head, as for a learning rate that falls with the depth."""
    blocks, head = model.get_submodule("blocks"), model.get_submodule("head")
    parts = [*blocks.children(), head]
    return [{"params": list(part.parameters()), "lr": 0.1 * 0.5**i} for i, part in enumerate(reversed(parts))]


def test_groups_have_the_names_of_their_modules() -> None:
    """A group is named after the module that all its parameters are in; without the model by its index."""
    model = layers()
    opt = CautiousDecay(SGD(layer_decay(model), lr=0.1, weight_decay=0.5))

    assert ["head", "blocks.1.0", "blocks.0.0"] == names(opt, model)
    assert ["group 0", "group 1", "group 2"] == names(opt, model, known=False)


def test_groups_of_the_same_module_stay_apart() -> None:
    """Two groups of one module have their index in the name, and a group of the whole model keeps its own."""
    model = layers()
    p = dict(model.named_parameters())
    groups = [{"params": p["head.weight"]}, {"params": [p["blocks.0.0.weight"]]}, {"params": [p["blocks.0.0.bias"]]}]
    groups[0]["params"] = [p["head.weight"], p["blocks.1.0.weight"]]
    opt = CautiousDecay(SGD(groups, lr=0.1, weight_decay=0.5))

    assert ["group 0", "blocks.0.0.weight", "blocks.0.0.bias"] == names(opt, model)
    groups = [{"params": [p["head.weight"]]}]
    groups += [{"params": [p[f"blocks.0.0.{a}"], p[f"blocks.1.0.{a}"]]} for a in ("weight", "bias")]
    opt = CautiousDecay(SGD(groups, lr=0.1, weight_decay=0.5))

    assert ["head.weight", "blocks (group 1)", "blocks (group 2)"] == names(opt, model)


def test_a_group_without_decay_leaves_the_name_to_the_one_that_decays() -> None:
    """Where the biases of a module are a group of their own without decay, the group that decays has the bare name."""
    model = layers()
    p = dict(model.get_submodule("head").named_parameters())
    groups = [
        {"params": [p["bias"]], "weight_decay": 0.0},
        {"params": list(model.get_submodule("blocks").parameters())},
    ]
    groups += [{"params": [p["weight"]], "weight_decay": 0.5}]
    groups[0]["params"] += [extra := nn.Parameter(torch.ones(1))]
    model.head.register_parameter("extra", extra)
    groups[2]["params"] += [more := nn.Parameter(torch.ones(1))]
    model.head.register_parameter("more", more)
    extra.grad = more.grad = torch.ones(1)
    opt = CautiousUpdate(SGD(groups, lr=0.1, weight_decay=0.5))
    monitor = MaskMonitor().watch(opt, model)
    opt.step()

    assert {"group 0": "head (group 0)", "group 1": "blocks", "group 2": "head"}.items() <= monitor._names.items()
    assert ["head (group 0)", "head"] == [row["name"] for row in monitor.rows()]


def test_a_name_that_the_user_gave_stays() -> None:
    """The group's own key `name` comes first."""
    model = layers()
    groups = layer_decay(model)
    groups[0]["name"] = "top"
    opt = CautiousDecay(SGD(groups, lr=0.1, weight_decay=0.5))

    assert ["top", "blocks.1.0", "blocks.0.0"] == names(opt, model)


def test_parameters_have_their_names() -> None:
    """With a row for each parameter, each has its name in the model."""
    model = layers()
    opt = CautiousDecay(SGD(layer_decay(model), lr=0.1, weight_decay=0.5))
    found = names(opt, model, per_parameter=True)

    assert sorted(name for name, _ in model.named_parameters()) == sorted(found)
    assert ["0.0", "0.1"] == names(opt, model, per_parameter=True, known=False)[:2]


def test_names_that_the_optimizer_was_given() -> None:
    """Named parameters (torch 2.6) need no model."""
    model = layers()
    groups = [{"params": list(model.get_submodule(part).named_parameters(part))} for part in ("blocks.1", "head")]
    try:
        opt = CautiousDecay(SGD(groups, lr=0.1, weight_decay=0.5))
    except TypeError:
        pytest.skip("this torch takes no named parameters")

    assert ["blocks.1.0", "head"] == names(opt, model, known=False)


def test_timm_layer_decay() -> None:
    """The groups that timm makes for a learning rate that falls with the depth are named after the blocks."""
    timm = pytest.importorskip("timm")
    import cwd_wrap.timm  # noqa: F401

    model = timm.create_model("test_vit")
    opt = timm.optim.create_optimizer_v2(model, "cautious_adamw", lr=1e-3, weight_decay=0.05, layer_decay=0.75)
    monitor = MaskMonitor().watch(opt, model)
    model(torch.randn(1, 3, *model.default_cfg["input_size"][1:])).sum().backward()
    opt.step()
    found = [row["name"] for row in monitor.rows()]

    assert [f"blocks.{i}" for i in range(6)] == found[1:-1]
