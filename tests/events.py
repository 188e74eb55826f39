"""A small model whose optimizer steps while things happen to it: between two steps, in hooks, in a closure.

A `World` has the model. An event, one of `EVENTS`, does one thing to a world; a random.Random chooses what exactly.
`history` makes steps with events and returns all that could be seen of them.
"""

import copy
import functools
import pickle
import random
import re
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import cwd_wrap.step.plan
import cwd_wrap.step.snapshot
from cwd_wrap import notices

PLACES = ("between steps", "before the base", "after the base", "before the wrapper", "after the wrapper", "closure")
Group = dict[str, Any]


class Happening(NamedTuple):
    """One step, and what happens before or in it."""

    event: str
    place: str
    pick: int
    """The seed of what the event chooses."""


class BrokenError(Exception):
    """Raised by events that break a step."""


class World:
    """A model with its optimizer, and what was seen of the last step."""

    def __init__(
        self, build: Callable[[Any], Optimizer], wrap: Callable[[Optimizer], Any], shapes: list[tuple[int, ...]]
    ) -> None:
        self.random = torch.Generator().manual_seed(0)
        self.known = [self.new_parameter(shape) for shape in shapes]
        """All parameters that there ever were."""
        self.without: list[Tensor] = []
        """Those that get no gradient."""
        self.in_place = False
        """Are gradients written into the tensors of the last step?"""
        half = len(self.known) // 2
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.opt = wrap(build([{"params": self.known[:half]}, {"params": self.known[half:], "weight_decay": 0.25}]))
        self.saved: Any = copy.deepcopy(self.opt.state_dict())
        self.noted: list[tuple[str, object]] = []
        self.once, self.always = ExitStack(), ExitStack()
        """What is undone after the step, and after the last one."""

    @property
    def base(self) -> Any:
        return self.opt.base_optimizer

    @property
    def groups(self) -> list[Group]:
        return self.opt.param_groups

    def random_like(self, t: Tensor) -> Tensor:
        return torch.randn(t.shape, generator=self.random).to(t.dtype)

    def new_parameter(self, shape: Iterable[int]) -> nn.Parameter:
        """A parameter with a gradient, which is not known yet."""
        p = nn.Parameter(torch.randn(tuple(shape), generator=self.random))
        p.grad = self.random_like(p)
        return p

    def give_gradient(self, p: Tensor, gradient: Tensor | None = None) -> None:
        """A gradient of any type; without one, a random one of the weight's type."""
        p.grad = None
        if hasattr(p, "grad_dtype"):
            p.grad_dtype = None
        p.grad = self.random_like(p) if gradient is None else gradient

    def add(self, p: nn.Parameter) -> nn.Parameter:
        self.known.append(p)
        return p

    def chosen(self, rng: random.Random) -> Any:
        """A parameter of the optimizer."""
        return rng.choice([p for group in self.groups for p in group["params"]])

    # ---- a step

    def step(self, happening: Happening) -> list[tuple[str, object]]:
        """Make a step. Returns all that could be seen of it."""
        self.noted = []
        act = functools.partial(EVENTS[happening.event], self, random.Random(happening.pick))
        self.attempt("gradients", self._set_gradients)
        warned: list[str] = []
        with warnings.catch_warnings(), mock.patch.object(notices, "warn", warned.append), ExitStack() as self.once:
            warnings.simplefilter("ignore")
            if happening.place == "between steps":
                self.attempt("event", act)
            elif happening.place != "closure":
                self._hook(happening.place, act)
            self.attempt("step", self._step_with_closure(act) if happening.place == "closure" else self.opt.step)
        self.note("warnings", warned)
        self.note("groups", self._plain(self.groups))
        self.note("state", [(self._plain(p), self._plain(state)) for p, state in self.opt.state.items()])
        self.note("weights", [self._bits(p) for p in self.known])
        self.note("gradients", [self._bits(p.grad) for p in self.known])
        return self.noted

    def note(self, what: str, seen: object) -> None:
        self.noted.append((what, seen))

    def attempt(self, what: str, act: Callable[[], object]) -> None:
        """Do something, and note what it returns or raises."""
        try:
            self.note(what, self._plain(act()))
        except Exception as error:
            self.note(what, (type(error).__name__, re.sub(r"0x[0-9a-f]+|\d{12,}", "<where>", str(error))))

    def _set_gradients(self) -> None:
        for p in self.known:
            if any(p is each for each in self.without):
                p.grad = None
            elif self.in_place and p.grad is not None and p.grad.layout == torch.strided:
                p.grad.copy_(self.random_like(p.grad))
            else:
                self.give_gradient(p)

    def _hook(self, place: str, act: Callable[[], object]) -> None:
        owner = self.base if place.endswith("the base") else self.opt
        register = owner.register_step_pre_hook if place.startswith("before") else owner.register_step_post_hook
        left = [act]

        def hook(*_: object) -> None:
            self.note(place, self._plain(self.groups))
            if left:
                left.pop()()

        self.once.callback(register(hook).remove)

    def _step_with_closure(self, act: Callable[[], object]) -> Callable[[], object]:
        def closure() -> Tensor:
            self.note("closure", self._plain(self.groups))
            act()
            return torch.tensor(1.0)

        return lambda: self.opt.step(closure)

    # ---- what can be seen

    def _plain(self, value: Any) -> object:
        """The value with tensors as their bits, parameters as their number, and objects without their address."""
        if isinstance(value, Tensor):
            number = next((i for i, p in enumerate(self.known) if p is value), None)
            return self._bits(value) if number is None else f"parameter {number}"
        if isinstance(value, dict):
            return {key: self._plain(each) for key, each in value.items()}
        if isinstance(value, list | tuple):
            return type(value).__name__, [self._plain(each) for each in value]
        return re.sub("0x[0-9a-f]+", "0x...", repr(value))

    @staticmethod
    def _bits(t: Tensor | None) -> object:
        if t is None:
            return None
        t = t.detach()
        parts = [t.coalesce().indices(), t.coalesce().values()] if t.is_sparse else [t.resolve_neg()]
        seen = [part.reshape(-1).contiguous().view(torch.uint8).tolist() for part in parts if part.device.type == "cpu"]
        return str(t.dtype), tuple(t.shape), seen


