"""Collects what each step did to the weights, from the wrappers' reports. It does not import the wrappers."""

import csv
import math
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, takewhile
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor, distributed
from torch.nn import Module
from torch.optim import Optimizer

from cwd_wrap import notices
from cwd_wrap.buckets import Part, Report
from cwd_wrap.graphs import capturing

if TYPE_CHECKING:
    from typing_extensions import Self

TOGETHER = 256  # so many tensors of sums are joined into one, because each alone takes 512 bytes on a device
LOOKS, ALMOST_NONE = 100, 0.01  # warn if less than this share of the weights decayed at so many looks in a row
_T = TypeVar("_T")
COLUMNS = (
    "step", "group", "name", "path", "weights", "eta_lam", "share_decayed", "share_towards", "decay_norm",
    "update_norm", "weight_norm",
)  # fmt: skip


class _Look(NamedTuple):
    """A step that was recorded."""

    number: int  # among all looks
    step: int  # among all steps of its groups
    parts: list[Part]


@dataclass
class _Row:
    """A row before it is made readable; rows of the same look, group and label are added up."""

    look: int
    step: int
    part: tuple[int, str]  # the group and its name
    label: str
    paths: list[str]
    eta_lam: float
    weights: float
    sums: list[float]

    def add(self, other: "_Row") -> None:
        self.paths += [path for path in other.paths if path not in self.paths]
        self.weights += other.weights
        self.sums = [one + more for one, more in zip(self.sums, other.sums, strict=True)]

    def readable(self) -> dict[str, Any]:
        active, towards, decayed, update, weight = self.sums
        numbers = (
            round(self.weights), self.eta_lam, _share(active, self.weights), _share(towards, self.weights),
            self.eta_lam * math.sqrt(decayed), math.sqrt(update), math.sqrt(weight),
        )  # fmt: skip
        return dict(zip(COLUMNS, (self.step, self.part[0], self.label, "+".join(self.paths), *numbers), strict=True))


