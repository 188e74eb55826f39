# Functions under register_jitable are compiled, not run: their arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
"""The rules in numba, on the CPU: one pass over memory, for all tensors of the same types in one call.

`_walk` has the loop, which is the same for every rule. `kernels.Backend` says what each function does.
"""

import contextlib
import hashlib
import inspect
import sys
from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from numba.extending import register_jitable
from torch import Tensor

from cwd_wrap import rules
from cwd_wrap.kernels import _eager
from cwd_wrap.kernels import bind as bound
from cwd_wrap.kernels._eager import _lines, _order, _write_back, copy, vector
from cwd_wrap.kernels._walk import COLUMNS, OF_METHOD, Job, Row, can_find_again, power, walk_of
from cwd_wrap.kernels._walk import fma as _fma
from cwd_wrap.kernels._walk import number as _number
from cwd_wrap.kernels._walk import where as _where
from cwd_wrap.kernels.bind import bind
from cwd_wrap.kernels.buckets import Bucket, Coming, Stepped, Sums, Whole, joined
from cwd_wrap.tensors import Shard

__all__ = [
    "cautious_update", "copy", "count_agreeing", "count_nonzero", "decay_along", "decay_from_snapshot", "p_norm_decay",
    "step_whole", "sums_of_step", "vector", "watch",
]  # fmt: skip


# ---- the rules, each made of formulas of rules.py. The numbers n come from the functions of the backend below.


@register_jitable
def _one(like):
    return _number(True, like)


@register_jitable
def _root(a):
    return np.sqrt(a)


@register_jitable
def _divide(a, b):
    return a / b


_WORDS = {
    "where": _where, "number": _number, "one": _one, "root": _root, "divide": _divide, "power": power, "fused": _fma,
}  # fmt: skip
_BOUND = bind(_WORDS, register_jitable(forceinline=True))
_aligned, _towards, _decayed = _BOUND["aligned"], _BOUND["moved_towards_zero"], _BOUND["decayed"]
_heading, _agreeing, _rescaled, _shrunk, _taken, _share = (
    _BOUND[name] for name in ("heading", "agrees", "rescaled", "shrunk", "taken", "share")
)


@register_jitable
def _masks(mask_of, u, x, strict):
    # The mask, and the strict one. Without a branch in the loop, which would cost up to a tenth.
    moved = mask_of(u, x, True)
    return _where(strict, moved, mask_of(u, x, False)), moved


@register_jitable
def _seen(mask, moved, x, step, w, own):
    return _number(moved, x), _share(x, mask, own) * x, step, w


@register_jitable
def _along_gradient(x, g, b, c, d, n, strict):
    mask, moved = _masks(_aligned, n[0] * g, x, strict)
    return _decayed(x, x, mask, n[1], n[10]), None, None, None, None, mask, _seen(mask, moved, x, None, None, n[10])


@register_jitable
def _along_momentum(x, m, g, c, d, n, strict):
    mask, moved = _masks(_aligned, _heading(m, g, n[0], n[2]), x, strict)
    return _decayed(x, x, mask, n[1], n[10]), None, None, None, None, mask, _seen(mask, moved, x, None, None, n[10])


@register_jitable
def _from_snapshot(w, x, b, c, d, n, strict):
    mask, moved = _masks(_towards, x, w, strict)
    new = _decayed(w, x, mask, n[1], n[10])
    return new, None, None, None, None, mask, _seen(mask, moved, x, x - w, new, n[10])


@register_jitable
def _step(w, x, b, c, d, n, strict):
    return None, None, None, None, None, False, (None, None, x - w, w)


@register_jitable
def _nonzero(x, a, b, c, d, n, strict):
    return None, None, None, None, None, x != 0, (None, None, None, None)


@register_jitable
def _agrees(w, x, g, c, d, n, strict):
    return None, None, None, None, None, _agreeing(w, x, g), (None, None, None, None)


@register_jitable
def _cautious_update(w, x, g, c, d, n, strict):
    mask = _agreeing(w, x, g)
    return _rescaled(x, x - w, mask, n[9], n[1]), None, None, None, None, mask, (None, None, None, None)


@register_jitable
def _p_norm_decay(w, x, b, c, d, n, strict):
    return _shrunk(w, x, n[9] * n[1], n[10]), None, None, None, None, x != 0, (None, None, None, None)


