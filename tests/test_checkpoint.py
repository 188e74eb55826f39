"""A resumed run gives the same weights: in a new process, in another format, or with another optimizer."""

import itertools
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ALL_PATHS, BASES, Base, PathOptions, can_run, net, same, train, values
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW

from cwd_wrap import CautiousDecay, wrapper

HERE = Path(__file__).parent

GO_ON = """
import sys, torch
torch.set_num_threads(1)
from support import ALL_PATHS, BASES, net, train, values
from cwd_wrap import CautiousDecay
file = sys.argv[1]
paths = {str(path): path for path in ALL_PATHS}
results = {}
for (name, path), (weights, state) in torch.load(file, weights_only=True).items():
    model = net()
    model.load_state_dict(weights)
    opt = CautiousDecay(BASES[name].on(paths[path])(model.parameters()), **paths[path])
    opt.load_state_dict(state)
    train(model, opt, range(3, 6))
    results[name, path] = values(model)
torch.save(results, file)
"""


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], torch.Tensor]:
    """The weights of every base and path after three steps here and three in a fresh process."""
    file = tmp_path_factory.mktemp("resumed") / "checkpoint.pt"
    checkpoints = {}
    for name, path in itertools.product(BASES, filter(can_run, ALL_PATHS)):
        if (build := BASES[name].on(path)) is not None:
            model = net()
            opt = CautiousDecay(build(model.parameters()), **path)
            train(model, opt, range(3))
            checkpoints[name, str(path)] = (model.state_dict(), opt.state_dict())
    torch.save(checkpoints, file)
    found_in = os.pathsep.join([str(HERE), str(HERE.parent)])
    subprocess.run(
        [sys.executable, "-c", GO_ON, str(file)], check=True, env={**os.environ, "PYTHONPATH": found_in}, cwd=HERE
    )
    results: dict[tuple[str, str], torch.Tensor] = torch.load(file, weights_only=True)
    return results


def test_a_fresh_process_goes_on_bit_for_bit(
    every_base: Base, every_path: PathOptions, resumed: dict[Any, torch.Tensor]
) -> None:
    """Three steps, torch.save, and three steps in a new process give the weights of six steps in one run."""
    model = net()
    train(model, CautiousDecay(every_base(model.parameters()), **every_path), range(6))

    assert torch.equal(values(model), resumed[str(every_base), str(every_path)])


def test_a_plain_run_resumes_in_the_wrapper(every_path: PathOptions) -> None:
    """A plain AdamW checkpoint resumed in the wrapper trains the same as that AdamW wrapped in place."""
    model, twin = net(), net()
    base, plain = (BASES["AdamW"](m.parameters(), **every_path.base) for m in (twin, model))
    train(twin, base, range(3))
    train(model, plain, range(3))
    opt = CautiousDecay(BASES["AdamW"](model.parameters(), **every_path.base), **every_path)
    opt.load_state_dict(plain.state_dict())
    train(model, opt, range(3, 6))
    train(twin, CautiousDecay(base, **every_path), range(3, 6))

    assert torch.equal(values(twin), values(model))


def test_a_wrapped_run_resumes_in_the_plain_optimizer(every_path: PathOptions) -> None:
    """A checkpoint of the wrapper resumes in plain AdamW, with AdamW's own decay."""
    model, twin = net(), net()
    opt, other = (CautiousDecay(BASES["AdamW"](m.parameters(), **every_path.base), **every_path) for m in (model, twin))
    train(model, opt, range(3))
    train(twin, other, range(3))
    plain = BASES["AdamW"](model.parameters(), **every_path.base)
    plain.load_state_dict(opt.state_dict())
    train(model, plain, range(3, 6))
    train(twin, other.base_optimizer, range(3, 6))

    assert torch.equal(values(twin), values(model))
    assert 0.5 == plain.param_groups[0]["weight_decay"]


# ------------------------------------------------------------------------------------ distributed checkpoints

FLAT = [False, True]
flat_or_not = pytest.mark.parametrize("flat", FLAT, ids=["nested", "flat"])


@flat_or_not
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_asking_a_fresh_optimizer_changes_no_weight(tensor_lr: bool, flat: bool, every_path: PathOptions) -> None:
    """DCP initialises a fresh optimizer's state by a step with zero gradients and lr 0: no weight moves or decays."""
    model = net()
    lr = torch.tensor(0.01) if tensor_lr else 0.01
    opt = CautiousDecay(
        AdamW(model.parameters(), lr=lr, weight_decay=0.5, **(every_path.base or {"foreach": False})), **every_path
    )
    before = values(model)
    get_optimizer_state_dict(model, opt, options=StateDictOptions(flatten_optimizer_state_dict=flat))

    assert torch.equal(before, values(model))
    assert {"exp_avg", "exp_avg_sq", "step"} == set(opt.state[model[0].weight])
    assert opt.param_groups[0]["lr"] is lr
    assert 0.5 == opt.param_groups[0]["weight_decay"]


@flat_or_not
def test_a_plain_checkpoint_loads_by_dcp(flat: bool, every_path: PathOptions) -> None:
    """A plain AdamW's distributed checkpoint loads into a new wrapper: the state arrives, and no weight changes."""
    model, options = net(), StateDictOptions(flatten_optimizer_state_dict=flat)
    plain = BASES["AdamW"](model.parameters(), **every_path.base)
    train(model, plain, range(2))
    checkpoint = get_optimizer_state_dict(model, plain, options=options)
    model.zero_grad()
    opt, before = CautiousDecay(BASES["AdamW"](model.parameters(), **every_path.base), **every_path), values(model)
    set_optimizer_state_dict(model, opt, optim_state_dict=checkpoint, options=options)

    assert torch.equal(before, values(model))
    assert same(plain.state_dict()["state"], opt.state_dict()["state"])