class MaskMonitor:
    """Records at each step which share of the weights decays, by how much, and how large the optimizer's update is.

    `watch` attaches it to a wrapper. `rows` gives a dict for each recorded step (a "look") and param group:

    - ``step``, ``group``: the number of the group's step since the monitor was attached, plus ``start``; the group's
      index. A step that raises does not count
    - ``name``: the group's key ``name``, or what `watch` found, or ``group 0``; see ``per_parameter``
    - ``path``: the path that the group took; several are joined by +
    - ``weights``: how many weights the method acted on, on this rank
    - ``eta_lam``: eta*lam, the share that one step takes off a weight where the mask is 1
    - ``share_decayed``: the share of weights that decayed: the mean of the mask. A weight that the step leaves in place
      counts, unless the wrapper is ``strict``
    - ``share_towards``: the share with ``u*x > 0``, which is what the paper's figure shows
    - ``decay_norm``: ``||eta*lam * (leak + (1 - leak) * mask) * x||``, the size of what the decay took away
    - ``update_norm``: ``||eta*u||``, the size of the optimizer's own update
    - ``weight_norm``: ``||x||`` after the step; of 16-bit weights, on some paths before they are rounded

    Norms are Euclidean. What a method does not have is NaN: for `CautiousUpdate` and `PNormDecay` ``share_towards`` and
    ``decay_norm``. Their ``share_decayed`` is the share of weights that keep their update (`CautiousUpdate`) or 1
    (`PNormDecay`), and ``update_norm`` is that of the base's update before it is masked.

    A step never waits for the device; `rows`, `write`, `to_csv`, `ratios` and `read` do. Training is the same with a
    monitor and without. On the path "direction" a look keeps a copy of the decaying weights during the step. Each
    optimizer needs its own monitor: one monitor cannot tell the groups of two optimizers apart.

    Args:
        per_parameter: a row for each parameter. ``name`` is then the parameter's, if `watch` was given the model or the
            optimizer named parameters (torch 2.6 or newer), else like ``0.3``, group and place in it.
        every: record the first of every so many steps; the others cost nothing.
        start: how many steps were taken before, in a resumed run: the first row has the step ``start + 1``.
        keep: how many rows are kept, the latest (about 1 kB each, less for rows of parameters). Older ones are dropped,
            so read or write them before.

    Raises:
        ValueError: ``every`` or ``keep`` is not a whole number above 0, or ``start`` not one from 0 up.

    Examples:
        >>> import torch
        >>> from cwd_wrap import CautiousDecay, MaskMonitor
        >>> w = torch.nn.Parameter(torch.tensor([1.0, 1.0, -1.0, -1.0]))
        >>> opt = CautiousDecay(torch.optim.SGD([w], lr=0.1), lam=0.5)
        >>> monitor = MaskMonitor().watch(opt)
        >>> w.grad = torch.tensor([1.0, -1.0, 1.0, 1.0])
        >>> opt.step()
        >>> monitor.ratios
        [0.25]
        >>> row = monitor.rows()[0]
        >>> row["name"], row["weights"], round(row["decay_norm"], 6), round(row["update_norm"], 6)
        ('group 0', 4, 0.05, 0.2)
    """

    def __new__(cls, *args: Any, **kwargs: Any) -> "Self":
        """Check the constructor's arguments before Python does: its error does not say what to do."""
        del kwargs
        if args and cls.__init__ is MaskMonitor.__init__:
            got = f"MaskMonitor takes keyword arguments only, but got {notices.described(args[0])}"
            msg = f"{got}. To watch an optimizer: MaskMonitor().watch(optimizer)"
            raise TypeError(msg)
        return super().__new__(cls)

    def __init__(self, *, per_parameter: bool = False, every: int = 1, start: int = 0, keep: int = 10_000) -> None:
        for what, value, least in (("every", every, 1), ("start", start, 0), ("keep", keep, 1)):
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                msg = f"{what}={value!r:.80}: pass a whole number {'above 0' if least else 'from 0 up'}"
                raise ValueError(msg)
        self.per_parameter = per_parameter
        self.every = every
        self.start = start
        self.keep = keep
        self._steps: dict[int, int] = {}  # of each group
        self._before: dict[int, int] = {}  # the same, before the last step
        self._due = 0  # the number of the step that is to be recorded, else 0
        self._looks: deque[_Look] = deque()
        self._count = 0  # of looks, dropped ones included
        self._rows = 0
        self._apart: list[Part] = []
        self._read = self._written = 0
        self._unread: dict[torch.device, Tensor] = {}  # weights decayed at dropped looks
        self._unread_weights = 0
        self._warned: set[int] = set()
        self._names: dict[str, str] = {}  # of groups and parameters, for names such as "group 0" and "0.3"

    # ---- what the wrapper calls

    def looks_at(self, groups: Iterable[int]) -> bool:
        """Count a step of these groups. Returns whether it is to be reported."""
        groups = list(groups)
        step = 1 + max((self._steps.get(group, self.start) for group in groups), default=self.start)
        self._before = self._steps
        self._steps = self._steps | dict.fromkeys(groups, step)
        self._due = step if (step - 1) % self.every == 0 else 0
        return self._due > 0

    def step_failed(self) -> None:
        """Take back what `looks_at` counted: the step has raised."""
        self._steps, self._due = self._before, 0

    def __call__(self, report: Report) -> None:
        """Record one step."""
        if not self._due and not self.looks_at({part.group for part in report.parts}):
            return
        parts = [self._as_kept(part) for part in report.parts]
        self._looks.append(_Look(self._count, self._due, parts))
        self._due = 0
        self._count += 1
        self._rows += _length(parts)
        while self._rows > self.keep and len(self._looks) > 1 and not capturing():
            self._forget(self._looks.popleft())
        self._apart += parts
        if len(self._apart) >= TOGETHER and not capturing():
            self._put_together()

    # ---- what the user calls

    def watch(self, optimizer: Optimizer, model: Module | None = None) -> "Self":
        """Become the observer of the wrapper in ``optimizer``, and return the monitor.

        ``optimizer`` is a `CautiousDecay`, `CautiousUpdate` or `PNormDecay`, or what accelerate, Trainer, Lightning or
        DeepSpeed made of it. (There, setting ``observer`` does nothing.) With ``model``, rows have the names of its
        parameters, and a group without a ``name`` that of the module in which all its parameters are, such as
        ``blocks.3``. Raises TypeError if there is no wrapper.
        """
        wrapper = _wrapper_in(optimizer)
        wrapper.observer = self
        self._names = _names(wrapper.param_groups, model)
        return self

    def rows(self, *, over_ranks: bool = False) -> list[dict[str, Any]]:
        """A dict of plain numbers for each step and group, or parameter, in order: for ``pandas.DataFrame(rows)``.

        ``over_ranks``: over the weights of all ranks, so all must call this together. Weights of a DTensor that several
        ranks hold count once. For plain parameters, which every rank holds (DDP), leave it off: one rank has the rows.

        Warns once for a group in which less than 1 % of the weights decayed at each of the last 100 looks, if the rows
        of so many are kept.
        """
        return [row.readable() for row in self._merged(over_ranks)]

    def write(self, writer: Callable[[dict[str, Any]], object], *, over_ranks: bool = False) -> None:
        """Call ``writer`` with each of the `rows` that was not yet written."""
        for row in self._merged(over_ranks):
            if row.look >= self._written:
                self._written = row.look  # if the writer raises, it gets this look again
                writer(row.readable())
        self._written = self._count

    def to_csv(self, path: str | PathLike[str], *, over_ranks: bool = False) -> None:
        """Write the `rows` to a CSV file with a header."""
        rows = self.rows(over_ranks=over_ranks)
        with Path(path).open("w", newline="", encoding="utf-8") as file:
            table = csv.DictWriter(file, COLUMNS)
            table.writeheader()
            table.writerows(rows)

    @property
    def ratios(self) -> list[float]:
        """One number for each look: the share of weights that decayed, NaN if the method acted on none.

        This counts the weights on this rank; `read` can take all ranks together. A call with a learning rate of 0 is no
        step and has no number (torch's distributed checkpoints make one). DeepSpeed calls ``step`` once for each param
        group, and each call has a number.
        """
        return [_share(*_counted([look])) for look in self._looks]

    def read(self, *, over_ranks: bool = False) -> float:
        """The share of weights that decayed, over all looks since the last call; NaN if the method acted on none.

        ``over_ranks``: over the weights of all ranks, so all must call this together. Weights that several ranks hold
        count once for each of them.
        """
        active, total = _counted(look for look in self._looks if look.number >= self._read)
        counts = [(active + sum(map(float, self._unread.values())), total + self._unread_weights)]
        self._read, self._unread, self._unread_weights = self._count, {}, 0
        if over_ranks:
            counts = _gathered(counts)
        return _share(sum(active for active, _ in counts), sum(total for _, total in counts))

    # ---- parts of the above

    def _as_kept(self, part: Part) -> Part:
        """The part with a row for each parameter, or one for all. If eta*lam is on a device, it is the last column."""
        sums, eta_lam = part.sums, part.eta_lam
        name = self._names.get(part.name, part.name)
        labels, weights = [self._names.get(label, label) for label in part.labels], part.weights
        if not self.per_parameter:
            sums, labels, weights = sums.sum(0, keepdim=True), [name], [sum(weights)]
        if isinstance(eta_lam, Tensor) and eta_lam.device.type != "cpu":
            sums = torch.cat([sums, eta_lam.to(sums).expand(len(sums), 1)], dim=1)
        else:
            eta_lam = float(eta_lam)
        return replace(part, name=name, sums=sums, labels=labels, weights=weights, eta_lam=eta_lam)

    def _forget(self, look: _Look) -> None:
        """Drop a look; `read` still counts it."""
        self._rows -= _length(look.parts)
        if look.number < self._read:
            return
        for part in look.parts:
            active = part.sums[:, 0].sum()
            self._unread[active.device] = self._unread.get(active.device, 0) + active
            self._unread_weights += sum(part.weights)

    def _put_together(self) -> None:
        alike: dict[Any, list[Part]] = {}
        for part in self._apart:
            alike.setdefault((part.sums.device, part.sums.dtype, part.sums.shape[1]), []).append(part)
        for some in alike.values():
            together = torch.cat([part.sums for part in some])
            for part, sums in zip(some, torch.split(together, [len(part.sums) for part in some]), strict=True):
                part.sums = sums
        self._apart = []

    def _merged(self, over_ranks: bool) -> list[_Row]:
        every = [row for look in self._looks for part in look.parts for row in _rows(look, part, over_ranks)]
        merged: dict[tuple[int, int, str], _Row] = {}
        for row in _gathered(every) if over_ranks else every:
            known = merged.setdefault((row.look, row.part[0], row.label), row)
            if known is not row:
                known.add(row)
        rows = sorted(merged.values(), key=lambda row: (row.look, row.part[0]))
        self._warn(rows)
        return rows

    def _warn(self, rows: Sequence[_Row]) -> None:
        looks: dict[tuple[int, str], dict[int, tuple[float, float]]] = {}
        for row in rows:
            of_group = looks.setdefault(row.part, {})
            active, weights = of_group.get(row.look, (0.0, 0.0))
            of_group[row.look] = active + row.sums[0], weights + row.weights
        for (group, name), of_group in looks.items():
            last = [_share(*counts) for counts in of_group.values()][-LOOKS:]
            if group in self._warned or len(last) < LOOKS or not max(last) < ALMOST_NONE:
                continue
            self._warned.add(group)
            where = notices.param_group(group, name)
            notices.warn(
                f"share_decayed of {where} was below {ALMOST_NONE} at each of the last {LOOKS} looks: the mask is 0 "
                "almost everywhere, so the method does next to nothing there. See whether its weight_norm grows; if it "
                "should not, use plain decay there, or a smaller lr"
            )


