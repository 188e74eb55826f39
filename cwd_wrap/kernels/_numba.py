# Functions under register_jitable are compiled, not run: their arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: ANN001, ANN202, PLR0124
"""The rules in numba, on the CPU: one pass over memory, for all tensors of the same types in one call.

A call works through chunks. A table says which tensor each chunk is of, another where the tensors are. `_walk` makes
the loop over them, the same for every rule. A rule is a function of the values of up to five tensors in one place and
of eight numbers ``n``; it returns what to write into each of the five (None: nothing), whether to count the place, and
what `rules.sums` sums there. The sums are compiled in only if they are asked for.

The threads are Python's, as many as `torch.get_num_threads` says; compiled code releases the interpreter lock. So calls
from several threads and after a fork work, whichever threading library numba finds. `kernels.Backend` says what each
function does.
"""

import contextlib
import functools
import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import chain
from typing import Any, cast

import numpy as np
import torch
from llvmlite import ir
from numba import carray, njit, types
from numba.extending import intrinsic, overload, register_jitable
from torch import Tensor

from cwd_wrap import rules
from cwd_wrap.buckets import Bucket, Coming, Stepped, Sums, Whole
from cwd_wrap.draws import Draws
from cwd_wrap.kernels import _eager
from cwd_wrap.kernels._eager import _lines, _order, _write_back, copy, vector
from cwd_wrap.tensors import Shard
from cwd_wrap.updates import Adam, Lion

__all__ = [
    "cautious_update", "copy", "count_agreeing", "count_nonzero", "decay_along", "decay_from_snapshot", "p_norm_decay",
    "step_whole", "sums_of_step", "vector",
]  # fmt: skip

CHUNK = 1 << 16  # elements
ALONE = 1 << 17  # elements below which a second thread costs more than it brings
TURNS = 8  # turns for each thread in which chunks are handed out: a thread that is slowed down takes fewer

COLUMNS, NUMBERS = 5, 8
_BFLOAT16, _FLOAT16 = types.uint16, types.int16  # numba has neither: these types hold their bits
_TAGS = {
    torch.float32: np.empty(0, np.float32),
    torch.float64: np.empty(0, np.float64),
    torch.bfloat16: np.empty(0, np.uint16),
    torch.float16: np.empty(0, np.int16),
}


# ---- what numba does not have


@intrinsic
def _pointer(typing_context, address, tag):
    """An address as a pointer to elements of the type of the array ``tag``."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(tag.dtype)(address, tag), generate


@intrinsic
def _fma(typing_context, a, b, c):
    """a*b + c, rounded once."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return a(a, b, c), generate


@intrinsic
def _number(typing_context, flag, like):
    """``flag`` as 0 or 1 of the type of ``like``."""

    def generate(context, builder, signature, arguments):
        bit = builder.trunc(arguments[0], ir.IntType(1))
        return builder.uitofp(bit, context.get_value_type(signature.return_type))

    return like(flag, like), generate


@intrinsic
def _wide(typing_context, bits):
    """The float32 that the 16 ``bits`` stand for."""

    def generate(context, builder, signature, arguments):
        if bits == _FLOAT16:
            return builder.fpext(builder.bitcast(arguments[0], ir.HalfType()), ir.FloatType())
        widened = builder.zext(arguments[0], ir.IntType(32))
        return builder.bitcast(builder.shl(widened, ir.Constant(ir.IntType(32), 16)), ir.FloatType())

    return types.float32(bits), generate


