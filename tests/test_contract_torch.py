"""The wrapper keeps what torch.optim.Optimizer promises: type, copies, state, hooks, groups."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
from support import BASES, Method, Pair, all_bases, net, same, train, values, weight
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


def sgd(**options: Any) -> SGD:
    return SGD([weight(1.0, -1.0, grad=[1.0, 1.0])], lr=0.1, weight_decay=0.5, **options)


def wrapped(**options: Any) -> CautiousDecay:
    return CautiousDecay(sgd(fused=options.get("path") == "one_pass"), **options)


def pickled(x: Any) -> Any:
    return pickle.loads(pickle.dumps(x))


# ------------------------------------------------------------------------------------ type and signatures


def overridden(cls: type) -> list[str]:
    """The public methods of Optimizer that ``cls`` overrides."""
    ours = {name: getattr(cls, name) for name in dir(Optimizer) if not name.startswith("_")}
    return [name for name, ours_ in ours.items() if inspect.isfunction(ours_) and ours_ is not getattr(Optimizer, name)]


def parameters(cls: type, name: str) -> list[tuple[str, Any, Any]]:
    return [(p.name, p.kind, p.default) for p in inspect.signature(getattr(cls, name)).parameters.values()]


@pytest.mark.parametrize("name", overridden(CautiousDecay))
def test_signatures_equal_those_of_torch(name: str) -> None:
    """Every overridden method has torch's parameters: the same names, kinds and defaults."""
    assert parameters(Optimizer, name) == parameters(CautiousDecay, name)


def test_the_discovery_finds_the_overrides() -> None:
    """The signature test covers the methods of the contract, so its list is not empty."""
    expected = {"step", "zero_grad", "state_dict", "load_state_dict", "add_param_group"}

    assert expected <= set(overridden(CautiousDecay))


def test_the_signature_check_can_fail() -> None:
    """The check finds a load_state_dict(sd), in which the parameter has another name than in torch."""

    class Renamed(CautiousDecay):
        def load_state_dict(self, sd: dict[str, Any]) -> None: ...

    assert "load_state_dict" in overridden(Renamed)
    assert parameters(Optimizer, "load_state_dict") != parameters(Renamed, "load_state_dict")


def test_is_an_optimizer() -> None:
    """Schedulers, accelerate and Lightning require an Optimizer, and the wrapper is one."""
    assert isinstance(wrapped(), Optimizer)
    assert issubclass(CautiousDecay.over(SGD), Optimizer)


def test_groups_state_and_defaults_are_the_bases_own() -> None:
    """param_groups, state and defaults are the base's objects even after load_state_dict has replaced them."""
    opt = wrapped()
    opt.load_state_dict(opt.state_dict())

    assert opt.param_groups is opt.base_optimizer.param_groups
    assert opt.state is opt.base_optimizer.state
    assert opt.defaults is opt.base_optimizer.defaults


@pytest.mark.parametrize("name", ["param_groups", "state", "defaults"])
def test_objects_assigned_to_the_wrapper_reach_the_base(name: str) -> None:
    """DeepSpeed and Lightning assign these attributes; the base then uses the assigned objects."""
    opt = wrapped()
    new = copy.copy(getattr(opt, name))
    setattr(opt, name, new)

    assert getattr(opt.base_optimizer, name) is new


@pytest.mark.parametrize("name", ["train", "eval", "is_second_order", "sync_lookahead", "_step_supports_amp_scaling"])
def test_has_no_attribute_that_the_base_lacks(name: str) -> None:
    """The wrapper has an optional attribute only if the base has it, and forwards no other attribute."""
    assert not hasattr(wrapped(), name)


@pytest.mark.parametrize("name", ["train", "eval", "sync_lookahead"])
def test_forwards_the_modes_of_the_base(name: str) -> None:
    """If the base has train(), eval() or sync_lookahead(), the wrapper has it too and calls it."""
    called: list[str] = []
    base = SGD([weight(1.0)], lr=0.1, weight_decay=0.5)
    setattr(base, name, lambda: called.append(name))
    getattr(CautiousDecay(base), name)()

    assert [name] == called


# ------------------------------------------------------------------------------------ copies


def copy_trains_alike(model: torch.nn.Module, opt: Optimizer, duplicate: Any) -> bool:
    """Do a net with its optimizer and a copy of both train to the same bits?"""
    train(model, opt, range(2))
    twins = (model, opt), duplicate((model, opt))
    for twin, twin_opt in twins:
        torch.manual_seed(1)
        train(twin, twin_opt, range(2, 4))
    (_, one), (_, other) = twins
    return type(one) is type(other) and torch.equal(*(values(twin) for twin, _ in twins))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, pickled])
