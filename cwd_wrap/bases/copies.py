"""Small copies of an optimizer, to see what its steps do to a few weights.

The optimizer, its parameters, its hooks, all random generators and other ranks do not notice.
"""

import contextlib
import copy
import inspect
import io
import random
import sys
import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer, optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from cwd_wrap.bases import quirks
from cwd_wrap.bases.values import FUNCTIONS, apart, is_number, is_plain, refers, text, with_twins

_SHAPE = (4, 3, 2, 2, 2, 2)
_RATES = (0.5, 1.0, 0.5)  # of the learning rate at each step: some optimizers divide it by the first or the largest
_MORE = 1016  # steps: the third is then number 1019. It is prime, since some optimizers do more in each k-th step
_SMALL_D = 2.0**-6
_OF_THE_ORIGINAL = ("param_groups", "state")  # attributes that a copy has for itself


class Taken(NamedTuple):
    """A step of a copy: its group before the step, and its weights before and after."""

    own: Optimizer
    group: dict[str, Any]
    before: list[Tensor]
    after: list[Tensor]

    @property
    def lr(self) -> tuple[float, float]:
        """The learning rate before and after."""
        return float(self.group.get("lr", 0)), float(self.own.param_groups[0].get("lr", 0))


class Copies:
    """Makes copies of ``own`` for one of its groups, and has them step."""

    def __init__(self, own: Optimizer, group: Mapping[str, Any]) -> None:
        self.own = own
        self.inside = quirks.holders(own, group)
        """The optimizers that it has step the group."""
        self.options = {key: value for key, value in group.items() if key != "params"}
        for key, value in self.options.items():
            if not is_plain(value, option=True):
                msg = f"its group holds a {type(value).__name__} as {key}"
                raise TypeError(msg)
        if quirks.has_d(group) and isinstance(d := group["d"], float) and (d < _SMALL_D or d == 1):
            self.options["d"] = 0.5  # D-Adaptation begins with values too small to see in a decay; 1 shows in none
        self.group, inner = group, quirks.stepper(own, group)
        rates = (group.get("lr"), group.get("initial_lr"), inner.defaults.get("lr"), 1e-3)
        self.lr = next(float(rate) for rate in rates if rate is not None and rate != 0)
        self.lam = 2.0**-10 / self.lr
        """A ``weight_decay`` that takes about 0.001 off the weights."""
        self.off = 0.0
        """The ``weight_decay`` of a decay that is switched off."""
        device = group["params"][0].device
        self.device = torch.device("cpu") if device.type == "meta" else device
        self.tells_apart = tells_apart(own, group)
        """True if there is one parameter for each of the group; else one for each kind."""
        kinds = list({_kind(p): p for p in group["params"]}.values())
        self.originals: list[Tensor] = group["params"] if self.tells_apart else kinds
        # With their attributes as they are: an optimizer may call their methods.
        self.kinds = [
            ((ndim, wide), {name: apart(vars(p)[name]) for name, _ in marks})
            for p, (ndim, wide, marks) in zip(self.originals, map(_kind, self.originals), strict=True)
        ]
        self.narrow = narrow(group)

    def run(
        self,
        decay: float,
        *,
        off: bool = False,
        size: float = 1.0,
        slope: float = 1.0,
        dtype: torch.dtype = torch.float32,
        late: bool = False,
    ) -> list[Taken]:
        """Some steps of a new copy, built with this ``weight_decay``, which is then switched ``off`` as in a wrapper.

        ``slope`` multiplies the gradients, and ``size`` the weights after the first step. ``dtype`` is that of both.
        With the slope 0 the learning rate is 1 at least, since only a decay moves the weights, perhaps a small one.
        In a ``late`` run the optimizer's counters of steps say before the last one that many more were made.
        """
        parameters = self._parameters(dtype)
        own = self._build(self.own, parameters, decay)
        taken, counted = [], [_numbers(own)]
        for number, rate in enumerate(_RATES):
            if late and number == len(_RATES) - 1:
                _count_on(*counted[-2:])
            generator = torch.Generator("cpu").manual_seed(number)
            for p in parameters:
                sign = torch.randint(0, 2, p.shape, generator=generator, device="cpu") * 2 - 1
                of_cpu: dict[str, Any] = {"generator": generator, "device": "cpu", "dtype": torch.float32}
                p.data.copy_(sign * (1 + torch.rand(p.shape, **of_cpu)) * (size if number else 1))
                p.grad = (torch.randn(p.shape, **of_cpu) * slope).to(p)
            for group in own.param_groups:
                if "lr" in group:
                    group["lr"] = _like(self.options.get("lr"), (self.lr if slope else max(self.lr, 1.0)) * rate)
                if "weight_decay" in group:
                    group["weight_decay"] = decay
                    group.update({"weight_decay": self.off} | quirks.kept_while_off(own, group) if off else {})
            group, before = dict(own.param_groups[0]), [p.detach().clone() for p in parameters]
            torch.default_generator.manual_seed(number)
            own.step()
            taken.append(Taken(own, group, before, [p.detach().clone() for p in parameters]))
            if taken[-1].lr[0] != taken[-1].lr[1]:
                break
            if late:
                counted.append(_numbers(own))
        return taken

    def _parameters(self, dtype: torch.dtype) -> list[torch.nn.Parameter]:
        parameters = []
        for (ndim, wide), attributes in self.kinds:
            shape = _SHAPE[:ndim][::-1] if wide else _SHAPE[:ndim]
            p = torch.nn.Parameter(torch.ones(shape, device=self.device, dtype=dtype))
            vars(p).update({name: apart(value) for name, value in attributes.items()})
            parameters.append(p)
        return parameters

    def _build(self, original: Optimizer, parameters: list[torch.nn.Parameter], decay: float) -> Optimizer:
        """A copy of ``original`` around a copy of the optimizer that it has step the group, if there is one."""
        inner = next(iter(quirks.holders(original, self.group)), None)
        twins = {id(p): twin for p, twin in zip(self.originals, parameters, strict=True)}
        own_ids = {id(p) for group in original.param_groups for p in group["params"]}
        attributes = {
            name: with_twins(value, twins) if refers(value, twins) else copy.deepcopy(value)
            for name, value in _attributes(original).items()
            if is_plain(value, own_ids=own_ids if self.tells_apart else ())
            and not (isinstance(value, FUNCTIONS) and refers(value, twins))
        }
        options = copy.deepcopy(self.options)
        options |= {"lr": _like(options["lr"], self.lr)} if "lr" in options else {}
        options |= {"weight_decay": decay} if "weight_decay" in options else {}
        cls: Any = type(original)
        takes = list(inspect.signature(cls).parameters)[1:]
        arguments = attributes | options
        first = self._build(inner, parameters, decay) if inner is not None else [{"params": parameters, **options}]
        own: Optimizer = cls(first, **{name: arguments[name] for name in takes if name in arguments})
        decays = {quirks.stepper(original, self.group).defaults.get("weight_decay"), self.options.get("weight_decay")}
        # An attribute that holds the decay keeps what the constructor made of ``decay``.
        vars(own).update(
            {name: value for name, value in attributes.items() if not any(value == each for each in decays - {0, None})}
        )
        own.param_groups[0].update(options)
        made: Any = getattr(own, "state", {})
        for key, value in getattr(original, "state", {}).items():
            if isinstance(key, str) and key in made and is_plain(value):
                made[key] = copy.deepcopy(value)
        for name, value in _attributes(original).items():
            if name not in attributes and not _same_kind(value, vars(own).get(name)) and self._decides(value):
                msg = f"its {name}, a {type(value).__name__}, cannot be copied"
                raise TypeError(msg)
        return own

    def _decides(self, value: object) -> bool:
        """True if steps may depend on an attribute: one to call, or a tensor or parameters from before any step."""
        if callable(value) or self.own.state:  # a step may have made the others
            return callable(value)
        return hasattr(value, "__array__") or refers(value, set(map(id, self.group["params"])))


