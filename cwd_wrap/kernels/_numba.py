# Functions under register_jitable are compiled, not run: their arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: ANN001, ANN202, PLR0124
"""The rules in numba, on the CPU: one pass over memory, for all tensors of the same types in one call.

`_walk` has the loop, which is the same for every rule. `kernels.Backend` says what each function does.
"""

from collections.abc import Callable, Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from numba.extending import register_jitable
from torch import Tensor

from cwd_wrap import rules
from cwd_wrap.buckets import Bucket, Coming, Stepped, Sums, Whole
from cwd_wrap.kernels import _eager
from cwd_wrap.kernels._eager import _lines, _order, _write_back, copy, vector
from cwd_wrap.kernels._walk import Job, Row, can_find_again, walk_of
from cwd_wrap.kernels._walk import fma as _fma
from cwd_wrap.kernels._walk import number as _number
from cwd_wrap.tensors import Shard
from cwd_wrap.updates import Adam, Lion

__all__ = [
    "cautious_update", "copy", "count_agreeing", "count_nonzero", "decay_along", "decay_from_snapshot", "p_norm_decay",
    "step_whole", "sums_of_step", "vector", "watch",
]  # fmt: skip


# ---- the rules, each the twin of functions in rules.py. The numbers n come from the functions of the backend below.


@register_jitable
def _aligned(u, x, strict):
    moved = (u > 0) & (x > 0) | (u < 0) & (x < 0)
    moved_or_left = (u >= 0) & (x >= 0) | (u <= 0) & (x <= 0)
    return moved if strict else moved_or_left, moved


@register_jitable
def _decay(w, x, mask, eta_lam):
    return w - _number(mask, x) * x * eta_lam


@register_jitable
def _seen(mask, moved, x, step, w):
    return _number(moved, x), _number(mask, x) * x, step, w


@register_jitable
def _along_gradient(x, g, b, c, d, n, strict):
    mask, moved = _aligned(n[0] * g, x, strict)
    return _decay(x, x, mask, n[1]), None, None, None, None, mask, _seen(mask, moved, x, None, None)


@register_jitable
def _along_momentum(x, m, g, c, d, n, strict):
    # Where a and b add up to 1, as torch.lerp computes it, so that near-cancellations come out as the optimizer's own.
    average = _fma(n[0], g - m, m if n[1] > 0 else g)
    u = average if n[2] > 0 else _fma(n[0], g, m)
    mask, moved = _aligned(u, x, strict)
    return _decay(x, x, mask, n[3]), None, None, None, None, mask, _seen(mask, moved, x, None, None)


@register_jitable
def _from_snapshot(w, x, b, c, d, n, strict):
    moved = (w < x) & (x > 0) | (w > x) & (x < 0)
    moved_or_left = (w <= x) & (x >= 0) | (w >= x) & (x <= 0)
    mask = moved if strict else moved_or_left
    new = _decay(w, x, mask, n[0])
    return new, None, None, None, None, mask, _seen(mask, moved, x, x - w, new)


@register_jitable
def _step(w, x, b, c, d, n, strict):
    return None, None, None, None, None, False, (None, None, x - w, w)


@register_jitable
def _nonzero(x, a, b, c, d, n, strict):
    return None, None, None, None, None, x != 0, (None, None, None, None)


@register_jitable
def _agrees(w, x, g, c, d, n, strict):
    mask = (w < x) & (g > 0) | (w > x) & (g < 0)
    return None, None, None, None, None, mask, (None, None, None, None)


@register_jitable
def _cautious_update(w, x, g, c, d, n, strict):
    mask = (w < x) & (g > 0) | (w > x) & (g < 0)
    v = x + n[0] * _number(mask, x) * (w - x)
    return v - n[1] * v, None, None, None, None, mask, (None, None, None, None)


@register_jitable
def _lerp(m, g, weight):
    # The twin of rules.lerp.
    low = weight < 0.5
    return (m if low else g) + (weight if low else weight - _number(True, weight)) * (g - m)


@register_jitable
def _sgd(x, g, b, c, d, n, strict):
    u = n[0] * g
    mask, moved = _aligned(u, x, strict)
    step = n[1] * u
    new = _decay(x - step, x, mask, n[2])
    return new, None, None, None, None, mask, _seen(mask, moved, x, step, new)


@register_jitable
def _sgd_momentum(x, g, m, c, d, n, strict):
    g = n[0] * g
    m = n[3] * m + n[4] * g
    u = g + n[3] * m if n[5] > 0 else m
    mask, moved = _aligned(u, x, strict)
    step = n[1] * u
    new = _decay(x - step, x, mask, n[2])
    return new, None, m, None, None, mask, _seen(mask, moved, x, step, new)


