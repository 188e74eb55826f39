"""What torch.optim.Optimizer promises its users, kept by the wrapper: type, copies, state, hooks, groups."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from support import BASES, all_bases, both_paths, net, same, train, values, weight
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from cwd_wrap import CautiousDecay

STEP_HOOKS = ("register_step_pre_hook", "register_step_post_hook")
STATE_HOOKS = (
    "register_state_dict_pre_hook",
    "register_state_dict_post_hook",
    "register_load_state_dict_pre_hook",
    "register_load_state_dict_post_hook",
)


def wrapped(**options: Any) -> CautiousDecay:
    return CautiousDecay(SGD([weight(1.0, -1.0, grad=[1.0, 1.0])], lr=0.1, weight_decay=0.5), **options)


# ------------------------------------------------------------------------------------ type and signatures


def overridden(cls: type) -> list[str]:
    """The public methods of Optimizer that ``cls`` has its own version of."""
    ours = {name: getattr(cls, name) for name in dir(Optimizer) if not name.startswith("_")}
    return [name for name, ours_ in ours.items() if inspect.isfunction(ours_) and ours_ is not getattr(Optimizer, name)]


def parameters(cls: type, name: str) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(getattr(cls, name)).parameters.values()]


@pytest.mark.parametrize("name", overridden(CautiousDecay))
def test_signatures_equal_those_of_torch(name: str) -> None:
    """Every overridden method takes torch's parameters: same names, kinds and defaults."""
    assert parameters(Optimizer, name) == parameters(CautiousDecay, name)


def test_the_discovery_finds_the_overrides() -> None:
    """The signature test is not run over an empty list: the methods that hold the contract are on it."""
    expected = {"step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"}

    assert expected <= set(overridden(CautiousDecay))


def test_the_signature_check_can_fail() -> None:
    """A load_state_dict(sd), which torch calls by keyword, is told from torch's."""

    class Renamed(CautiousDecay):
        def load_state_dict(self, sd: dict[str, Any]) -> None: ...

    assert "load_state_dict" in overridden(Renamed)
    assert parameters(Optimizer, "load_state_dict") != parameters(Renamed, "load_state_dict")


def test_is_an_optimizer() -> None:
    """Schedulers, accelerate and Lightning ask for an Optimizer, and the wrapper is one."""
    assert isinstance(wrapped(), Optimizer)
    assert issubclass(CautiousDecay.over(SGD), Optimizer)


def test_objects_are_the_bases_own_and_fresh() -> None:
    """param_groups, state and defaults are the base's objects even after load_state_dict has replaced them."""
    opt = wrapped()
    opt.load_state_dict(opt.state_dict())

    assert opt.param_groups is opt.base_optimizer.param_groups
    assert opt.state is opt.base_optimizer.state
    assert opt.defaults is opt.base_optimizer.defaults


@pytest.mark.parametrize("name", ["param_groups", "state", "defaults"])
def test_objects_assigned_to_the_wrapper_reach_the_base(name: str) -> None:
    """DeepSpeed and Lightning assign these attributes; the base then works with what was assigned."""
    opt = wrapped()
    new = copy.copy(getattr(opt, name))
    setattr(opt, name, new)

    assert getattr(opt.base_optimizer, name) is new


@pytest.mark.parametrize("name", ["train", "eval", "is_second_order", "sync_lookahead", "_step_supports_amp_scaling"])
def test_has_no_attribute_that_the_base_lacks(name: str) -> None:
    """What only some optimizers have, the wrapper has only if the base has it; nothing is forwarded unnamed."""
    assert not hasattr(wrapped(), name)


@pytest.mark.parametrize("name", ["train", "eval", "sync_lookahead"])
def test_forwards_the_modes_of_the_base(name: str) -> None:
    """Where the base can train() and eval(), so can the wrapper."""
    called: list[str] = []
    base = SGD([weight(1.0)], lr=0.1, weight_decay=0.5)
    setattr(base, name, lambda: called.append(name))
    getattr(CautiousDecay(base), name)()

    assert [name] == called