@flat_or_not
def test_a_run_goes_on_from_dcp_bit_for_bit(flat: bool, every_path: PathOptions) -> None:
    """Two steps, a distributed checkpoint, and two steps of a new net and wrapper give the weights of four steps."""
    straight, model, again = net(), net(), net()
    opt, first = (
        CautiousDecay(BASES["AdamW"](m.parameters(), **every_path.base), **every_path) for m in (straight, model)
    )
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    train(straight, opt, range(4))
    train(model, first, range(2))
    again.load_state_dict(model.state_dict())
    second = CautiousDecay(BASES["AdamW"](again.parameters(), **every_path.base), **every_path)
    checkpoint = get_optimizer_state_dict(model, first, options=options)
    set_optimizer_state_dict(again, second, optim_state_dict=checkpoint, options=options)
    train(again, second, range(2, 4))

    assert torch.equal(values(straight), values(again))


def test_a_flat_checkpoint_has_the_plain_optimizers_keys(every_path: PathOptions) -> None:
    """The wrapper adds no key to a flat distributed checkpoint, which requires every key of the groups."""
    options, keys = StateDictOptions(flatten_optimizer_state_dict=True), []
    for wrap in (lambda base: base, lambda base: CautiousDecay(base, **every_path)):
        model = net()
        opt = wrap(BASES["AdamW"](model.parameters(), **every_path.base))
        keys.append(set(get_optimizer_state_dict(model, opt, options=options)))

    assert keys[0] == keys[1]
    assert "param_groups.0.weight.weight_decay" in keys[1]


def test_asking_between_two_steps_changes_nothing(every_path: PathOptions) -> None:
    """A checkpoint during training, with gradients cleared, takes no hidden step: Adam's counter stays at 2."""
    model = net()
    opt = CautiousDecay(BASES["AdamW"](model.parameters(), **every_path.base), **every_path)
    train(model, opt, range(2))
    opt.zero_grad()
    before = values(model)
    get_optimizer_state_dict(model, opt)

    assert torch.equal(before, values(model))
    assert 2.0 == opt.state[model[0].weight]["step"].item()


def test_a_stateless_base_asked_between_two_steps_does_not_decay(every_path: PathOptions) -> None:
    """SGD has no state, so DCP takes its step with lr 0 at every checkpoint; no weight decays."""
    model = net()
    opt = CautiousDecay(SGD(model.parameters(), lr=0.1, weight_decay=0.5, **every_path.base), **every_path)
    train(model, opt, range(1))
    opt.state.clear()
    opt.zero_grad()
    before = values(model)
    get_optimizer_state_dict(model, opt)

    assert torch.equal(before, values(model))


# ------------------------------------------------------------------------------------ in the middle of a step


def in_the_middle(monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]) -> None:
    """Run ``act`` once inside AdamW's own step, as a signal handler would."""
    init_group = AdamW._init_group

    def interrupted(self: AdamW, *args: Any) -> Any:
        monkeypatch.setattr(AdamW, "_init_group", init_group)
        act()
        return init_group(self, *args)

    monkeypatch.setattr(AdamW, "_init_group", interrupted)


def stepped_adamw(path: PathOptions) -> CautiousDecay:
    groups = [{"params": list(net().parameters())}, {"params": list(net().parameters()), "weight_decay": 0.0}]
    opt = CautiousDecay(AdamW(groups, weight_decay=0.1, fused=path.get("path") == "one_pass" or None), **path)
    for p in [p for group in groups for p in group["params"]]:
        p.grad = torch.ones_like(p)
    opt.step()
    return opt


def test_a_state_dict_in_a_signal_handler(every_path: PathOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """A state dict made in the middle of a step (by SLURM's SIGUSR1) has the groups from between steps."""
    opt, twin = stepped_adamw(every_path), stepped_adamw(every_path)
    between = opt.state_dict()["param_groups"]
    made = []
    in_the_middle(monkeypatch, lambda: made.append(opt.state_dict()["param_groups"]))
    opt.step()
    twin.step()

    assert made == [between]
    assert opt.state_dict()["param_groups"] == between
    for group, same_group in zip(opt.param_groups, twin.param_groups, strict=True):
        assert all(map(torch.equal, group["params"], same_group["params"]))


def test_a_state_dict_from_another_thread_waits_for_the_step(
    every_path: PathOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another thread that asks for a state dict in the middle of a step gets one from after the step."""
    opt = stepped_adamw(every_path)
    made = []
    thread = threading.Thread(target=lambda: made.append(opt.state_dict()))

    def ask() -> None:
        thread.start()
        thread.join(0.2)
        assert not made

    in_the_middle(monkeypatch, ask)
    opt.step()
    thread.join()

    assert made[0]["param_groups"] == opt.state_dict()["param_groups"]
    assert {float(state["step"]) for state in made[0]["state"].values()} == {2.0}


def test_a_step_that_waits_for_a_state_dict_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """If a step waits for a thread that waits for the step, the thread's state dict raises after a while."""
    monkeypatch.setattr(wrapper, "_PATIENCE", 0.1)
    opt = stepped_adamw({})
    errors = []

    def ask() -> None:
        try:
            opt.state_dict()
        except RuntimeError as error:
            errors.append(str(error))

    def wait() -> None:
        thread = threading.Thread(target=ask)
        thread.start()
        thread.join()

    in_the_middle(monkeypatch, wait)
    opt.step()

    assert errors == [
        "CautiousDecay.state_dict waited 0.1 seconds for the end of a step in another thread: call it between steps"
    ]