def test_a_copy_trains_on_like_the_original(every_pair: Pair, duplicate: Any) -> None:
    """A deep copy or pickle of a net with its optimizer trains on like the original: class and arguments are copied."""
    model = net()

    assert copy_trains_alike(model, every_pair(model.parameters()), duplicate)


def test_a_class_from_over_trains_like_the_wrapper(every_method: Method) -> None:
    """A class from over() trains like the method around the same base, and can be copied and pickled."""
    model, other = net(), net()
    opt = every_method.wrap(AdamW(model.parameters(), lr=0.01, weight_decay=0.5, **every_method.base))
    cls = every_method.over(AdamW)
    built = cls(other.parameters(), lr=0.01, weight_decay=0.5, **every_method.base)
    for one, optimizer in ((model, opt), (other, built)):
        torch.manual_seed(1)
        train(one, optimizer, range(2))

    assert torch.equal(values(model), values(other))
    for duplicate in (copy.deepcopy, pickled):
        assert copy_trains_alike(other, built, duplicate)
        assert cls is duplicate(cls)


def test_copies_keep_the_settings() -> None:
    """lam, mask, strict, path and backend survive pickling."""
    opt = pickle.loads(pickle.dumps(wrapped(lam=0.25, strict=True, path="snapshot", backend="eager")))

    assert (0.25, "update", True, "snapshot", "eager") == (opt.lam, opt.mask, opt.strict, opt.path, opt.backend)


def test_a_copy_takes_hooks() -> None:
    """Hooks can be registered on a copy, and fire."""
    opt, calls = copy.deepcopy(wrapped()), []
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    opt.step()

    assert ["post"] == calls


def test_classes_from_over_have_both_names() -> None:
    """The name of the class that over(AdamW) returns joins those of the wrapper and the base."""
    assert "CautiousDecayAdamW" == CautiousDecay.over(AdamW).__name__


# ------------------------------------------------------------------------------------ state dicts