Numbers = dict[tuple[int, Any], tuple[Any, Any]]
"""Where each number is: a dict and a key, and what it is."""


def _numbers(own: Optimizer) -> Numbers:
    """The numbers in the state, the groups and the attributes of an optimizer and of those inside."""
    found: Numbers = {}
    for layer in quirks.all_layers(own):
        for where in (
            vars(layer),
            *layer.param_groups,
            *(each for each in layer.state.values() if hasattr(each, "items")),
        ):
            numbers = ((key, value) for key, value in where.items() if is_number(value) and type(value) is not bool)
            found |= {(id(where), key): (where, apart(value)) for key, value in numbers}
    return found


def _count_on(before: Numbers, now: Numbers) -> None:
    """Add many steps to the numbers that the last step has increased by 1."""
    for (where, key), (owner, value) in now.items():
        if (where, key) in before and value - before[where, key][1] == 1:
            owner[key] += _MORE


def _attributes(optimizer: Optimizer) -> dict[str, Any]:
    """The attributes that a class of optimizers has for itself."""
    return {
        name: value
        for name, value in vars(optimizer).items()
        if name not in _OF_THE_ORIGINAL
        and not name.startswith("_optimizer_")  # hooks
        and not hasattr(Optimizer, name)  # a scheduler replaces `step`
    }