def history(world: World, happenings: Iterable[Happening]) -> list[list[tuple[str, object]]]:
    """What could be seen of each step."""
    threads = torch.get_num_threads()
    try:
        with world.always:
            return [world.step(happening) for happening in happenings]
    finally:
        torch.set_num_threads(threads)


# ------------------------------------------------------------------------------------ events

Event = Callable[[World, random.Random], object]
EVENTS: dict[str, Event] = {}


def event(function: Event) -> Event:
    EVENTS[function.__name__.strip("_").replace("_", " ")] = function
    return function


@event
def nothing(world: World, rng: random.Random) -> None:
    """The first event: hypothesis shrinks to it."""


# ---- values of a group


@event
def lr(world: World, rng: random.Random) -> None:
    rng.choice(world.groups)["lr"] = rng.choice([0.05, 0.2, 0.1, 0.0, 1])


@event
def lr_tensor(world: World, rng: random.Random) -> None:
    rng.choice(world.groups)["lr"] = torch.tensor(rng.choice([0.05, 0.2]))


@event
def tensors_are_filled(world: World, rng: random.Random) -> None:
    """A schedule fills tensors in place."""
    value = rng.choice([0.05, 0.25, 0.0, 0.9])
    for group in world.groups:
        for key in ("lr", "weight_decay", "momentum"):
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)


@event
def weight_decay(world: World, rng: random.Random) -> None:
    rng.choice(world.groups)["weight_decay"] = rng.choice([0.1, 0.5, 0.0, 1, torch.tensor(0.5), 0.7])


@event
def no_group_decays(world: World, rng: random.Random) -> None:
    for group in world.groups:
        group["weight_decay"] = 0.0