def _in_one_pass(update: Callable[..., Any], method: Callable[..., Any]) -> Callable[..., Any]:
    """The rule that makes an ``update`` with a ``method`` of `rules.METHODS`."""

    @register_jitable(forceinline=True)
    def rule(x, g, a, b, c, n, strict):
        down = n[0] * g
        u, step, a_new, b_new, c_new = update(down, a, b, c, n[2], n[3], n[4], n[5], n[6], n[7], n[8])
        decays, moved = _masks(_aligned, u, x, strict)
        new, mask = method(x, down, u, step, decays, n[1], n[9], n[10])
        return new, None, a_new, b_new, c_new, mask, _seen(mask, moved, x, step, new, n[10])

    made: Callable[..., Any] = rule
    return made


def _counted_before(update: Callable[..., Any]) -> Callable[..., Any]:
    """The rule that counts where an ``update`` is to go down the gradient, and writes nothing."""

    @register_jitable
    def rule(x, g, a, b, c, n, strict):
        down = n[0] * g
        u = update(down, a, b, c, n[2], n[3], n[4], n[5], n[6], n[7], n[8])[0]
        return None, None, None, None, None, _aligned(u, down, True), (None, None, None, None)

    made: Callable[..., Any] = rule
    return made


def _averaging(update: Callable[..., Any]) -> Callable[..., Any]:
    """The rule that decays inside of a schedule-free ``update``."""

    @register_jitable
    def rule(x, g, a, b, c, n, strict):
        u = n[0] * g
        mask, moved = _masks(_aligned, u, x, strict)
        new, step, a_new, b_new, c_new = update(
            u, x, _taken(x, mask, n[1], n[10]), a, b, c, n[2], n[3], n[4], n[5], n[6], n[7], n[8]
        )
        return new, None, a_new, b_new, c_new, mask, _seen(mask, moved, x, step, new, n[10])

    made: Callable[..., Any] = rule
    return made


_walks: dict[str, Callable[..., int]] = {}
_MADE_OF = ""  # without source files numba caches nothing
with contextlib.suppress(OSError):
    _SOURCES = "".join(map(inspect.getsource, (rules, bound, sys.modules[__name__])))
    _MADE_OF = hashlib.sha256(_SOURCES.encode()).hexdigest()


def _add_walk(name: str, rule: Callable[..., Any]) -> None:
    """Make the walk of a ``rule``.

    numba's cache on disk notices changes of the file with the walk. Of the rule it knows the name, so this says what
    the rule is made of.
    """
    rule.__name__ = rule.__qualname__ = f"{name}_{_MADE_OF}"
    globals()[rule.__name__] = rule
    _walks[name] = walk_of(name, rule)


for _name, _rule in (
    ("along_gradient", _along_gradient), ("along_momentum", _along_momentum), ("from_snapshot", _from_snapshot),
    ("step", _step), ("nonzero", _nonzero), ("agrees", _agrees), ("cautious_update", _cautious_update),
    ("p_norm_decay", _p_norm_decay),
    *(
        (f"{_update.__name__}_{_method.__name__}", _in_one_pass(_BOUND[_update.__name__], _BOUND[_method.__name__]))
        for _update in rules.UPDATES for _method in rules.METHODS
    ),
    *((f"{_update.__name__}_agrees", _counted_before(_BOUND[_update.__name__])) for _update in rules.UPDATES),
    *((f"{_update.__name__}_with_decay", _averaging(_BOUND[_update.__name__])) for _update in rules.AVERAGING),
):  # fmt: skip
    _add_walk(_name, _rule)


# ---- the backend

_FIVE = 5
"""So many `rules.sums` are made for a monitor."""


def watch(buckets: Sequence[Bucket]) -> Callable[[], bool] | None:
    """`kernels.Backend.watch`: the tables of the call are kept, too."""
    unchanged = _eager.watch(buckets)
    if unchanged is None:
        return None
    columns, counters = _columns(buckets), _counters(buckets)
    job = buckets[0].kept = Job(columns, counters)
    if not can_find_again():
        return unchanged
    one, many = buckets[0], len(buckets) > 1
    for row, column in (*enumerate(columns), *enumerate(counters, COLUMNS)):
        job.take(row, column, lasts=not many)

    def found() -> bool:
        for row, column in enumerate(_columns(buckets) if many else one.columns):
            job.take(row, column, lasts=not many)
        return job.find_again()

    return found