# ------------------------------------------------------------------------------------ copies


@all_bases
@both_paths
def test_a_deepcopy_trains_on_like_the_original(build: Any, snapshot: bool) -> None:
    """copy.deepcopy of a net with its optimizer gives a pair that goes on bit for bit as the original does."""
    model = net()
    opt = CautiousDecay(build(model.parameters()), snapshot=snapshot)
    train(model, opt, range(2))
    twin, twin_opt = copy.deepcopy((model, opt))
    train(model, opt, range(2, 4))
    train(twin, twin_opt, range(2, 4))

    assert torch.equal(values(model), values(twin))


@all_bases
@both_paths
def test_a_pickled_optimizer_trains_on_like_the_original(build: Any, snapshot: bool) -> None:
    """What comes back from pickle goes on bit for bit as the original does."""
    model = net()
    opt = CautiousDecay(build(model.parameters()), snapshot=snapshot)
    train(model, opt, range(2))
    twin, twin_opt = pickle.loads(pickle.dumps((model, opt)))
    train(model, opt, range(2, 4))
    train(twin, twin_opt, range(2, 4))

    assert torch.equal(values(model), values(twin))


def test_copies_keep_the_settings() -> None:
    """lam, mask, strict, snapshot and backend survive pickling."""
    opt = pickle.loads(pickle.dumps(wrapped(lam=0.25, strict=True, snapshot=True, backend="eager")))

    assert (0.25, "update", True, True, "eager") == (opt.lam, opt.mask, opt.strict, opt.snapshot, opt.backend)


def test_a_copy_takes_hooks() -> None:
    """Hooks can be registered on a copy, and fire."""
    opt, calls = copy.deepcopy(wrapped()), []
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    opt.step()

    assert ["post"] == calls


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_classes_from_over_are_copied_as_themselves(duplicate: Any) -> None:
    """An instance of over(AdamW) comes back from a copy with its own class, which bears both names."""
    cls = CautiousDecay.over(AdamW)

    assert cls is duplicate(cls)
    assert cls is type(duplicate(cls([weight(1.0)], weight_decay=0.5)))
    assert "CautiousDecayAdamW" == cls.__name__


# ------------------------------------------------------------------------------------ state dicts


@all_bases
@both_paths
def test_state_dict_is_that_of_the_plain_optimizer(build: Any, snapshot: bool) -> None:
    """After equal gradients, the wrapper's state dict has the plain optimizer's keys, types and values."""
    ours, theirs = net(), net()
    opt, plain = CautiousDecay(build(ours.parameters()), snapshot=snapshot), build(theirs.parameters())
    for group in plain.param_groups:
        group["weight_decay"] = 0.0  # a coupled decay would enter the state
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        p.grad = q.grad = torch.randn_like(p)
    opt.step()
    plain.step()
    for group in plain.param_groups:
        group["weight_decay"] = 0.5

    assert same(plain.state_dict(), opt.state_dict())


@all_bases
def test_checkpoints_load_both_ways(build: Any) -> None:
    """A plain optimizer's checkpoint loads in the wrapper and the wrapper's in the plain one: nothing changes."""
    model = net()
    plain = build(model.parameters())
    train(model, plain, range(2))
    opt = CautiousDecay(build(model.parameters()))
    opt.load_state_dict(plain.state_dict())
    again = build(model.parameters())
    again.load_state_dict(opt.state_dict())

    assert same(plain.state_dict(), opt.state_dict())
    assert same(plain.state_dict(), again.state_dict())


def test_checkpoint_is_read_with_weights_only() -> None:
    """torch.save writes a state dict that torch.load takes with weights_only=True."""
    opt, file = wrapped(), io.BytesIO()
    opt.step()
    torch.save(opt.state_dict(), file)
    file.seek(0)

    assert same(opt.state_dict(), torch.load(file, weights_only=True))