@register_jitable
def _lion(x, g, m, c, d, n, strict):
    g = n[0] * g
    mean = _lerp(m, g, n[3])
    u = _number(mean > 0, x) - _number(mean < 0, x)
    mask, moved = _aligned(u, x, strict)
    step = n[1] * u
    new = _decay(x - step, x, mask, n[2])
    return new, None, _lerp(m, g, n[4]), None, None, mask, _seen(mask, moved, x, step, new)


@register_jitable
def _adam(x, g, m, v, d, n, strict):
    g = n[0] * g
    m = _lerp(m, g, n[3])
    v = n[4] * v + n[5] * g * g
    mask, moved = _aligned(m, x, strict)
    step = n[1] * m / (np.sqrt(v) / n[7] + n[6])
    new = _decay(x - step, x, mask, n[2])
    return new, None, m, v, None, mask, _seen(mask, moved, x, step, new)


@register_jitable
def _amsgrad(x, g, m, v, largest, n, strict):
    g = n[0] * g
    m = _lerp(m, g, n[3])
    v = n[4] * v + n[5] * g * g
    largest = v if (v > largest) | (v != v) else largest  # NaN stays
    mask, moved = _aligned(m, x, strict)
    step = n[1] * m / (np.sqrt(largest) / n[7] + n[6])
    new = _decay(x - step, x, mask, n[2])
    return new, None, m, v, largest, mask, _seen(mask, moved, x, step, new)


_walks = {
    rule.__name__: walk_of(rule)
    for rule in (
        _along_gradient, _along_momentum, _from_snapshot, _step, _nonzero, _agrees, _cautious_update,
        _sgd, _sgd_momentum, _lion, _adam, _amsgrad,
    )
}  # fmt: skip


# ---- the backend


def watch(buckets: Sequence[Bucket]) -> Callable[[], bool] | None:
    """`kernels.Backend.watch`: the tables of the call are kept, too."""
    unchanged = _eager.watch(buckets)
    if unchanged is None:
        return None
    job = buckets[0].kept = Job(_columns(buckets), _counters(buckets))
    return (lambda: job.find_again(_columns(buckets), _counters(buckets))) if can_find_again() else unchanged


def decay_along(buckets: Sequence[Coming], *, strict: bool, count: bool) -> Sums:
    """`kernels.Backend.decay_along`."""
    rows: list[tuple[float, ...]] = []
    for bucket in buckets:
        a, b, eta_lam = bucket.a, bucket.b, float(bucket.eta_lam)
        if bucket.m is None:
            rows.append((1.0 if b > 0 else -1.0, eta_lam))
        elif b == 1 - a:
            rows.append((b if b < 0.5 else b - 1, float(b < 0.5), 1.0, eta_lam))
        else:
            rows.append((b / a, 1.0, 0.0, eta_lam))
    rule = "_along_gradient" if buckets[0].m is None else "_along_momentum"
    return _launch(rule, buckets, _per_bucket(buckets, rows), strict=strict, count=count)


def decay_from_snapshot(buckets: Sequence[Stepped], *, strict: bool, count: bool) -> Sums:
    """`kernels.Backend.decay_from_snapshot`."""
    rows = _per_bucket(buckets, [(float(bucket.eta_lam),) for bucket in buckets])
    return _launch("_from_snapshot", buckets, rows, strict=strict, count=count)


def step_whole(buckets: Sequence[Whole], *, strict: bool, count: bool) -> Sums:
    """`kernels.Backend.step_whole`."""
    return _launch(f"_{buckets[0].update.kernel}", buckets, _of_updates, strict=strict, count=count)


def sums_of_step(buckets: Sequence[Stepped]) -> Tensor:
    """`kernels.Backend.sums_of_step`."""
    return cast("Tensor", _launch("_step", buckets, count=True))


def count_nonzero(x: Sequence[Tensor]) -> Tensor:
    """`kernels.Backend.count_nonzero`."""
    return _counted("_nonzero", (x,))


def count_agreeing(buckets: Sequence[Stepped]) -> Tensor:
    """`kernels.Backend.count_agreeing`."""
    return _counted("_agrees", _columns(buckets))


def cautious_update(buckets: Sequence[Stepped], alpha: Tensor) -> None:
    """`kernels.Backend.cautious_update`."""
    eta_lams = [float(bucket.eta_lam) for bucket in buckets for _ in bucket.w]
    _launch("_cautious_update", buckets, [(1, row) for row in zip(alpha.tolist(), eta_lams, strict=True)])


def p_norm_decay(buckets: Sequence[Stepped], p: float, nonzero: Tensor) -> None:
    """`kernels.Backend.p_norm_decay`, by torch: its power is computed in vectors, numba's is not."""
    _eager.p_norm_decay(buckets, p, nonzero)


