"""A resumed run gives the same weights: in a new process, in another format, or with another optimizer."""

import copy
import os
import pickle
import re
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import call
from support import (
    ALL_PATHS,
    BASES,
    BASES_ON_PATHS,
    Base,
    PathOptions,
    can_run,
    net,
    same,
    stopped_in_a_step,
    train,
    values,
    weight,
)  # fmt: skip
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, AdamW, Rprop

from cwd_wrap import CautiousDecay
from cwd_wrap.methods import wrapper

HERE = Path(__file__).parent


def go_on(file: Path) -> None:
    """Take three more steps from the checkpoints of a file, and write the weights there."""
    torch.set_num_threads(1)
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


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], torch.Tensor]:
    """The weights of every base and path after three steps here and three in a fresh process."""
    file = tmp_path_factory.mktemp("resumed") / "checkpoint.pt"
    checkpoints = {}
    for build, path in (case.values for case in BASES_ON_PATHS if not case.marks):
        model = net()
        opt = CautiousDecay(build(model.parameters()), **path)
        train(model, opt, range(3))
        checkpoints[str(build), str(path)] = (model.state_dict(), opt.state_dict())
    torch.save(checkpoints, file)
    call(go_on, file)
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


# ------------------------------------------------------------------------------------ which lam is in force


def two_groups(**options: Any) -> AdamW:
    """AdamW over two groups, of which the second does not decay. A gradient of 0 leaves the decay alone."""
    p, q = weight(1.0, grad=[0.0]), weight(1.0, grad=[0.0])
    return AdamW([{"params": [p]}, {"params": [q], "weight_decay": 0.0}], **{"lr": 0.5, "weight_decay": 0.1, **options})


def after_a_step(opt: CautiousDecay) -> list[float]:
    opt.step()
    return [round(p.item(), 6) for group in opt.param_groups for p in group["params"]]


def replaced(lam: float, by: str) -> Any:
    text = (
        f"load_state_dict replaced lam={lam:g} by weight_decay {by} of the checkpoint: to go on with yours, set "
        f"opt.lam = {lam:g} after loading"
    )
    return pytest.warns(UserWarning, match=f"^CautiousDecay.{re.escape(text)}$")


def test_the_checkpoints_decay_wins_with_a_warning() -> None:
    """A checkpoint with 0.1 in a wrapper with lam=0.4: a warning has both numbers, and 0.1 decays: 1 - 0.5*0.1."""
    opt = CautiousDecay(two_groups(), lam=0.4)
    with replaced(0.4, "0.1") as caught:
        opt.load_state_dict(two_groups().state_dict())

    assert 1 == len(caught)
    assert __file__ == caught[0].filename
    assert 0.1 == opt.lam
    assert [0.95, 1.0] == after_a_step(opt)


def test_a_lam_that_is_set_after_loading_wins() -> None:
    """opt.lam = 0.4 after the load decays by 0.4, in the group that decayed: 1 - 0.5*0.4."""
    opt = CautiousDecay(two_groups(), lam=0.4)
    with replaced(0.4, "0.1"):
        opt.load_state_dict(two_groups().state_dict())
    opt.lam = 0.4

    assert 0.4 == opt.lam
    assert [0.8, 1.0] == after_a_step(opt)