def _wrapper_in(optimizer: object) -> Any:
    """The outermost wrapper in an optimizer of an engine, or in one around it, such as Lookahead."""
    layers: list[object] = []
    layer: object = optimizer
    while layer is not None and not any(layer is known for known in layers):
        layers.append(layer)
        # Lightning's optimizer has all attributes of the one inside it, so look inside first.
        inside = _first(layer, "_optimizer", "optimizer")
        if inside is None and "observer" in getattr(layer, "__dict__", {}):
            return layer
        layer = inside or _first(layer, "_base_optimizer", "base_optimizer")
    msg = (
        "MaskMonitor.watch found no CautiousDecay, CautiousUpdate or PNormDecay in "
        f"{' around '.join(type(each).__name__ for each in layers) or None}: pass the optimizer that was wrapped. "
        "A Trainer has none before training begins"
    )
    raise TypeError(msg)


def _first(layer: object, *names: str) -> object:
    return next((inside for name in names if (inside := getattr(layer, name, None)) is not None), None)


def _names(groups: Sequence[dict[str, Any]], model: Module | None) -> dict[str, str]:
    """For the names that reports give to groups and parameters, such as "group 0" and "0.3", those in the model."""
    of_model = {} if model is None else {id(p): name for name, p in model.named_parameters()}
    of_group = [group.get("param_names") or [of_model.get(id(p)) for p in group["params"]] for group in groups]
    names = {f"{i}.{j}": name for i, some in enumerate(of_group) for j, name in enumerate(some) if name}
    modules = [_module(some) if all(some) else "" for some in of_group]
    decaying = [module for module, group in zip(modules, groups, strict=True) if group.get("weight_decay")]
    for i, (module, group) in enumerate(zip(modules, groups, strict=True)):
        among = decaying if group.get("weight_decay") else modules  # often a module's biases are a group without decay
        if module:
            names[f"group {i}"] = module if among.count(module) == 1 else f"{module} (group {i})"
    return names