def _of_updates(buckets: Sequence[Whole], job: Job) -> list[Row]:
    """The numbers ``n`` of the update's rule: sign of the gradient, lr, eta*lam, and then its own."""
    t = job.steps() if buckets[0].update.counts else []
    first = 0
    rows: list[Row] = []
    for bucket in buckets:
        update = bucket.update
        sign, lr, eta_lam = -1.0 if update.maximize else 1.0, float(bucket.lr), float(bucket.eta_lam)
        if isinstance(update, Adam):
            last = first + len(bucket.w)
            for each in t if len(t) == 1 else t[first:last]:
                eta, root = lr / (1 - update.beta1**each), (1 - update.beta2**each) ** 0.5
                row = (sign, eta, eta_lam, 1 - update.beta1, update.beta2, 1 - update.beta2, update.eps, root)
                rows.append((len(bucket.w) if len(t) == 1 else 1, row))
            first = last
        elif isinstance(update, Lion):
            rows.append((len(bucket.w), (sign, lr, eta_lam, 1 - update.beta1, 1 - update.beta2)))
        else:
            rest = update.momentum, 1 - update.dampening, float(update.nesterov)
            rows.append((len(bucket.w), (sign, lr, eta_lam, *rest)))
    return rows


def _counters(buckets: Sequence[Bucket]) -> Sequence[Tensor]:
    of_buckets = [bucket.steps for bucket in buckets if isinstance(bucket, Whole)]
    return of_buckets[0] if len(of_buckets) == 1 else list(chain.from_iterable(of_buckets))


def _per_bucket(buckets: Sequence[Bucket], rows: Sequence[tuple[float, ...]]) -> list[Row]:
    return [(len(bucket.w), row) for bucket, row in zip(buckets, rows, strict=True)]


def _counted(rule: str, columns: Sequence[Sequence[Tensor]]) -> Tensor:
    lines = _in_lines(columns)
    job = Job(lines)
    job.find(lines)
    return torch.from_numpy(job.per_tensor(job.run(_walks[rule], (), sums=1))[:, 0].astype(np.int64))


def _columns(buckets: Sequence[Bucket]) -> list[Sequence[Tensor]]:
    if len(buckets) == 1:
        return list(buckets[0].columns)
    return [list(chain.from_iterable(parts)) for parts in zip(*(b.columns for b in buckets), strict=True)]


def _launch(
    rule: str,
    buckets: Sequence[Any],
    rows: Sequence[Row] | Callable[[Sequence[Any], Job], Sequence[Row]] = (),
    *,
    strict: bool = False,
    count: bool = False,
) -> Sums:
    """Carry ``rule`` out on all tensors of the buckets. Returns `rules.sums` of each if ``count``.

    ``rows``: the numbers of the rule, or a function that returns them when the tensors have been found.
    """
    job, walk, sums = buckets[0].kept, _walks[rule], 5 if count else 0
    if isinstance(job, Job):  # its tensors are contiguous
        if not job.found:
            job.find(_columns(buckets), _counters(buckets))
        of_chunks = job.run(walk, rows(buckets, job) if callable(rows) else rows, strict=strict, sums=sums)
        return torch.from_numpy(job.per_tensor(of_chunks)) if count else None
    columns = _columns(buckets)
    lines = _in_lines(columns)
    job = Job(lines, _counters(buckets))
    written = [0, *range(2, len(columns))] if isinstance(buckets[0], Whole) else [0]
    draws = [bucket.draws for bucket in buckets if bucket.draws is not None]
    if draws and any(columns[i][0].element_size() == 2 for i in written):
        streams = [rules.stream(each.stream, torch.tensor(each.numbers, device="cpu")).numpy() for each in draws]
        shards = np.array([shard for each in draws for shard in each.shards], np.int64)
        job.draw(np.concatenate(streams), shards.reshape(-1, len(Shard._fields)))
    job.find(lines, _counters(buckets))
    of_chunks = job.run(walk, rows(buckets, job) if callable(rows) else rows, strict=strict, sums=sums)
    for i in written if lines is not columns else ():
        for t, line, weight in zip(columns[i], lines[i], columns[0], strict=True):
            _write_back(t, line, _order(weight))
    return torch.from_numpy(job.per_tensor(of_chunks)) if count else None


def _in_lines(columns: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
    """The columns, with all tensors of a row contiguous and in one order of elements."""
    if all(map(Tensor.is_contiguous, chain.from_iterable(columns))):
        return columns
    return list(zip(*([line.contiguous() for line in _lines(*row)] for row in zip(*columns, strict=True)), strict=True))