@event
def a_wrong_value(world: World, rng: random.Random) -> None:
    """It stays until another event replaces it."""
    key, value = rng.choice(
        [("weight_decay", -0.5), ("lr", float("nan")), ("betas", (0.9,)), ("weight_decay", "0.1"), ("momentum", None)]
    )
    group = rng.choice(world.groups)
    if key in group:
        group[key] = value


@event
def values_are_back(world: World, rng: random.Random) -> None:
    """Every group has the values with which it was built, as the very objects."""
    for group in world.groups:
        for key, value in world.base.defaults.items():
            if key in group:
                group[key] = value


@event
def betas(world: World, rng: random.Random) -> None:
    group = rng.choice(world.groups)
    if "betas" in group:
        group["betas"] = rng.choice([(0.9, 0.999), (0.5, 0.9), (0.0, 0.99), [0.8, 0.99]])


@event
def betas_in_place(world: World, rng: random.Random) -> None:
    """A list of betas is written to."""
    group = rng.choice(world.groups)
    if "betas" in group:
        group["betas"] = betas = list(group["betas"]) if isinstance(group["betas"], tuple) else group["betas"]
        betas[0] = rng.choice([0.3, 0.6, 0.9])


@event
def momentum(world: World, rng: random.Random) -> None:
    group = rng.choice(world.groups)
    key = rng.choice([key for key in ("momentum", "dampening", "eps", "alpha", "momentum_decay") if key in group])
    values = {"momentum": [0.0, 0.5, 0.9], "dampening": [0.0, 0.5], "eps": [1e-3, 1e-8], "alpha": [0.5, 0.9]}
    group[key] = rng.choice(values.get(key, [0.004, 0.1]))


@event
def flag(world: World, rng: random.Random) -> None:
    group = rng.choice(world.groups)
    known = ("maximize", "nesterov", "foreach", "fused", "capturable", "amsgrad", "caution")
    key = rng.choice([key for key in known if key in group])
    group[key] = rng.choice([True, False, None]) if key in ("foreach", "fused") else not group[key]


@event
def another_key(world: World, rng: random.Random) -> None:
    group = rng.choice(world.groups)
    if "note" in group and rng.random() < 0.5:
        del group["note"]
    else:
        group["note"] = rng.choice([1, 2.5, "text", None])


@event
def keys_in_another_order(world: World, rng: random.Random) -> None:
    group = rng.choice(world.groups)
    keys = list(group)
    rng.shuffle(keys)
    for key in keys:
        group[key] = group.pop(key)


# ---- gradients


@event
def no_gradient(world: World, rng: random.Random) -> None:
    """This parameter has none from now on, or has one again."""
    p = world.chosen(rng)
    before = len(world.without)
    world.without = [each for each in world.without if each is not p]
    if len(world.without) == before:
        world.without.append(p)
        p.grad = None


@event
def no_gradients(world: World, rng: random.Random) -> None:
    world.opt.zero_grad()


@event
def gradients_in_place(world: World, rng: random.Random) -> None:
    """From now on they are written into the same tensors, or not any more."""
    world.in_place = not world.in_place


@event
def another_gradient(world: World, rng: random.Random) -> None:
    p = world.chosen(rng)
    kind = rng.choice(["new", "transposed", "negated view", "zero", "clipped", "not a number"])
    if kind == "new":
        p.grad = world.random_like(p)
    elif kind == "transposed":
        p.grad = world.random_like(p).t().contiguous().t()
    elif kind == "negated view":
        p.grad = torch._neg_view(world.random_like(p))
    elif kind == "zero":
        p.grad = torch.zeros_like(p)
    elif kind == "clipped":
        p.grad.mul_(0.5)
    else:
        p.grad = torch.full_like(p, float("nan"))


@event
def sparse_gradient(world: World, rng: random.Random) -> None:
    p = world.chosen(rng)
    p.grad = torch.sparse_coo_tensor(torch.tensor([[0]]), world.random_like(p)[:1], p.shape)