def _same_kind(a: object, b: object) -> bool:
    return type(a) is type(b) and getattr(a, "__code__", None) is getattr(b, "__code__", None)


Kind = tuple[int, bool, tuple[tuple[str, str], ...]]


def kinds(group: Mapping[str, Any]) -> list[Kind]:
    """What a step can tell parameters apart by: dimensions, whether a matrix is wide, and attributes (``p.wd_mul``)."""
    return list(dict.fromkeys(map(_kind, group["params"])))


def _kind(p: Tensor) -> Kind:
    texts = ((name, text(value)) for name, value in vars(p).items())
    wide = p.ndim == 2 and p.shape[0] < p.shape[1]
    return p.ndim, wide, tuple((name, each) for name, each in texts if each is not None)


def narrow(group: Mapping[str, Any]) -> list[torch.dtype]:
    """The 16-bit types of the group's parameters."""
    types = dict.fromkeys(p.dtype for p in group["params"])
    return [dtype for dtype in (torch.bfloat16, torch.float16) if dtype in types]


def _like(value: object, number: float) -> float | Tensor:
    return torch.full_like(value, number) if isinstance(value, Tensor) else number


def tells_apart(own: Optimizer, group: Mapping[str, Any]) -> bool:
    """True if it can treat each parameter of the group in its own way: it has their names, or refers to some of them.

    An attribute refers to parameters if it holds them or their ids, or a name for each.
    """
    ids, number = set(map(id, group["params"])), len(group["params"])
    attributes = [value for layer in (own, *quirks.holders(own, group)) for value in _attributes(layer).values()]
    named = (isinstance(each, list | tuple) and all(isinstance(name, str) for name in each) for each in attributes)
    return bool(group.get("param_names")) or any(
        (is_named and len(each) == number) or refers(each, ids)
        for each, is_named in zip(attributes, named, strict=True)
    )


class _NoMessages(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises where an optimizer would communicate with other ranks: they do not take part."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if "c10d" in func.namespace:
            msg = "its step communicates with other ranks"
            raise RuntimeError(msg)
        return func(*args, **(kwargs or {}))


def _put_back(cls: type[Optimizer], step: Any) -> None:
    """Undo what torch does when it builds the first copy: it puts a step with hooks in place of the class's."""
    if step is not None:
        cls.step = step  # type: ignore[method-assign]
    elif "step" in vars(cls):
        del cls.step


@contextlib.contextmanager
def unnoticed(copies: Copies) -> Iterator[None]:
    """Inside this context steps of the copies are not noticed."""
    device = copies.device
    with contextlib.ExitStack() as stack:
        for hooks in (optimizer._global_optimizer_pre_hooks, optimizer._global_optimizer_post_hooks):
            stack.callback(hooks.update, dict(hooks))  # type: ignore[arg-type]
            hooks.clear()
        for cls in map(type, (copies.own, *copies.inside)):
            stack.callback(_put_back, cls, vars(cls).get("step"))
        stack.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy")) is not None:
            stack.callback(numpy.random.set_state, numpy.random.get_state())
        stack.enter_context(torch.random.fork_rng([] if device.type == "cpu" else [device], device_type=device.type))
        no_messages = _NoMessages()  # type: ignore[no-untyped-call]
        for context in (torch.inference_mode(False), torch.enable_grad(), warnings.catch_warnings(), no_messages):
            stack.enter_context(context)
        stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
        warnings.simplefilter("ignore")
        yield