@intrinsic
def _narrow(typing_context, value, like):
    """The float32 ``value`` rounded to nearest, as 16 bits of the type of ``like``."""

    def generate(context, builder, signature, arguments):
        if like == _FLOAT16:
            return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
        not_a_number = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        chosen = builder.select(not_a_number, ir.Constant(word, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(chosen, ir.Constant(word, 16)), ir.IntType(16))

    return like(value, like), generate


@intrinsic
def _add_square(typing_context, sums, total, value):
    """``total`` + ``value``**2 if there are ``sums``. LLVM may reorder the additions, so that it can vectorise them."""

    def generate(context, builder, signature, arguments):
        _, total, value = arguments
        if types.none in signature.args[::2]:
            return total
        return builder.fadd(total, builder.fmul(value, value), flags=("reassoc",))

    return total(sums, total, value), generate


def _line(addresses, column, tensor, start, stop, tag):
    """The elements of a chunk in one column; None if there is no such column."""


@overload(_line, inline="always")
def _(addresses, column, tensor, start, stop, tag):
    if tag is types.none:
        return lambda addresses, column, tensor, start, stop, tag: None
    return lambda addresses, column, tensor, start, stop, tag: carray(_pointer(addresses[column, tensor], tag), stop)[
        start:
    ]


def _get(line, i, like):
    """Element ``i`` in the type of ``like``, in which the rule computes; None if there is no such column."""


@overload(_get, inline="always")
def _(line, i, like):
    if line is types.none:
        return lambda line, i, like: None
    if line.dtype in (_BFLOAT16, _FLOAT16):
        return lambda line, i, like: _wide(line[i])
    if like == types.float32:
        return lambda line, i, like: np.float32(line[i])
    return lambda line, i, like: line[i]


def _put(line, i, value, random):
    """Write ``value`` to element ``i``, stochastically rounded where there are ``random`` bits; None writes nothing."""


@overload(_put)  # without inline="always": numba would warn about the branches
def _(line, i, value, random):
    if line is types.none or value is types.none:
        return lambda line, i, value, random: None
    if line.dtype not in (_BFLOAT16, _FLOAT16):

        def write(line, i, value, random):
            line[i] = value

    elif random is types.none:

        def write(line, i, value, random):
            line[i] = _narrow(value, line[i])

    else:
        as_bits = np.uint16 if line.dtype == _BFLOAT16 else np.int16

        def write(line, i, value, random):
            # The twin of rules.stochastic_rounding.
            bits = _narrow(value, line[i])
            nearest = _wide(bits)
            other_bits = as_bits(bits + (1 if abs(value) > abs(nearest) else -1))
            other = _wide(other_bits)
            chance = (value - nearest) / (other - nearest)
            line[i] = other_bits if np.float32(random) * np.float32(2**-16) < chance else bits

    return write


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


# ---- the walk


@register_jitable
def _random(key, place):
    """The twin of rules.random_words and rules.uniform: 16 random bits for each of four tensors."""
    word = np.uint64(key) + np.uint64(place) * np.uint64(0x9E3779B97F4A7C15)
    word = (word ^ (word >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    word = (word ^ (word >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    word ^= word >> np.uint64(31)
    low = np.uint64(0xFFFF)
    return (
        np.uint32(word & low),
        np.uint32((word >> np.uint64(16)) & low),
        np.uint32((word >> np.uint64(32)) & low),
        np.uint32(word >> np.uint64(48)),
    )


def _bits(keys, tensor, place):
    """`_random`, or None for each tensor if there are no keys."""


@overload(_bits, inline="always")
def _(keys, tensor, place):
    if keys is types.none:
        return lambda keys, tensor, place: (None, None, None, None)
    return lambda keys, tensor, place: _random(keys[tensor], place)


def _compiled(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's njit, with a cache on disk if numba finds a folder for one that it may write to."""

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            return njit(cache=True, **options)(function)
        except RuntimeError:
            return njit(**options)(function)

    return compiled


def _walk(rule: Callable[..., Any]) -> Callable[..., None]:
    """The compiled function that applies ``rule`` to the chunks from ``first`` up to, not including, ``last``.

    It fills ``counts`` with the count of each chunk, and ``sums``, if not None, with the other four of `rules.sums`.
    """

    @_compiled(nogil=True, error_model="numpy")
    def walk(addresses, chunks, numbers, tags, strict, keys, counts, sums, first, last):
        for k in range(first, last):
            tensor, start, stop, place = chunks[k, 0], chunks[k, 1], chunks[k, 2], chunks[k, 3]
            row = numbers[tensor]
            n = (row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7])
            line0 = _line(addresses, 0, tensor, start, stop, tags[0])
            line1 = _line(addresses, 1, tensor, start, stop, tags[1])
            line2 = _line(addresses, 2, tensor, start, stop, tags[2])
            line3 = _line(addresses, 3, tensor, start, stop, tags[3])
            line4 = _line(addresses, 4, tensor, start, stop, tags[4])
            count = 0
            moved = decayed = step = weight = _number(False, n[0])
            for i in range(stop - start):
                new0, new1, new2, new3, new4, mask, seen = rule(
                    _get(line0, i, n[0]), _get(line1, i, n[0]), _get(line2, i, n[0]), _get(line3, i, n[0]),
                    _get(line4, i, n[0]), n, strict,
                )  # fmt: skip
                random = _bits(keys, tensor, place + i)
                _put(line0, i, new0, random[0])
                _put(line1, i, new1, None)
                _put(line2, i, new2, random[1])
                _put(line3, i, new3, random[2])
                _put(line4, i, new4, random[3])
                count += mask
                moved = _add_square(sums, moved, seen[0])
                decayed = _add_square(sums, decayed, seen[1])
                step = _add_square(sums, step, seen[2])
                weight = _add_square(sums, weight, seen[3])
            counts[k] = count
            if sums is not None:
                sums[k, 0], sums[k, 1], sums[k, 2], sums[k, 3] = moved, decayed, step, weight

    walk_of: Callable[..., None] = walk
    return walk_of


@_compiled(nogil=True)
def _advance(addresses, tag, steps):
    """Increase the counters at ``addresses`` by one, and note them in ``steps``."""
    for i in range(len(addresses)):
        counter = carray(_pointer(addresses[i], tag), 1)
        counter[0] += 1
        steps[i] = counter[0]


_walks = {
    rule.__name__: _walk(rule)
    for rule in (
        _along_gradient, _along_momentum, _from_snapshot, _step, _nonzero, _agrees, _cautious_update,
        _sgd, _sgd_momentum, _lion, _adam, _amsgrad,
    )
}  # fmt: skip


# ---- the backend


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
    return _launch(rule, buckets, _numbers(buckets, rows), strict=strict, count=count)


def decay_from_snapshot(buckets: Sequence[Stepped], *, strict: bool, count: bool) -> Sums:
    """`kernels.Backend.decay_from_snapshot`."""
    numbers = _numbers(buckets, [(float(bucket.eta_lam),) for bucket in buckets])
    return _launch("_from_snapshot", buckets, numbers, strict=strict, count=count)


def step_whole(buckets: Sequence[Whole], *, strict: bool, count: bool) -> Sums:
    """`kernels.Backend.step_whole`."""
    numbers = _numbers(buckets, [_of_update(bucket) for bucket in buckets])
    if isinstance(buckets[0].update, Adam):
        _correct_bias(buckets, numbers)
    return _launch(f"_{buckets[0].update.kernel}", buckets, numbers, strict=strict, count=count)


def sums_of_step(buckets: Sequence[Stepped]) -> Tensor:
    """`kernels.Backend.sums_of_step`."""
    numbers = _numbers(buckets, [()] * len(buckets))
    return cast("Tensor", _launch("_step", buckets, numbers, count=True))


def count_nonzero(x: Sequence[Tensor]) -> Tensor:
    """`kernels.Backend.count_nonzero`."""
    return _counted("_nonzero", (x,))


def count_agreeing(buckets: Sequence[Stepped]) -> Tensor:
    """`kernels.Backend.count_agreeing`."""
    return _counted("_agrees", _columns(buckets))


def cautious_update(buckets: Sequence[Stepped], alpha: Tensor) -> None:
    """`kernels.Backend.cautious_update`."""
    numbers = _numbers(buckets, [(0.0, float(bucket.eta_lam)) for bucket in buckets])
    numbers[:, 0] = alpha.numpy()
    _launch("_cautious_update", buckets, numbers)


def p_norm_decay(buckets: Sequence[Stepped], p: float, nonzero: Tensor) -> None:
    """`kernels.Backend.p_norm_decay`, by torch: its power is computed in vectors, numba's is not."""
    _eager.p_norm_decay(buckets, p, nonzero)


def _of_update(bucket: Whole) -> tuple[float, ...]:
    """The numbers ``n`` of the update's rule: sign of the gradient, lr, eta*lam, and then its own."""
    update = bucket.update
    common = (-1.0 if update.maximize else 1.0, float(bucket.lr), float(bucket.eta_lam))
    if isinstance(update, Adam):
        return (*common, 1 - update.beta1, update.beta2, 1 - update.beta2, update.eps)
    if isinstance(update, Lion):
        return (*common, 1 - update.beta1, 1 - update.beta2)
    return (*common, update.momentum, 1 - update.dampening, float(update.nesterov))


def _correct_bias(buckets: Sequence[Whole], numbers: np.ndarray) -> None:
    """Increase the counters; divide lr (column 1) by 1 - beta1**t, and write sqrt(1 - beta2**t) to column 7."""
    row = 0
    for bucket in buckets:
        t = np.empty(len(bucket.steps))
        _advance(_addresses(bucket.steps), _TAGS[bucket.steps[0].dtype], t)
        of_bucket = numbers[row : row + len(t)]
        update = bucket.update
        if isinstance(update, Adam):
            of_bucket[:, 1] = float(bucket.lr) / (1 - update.beta1**t)
            of_bucket[:, 7] = (1 - update.beta2**t) ** 0.5
        row += len(t)


def _numbers(buckets: Sequence[Bucket], rows: Sequence[Sequence[float]]) -> np.ndarray:
    """A row of numbers for each tensor, from those for each bucket, in the type that the rule computes in."""
    wide = np.float64 if buckets[0].w[0].dtype == torch.float64 else np.float32
    padded = np.zeros((len(rows), NUMBERS), wide)
    for into, row in zip(padded, rows, strict=True):
        into[: len(row)] = row
    return np.repeat(padded, [len(bucket.w) for bucket in buckets], axis=0)


def _counted(rule: str, columns: Sequence[Sequence[Tensor]]) -> Tensor:
    sizes = _sizes(columns[0])
    numbers = np.zeros((len(sizes), NUMBERS), np.float64 if columns[0][0].dtype == torch.float64 else np.float32)
    counts = _per_tensor(len(sizes), *_run(rule, _in_lines(columns), numbers))[:, 0]
    return torch.from_numpy(counts.astype(np.int64))


def _columns(buckets: Sequence[Bucket]) -> list[Sequence[Tensor]]:
    if len(buckets) == 1:
        return list(buckets[0].columns)
    return [list(chain.from_iterable(parts)) for parts in zip(*(b.columns for b in buckets), strict=True)]


def _launch(
    rule: str, buckets: Sequence[Bucket], numbers: np.ndarray, *, strict: bool = False, count: bool = False
) -> Sums:
    """Carry ``rule`` out on all tensors of the buckets. Returns `rules.sums` of each if ``count``."""
    columns = _columns(buckets)
    written = [0, *range(2, len(columns))] if isinstance(buckets[0], Whole) else [0]
    narrow = any(columns[i][0].element_size() == 2 for i in written)
    draws = [bucket.draws for bucket in buckets if bucket.draws is not None] if narrow else []
    lines = _in_lines(columns)
    of_chunks = _run(rule, lines, numbers, strict, draws, count)
    for i in written if lines is not columns else ():
        for t, line, weight in zip(columns[i], lines[i], columns[0], strict=True):
            _write_back(t, line, _order(weight))
    return torch.from_numpy(_per_tensor(len(columns[0]), *of_chunks)) if count else None


def _in_lines(columns: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
    """The columns, with all tensors of a row contiguous and in one order of elements."""
    if all(map(Tensor.is_contiguous, chain.from_iterable(columns))):
        return columns
    return list(zip(*([line.contiguous() for line in _lines(*row)] for row in zip(*columns, strict=True)), strict=True))


def _run(
    rule: str,
    columns: Sequence[Sequence[Tensor]],
    numbers: np.ndarray,
    strict: bool = False,
    draws: Sequence[Draws] = (),
    count: bool = False,
) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Carry ``rule`` out. Returns for each chunk its tensor, the count, and if ``count`` the other four sums."""
    walk = _walks[rule]
    sizes = _sizes(columns[0])
    keys, chunks = None, _chunks(sizes.tobytes())
    if draws:
        keys = np.concatenate(
            [rules.stream(each.stream, torch.tensor(each.numbers, device="cpu")).numpy() for each in draws]
        )
        shards = np.array([shard for each in draws for shard in each.shards], np.int64).reshape(-1, len(Shard._fields))
        chunks = _chunks(sizes.tobytes(), shards.tobytes())
    counts, sums = np.zeros(len(chunks), np.int64), np.zeros((len(chunks), 4)) if count else None
    addresses = np.stack([_addresses(column) for column in columns])
    if not addresses[:, sizes > 0].all():
        msg = (
            "a weight, gradient or state has no memory (a fake or meta tensor, or one whose storage was freed): "
            "give it memory before the step"
        )
        raise ValueError(msg)
    tags = (*(_TAGS[column[0].dtype] for column in columns), *[None] * (COLUMNS - len(columns)))
    threads = min(torch.get_num_threads(), 1 + int(sizes.sum()) // ALONE)
    if threads == 1:
        walk(addresses, chunks, numbers, tags, strict, keys, counts, sums, 0, len(chunks))
        return chunks[:, 0], counts, sums
    turns = min(threads * TURNS, len(chunks))
    cuts = [len(chunks) * i // turns for i in range(turns + 1)]
    turn = itertools.count()

    def take_turns() -> None:
        while (i := next(turn)) < turns:
            walk(addresses, chunks, numbers, tags, strict, keys, counts, sums, cuts[i], cuts[i + 1])

    others: list[Future[None]] = []
    with contextlib.suppress(RuntimeError):  # while Python exits no thread can be started: this one does all the work
        others.extend(_pool(threads).submit(take_turns) for _ in range(threads - 1))
    take_turns()
    for other in others:
        other.result()
    return chunks[:, 0], counts, sums


def _per_tensor(tensors: int, of: np.ndarray, counts: np.ndarray, sums: np.ndarray | None) -> np.ndarray:
    """A row for each tensor, from those of its chunks."""
    columns = [counts] if sums is None else [counts, *sums.T]
    return np.stack([np.bincount(of, column, tensors) for column in columns], axis=1)


def _sizes(column: Sequence[Tensor]) -> np.ndarray:
    return np.fromiter(map(Tensor.numel, column), np.int64, len(column))


def _addresses(column: Sequence[Tensor]) -> np.ndarray:
    return np.fromiter(map(Tensor.data_ptr, column), np.int64, len(column))


@functools.lru_cache(64)
def _chunks(sizes: bytes, shards: bytes | None = None) -> np.ndarray:
    """For each chunk: tensor, first element, the one after the last, and the place of the first in the whole parameter.

    ``sizes`` are those of the tensors. With their ``shards``, each chunk lies in one run of its shard.
    """
    numel = np.frombuffer(sizes, np.int64)
    tensor: np.ndarray = np.arange(len(numel))
    start: np.ndarray = np.zeros(len(numel), np.int64)
    length, place = numel, start
    if shards is not None:
        offset, run, jump, _ = np.frombuffer(shards, np.int64).reshape(-1, len(Shard._fields)).T
        tensor, number = _cut(numel, np.maximum(run, 1))
        start, length, place = number * run[tensor], run[tensor], offset[tensor] + number * jump[tensor]
    of, number = _cut(length, np.full(len(length), CHUNK))
    ahead = number * CHUNK
    stop = start[of] + np.minimum(ahead + CHUNK, length[of])
    return np.stack([tensor[of], start[of] + ahead, stop, place[of] + ahead], axis=1)


def _cut(sizes: np.ndarray, parts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cut each of ``sizes`` into parts of at most ``parts``: for each part the index of its size, and its number."""
    counts: np.ndarray = -(-sizes // parts)
    of = np.repeat(np.arange(len(sizes)), counts)
    return of, np.arange(len(of)) - np.repeat(np.cumsum(counts) - counts, counts)


@functools.lru_cache(1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads - 1, "cwd_wrap")


if hasattr(os, "register_at_fork"):  # Windows has no fork
    os.register_at_fork(after_in_child=_pool.cache_clear)  # a child has none of its parent's threads