@event
def gradient_of_another_type(world: World, rng: random.Random) -> None:
    """The weight becomes one of another type, its gradient does not."""
    p = world.chosen(rng)
    gradient = p.grad
    p.grad = None
    p.data = p.data.to(rng.choice([torch.bfloat16, torch.float64]))
    world.give_gradient(p, gradient if hasattr(p, "grad_dtype") else None)


# ---- parameters and lists


@event
def replaced(world: World, rng: random.Random) -> None:
    params = rng.choice(world.groups)["params"]
    i = rng.randrange(len(params))
    new = world.add(world.new_parameter(params[i].shape))
    if rng.random() < 0.5:
        world.opt.state.pop(params[i], None)
    params[i] = new


@event
def swapped_order(world: World, rng: random.Random) -> None:
    rng.choice(world.groups)["params"].reverse()


@event
def dropped(world: World, rng: random.Random) -> None:
    params = rng.choice(world.groups)["params"]
    p = params.pop(rng.randrange(len(params)))
    if rng.random() < 0.5:
        world.opt.state.pop(p, None)


@event
def listed_twice(world: World, rng: random.Random) -> None:
    rng.choice(world.groups)["params"].append(world.chosen(rng))


@event
def moved_to_another_group(world: World, rng: random.Random) -> None:
    params = rng.choice(world.groups)["params"]
    rng.choice(world.groups)["params"].append(params.pop())


@event
def another_list(world: World, rng: random.Random) -> None:
    """A list of the same parameters, or a list that is empty."""
    group = rng.choice(world.groups)
    group["params"] = rng.choice([list(group["params"]), []])


@event
def group_added(world: World, rng: random.Random) -> None:
    if len(world.groups) < 4:
        p = world.add(world.new_parameter(world.known[0].shape))
        rng.choice([world.opt, world.base]).add_param_group({"params": [p], "weight_decay": rng.choice([0.5, 0.0])})


@event
def group_removed(world: World, rng: random.Random) -> None:
    if len(world.groups) > 1:
        world.groups.pop(rng.randrange(len(world.groups)))


@event
def groups_swapped(world: World, rng: random.Random) -> None:
    world.groups.reverse()


@event
def groups_are_copies(world: World, rng: random.Random) -> None:
    world.opt.param_groups = [dict(group) for group in world.groups]


@event
def swap_tensors(world: World, rng: random.Random) -> None:
    p = world.chosen(rng)
    torch.utils.swap_tensors(p, world.new_parameter(p.shape))


@event
def requires_no_gradient(world: World, rng: random.Random) -> None:
    p = world.chosen(rng)
    p.requires_grad_(not p.requires_grad)


# ---- memory of parameters


@event
def other_data(world: World, rng: random.Random) -> None:
    p = world.chosen(rng)
    p.data = world.random_like(p)


@event
def data_at_the_same_address(world: World, rng: random.Random) -> None:
    """The memory is freed, and most likely comes back."""
    p = world.chosen(rng)
    p.data = torch.empty(0)
    p.data = torch.randn(p.grad.shape, generator=world.random)


@event
def data_of_another_type(world: World, rng: random.Random) -> None:
    """State and gradient stay as they are, or the state is dropped."""
    p = world.chosen(rng)
    if rng.random() < 0.5:
        world.opt.state.pop(p, None)
    p.grad = None
    p.data = p.data.to(rng.choice([torch.bfloat16, torch.float64, torch.float32]))
    world.give_gradient(p)


@event
def a_view_of_the_data(world: World, rng: random.Random) -> None:
    """The weight has another shape with as many elements; with the state that it had."""
    p = world.chosen(rng)
    p.grad = None
    p.data = rng.choice([p.data.t(), p.data.reshape(-1), p.data.reshape(1, -1), p.data.reshape(-1, 1)])
    world.give_gradient(p)


@event
def transposed_memory(world: World, rng: random.Random) -> None:
    """The weight has the same shape, but is not contiguous."""
    p = world.chosen(rng)
    p.data = p.data.t().contiguous().t() if rng.random() < 0.5 else torch.cat([p.data, p.data], -1)[..., ::2]