def test_load_state_dict_takes_its_argument_by_keyword() -> None:
    """DCP calls load_state_dict(state_dict=...), and the groups' new values count."""
    opt, other = wrapped(), wrapped(lam=0.25)
    opt.load_state_dict(state_dict=other.state_dict())

    assert 0.25 == opt.param_groups[0]["weight_decay"]


def test_the_loaded_strength_is_used() -> None:
    """After loading, a step decays by the checkpoint's weight_decay: 1 - 0.1*0.25*1 - 0.1*1."""
    opt = wrapped()
    opt.load_state_dict(wrapped(lam=0.25).state_dict())
    opt.step()

    assert pytest.approx(0.875) == opt.param_groups[0]["params"][0][0].item()


def test_state_dict_does_not_hold_the_snapshot() -> None:
    """The snapshot path keeps its copies out of state, so a checkpoint is as large as the plain one."""
    opt = wrapped(snapshot=True)
    opt.step()

    kept = {key for state in opt.state_dict()["state"].values() for key in state}

    assert kept <= {"momentum_buffer"}  # SGD's own, None without momentum


# ------------------------------------------------------------------------------------ hooks


@both_paths
@pytest.mark.parametrize("register", STEP_HOOKS)
def test_a_step_hook_fires_once_with_the_wrapper(register: str, snapshot: bool) -> None:
    """A step hook on the wrapper fires once a step, and its first argument is the wrapper."""
    opt, seen = wrapped(snapshot=snapshot), []
    getattr(opt, register)(lambda optimizer, *_: seen.append(optimizer))
    opt.step()

    assert [opt] == seen


@pytest.mark.parametrize("register", STATE_HOOKS)
def test_a_state_hook_fires_once_with_the_wrapper(register: str) -> None:
    """A state-dict hook on the wrapper fires once for a save and a load, and its first argument is the wrapper."""
    opt, seen = wrapped(), []
    getattr(opt, register)(lambda optimizer, *_: seen.append(optimizer))
    opt.load_state_dict(opt.state_dict())

    assert [opt] == seen


def test_a_pre_hook_sees_what_torch_shows_it() -> None:
    """The hook's args are (optimizer,) and its kwargs those of the call, as for any torch optimizer."""
    seen: list[Any] = []
    for opt in (SGD([weight(1.0)], lr=0.1), wrapped()):
        opt.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append((args == (optimizer,), kwargs)))
        opt.step(closure=None)

    assert seen[0] == seen[1] == (True, {"closure": None})


def test_a_pre_hook_may_change_the_arguments() -> None:
    """What a pre hook returns is what the step is called with: here, a closure."""
    opt = wrapped()
    opt.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, lambda: 7.0), kwargs))

    assert 7.0 == opt.step()


def test_a_pre_hook_that_returns_anything_else_is_refused_as_by_torch() -> None:
    """torch raises RuntimeError for a pre hook's result that is no pair of arguments; so does the wrapper."""
    for opt in (SGD([weight(1.0)], lr=0.1), wrapped()):
        opt.register_step_pre_hook(lambda *_: 3)
        with pytest.raises(RuntimeError, match="must return None or a tuple of"):
            opt.step()


def test_state_dict_hooks_may_replace_the_dict() -> None:
    """What a state-dict post hook, or a load pre hook, returns takes the place of the state dict."""
    opt = wrapped()
    opt.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "note": 1})
    opt.register_load_state_dict_pre_hook(lambda _, state_dict: wrapped(lam=0.25).state_dict())
    opt.load_state_dict({})

    assert 1 == opt.state_dict()["note"]
    assert 0.25 == opt.param_groups[0]["weight_decay"]


def test_loading_leaves_the_callers_dict_alone() -> None:
    """A load pre hook that edits the dict it is given does not edit the caller's."""
    opt = wrapped()
    opt.register_load_state_dict_pre_hook(lambda _, state_dict: state_dict.update(note=1))
    checkpoint = opt.state_dict()
    opt.load_state_dict(checkpoint)

    assert {"state", "param_groups"} == set(checkpoint)