def has_the_plain_state(opt: Optimizer, ours: torch.nn.Module, base: Any, roundings: float) -> bool:
    """After two steps with equal gradients, is the state dict that of ``base``?"""
    theirs = net()
    plain = base(theirs.parameters(), weight_decay=0.0)  # a coupled decay would enter the state
    for step in range(2):
        for model, optimizer in ((ours, opt), (theirs, plain)):
            generator = torch.Generator().manual_seed(step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
    plain.param_groups[0]["weight_decay"] = 0.5
    return same(plain.state_dict(), opt.state_dict(), roundings)


def test_state_dict_is_that_of_the_plain_optimizer(every_pair: Pair) -> None:
    """The state dict has the plain optimizer's keys, types, values and counters; one pass may round differently."""
    model = net()
    roundings = 1e-6 if every_pair.method.path["path"] == "one_pass" else 0

    assert has_the_plain_state(every_pair(model.parameters()), model, every_pair.base, roundings)


@all_bases
def test_checkpoints_load_both_ways(build: Any) -> None:
    """A plain optimizer's checkpoint loads in the wrapper, and the wrapper's in the plain one, without a change."""
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
    """torch.load with weights_only=True reads the state dict that torch.save wrote."""
    opt, file = wrapped(), io.BytesIO()
    opt.step()
    torch.save(opt.state_dict(), file)
    file.seek(0)

    assert same(opt.state_dict(), torch.load(file, weights_only=True))


def test_load_state_dict_takes_its_argument_by_keyword() -> None:
    """load_state_dict(state_dict=...), as DCP calls it, loads the groups' values."""
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
    opt = wrapped(path="snapshot")
    opt.step()

    kept = {key for state in opt.state_dict()["state"].values() for key in state}

    assert kept <= {"momentum_buffer"}  # SGD's own, None without momentum


# ------------------------------------------------------------------------------------ hooks


def test_step_hooks_fire_once_with_the_wrapper(every_method: Method) -> None:
    """A step hook on the wrapper, before or after, fires once a step, and its first argument is the wrapper."""
    opt, seen = every_method.wrap(sgd(**every_method.base)), []
    for register in STEP_HOOKS:
        getattr(opt, register)(lambda optimizer, *_, register=register: seen.append((register, optimizer)))
    opt.step()

    assert [(register, opt) for register in STEP_HOOKS] == seen


@pytest.mark.parametrize("register", STATE_HOOKS)
def test_a_state_hook_fires_once_with_the_wrapper(register: str) -> None:
    """A state-dict hook on the wrapper fires once for a save and a load, and its first argument is the wrapper."""
    opt, seen = wrapped(), []
    getattr(opt, register)(lambda optimizer, *_: seen.append(optimizer))
    opt.load_state_dict(opt.state_dict())

    assert [opt] == seen


def test_a_pre_hook_gets_the_arguments_that_torch_passes() -> None:
    """A hook's args are (optimizer,) and its kwargs those of the call, as for any torch optimizer."""
    seen: list[Any] = []
    for opt in (SGD([weight(1.0)], lr=0.1), wrapped()):
        opt.register_step_pre_hook(lambda optimizer, args, kwargs: seen.append((args == (optimizer,), kwargs)))
        opt.step(closure=None)

    assert seen[0] == seen[1] == (True, {"closure": None})


def test_a_pre_hook_may_change_the_arguments() -> None:
    """The step is called with the arguments that a pre hook returns: here, a closure."""
    opt = wrapped()
    opt.register_step_pre_hook(lambda optimizer, args, kwargs: ((optimizer, lambda: 7.0), kwargs))

    assert 7.0 == opt.step()


def test_a_pre_hook_that_returns_anything_else_is_refused_as_by_torch() -> None:
    """A pre hook that returns anything but a pair of arguments raises RuntimeError, as in torch."""
    for opt in (SGD([weight(1.0)], lr=0.1), wrapped()):
        opt.register_step_pre_hook(lambda *_: 3)
        with pytest.raises(RuntimeError, match="must return None or a tuple of"):
            opt.step()


def test_state_dict_hooks_may_replace_the_dict() -> None:
    """The return value of a state-dict post hook, or of a load pre hook, replaces the state dict."""
    opt = wrapped()
    opt.register_state_dict_post_hook(lambda _, state_dict: {**state_dict, "note": 1})
    opt.register_load_state_dict_pre_hook(lambda _, state_dict: wrapped(lam=0.25).state_dict())
    opt.load_state_dict({})

    assert 1 == opt.state_dict()["note"]
    assert 0.25 == opt.param_groups[0]["weight_decay"]


def test_loading_does_not_change_the_callers_dict() -> None:
    """A load pre hook that edits its dict does not change the caller's dict."""
    opt = wrapped()
    opt.register_load_state_dict_pre_hook(lambda _, state_dict: state_dict.update(note=1))
    checkpoint = opt.state_dict()
    opt.load_state_dict(checkpoint)

    assert {"state", "param_groups"} == set(checkpoint)


def test_hooks_of_the_base_fire_too(every_method: Method) -> None:
    """A hook registered on the base before wrapping still fires once a step, with the base as argument."""
    opt, seen = every_method.wrap(sgd(**every_method.base)), []
    for register in STEP_HOOKS:
        getattr(opt.base_optimizer, register)(lambda optimizer, *_: seen.append(optimizer))
    opt.step()

    assert [opt.base_optimizer] * 2 == seen


def test_global_hooks_fire_once_a_step(every_method: Method) -> None:
    """torch's profiler counts steps with a global hook; a wrapped step counts as one."""
    opt, seen = every_method.wrap(sgd(**every_method.base)), []
    before = register_optimizer_step_pre_hook(lambda *_: seen.append("before"))
    after = register_optimizer_step_post_hook(lambda *_: seen.append("after"))
    try:
        opt.step()
        opt.step()
    finally:
        before.remove()
        after.remove()

    assert ["before", "after"] * 2 == seen


def test_torch_does_not_patch_the_step_again() -> None:
    """The wrapper's step is marked as hooked, so torch does not patch it and hooks fire once."""
    opt, seen = wrapped(), []
    opt._patch_step_function()
    opt.register_step_pre_hook(lambda *_: seen.append(1))
    opt.step()

    assert [1] == seen


def test_a_step_leaves_no_hook_behind(every_method: Method) -> None:
    """After a step, the base has the hooks that it had before it."""
    opt = every_method.wrap(sgd(**every_method.base))
    opt.step()

    assert 0 == len(opt.base_optimizer._optimizer_step_pre_hooks)
    assert 0 == len(opt.base_optimizer._optimizer_step_post_hooks)


def test_a_base_hook_may_change_the_gradient(every_rule: Method) -> None:
    """Every method uses the gradient that the base's step uses, here one that a hook of the base negated."""
    opt = every_rule.wrap(sgd(**every_rule.base))
    (p,) = opt.param_groups[0]["params"]
    opt.base_optimizer.register_step_pre_hook(lambda *_: setattr(p, "grad", -p.grad))
    expected = every_rule.after_sgd(p, -p.grad)
    opt.step()

    torch.testing.assert_close(expected, p.detach())


# ------------------------------------------------------------------------------------ groups and gradients


def test_an_added_group_is_trained_and_decayed(every_rule: Method) -> None:
    """A group added to the wrapper is added to the base: it steps, and the method applies to it."""
    opt, p = every_rule.wrap(sgd(**every_rule.base)), weight(1.0, -2.0, grad=[1.0, 1.0])
    opt.param_groups[0]["params"][0].grad = None
    opt.add_param_group({"params": [p]})
    expected = every_rule.after_sgd(p, p.grad)
    opt.step()

    assert 2 == len(opt.base_optimizer.param_groups)
    torch.testing.assert_close(expected, p.detach())


def test_add_param_group_takes_its_argument_by_keyword() -> None:
    """add_param_group(param_group=...) works, and the group's own values stay."""
    opt = wrapped(lam=0.25)
    opt.add_param_group(param_group={"params": [weight(1.0)], "weight_decay": 0.0, "lr": 0.5})

    assert (0.0, 0.5) == (opt.param_groups[1]["weight_decay"], opt.param_groups[1]["lr"])


def test_a_parameter_cannot_be_added_twice() -> None:
    """A parameter that is already in a group raises torch's error, and no group is added."""
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
    """Like apex's optimizers: set_to_none is an option of the constructor."""

    def zero_grad(self) -> None:
        super().zero_grad(set_to_none=True)


def test_zero_grad_of_a_base_that_takes_no_option() -> None:
    """The base's zero_grad is called without set_to_none; with set_to_none=False it raises its TypeError."""
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


def test_replaced_parameters_are_stepped_and_decayed(every_rule: Method) -> None:
    """The next step uses the tensors that accelerate or FSDP2 put into a group."""
    opt, p = every_rule.wrap(sgd(**every_rule.base)), weight(1.0, grad=[1.0])
    opt.step()
    opt.param_groups[0]["params"] = [p]
    expected = every_rule.after_sgd(p, p.grad)
    opt.step()

    torch.testing.assert_close(expected, p.detach())


def test_groups_stepped_one_at_a_time_are_stepped_once(every_rule: Method) -> None:
    """If one group is assigned and stepped at a time, as in DeepSpeed, every group takes one step."""
    params = [weight(1.0, grad=[1.0]), weight(1.0, grad=[1.0])]
    base = SGD([{"params": [p]} for p in params], lr=0.1, weight_decay=0.5, **every_rule.base)
    opt, expected = every_rule.wrap(base), [every_rule.after_sgd(p, p.grad) for p in params]
    groups = opt.param_groups
    for group in groups:
        opt.param_groups = [group]
        opt.step()
    opt.param_groups = groups

    torch.testing.assert_close(expected, [p.detach() for p in params])


# ------------------------------------------------------------------------------------ profiler, printing


def test_profiler_ranges(every_method: Method) -> None:
    """A profile shows one range for the wrapper's step, with the base's inside it, and one for zero_grad."""
    opt = every_method.wrap(sgd(**every_method.base))
    with torch.autograd.profiler.profile() as profile:
        opt.step()
        opt.zero_grad()
    names = [event.name for event in profile.function_events if event.name.startswith("Optimizer.")]

    assert [f"Optimizer.step#{type(opt).__name__}.step", "Optimizer.step#SGD.step"] == names[:2]
    assert ["Optimizer.zero_grad#SGD.zero_grad"] == names[2:]


def test_repr_shows_the_path_and_its_cost() -> None:
    """repr names the base, lam, the path and the bytes of the snapshot: 8 for two float32 weights."""
    assert "CautiousDecay(SGD, lam=0.5, path='snapshot', backend='eager', snapshot_bytes=8)" == repr(
        wrapped(path="snapshot", backend="eager")
    )


def test_the_snapshot_costs_nothing_on_the_direction_path() -> None:
    """snapshot_bytes is 0 without a snapshot, and the decaying weights' size with one."""
    assert (0, 8) == (wrapped().snapshot_bytes, wrapped(path="snapshot").snapshot_bytes)


def test_the_table_of_bases_is_not_empty() -> None:
    """The table of bases holds several, including a fused one."""
    assert {"SGD", "AdamW", "AdamW-fused"} <= set(BASES)