@event
def data_of_another_size(world: World, rng: random.Random) -> None:
    """The state goes, as it would not fit."""
    p = world.chosen(rng)
    world.opt.state.pop(p, None)
    p.grad = None
    p.data = torch.randn((3, 4)[: p.dim()], generator=world.random).to(p.dtype)
    world.give_gradient(p)


@event
def module_to(world: World, rng: random.Random) -> None:
    nn.ParameterList(world.known).to(rng.choice([torch.bfloat16, torch.float64, torch.float32]))


# ---- state


def state_of(world: World, rng: random.Random) -> dict[str, Any]:
    return rng.choice(list(world.opt.state.values()))


def tensor_in_state(world: World, rng: random.Random) -> tuple[dict[str, Any], str, Tensor]:
    state = state_of(world, rng)
    key = rng.choice([key for key, value in state.items() if isinstance(value, Tensor)])
    return state, key, state[key]


@event
def state_of_a_parameter_replaced(world: World, rng: random.Random) -> None:
    p = rng.choice(list(world.opt.state))
    world.opt.state[p] = {k: v.clone() if isinstance(v, Tensor) else v for k, v in world.opt.state[p].items()}


@event
def tensor_of_state_replaced(world: World, rng: random.Random) -> None:
    state, key, t = tensor_in_state(world, rng)
    state[key] = t.clone() if key == "step" else world.random_like(t).abs()


@event
def data_of_state_replaced(world: World, rng: random.Random) -> None:
    _, key, t = tensor_in_state(world, rng)
    t.data = t.clone() if key == "step" else world.random_like(t).abs()


@event
def counter(world: World, rng: random.Random) -> None:
    steps = [state["step"] for state in world.opt.state.values() if isinstance(state.get("step"), Tensor)]
    if steps:
        rng.choice(steps).fill_(rng.choice([1, 1000]))


@event
def counter_of_another_type(world: World, rng: random.Random) -> None:
    state = state_of(world, rng)
    if isinstance(state.get("step"), Tensor):
        state["step"] = state["step"].to(rng.choice([torch.float64, torch.float32]))


@event
def state_cleared(world: World, rng: random.Random) -> None:
    rng.choice([world.opt.state, state_of(world, rng)]).clear()


@event
def state_popped(world: World, rng: random.Random) -> None:
    world.opt.state.pop(rng.choice(list(world.opt.state)))


@event
def entry_of_state_popped(world: World, rng: random.Random) -> None:
    state, key, _ = tensor_in_state(world, rng)
    del state[key]


@event
def state_touched(world: World, rng: random.Random) -> None:
    """Someone asks for the state of every parameter, which makes an empty one where there is none."""
    for p in world.known:
        world.opt.state[p]


@event
def another_state(world: World, rng: random.Random) -> None:
    world.opt.state = defaultdict(dict, world.opt.state)


@event
def saved(world: World, rng: random.Random) -> None:
    world.saved = copy.deepcopy(world.opt.state_dict())


@event
def loaded(world: World, rng: random.Random) -> None:
    rng.choice([world.opt, world.base]).load_state_dict(copy.deepcopy(world.saved))


# ---- the wrapper


@event
def argument(world: World, rng: random.Random) -> None:
    opt = world.opt
    values: dict[str, list[Any]] = {
        "lam": [0.5, 0.25, 0.0, None],
        "strict": [True, False],
        "leak": [0.0, 0.25, 1.0],
        "mask": ["update", "gradient", "all", "random", "unknown"],
        "path": [None, "one_pass", "direction", "pieces", "snapshot"],
        "backend": [None, "eager"],
        "rounding": ["nearest", "stochastic"],
        "seed": [0, 3],
        "p": [0.8, 1.0, 2.0],
        "scale": ["mean", "numel", None],
        "step_size": [None, _eta],
    }
    key = rng.choice([key for key in values if hasattr(opt, key)])
    setattr(opt, key, rng.choice(values[key]))


def _eta(group: Group) -> float:
    return 0.5 * float(group["lr"])