def _module(names: Sequence[str]) -> str:
    """The innermost module in which all these parameters are, or the parameter if there is one; "" for the model."""
    columns = zip(*(name.split(".") for name in names), strict=False)
    return ".".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))


def _rows(look: _Look, part: Part, over_ranks: bool) -> Iterator[_Row]:
    copies = part.copies if over_ranks else 1
    for label, weights, sums in zip(part.labels, part.weights, part.sums.tolist(), strict=True):
        eta_lam = sums.pop() if isinstance(part.eta_lam, Tensor) else part.eta_lam
        of_one = weights / copies, [number / copies for number in sums]
        yield _Row(look.number, look.step, (part.group, part.name), label, [part.path], eta_lam, *of_one)


def _counted(looks: Iterable[_Look]) -> tuple[float, float]:
    parts = [part for look in looks for part in look.parts]
    return sum(float(part.sums[:, 0].sum()) for part in parts), sum(sum(part.weights) for part in parts)


def _length(parts: Sequence[Part]) -> int:
    return max(1, sum(len(part.labels) for part in parts))


def _gathered(here: list[_T]) -> list[_T]:
    """The entries of all ranks."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return here
    lists = [here] * distributed.get_world_size()
    distributed.all_gather_object(lists, here)
    return list(chain.from_iterable(lists))


def _share(active: float, total: float) -> float:
    return active / total if total else math.nan