def decay_along(buckets: Sequence[Coming], *, count: bool, strict: bool = False, leak: float = 0.0) -> Sums:
    """`kernels.Backend.decay_along`."""
    rows: list[tuple[float, ...]] = []
    for bucket in buckets:
        a, b, eta_lam = bucket.a, bucket.b, float(bucket.eta_lam)
        if bucket.m is None:
            rows.append((1.0 if b > 0 else -1.0, eta_lam))
        else:
            rows.append((b, eta_lam, 1.0) if b == 1 - a else (b / a, eta_lam, 0.0))
    rule = "along_gradient" if buckets[0].m is None else "along_momentum"
    rows_of = _per_bucket(buckets, rows)
    return _launch(rule, buckets, rows_of, strict=strict, sums=_FIVE * count, of_method=(1.0, leak))


def decay_from_snapshot(buckets: Sequence[Stepped], *, count: bool, strict: bool = False, leak: float = 0.0) -> Sums:
    """`kernels.Backend.decay_from_snapshot`."""
    rows = _per_bucket(buckets, [(0.0, float(bucket.eta_lam)) for bucket in buckets])
    return _launch("from_snapshot", buckets, rows, strict=strict, sums=_FIVE * count, of_method=(1.0, leak))


def step_whole(
    buckets: Sequence[Whole],
    *,
    count: bool,
    strict: bool = False,
    method: str = "with_decay",
    factor: Tensor | None = None,
    own: float = 0.0,
) -> Sums:
    """`kernels.Backend.step_whole`."""
    of_method = 1.0 if factor is None else factor, own
    rule = f"{buckets[0].update.formula}_{method}"
    return _launch(rule, buckets, _of_updates, strict=strict, sums=_FIVE * count, of_method=of_method)


def sums_of_step(buckets: Sequence[Stepped]) -> Tensor:
    """`kernels.Backend.sums_of_step`."""
    return cast("Tensor", _launch("step", buckets, sums=_FIVE))


def count_nonzero(x: Sequence[Tensor]) -> Tensor:
    """`kernels.Backend.count_nonzero`."""
    return _counted("nonzero", (x,))


def count_agreeing(buckets: Sequence[Stepped] | Sequence[Whole]) -> Tensor:
    """`kernels.Backend.count_agreeing`."""
    first = buckets[0]
    if isinstance(first, Stepped):
        return _counted("agrees", _columns(buckets))
    counts = _launch(f"{first.update.formula}_agrees", buckets, _before_updates, sums=1, writes=False)
    return cast("Tensor", counts)[:, 0].long()


def cautious_update(buckets: Sequence[Stepped], alpha: Tensor) -> None:
    """`kernels.Backend.cautious_update`."""
    rows = _per_bucket(buckets, [(0.0, float(bucket.eta_lam)) for bucket in buckets])
    _launch("cautious_update", buckets, rows, of_method=(alpha, 0.0))


def p_norm_decay(buckets: Sequence[Stepped], p: float, nonzero: Tensor) -> None:
    """`kernels.Backend.p_norm_decay`."""
    rows = _per_bucket(buckets, [(0.0, float(bucket.eta_lam)) for bucket in buckets])
    wide = torch.promote_types(buckets[0].w[0].dtype, torch.float32)
    _launch("p_norm_decay", buckets, rows, of_method=((nonzero != 0).to(wide) * p, p - 2))


def _of_updates(buckets: Sequence[Whole], job: Job) -> list[Row]:
    """The numbers of the update's rule; ``job`` is to count."""
    rows, after = _before_and_after(buckets, job)
    job.count(after)
    return rows


def _before_updates(buckets: Sequence[Whole], job: Job) -> list[Row]:
    """The numbers of the update's rule. ``job`` writes the counters as it has read them."""
    return _before_and_after(buckets, job)[0]