@both_paths
def test_hooks_of_the_base_fire_too(snapshot: bool) -> None:
    """A hook that was on the base before it was wrapped still fires, with the base, once a step."""
    opt, seen = wrapped(snapshot=snapshot), []
    for register in STEP_HOOKS:
        getattr(opt.base_optimizer, register)(lambda optimizer, *_: seen.append(optimizer))
    opt.step()

    assert [opt.base_optimizer] * 2 == seen


@both_paths
@pytest.mark.parametrize("register", [register_optimizer_step_pre_hook, register_optimizer_step_post_hook])
def test_global_hooks_fire_once_a_step(register: Any, snapshot: bool) -> None:
    """torch's profiler counts steps by a global hook: it counts one for a wrapped step."""
    opt, seen = wrapped(snapshot=snapshot), []
    handle = register(lambda *_: seen.append(1))
    try:
        opt.step()
        opt.step()
    finally:
        handle.remove()

    assert [1, 1] == seen


def test_torch_does_not_patch_the_step_again() -> None:
    """torch patches the step of a class that is not marked as hooked; the wrapper's is, so hooks still fire once."""
    opt, seen = wrapped(), []
    opt._patch_step_function()
    opt.register_step_pre_hook(lambda *_: seen.append(1))
    opt.step()

    assert [1] == seen


@both_paths
def test_a_step_leaves_no_hook_behind(snapshot: bool) -> None:
    """After a step, the base has the hooks that it had before it."""
    opt = wrapped(snapshot=snapshot)
    opt.step()

    assert 0 == len(opt.base_optimizer._optimizer_step_pre_hooks)
    assert 0 == len(opt.base_optimizer._optimizer_step_post_hooks)


@both_paths
def test_a_base_hook_that_changes_the_gradient_changes_the_mask(snapshot: bool) -> None:
    """Both paths see the gradient that the step sees: a base hook flips it, and the other weight decays."""
    opt = wrapped(snapshot=snapshot)
    p = opt.param_groups[0]["params"][0]
    opt.base_optimizer.register_step_pre_hook(lambda *_: setattr(p, "grad", -p.grad))
    opt.step()

    torch.testing.assert_close(torch.tensor([1.1, -0.85]), p.detach())


# ------------------------------------------------------------------------------------ groups and gradients


@both_paths
def test_an_added_group_is_trained_and_decayed(snapshot: bool) -> None:
    """A group added to the wrapper is the base's, steps and decays: 1 - 0.1*1 - 0.1*0.5*1."""
    opt, p = wrapped(snapshot=snapshot), weight(1.0, grad=[1.0])
    opt.add_param_group({"params": [p]})
    opt.step()

    assert 2 == len(opt.base_optimizer.param_groups)
    assert pytest.approx(0.85) == p.item()


def test_add_param_group_takes_its_argument_by_keyword() -> None:
    """add_param_group(param_group=...) works, and the group's own values stay."""
    opt = wrapped(lam=0.25)
    opt.add_param_group(param_group={"params": [weight(1.0)], "weight_decay": 0.0, "lr": 0.5})

    assert (0.0, 0.5) == (opt.param_groups[1]["weight_decay"], opt.param_groups[1]["lr"])


def test_a_parameter_cannot_be_added_twice() -> None:
    """A parameter that is in a group already is refused with torch's error, and no group is added."""
    opt = wrapped()
    with pytest.raises(ValueError, match="more than one parameter group"):
        opt.add_param_group({"params": opt.param_groups[0]["params"]})

    assert 1 == len(opt.param_groups)