@event
def observer(world: World, rng: random.Random) -> None:
    """Someone looks at this step."""

    def note(report: Any) -> None:
        for part in report.parts:
            seen = (part.group, part.path, part.labels, part.weights, part.eta_lam, part.sums)
            world.note("report", world._plain(seen))

    world.opt.observer = note
    world.once.callback(setattr, world.opt, "observer", None)


@event
def drop_snapshot(world: World, rng: random.Random) -> None:
    world.opt.drop_snapshot()


@event
def deep_copy(world: World, rng: random.Random) -> None:
    """The copy goes on, with copies of the parameters."""
    world.opt, world.known, world.without = copy.deepcopy((world.opt, world.known, world.without))
    world._set_gradients()


@event
def pickled(world: World, rng: random.Random) -> None:
    world.opt, world.known, world.without = pickle.loads(pickle.dumps((world.opt, world.known, world.without)))
    world._set_gradients()


@event
def another_base(world: World, rng: random.Random) -> None:
    """The wrapper gets another optimizer of the same parameters."""
    base = copy.copy(world.base)
    base.param_groups = [dict(group) for group in world.groups]
    base.state = defaultdict(dict, {p: dict(state) for p, state in world.opt.state.items()})
    world.opt.base_optimizer = base


# ---- the base's step


@event
def step_of_the_class(world: World, rng: random.Random) -> None:
    """Another library patches the class, with torch's hooks inside of its function or without them."""
    cls = type(world.base)
    inner = cls.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        world.note("patched", None)
        return inner(self, *args, **kwargs)

    new = functools.wraps(inner)(step) if rng.random() < 0.5 else Optimizer.profile_hook_step(step)
    new.hooked = True
    world.always.enter_context(mock.patch.object(cls, "step", new))


@event
def step_of_the_instance(world: World, rng: random.Random) -> None:
    base = world.base
    if "step" in vars(base):
        del base.step
        return
    inner = base.step if rng.random() < 0.8 else _unhooked(base)

    def step(*args: Any, **kwargs: Any) -> Any:
        world.note("replaced", None)
        return inner(*args, **kwargs)

    base.step = step


def _unhooked(base: Any) -> Any:
    own = type(base).step
    while getattr(own, "hooked", False):
        own = own.__wrapped__
    return functools.partial(own, base)


@event
def broken(world: World, rng: random.Random) -> None:
    """The base's own code raises an error at one of its calls in this step: before its work, or after it."""
    cls = type(world.base)
    inner = _unhooked(world.base).func
    late, calls = rng.random() < 0.5, [rng.randrange(2)]

    def step(self: Any, closure: Any = None) -> Any:
        calls[0] -= 1
        if calls[0] < 0 and not late:
            raise BrokenError("before")
        done = inner(self, closure)
        if calls[0] < 0 and late:
            raise BrokenError("after")
        return done

    new = Optimizer.profile_hook_step(step)
    new.hooked = True
    world.once.enter_context(mock.patch.object(cls, "step", new))


@event
def error(world: World, rng: random.Random) -> None:
    raise BrokenError("here")


@event
def another_step(world: World, rng: random.Random) -> None:
    """A step in a step, or one step more."""
    world.opt.step()


@event
def scaled(world: World, rng: random.Random) -> None:
    """GradScaler leaves it to a fused base to unscale its gradients, for this step."""
    base = world.base
    base.grad_scale, base.found_inf = torch.tensor(rng.choice([1.0, 2.0])), torch.tensor(float(rng.random() < 0.3))
    world.once.callback(lambda: [vars(base).pop(key, None) for key in ("grad_scale", "found_inf")])


# ---- the machine


@event
def captured(world: World, rng: random.Random) -> None:
    """A CUDA graph is captured in this step, as far as we can tell."""
    for module in (cwd_wrap.step.plan, cwd_wrap.step.snapshot):
        world.once.enter_context(mock.patch.object(module, "capturing", lambda: True))


@event
def threads(world: World, rng: random.Random) -> None:
    torch.set_num_threads(rng.choice([1, 2]))