def _before_and_after(buckets: Sequence[Whole], job: Job) -> tuple[list[Row], list[tuple[float, ...]]]:
    """The numbers ``n`` of the update's rule: sign of the gradient, eta*lam, and its own. The counters after it."""
    before = job.counters()
    if len(before) == 1 and len(buckets) == 1:  # nearly always
        update, bucket = buckets[0].update, buckets[0]
        ((numbers, after),), _ = update.steps(float(bucket.lr), before)
        return [(len(bucket.w), (-1.0 if update.maximize else 1.0, float(bucket.eta_lam), *numbers))], [after]
    alike = len(before) == 1
    rows: list[Row] = []
    counted: list[tuple[float, ...]] = []
    first = 0
    for bucket in buckets:
        last = first + len(bucket.w)
        sign = -1.0 if bucket.update.maximize else 1.0
        steps, taken = bucket.update.steps(float(bucket.lr), before if alike else before[first:last])
        of_steps = [(sign, float(bucket.eta_lam), *numbers) for numbers, _ in steps]
        rows += [(len(bucket.w), of_steps[0])] if len(steps) == 1 else [(1, of_steps[k]) for k in taken]
        counted += [steps[k][1] for k in (taken * len(bucket.w) if alike else taken)]
        first = last
    return rows, counted


def _counters(buckets: Sequence[Bucket]) -> list[Sequence[Tensor]]:
    of_buckets = [bucket.counters for bucket in buckets if isinstance(bucket, Whole)]
    return [joined(columns) for columns in zip(*of_buckets, strict=True)]


def _per_bucket(buckets: Sequence[Bucket], rows: Sequence[tuple[float, ...]]) -> list[Row]:
    return [(len(bucket.w), row) for bucket, row in zip(buckets, rows, strict=True)]


def _counted(rule: str, columns: Sequence[Sequence[Tensor]]) -> Tensor:
    lines = _in_lines(columns)
    job = Job(lines)
    job.find(lines)
    return torch.from_numpy(job.per_tensor(job.run(_walks[rule], (), sums=1))[:, 0].astype(np.int64))


def _columns(buckets: Sequence[Bucket]) -> list[Sequence[Tensor]]:
    return [joined(columns) for columns in zip(*(bucket.columns for bucket in buckets), strict=True)]


def _launch(
    rule: str,
    buckets: Sequence[Any],
    rows: Sequence[Row] | Callable[[Sequence[Any], Job], Sequence[Row]] = (),
    *,
    strict: bool = False,
    sums: int = 0,
    of_method: tuple[float | Tensor, float] | None = None,
    writes: bool = True,
) -> Sums:
    """Carry ``rule`` out on all tensors of the buckets. Returns the first 0, 1 or 5 ``sums`` of each.

    ``rows``: the numbers of the rule, or a function that returns them when the tensors have been found. ``of_method``:
    the factor of each tensor, and the method's own number.
    """
    job, walk = buckets[0].kept, _walks[rule]
    columns: Sequence[Sequence[Tensor]] = ()
    lines: Sequence[Sequence[Tensor]] = ()
    written: list[int] = []
    if not isinstance(job, Job):  # else its tensors are contiguous
        columns = _columns(buckets)
        lines = _in_lines(columns)
        job = Job(lines, _counters(buckets))
        if writes:
            written = [0, *range(2, len(columns))] if isinstance(buckets[0], Whole) else [0]
        draws = [bucket.draws for bucket in buckets if bucket.draws is not None]
        if draws and any(columns[i][0].element_size() == 2 for i in written):
            streams = [rules.stream(each.stream, torch.tensor(each.numbers, device="cpu")).numpy() for each in draws]
            shards = np.array([shard for each in draws for shard in each.shards], np.int64)
            job.draw(np.concatenate(streams), shards.reshape(-1, len(Shard._fields)))
        job.find(lines, _counters(buckets))
    elif not job.found:
        job.find(_columns(buckets), _counters(buckets))
    if of_method is not None:
        job.numbers[:, OF_METHOD], job.numbers[:, OF_METHOD + 1] = of_method
    of_chunks = job.run(walk, rows(buckets, job) if callable(rows) else rows, strict=strict, sums=sums)
    for i in written if lines is not columns else ():
        for t, line, weight in zip(columns[i], lines[i], columns[0], strict=True):
            _write_back(t, line, _order(weight))
    return torch.from_numpy(job.per_tensor(of_chunks)) if sums else None


def _in_lines(columns: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
    """The columns, with all tensors of a row contiguous and in one order of elements."""
    if all(map(Tensor.is_contiguous, chain.from_iterable(columns))):
        return columns
    return list(zip(*([line.contiguous() for line in _lines(*row)] for row in zip(*columns, strict=True)), strict=True))