@pytest.mark.skipif(
    "param_names"
    not in SGD([("w", weight(1.0))] if torch.__version__ >= "2.6" else [weight(1.0)], lr=0.1).param_groups[0],
    reason="this torch has no param_names (they came with 2.6)",
)
def test_param_names_are_kept() -> None:
    """Names given with the parameters are in the groups, in the state dict, and in groups added later."""
    opt = CautiousDecay(SGD([("w", weight(1.0))], lr=0.1, weight_decay=0.5))
    opt.add_param_group({"params": [("v", weight(1.0))]})

    assert [["w"], ["v"]] == [group["param_names"] for group in opt.param_groups]
    assert [["w"], ["v"]] == [group["param_names"] for group in opt.state_dict()["param_groups"]]


class ApexLike(SGD):
    """Like apex's: whether to None is an option of the constructor."""

    def zero_grad(self) -> None:
        super().zero_grad(set_to_none=True)


def test_zero_grad_of_a_base_that_takes_no_option() -> None:
    """It is called without set_to_none. set_to_none=False, which it cannot do, raises the base's TypeError."""
    p = weight(1.0, grad=[1.0])
    opt = CautiousDecay(ApexLike([p], weight_decay=0.5))
    with pytest.raises(TypeError, match="set_to_none"):
        opt.zero_grad(set_to_none=False)
    opt.zero_grad()

    assert p.grad is None


@pytest.mark.parametrize("set_to_none", [True, False])
def test_zero_grad(set_to_none: bool) -> None:
    """zero_grad clears the gradients of the base, to None or to 0."""
    opt = wrapped()
    opt.zero_grad(set_to_none=set_to_none)
    grad = opt.param_groups[0]["params"][0].grad

    assert grad is None if set_to_none else torch.equal(torch.zeros(2), grad)


def test_replaced_parameters_are_stepped_and_decayed() -> None:
    """accelerate and FSDP2 put other tensors into a group; the next step works on those."""
    opt, p = wrapped(snapshot=True), weight(1.0, grad=[1.0])
    opt.step()
    opt.param_groups[0]["params"] = [p]
    opt.step()

    assert pytest.approx(0.85) == p.item()


@both_paths
def test_groups_stepped_one_at_a_time_are_stepped_once(snapshot: bool) -> None:
    """DeepSpeed assigns one group, steps, and goes on: every group takes one step in all."""
    p, q = weight(1.0, grad=[1.0]), weight(1.0, grad=[1.0])
    opt = CautiousDecay(SGD([{"params": [p]}, {"params": [q]}], lr=0.1, weight_decay=0.5), snapshot=snapshot)
    groups = opt.param_groups
    for group in groups:
        opt.param_groups = [group]
        opt.step()
    opt.param_groups = groups

    assert [pytest.approx(0.85)] * 2 == [p.item(), q.item()]


# ------------------------------------------------------------------------------------ profiler, printing


@both_paths
def test_profiler_ranges(snapshot: bool) -> None:
    """A profile shows one range for the wrapper's step, with the base's inside it, and one for zero_grad."""
    opt = wrapped(snapshot=snapshot)
    with torch.autograd.profiler.profile() as profile:
        opt.step()
        opt.zero_grad()
    names = [event.name for event in profile.function_events if event.name.startswith("Optimizer.")]

    assert ["Optimizer.step#CautiousDecay.step", "Optimizer.step#SGD.step"] == names[:2]
    assert ["Optimizer.zero_grad#SGD.zero_grad"] == names[2:]


def test_repr_tells_the_path_and_its_cost() -> None:
    """repr names the base, the strength, the path and the bytes of the snapshot: two float32 weights take 8."""
    assert "CautiousDecay(SGD, lam=0.5, path='snapshot', backend='eager', snapshot_bytes=8)" == repr(
        wrapped(snapshot=True, backend="eager")
    )


def test_the_snapshot_costs_nothing_on_the_direction_path() -> None:
    """snapshot_bytes is 0 without a snapshot, and the decaying weights' size with one."""
    assert (0, 8) == (wrapped().snapshot_bytes, wrapped(snapshot=True).snapshot_bytes)


def test_the_table_of_bases_is_not_empty() -> None:
    """The tests above run over several bases, a fused one among them."""
    assert {"SGD", "AdamW", "AdamW-fused"} <= set(BASES)
