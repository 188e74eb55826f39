"""What several test files share: every path, every method, a table of bases, and a small net to train."""

import contextlib
import importlib.util
import threading
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any
from unittest import mock

import pytest
import reference
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from cwd_wrap import CautiousDecay, CautiousUpdate, PNormDecay
from cwd_wrap.bases import updates

both_paths = pytest.mark.parametrize("path", ["direction", "snapshot"])

# ------------------------------------------------------------------------------------ paths


class PathOptions(dict[str, Any]):
    """Keyword arguments that force a path on a wrapper; `base` holds those that its base needs for that path."""

    @property
    def base(self) -> dict[str, Any]:
        """The options of the base."""
        return {"fused": True} if self.get("path") == "one_pass" else {}

    @property
    def copies(self) -> bool:
        """Does the path compare with a copy of the weights? Then it takes a step that is lost in rounding for 0."""
        return self["path"] in ("snapshot", "pieces")

    def __str__(self) -> str:
        return "-".join(self.values())


WITH_A_KERNEL = [(path, backend) for path in ("one_pass", "direction", "snapshot") for backend in ("eager", "numba")]
ALL_PATHS = [*(PathOptions(path=path, backend=backend) for path, backend in WITH_A_KERNEL), PathOptions(path="pieces")]
COPYING = [path for path in ALL_PATHS if path.copies]
OF_SIBLINGS = [path for path in ALL_PATHS if path["path"] != "direction"]


def can_run(path: PathOptions) -> bool:
    """Is its backend installed?"""
    return path.get("backend") != "numba" or importlib.util.find_spec("numba") is not None


def param(*values: Any, path: PathOptions) -> Any:
    """A case of a test over paths, skipped where its backend is not installed."""
    marks = [] if can_run(path) else [pytest.mark.skip(reason="numba is not installed")]
    return pytest.param(*values, marks=marks, id="-".join(map(str, values)))


# ------------------------------------------------------------------------------------ bases


class Base:
    """A row of the table of bases: a call with parameters and options builds the optimizer."""

    def __init__(self, name: str, cls: Callable[..., Optimizer], **options: Any) -> None:
        self.name = name
        self.cls = cls
        self.options = {"weight_decay": 0.5, **options}

    def __call__(self, params: Any, **options: Any) -> Optimizer:
        return self.cls(params, **(self.options | options))

    def __str__(self) -> str:
        return self.name

    def on(self, path: PathOptions) -> "Base | None":
        """The same base with the options that ``path`` needs; None if it cannot take that path."""
        if path["path"] == "one_pass" and (self.cls is Adagrad or "fused" in self.options or "foreach" in self.options):
            return None
        return Base(self.name, self.cls, **self.options, **path.base)


BASES: dict[str, Base] = {
    base.name: base
    for base in (
        Base("SGD", SGD, lr=0.1),
        Base("SGD-momentum", SGD, lr=0.1, momentum=0.9),
        Base("Adam", Adam, lr=0.01),
        Base("AdamW", AdamW, lr=0.01),
        Base("AdamW-amsgrad", AdamW, lr=0.01, amsgrad=True),
        Base("AdamW-fused", AdamW, lr=0.01, fused=True),
        Base("AdamW-foreach", AdamW, lr=0.01, foreach=True),
        Base("Adagrad", Adagrad, lr=0.1),
    )
}
all_bases = pytest.mark.parametrize("build", BASES.values(), ids=list(BASES))


def each_once(rows: Iterable[Any], paths_of: Callable[[Any], list[PathOptions]]) -> list[tuple[Any, PathOptions]]:
    """The first row on all of its paths, and each other row on one of its own that can run here, in turn.

    What the row and the path decide each for itself needs no more. Only the maths needs every row on every path.
    """
    first, *others = rows
    pairs = [(first, path) for path in paths_of(first)]
    for turn, row in enumerate(others):
        paths = list(filter(can_run, paths_of(row)))
        pairs.append((row, paths[turn % len(paths)]))
    return pairs


def in_turn(rows: Iterable[Any], paths: list[PathOptions] = ALL_PATHS) -> list[Any]:
    """Cases of a row and a path: the first row with each path, each other row with one."""
    return [param(row, path, path=path) for row, path in each_once(rows, lambda _: paths)]


BASES_ON_PATHS = [
    param(base.on(path), path, path=path)
    for base, path in each_once(
        [BASES["AdamW"], *(base for name, base in BASES.items() if name != "AdamW")],
        lambda base: [path for path in ALL_PATHS if base.on(path) is not None],
    )
]


def update_of(cls: Callable[..., Optimizer], **options: Any) -> updates.Update:
    """The update of an optimizer that is built with ``options``."""
    base = cls([weight(1.0)], **({"lr": 0.1} | options))
    update = updates.find(base, base.param_groups[0])
    assert isinstance(update, updates.Update), update
    return update


# ------------------------------------------------------------------------------------ methods


class Method:
    """A method on one path: how to wrap, and its `reference`."""

    def __init__(
        self, name: str, cls: Any, of_reference: reference.Reference | None, path: PathOptions, **options: Any
    ) -> None:
        self.name = name
        self.wrap = partial(cls, **options, **path)
        self.over = partial(cls.over, **options, **path)
        self.reference = of_reference
        self.path = path
        self.base = path.base

    def after_sgd(self, p: Tensor, g: Tensor, lr: float = 0.1, lam: float = 0.5) -> Tensor:
        """``p`` after a wrapped step of plain SGD along ``g``, as the reference gives it."""
        x, g = p.detach().double(), g.double()
        return self.reference(x, x - lr * g, g, lr * lam).to(p.dtype)

    def __str__(self) -> str:
        return f"{self.name}-{self.path}"