def test_the_same_lam_is_loaded_without_a_warning() -> None:
    """A wrapper's own checkpoint with the same lam, and a wrapper without lam=, load without a warning."""
    opt = CautiousDecay(two_groups(), lam=0.4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        CautiousDecay(two_groups(), lam=0.4).load_state_dict(opt.state_dict())
        plain = CautiousDecay(two_groups())
        plain.load_state_dict(opt.state_dict())

    assert 0.4 == plain.lam


@pytest.mark.parametrize(
    ("lam", "saved", "shown", "in_force"), [(0, [0.1, 0.0], "0.1", 0.1), (0.4, [0.0, 0.0], "0", 0)]
)
def test_a_lam_of_0_is_a_lam(lam: float, saved: list[float], shown: str, in_force: float) -> None:
    """lam=0 replaced by 0.1, and 0.4 by 0, warn as well, and no second warning follows."""
    opt, checkpoint = CautiousDecay(two_groups(), lam=lam), two_groups()
    for group, value in zip(checkpoint.param_groups, saved, strict=True):
        group["weight_decay"] = value
    with replaced(lam, shown) as caught:
        opt.load_state_dict(checkpoint.state_dict())

    assert 1 == len(caught)
    assert in_force == opt.lam


def test_a_checkpoint_with_several_decays() -> None:
    """If the groups of a checkpoint differ, the warning has the range, and opt.lam is None."""
    opt, checkpoint = (
        CautiousDecay(SGD([{"params": [weight(1.0)]} for _ in range(3)], lr=1.0), lam=0.4) for _ in range(2)
    )
    for group, value in zip(checkpoint.param_groups, (0.1, 0.4, 0.2), strict=True):
        group["weight_decay"] = value
    with replaced(0.4, "0.1 to 0.4"):
        opt.load_state_dict(checkpoint.state_dict())

    assert opt.lam is None


def test_lam_tells_what_is_in_force_however_it_came() -> None:
    """A schedule, a value written by hand, new groups and a state dict loaded by the base itself show in opt.lam."""
    base = two_groups()
    opt = CautiousDecay(base)
    assert 0.1 == opt.lam
    base.param_groups[0]["weight_decay"] = 0.3
    assert 0.3 == opt.lam
    opt.lam = 0.4
    base.load_state_dict(two_groups().state_dict())
    assert 0.1 == opt.lam == copy.deepcopy(opt).lam == pickle.loads(pickle.dumps(opt)).lam
    base.param_groups[1]["weight_decay"] = 0.2
    assert opt.lam is None
    opt.lam = None  # leaves each group its own
    assert [0.1, 0.2] == [group["weight_decay"] for group in base.param_groups]
    base.param_groups = [{**group, "weight_decay": 0.0} for group in base.param_groups]
    assert 0 == opt.lam


def test_lam_inside_a_step(every_path: PathOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a step, while the base's decay is off, opt.lam is that of between steps."""
    opt, seen = stepped_adamw(every_path), []
    in_the_middle(monkeypatch, lambda: seen.append(opt.lam))
    opt.step()

    assert [0.1] == seen


def test_a_group_added_after_loading_gets_the_loaded_lam() -> None:
    """A group that is added after the load decays as the others do, as in the run that made the checkpoint."""
    opt = CautiousDecay(two_groups(), lam=0.4)
    with replaced(0.4, "0.1"):
        opt.load_state_dict(two_groups().state_dict())
    opt.add_param_group({"params": [weight(1.0)]})

    assert [0.1, 0.0, 0.1] == [group["weight_decay"] for group in opt.param_groups]


def test_a_group_with_a_decay_of_its_own_is_no_other_lam() -> None:
    """A group that was added with its own decay was never lam's: loading it again gives no warning."""
    opt = CautiousDecay(two_groups(), lam=0.4)
    opt.add_param_group({"params": [weight(1.0)], "weight_decay": 0.2})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.load_state_dict(opt.state_dict())

    assert [0.4, 0.0, 0.2] == [group["weight_decay"] for group in opt.param_groups]


def test_a_base_without_weight_decay_keeps_its_lam() -> None:
    """Rprop's checkpoint has no decay, so the wrapper's lam stays in force."""
    opt = CautiousDecay(Rprop([weight(1.0)]), lam=0.4)
    opt.load_state_dict(Rprop([weight(1.0)]).state_dict())

    assert 0.4 == opt.lam


def test_dcp_warns_of_a_replaced_lam(tmp_path: Path) -> None:
    """torch's distributed checkpoints load the decay, too, and the warning comes."""
    model = net()
    checkpoint = get_optimizer_state_dict(model, AdamW(model.parameters(), weight_decay=0.1))
    opt = CautiousDecay(AdamW(model.parameters()), lam=0.4)
    with replaced(0.4, "0.1"):
        set_optimizer_state_dict(model, opt, optim_state_dict=checkpoint)

    assert 0.1 == opt.lam


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


def test_what_a_wrapper_says_of_itself_in_a_signal_handler(
    every_path: PathOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """repr, paths and snapshot_bytes in the middle of a step are those from between steps."""
    opt = stepped_adamw(every_path)
    said = []
    in_the_middle(monkeypatch, lambda: said.append((repr(opt), opt.paths(), opt.snapshot_bytes)))
    between = repr(opt), opt.paths(), opt.snapshot_bytes
    opt.step()

    assert [between] == said
    assert "lam=[0.1, 0.0]" in between[0]


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


def test_a_repr_from_another_thread_does_not_wait_for_the_step(
    every_path: PathOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the middle of another thread's step it says that much, at once; after the step it is the whole text again."""
    opt = stepped_adamw(every_path)
    between, said = repr(opt), []

    def ask() -> None:
        thread = threading.Thread(target=lambda: said.append(repr(opt)))
        thread.start()
        thread.join()

    in_the_middle(monkeypatch, ask)
    opt.step()

    assert ["CautiousDecay(AdamW, in a step of another thread)"] == said
    assert between == repr(opt)


def in_children_of_a_step() -> list[tuple[str, bool, bool]]:
    """For each path, in a child that is forked while a thread steps: is the state dict right; and in the parent."""
    torch.set_num_threads(1)
    wrapper._PATIENCE = 3.0
    return [(str(path), *in_a_child_of_a_step(path)) for path in ALL_PATHS if can_run(path)]


def in_a_child_of_a_step(path: PathOptions) -> tuple[bool, bool]:
    opt, other = stepped_adamw(path), stepped_adamw(path)
    between = opt.state_dict()["param_groups"]
    with stopped_in_a_step(opt.step):
        child = os.fork()
        if child == 0:
            right = opt.state_dict()["param_groups"] == between and opt.lam == 0.1
            other.step()
            os._exit(not right)
        _, status = os.waitpid(child, 0)
    return status == 0, opt.state_dict()["param_groups"] == between


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_a_child_that_is_forked_while_another_thread_steps() -> None:
    """In the child, where that thread is gone, a state dict is made at once, and it is that of between steps."""
    expected = [(str(path), True, True) for path in ALL_PATHS if can_run(path)]

    assert expected == call(in_children_of_a_step)
