"""Stopping and going on, in a new process, another format, from another optimizer: the weights come out the same."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support import BASES, both_paths, net, same, train, values
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW

from cwd_wrap import CautiousDecay

HERE = Path(__file__).parent

GO_ON = """
import sys, torch
torch.set_num_threads(1)
from support import BASES, net, train, values
from cwd_wrap import CautiousDecay
file = sys.argv[1]
results = {}
for (name, path), (weights, state) in torch.load(file, weights_only=True).items():
    model = net()
    model.load_state_dict(weights)
    opt = CautiousDecay(BASES[name](model.parameters()), path=path)
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
    for name, build in BASES.items():
        for path in ("direction", "snapshot"):
            model = net()
            opt = CautiousDecay(build(model.parameters()), path=path)
            train(model, opt, range(3))
            checkpoints[name, path] = (model.state_dict(), opt.state_dict())
    torch.save(checkpoints, file)
    found_in = os.pathsep.join([str(HERE), str(HERE.parent)])
    subprocess.run(
        [sys.executable, "-c", GO_ON, str(file)], check=True, env={**os.environ, "PYTHONPATH": found_in}, cwd=HERE
    )
    results: dict[tuple[str, str], torch.Tensor] = torch.load(file, weights_only=True)
    return results


@both_paths
@pytest.mark.parametrize("name", list(BASES))
def test_a_fresh_process_goes_on_bit_for_bit(name: str, path: str, resumed: dict[Any, torch.Tensor]) -> None:
    """Three steps, torch.save, a new process, three steps: the weights of six steps in one go."""
    model = net()
    train(model, CautiousDecay(BASES[name](model.parameters()), path=path), range(6))

    assert torch.equal(values(model), resumed[name, path])


@both_paths
def test_a_plain_run_is_continued_cautiously(path: str) -> None:
    """A plain AdamW checkpoint goes on in the wrapper as if AdamW, with its state, had been wrapped on the spot."""
    model, twin = net(), net()
    base, plain = (BASES["AdamW"](m.parameters()) for m in (twin, model))
    train(twin, base, range(3))
    train(model, plain, range(3))
    opt = CautiousDecay(BASES["AdamW"](model.parameters()), path=path)
    opt.load_state_dict(plain.state_dict())
    train(model, opt, range(3, 6))
    train(twin, CautiousDecay(base, path=path), range(3, 6))

    assert torch.equal(values(twin), values(model))


@both_paths
def test_a_cautious_run_is_continued_plainly(path: str) -> None:
    """A checkpoint of the wrapper goes on in plain AdamW, with its own decay back on."""
    model, twin = net(), net()
    opt, other = (CautiousDecay(BASES["AdamW"](m.parameters()), path=path) for m in (model, twin))
    train(model, opt, range(3))
    train(twin, other, range(3))
    plain = BASES["AdamW"](model.parameters())
    plain.load_state_dict(opt.state_dict())
    train(model, plain, range(3, 6))
    train(twin, other.base_optimizer, range(3, 6))

    assert torch.equal(values(twin), values(model))
    assert 0.5 == plain.param_groups[0]["weight_decay"]


# ------------------------------------------------------------------------------------ distributed checkpoints

FLAT = [False, True]
flat_or_not = pytest.mark.parametrize("flat", FLAT, ids=["nested", "flat"])


@both_paths
@flat_or_not
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
def test_asking_a_fresh_optimizer_changes_no_weight(tensor_lr: bool, flat: bool, path: str) -> None:
    """DCP initialises a fresh optimizer's state by a step with zero gradients and lr 0: no weight moves or decays."""
    model = net()
    lr = torch.tensor(0.01) if tensor_lr else 0.01
    opt = CautiousDecay(AdamW(model.parameters(), lr=lr, weight_decay=0.5, foreach=False), path=path)
    before = values(model)
    get_optimizer_state_dict(model, opt, options=StateDictOptions(flatten_optimizer_state_dict=flat))

    assert torch.equal(before, values(model))
    assert {"exp_avg", "exp_avg_sq", "step"} == set(opt.state[model[0].weight])
    assert opt.param_groups[0]["lr"] is lr
    assert 0.5 == opt.param_groups[0]["weight_decay"]


@both_paths
@flat_or_not
def test_a_plain_checkpoint_loads_by_dcp(flat: bool, path: str) -> None:
    """A plain AdamW's distributed checkpoint loads into a fresh wrapper: its state is there, no weight has changed."""
    model, options = net(), StateDictOptions(flatten_optimizer_state_dict=flat)
    plain = BASES["AdamW"](model.parameters())
    train(model, plain, range(2))
    checkpoint = get_optimizer_state_dict(model, plain, options=options)
    model.zero_grad()
    opt, before = CautiousDecay(BASES["AdamW"](model.parameters()), path=path), values(model)
    set_optimizer_state_dict(model, opt, optim_state_dict=checkpoint, options=options)

    assert torch.equal(before, values(model))
    assert same(plain.state_dict()["state"], opt.state_dict()["state"])


@both_paths
@flat_or_not
def test_a_run_goes_on_from_dcp_bit_for_bit(flat: bool, path: str) -> None:
    """Two steps, a distributed checkpoint, a fresh net and wrapper, two steps: the weights of four steps in one go."""
    straight, model, again = net(), net(), net()
    opt, first = (CautiousDecay(BASES["AdamW"](m.parameters()), path=path) for m in (straight, model))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    train(straight, opt, range(4))
    train(model, first, range(2))
    again.load_state_dict(model.state_dict())
    second = CautiousDecay(BASES["AdamW"](again.parameters()), path=path)
    checkpoint = get_optimizer_state_dict(model, first, options=options)
    set_optimizer_state_dict(again, second, optim_state_dict=checkpoint, options=options)
    train(again, second, range(2, 4))

    assert torch.equal(values(straight), values(again))


@both_paths
def test_a_flat_checkpoint_has_the_plain_optimizers_keys(path: str) -> None:
    """The wrapper adds no key to a flat distributed checkpoint, where every key of the live groups is required."""
    options, keys = StateDictOptions(flatten_optimizer_state_dict=True), []
    for wrap in (lambda base: base, lambda base: CautiousDecay(base, path=path)):
        model = net()
        opt = wrap(BASES["AdamW"](model.parameters()))
        keys.append(set(get_optimizer_state_dict(model, opt, options=options)))

    assert keys[0] == keys[1]
    assert "param_groups.0.weight.weight_decay" in keys[1]


@both_paths
def test_asking_between_two_steps_changes_nothing(path: str) -> None:
    """A checkpoint in mid-training, with the gradients cleared, takes no hidden step: Adam's counter stays at 2."""
    model = net()
    opt = CautiousDecay(BASES["AdamW"](model.parameters()), path=path)
    train(model, opt, range(2))
    opt.zero_grad()
    before = values(model)
    get_optimizer_state_dict(model, opt)

    assert torch.equal(before, values(model))
    assert 2.0 == opt.state[model[0].weight]["step"].item()


@both_paths
def test_a_stateless_base_asked_between_two_steps_does_not_decay(path: str) -> None:
    """SGD has no state, so DCP takes its step with lr 0 at every checkpoint; no weight decays."""
    model = net()
    opt = CautiousDecay(SGD(model.parameters(), lr=0.1, weight_decay=0.5), path=path)
    train(model, opt, range(1))
    opt.state.clear()
    opt.zero_grad()
    before = values(model)
    get_optimizer_state_dict(model, opt)

    assert torch.equal(before, values(model))