# None: the method draws random numbers; test_masks.py tests it.
METHODS: dict[str, tuple[Any, reference.Reference | None, dict[str, Any]]] = {
    "decay": (CautiousDecay, reference.decay(), {}),
    "strict": (CautiousDecay, reference.decay(strict=True), {"strict": True}),
    "leak": (CautiousDecay, reference.decay(leak=0.25), {"leak": 0.25}),
    "gradient": (CautiousDecay, reference.decay("gradient"), {"mask": "gradient"}),
    "gradient-leak": (CautiousDecay, reference.decay("gradient", leak=0.25), {"mask": "gradient", "leak": 0.25}),
    "gradient-strict": (CautiousDecay, reference.decay("gradient", strict=True), {"mask": "gradient", "strict": True}),
    "random": (CautiousDecay, None, {"mask": "random"}),
    "all": (CautiousDecay, reference.decay("all"), {"mask": "all"}),
    "update": (CautiousUpdate, reference.update(), {}),
    "update-numel": (CautiousUpdate, reference.update("numel"), {"scale": "numel"}),
    "update-unscaled": (CautiousUpdate, reference.update(None), {"scale": None}),
    "p-norm": (PNormDecay, reference.p_norm(), {}),
    "p-norm-0.5": (PNormDecay, reference.p_norm(0.5), {"p": 0.5}),
    "p-norm-1": (PNormDecay, reference.p_norm(1.0), {"p": 1.0}),
    "p-norm-2": (PNormDecay, reference.p_norm(2.0), {"p": 2.0}),
}


def paths_of(name: str) -> list[PathOptions]:
    """The paths that a method can take."""
    if name in ("decay", "strict", "leak"):
        return ALL_PATHS
    return COPYING if METHODS[name][0] is CautiousDecay else OF_SIBLINGS


def _on(name: str, path: PathOptions) -> Any:
    cls, of_reference, options = METHODS[name]
    return param(Method(name, cls, of_reference, path, **options), path=path)


METHODS_ON_PATHS = [_on(name, path) for name in METHODS for path in paths_of(name)]
METHODS_ONCE = [_on(name, path) for name, path in each_once(METHODS, paths_of)]


class Pair:
    """A method on one path around one base: a call with parameters builds both."""

    def __init__(self, method: Method, base: Base) -> None:
        self.method = method
        self.base = base

    def __call__(self, params: Any) -> Any:
        return self.method.wrap(self.base(params))

    def __str__(self) -> str:
        return f"{self.method.name}-{self.base}-{self.method.path}"


def _pair(name: str, base: Base, path: PathOptions) -> Any:
    return param(Pair(_on(name, path).values[0], base), path=path)


PAIRS = [
    *(_pair("decay", *case.values) for case in BASES_ON_PATHS),
    *(_pair(name, BASES["AdamW"].on(path), path) for name, path in each_once(METHODS, paths_of) if name != "decay"),
]


# ------------------------------------------------------------------------------------ weights and nets


def weight(*values: float, grad: Iterable[float] | None = None, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    """A vector of weights, with a gradient if one is given."""
    p = nn.Parameter(torch.tensor(values, dtype=dtype))
    p.grad = None if grad is None else torch.tensor(list(grad), dtype=dtype)
    return p


def net() -> nn.Sequential:
    """The same small net at each call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1))


def loss_of(model: nn.Module, step: int) -> Tensor:
    """The loss on batch number ``step``."""
    x = torch.randn(5, 3, generator=torch.Generator().manual_seed(step))
    loss: Tensor = (model(x) - x.sum(1, keepdim=True)).square().mean()
    return loss


def train(model: nn.Module, optimizer: Optimizer, steps: Iterable[int]) -> None:
    """One step on each of the batches ``steps``."""
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


def values(model: nn.Module) -> Tensor:
    """All weights in one vector, copied."""
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def same(a: object, b: object, roundings: float = 0) -> bool:
    """Are two nested structures equal? The values of tensors may differ by ``roundings``, relative and absolute."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        alike = (a.dtype, a.shape) == (b.dtype, b.shape)
        return alike and torch.allclose(a, b, rtol=roundings, atol=roundings)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key], roundings) for key in a)
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(same(x, y, roundings) for x, y in zip(a, b, strict=True))
    return type(a) is type(b) and a == b


@contextlib.contextmanager
def stopped_in_a_step(step: Callable[[], Any]) -> Iterator[None]:
    """A thread runs the ``step`` of an AdamW, and waits in the middle of it until the block ends."""
    inside, done = threading.Event(), threading.Event()
    init_group: Any = AdamW._init_group

    def waits(self: AdamW, *args: Any) -> Any:
        if threading.current_thread() is thread:
            inside.set()
            done.wait()
        return init_group(self, *args)

    thread = threading.Thread(target=step)
    with mock.patch.object(AdamW, "_init_group", waits):
        thread.start()
        inside.wait()
        yield
        done.set()
        thread.join()
