# Functions under triton.jit are compiled, not run: their arguments have no Python types, and constants are in capitals.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: ANN001, ANN202, ARG001, N803, SIM102
"""The rules in Triton: one launch for all tensors of one device and the same types, whatever their number.

A launch works through chunks. A table on the device says which tensor and which bucket each chunk is of, another where
the tensors are; both are sent again only if they have changed. One launch is for tensors that begin at multiples of 16
bytes, another for the rest. What changes from step to step (eta*lam, the learning rate, the counters) is read
from device memory: no value is compiled in, and each replay of a CUDA graph reads the new ones.

`_sweep` is the kernel for every rule. A decay is a function of the values of up to three tensors in one place, of
eta*lam and of two coefficients; it returns what to write over the first tensor, and whether to count it. An update is a
function of the gradient and of up to three tensors of state, and returns what its twin in rules.py returns; a method of
rules.py makes the new weight of it. A schedule-free update takes the weight and its decay, too, and makes the new
weight itself. A rule that needs a number for each whole tensor takes two launches: one counts, and the other reads a
number that was computed from the counts. The sums for a monitor are made in the launch that decays, and compiled in
only if they are asked for.

What is written is rounded as in rules.py: no multiplication is fused with an addition, and float32 roots and quotients
are those of the IEEE standard.
"""

import contextlib
import math
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import chain, repeat
from operator import attrgetter
from typing import Any, TypeAlias, TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from cwd_wrap.bases.updates import Numbers, Update
from cwd_wrap.draws import Draws
from cwd_wrap.kernels import _eager
from cwd_wrap.kernels._eager import NO_MEMORY, ByType, _order, _write_back
from cwd_wrap.kernels._tables import plain, table
from cwd_wrap.kernels.bind import NUMBERS, bind
from cwd_wrap.kernels.buckets import Bucket, Coming, Stepped, Sums, Whole, joined

BLOCK = 1024  # elements that a program handles at once: 8 a thread, so that 16-bit types too move 128 bits at a time
THREADS = 128
CHUNK = 1 << 14  # elements that a program handles in all: its 32 bytes in the table are at most 0.1 % of theirs
ALIGNMENT = 16  # bytes
ROW = 4 + 1 + NUMBERS + 2 + 1
"""Words in a row of the table of rows: the addresses of eta*lam and of a learning rate on the device, or 0; their
values, or 0.0 where there is an address; the sign of the gradient; the rule's numbers; log2(beta) of two averages; the
method's own number.
Addresses are int64, the rest float64. Where a learning rate has an address, the first number is computed for 1."""

_COLUMNS = ("FIRST", "SECOND", "THIRD", "FOURTH", "FIFTH")
_DTYPE = attrgetter("dtype")
_TYPES = ByType(
    {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}
)

_Function = TypeVar("_Function", bound=Callable[..., object])
_Row: TypeAlias = tuple[float | Tensor, float | Tensor, Sequence[float]]
"""What the tensors of a bucket share: eta*lam, the learning rate, the coefficients."""

_UNALIGNED = bytes(low % ALIGNMENT != 0 for low in range(256))
"""For each lowest byte of an address, 1 if the address is not a multiple of `ALIGNMENT`, else 0."""


# ---- the decays, each made of formulas of rules.py


@triton.jit
def _where(condition, a, b):
    return tl.where(condition, a, b)


@triton.jit
def _number_of(flag, like):
    return flag.to(like.dtype)


@triton.jit
def _one(like):
    return 1


@triton.jit
def _root(a):
    return tl.sqrt(a) if a.dtype == tl.float64 else tl.sqrt_rn(a)


@triton.jit
def _divide(a, b):
    return a / b if b.dtype == tl.float64 else tl.div_rn(a, b)


@triton.jit
def _power(a, exponent):
    # Of 0 the logarithm is -inf, and the power inf. CUDA's logarithm takes denormals for 0, so they are scaled.
    denormal = a < 1.1754943508222875e-38
    logarithm = tl.log2(tl.where(denormal, a * 16777216.0, a)) - tl.where(denormal, 24.0, 0.0)
    return tl.where(exponent == 0, 1.0, tl.exp2(exponent * logarithm))


@triton.jit
def _fused(a, b, c):
    return tl.fma(a, b, c)


@triton.jit
def _abs(a):
    return tl.abs(a)


_WORDS = {
    "where": _where, "number": _number_of, "one": _one, "root": _root, "divide": _divide, "power": _power,
    "fused": _fused, "abs": _abs,
}  # fmt: skip
_SEEN = {"tl": tl, "Tensor": tl.tensor, "Maybe": tl.tensor, "bool": tl.tensor}  # names that Triton looks up, no more
_BOUND = bind({**_WORDS, **_SEEN}, triton.jit)
_aligned, _towards, _decayed = _BOUND["aligned"], _BOUND["moved_towards_zero"], _BOUND["decayed"]
_heading, _agreeing, _rescaled, _shrunk, _taken, _share = (
    _BOUND[name] for name in ("heading", "agrees", "rescaled", "shrunk", "taken", "share")
)


@triton.jit
def _along_gradient(x, g, z, eta_lam, sign, average, leak, STRICT: tl.constexpr):
    mask = _aligned(sign * g, x, STRICT)
    return _decayed(x, x, mask, eta_lam, leak), mask


@triton.jit
def _along_momentum(x, m, g, eta_lam, slope, average, leak, STRICT: tl.constexpr):
    mask = _aligned(_heading(m, g, slope, average), x, STRICT)
    return _decayed(x, x, mask, eta_lam, leak), mask


@triton.jit
def _from_snapshot(w, x, z, eta_lam, factor, n1, leak, STRICT: tl.constexpr):
    mask = _towards(x, w, STRICT)
    return _decayed(w, x, mask, eta_lam, leak), mask


@triton.jit
def _step(w, x, z, eta_lam, factor, n1, own, STRICT: tl.constexpr):
    return w, tl.zeros_like(w) != 0


@triton.jit
def _copy(to, source, z, eta_lam, factor, n1, own, STRICT: tl.constexpr):
    return source, tl.zeros_like(source) == 0


@triton.jit
def _agrees(w, x, g, eta_lam, factor, n1, own, STRICT: tl.constexpr):
    return w, _agreeing(w, x, g)


@triton.jit
def _nonzero(x, y, z, eta_lam, factor, n1, own, STRICT: tl.constexpr):
    return x, x != 0


@triton.jit
def _cautious_update(w, x, g, eta_lam, alpha, n1, own, STRICT: tl.constexpr):
    mask = _agreeing(w, x, g)
    return _rescaled(x, x - w, mask, alpha, eta_lam), mask


@triton.jit
def _p_norm_decay(w, x, z, eta_lam, p, n1, exponent, STRICT: tl.constexpr):
    return _shrunk(w, x, p * eta_lam, exponent), x != 0  # p is 0 for a tensor that was 0 as a whole


# ---- the walk


@triton.jit
def _mix(z):
    # The twin of rules.mix, on uint64.
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB
    return z ^ (z >> 31)


@triton.jit
def _stream(of, number):
    # The twin of rules.stream.
    return _mix(of + number.to(tl.uint64) * 0x9E3779B97F4A7C15)


@triton.jit
def _round_stochastically(wide, random, FLOAT16: tl.constexpr):
    # The twin of rules.stochastic_rounding for ``random`` * 2**-16, by the bits that are cut off: ``lost`` of 2**16.
    bits = wide.to(tl.int32, bitcast=True)
    spare: tl.constexpr = 0x1FFF if FLOAT16 else 0xFFFF
    largest: tl.constexpr = 65504.0 if FLOAT16 else 3.3895313892515355e38
    lost = (bits & spare) * (8 if FLOAT16 else 1)
    outwards = _outwards(lost, random, (bits & (spare + 1)) != 0)
    rounded = ((bits & ~spare) + tl.where(outwards, spare + 1, 0)).to(tl.float32, bitcast=True)
    if FLOAT16:  # below 2**-14 its numbers are 2**-24 apart
        steps = tl.abs(wide) * 16777216.0
        whole = tl.floor(steps)
        up = _outwards((steps - whole) * 65536.0, random.to(tl.float32), whole * 0.5 != tl.floor(whole * 0.5))
        whole += tl.where(up, 1.0, 0.0)
        small = whole * tl.where(bits < 0, -5.9604644775390625e-08, 5.9604644775390625e-08)
        rounded = tl.where(tl.abs(wide) < 6.103515625e-05, small, rounded)
    return tl.where(tl.abs(wide) <= largest, rounded, wide)  # NaN and overflow are left to rounding to nearest


@triton.jit
def _outwards(lost, random, odd):
    # Take the nearest of the two neighbours (at a tie the even one), unless random < the chance of the other.
    nearest = (lost > 32768) | ((lost == 32768) & odd)
    return tl.where(nearest, random >= 65536 - lost, random < lost)


@triton.jit
def _pointer(addresses, at, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    # Triton 3.0 makes a pointer type of the dtype of a tensor, but not of a constant.
    pointer = tl.load(addresses + at).to(tl.pointer_type(tl.zeros([1], TYPE).dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _number(addresses, numbers, at, TYPE: tl.constexpr):
    """A number of a row (see `ROW`) in float64: the one at its address, if there is one, else its value."""
    there = tl.load(_pointer(addresses, at, TYPE, False), mask=tl.load(addresses + at) != 0, other=0.0)
    return there.to(tl.float64) + tl.load(numbers + at + 2)


@triton.jit
def _load(pointer, at, inside, WIDE: tl.constexpr):
    return tl.load(pointer + at, mask=inside).to(WIDE)


@triton.jit
def _store(pointer, value, at, inside, words, COLUMN: tl.constexpr, WRITE: tl.constexpr):
    if words is not None:
        if (pointer.dtype.element_ty == tl.float16) | (pointer.dtype.element_ty == tl.bfloat16):
            random = ((words >> 16 * COLUMN) & 0xFFFF).to(tl.int32)
            value = _round_stochastically(value, random, pointer.dtype.element_ty == tl.float16)
    if WRITE:
        tl.store(pointer + at, value.to(pointer.dtype.element_ty), mask=inside)


@triton.jit
def _update(
    x, g, z, v, largest, eta_lam, n0, n1, n2, n3, n4, n5, n6, factor, own,
    RULE: tl.constexpr, METHOD: tl.constexpr, STRICT: tl.constexpr,
):  # fmt: skip
    """(new x, direction, mask, eta*u, new state) of an update and its method."""
    if METHOD is None:
        mask = _aligned(g, x, STRICT)
        new, step, z, v, largest = RULE(g, x, _taken(x, mask, eta_lam, own), z, v, largest, n0, n1, n2, n3, n4, n5, n6)
        return new, g, mask, step, z, v, largest
    else:  # noqa: RET505 - Triton compiles one of the two
        direction, step, z, v, largest = RULE(g, z, v, largest, n0, n1, n2, n3, n4, n5, n6)
        mask = _aligned(direction, x, STRICT)
        new, mask = METHOD(x, g, direction, step, mask, eta_lam, factor, own)
        return new, direction, mask, step, z, v, largest


@triton.jit
def _piece(
    first,
    second,
    third,
    fourth,
    fifth,
    at,
    inside,
    eta_lam,
    sign,
    n0,
    n1,
    n2,
    n3,
    n4,
    n5,
    n6,
    factor,
    own,
    key,
    offset,
    run,
    jump,
    active,
    towards,
    decayed,
    stepped,
    weights,
    RULE: tl.constexpr,
    UPDATE: tl.constexpr,
    METHOD: tl.constexpr,
    WRITE: tl.constexpr,
    WIDE: tl.constexpr,
    STRICT: tl.constexpr,
    SUMS: tl.constexpr,
):
    """Carry RULE out on a block. Returns the running sums of `rules.sums` with those of the block added."""
    words = None
    if key is not None:  # at the place in the whole parameter, of which this may be a shard
        words = _stream(key, offset + (at if run is None else at // run * jump + at % run))
    x = _load(first, at, inside, WIDE)
    y = _load(second, at, inside, WIDE) if second is not None else x
    z = _load(third, at, inside, WIDE) if third is not None else None
    if UPDATE:
        v = _load(fourth, at, inside, WIDE) if fourth is not None else None
        largest = _load(fifth, at, inside, WIDE) if fifth is not None else None
        before, y = x, sign * y
        x, direction, mask, step, z, v, largest = _update(
            x, y, z, v, largest, eta_lam, n0, n1, n2, n3, n4, n5, n6, factor, own, RULE, METHOD, STRICT
        )
        if SUMS:
            moved = _aligned(direction, before, True)
        if third is not None:
            _store(third, z, at, inside, words, 1, WRITE)
        if fourth is not None:
            _store(fourth, v, at, inside, words, 2, WRITE)
        if fifth is not None:
            _store(fifth, largest, at, inside, words, 3, WRITE)
    else:
        before = y if SUMS == 5 else x
        step = before - x
        if SUMS:
            _, moved = RULE(x, y, z, eta_lam, factor, n1, own, True)
        x, mask = RULE(x, y, z, eta_lam, factor, n1, own, STRICT)
    _store(first, x, at, inside, words, 0, WRITE)
    active = _add(active, mask, inside)
    if SUMS:
        towards = _add(towards, moved, inside)
        decayed = _add_square(decayed, _share(before, mask, own) * before, inside)
        stepped = _add_square(stepped, step, inside)
        weights = _add_square(weights, x, inside)
    return active, towards, decayed, stepped, weights


@triton.jit
def _add_square(total, value, inside):
    return _add(total, value * value, inside)


@triton.jit
def _add(total, value, inside):
    value = value.to(total.dtype)
    return total + (value if inside is None else tl.where(inside, value, 0))


@triton.jit
def _add_to(sums, active, towards, decayed, stepped, weights, SUMS: tl.constexpr):
    tl.atomic_add(sums, tl.sum(active).to(tl.float64))
    tl.atomic_add(sums + 1, tl.sum(towards).to(tl.float64))
    tl.atomic_add(sums + 2, tl.sum(decayed).to(tl.float64))
    if SUMS == 5:
        tl.atomic_add(sums + 3, tl.sum(stepped).to(tl.float64))
        tl.atomic_add(sums + 4, tl.sum(weights).to(tl.float64))


@triton.jit(do_not_specialize=["addresses", "tensors", "chunks", "rows", "numbers", "steps"])
def _sweep(
    addresses,
    tensors,
    chunks,
    rows,
    numbers,
    steps,
    counts,
    streams,
    shards,
    per_tensor,
    RULE: tl.constexpr,
    UPDATE: tl.constexpr,
    METHOD: tl.constexpr,
    WRITE: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    FOURTH: tl.constexpr,
    FIFTH: tl.constexpr,
    ROW: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STRICT: tl.constexpr,
    COUNT: tl.constexpr,
    SUMS: tl.constexpr,
    OWN: tl.constexpr,
    IN_RUNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Carry RULE out on chunk number ``program_id``.

    ``addresses``: columns of ``tensors`` each, of the types FIRST to FIFTH; if WRITE, the first is written, and the
    third to the fifth if RULE is an UPDATE, from which METHOD makes the new weight. Without a METHOD it is a
    schedule-free one.
    ``chunks``: for each its tensor, its first element, the one after its last, and its row.
    ``rows`` and ``numbers``: the same table of rows (see `ROW`) as addresses and as float64.
    ``steps``: None, or the address of each tensor's counter from before the step, for an update that only corrects
    biases (see `Update.corrects_bias`); the last two numbers of the row are log2(beta) of its two averages.
    ``streams``: None rounds to nearest; otherwise the stream there makes the random numbers that round, and ``shards``
    holds for each tensor its number and the first three fields of `tensors.Shard`. IN_RUNS: some have several runs.
    ``per_tensor``: None, or a number for each tensor: the factor of METHOD, or in place of the first of a decay.
    OWN: do the rows have the method's own number (a leak, an exponent)? Else it is 0, and the kernel is simpler.
    SUMS: 0, or how many of `rules.sums` are known, and ``counts`` holds five numbers for each tensor: 3 before the
    step, when RULE decays along a direction, else 5.
    """
    chunk = chunks + tl.program_id(0).to(tl.int64) * 4
    tensor, start, stop, row = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3) * ROW
    start = tl.multiple_of(start, BLOCK)
    eta_lam = _number(rows, numbers, row, WIDE).to(WIDE)
    of_rule = numbers + row + 4
    sign, n0, n1 = tl.load(of_rule).to(WIDE), tl.load(of_rule + 1), tl.load(of_rule + 2)
    if UPDATE:
        n0 *= _number(rows, numbers, row + 1, WIDE)
    if steps is not None:
        # In float64, 2**y is right to an ulp or two, so 1 - beta**t is off by about 1e-16: where it is 0.001, by 1e-13
        # of itself.
        t = tl.load(_pointer(steps, tensor, tl.float32, False)).to(tl.float64) + 1
        n0 /= 1 - tl.exp2(t * tl.load(of_rule + 8))
        n1 *= tl.sqrt(1 - tl.exp2(t * tl.load(of_rule + 9)))
    n0, n1 = n0.to(WIDE), n1.to(WIDE)
    own_factor = 1.0 if UPDATE else n0
    factor = tl.load(per_tensor + tensor) if per_tensor is not None else own_factor
    own = tl.load(of_rule + 10).to(WIDE) if OWN else tl.full([], 0, WIDE)
    n2, n3 = tl.load(of_rule + 3).to(WIDE), tl.load(of_rule + 4).to(WIDE)
    n4, n5 = tl.load(of_rule + 5).to(WIDE), tl.load(of_rule + 6).to(WIDE)
    n6 = tl.load(of_rule + 7).to(WIDE)
    column = tl.cast(tensors, tl.int64)
    first = _pointer(addresses, tensor, FIRST, ALIGNED)
    second = _pointer(addresses + column, tensor, SECOND, ALIGNED) if SECOND is not None else None
    third = _pointer(addresses + column * 2, tensor, THIRD, ALIGNED) if THIRD is not None else None
    fourth = _pointer(addresses + column * 3, tensor, FOURTH, ALIGNED) if FOURTH is not None else None
    fifth = _pointer(addresses + column * 4, tensor, FIFTH, ALIGNED) if FIFTH is not None else None
    key, offset, run, jump = None, None, None, None
    if streams is not None:
        of_tensor = shards + tl.cast(tensor, tl.int64) * 4
        key = _stream(tl.load(streams).to(tl.uint64), tl.load(of_tensor))
        offset = tl.load(of_tensor + 1)
        if IN_RUNS:  # this costs a division at each place
            run, jump = tl.load(of_tensor + 2), tl.load(of_tensor + 3)
    active, towards = tl.zeros([BLOCK], tl.int32), tl.zeros([BLOCK], tl.int32)
    decayed, stepped, weights = tl.zeros([BLOCK], WIDE), tl.zeros([BLOCK], WIDE), tl.zeros([BLOCK], WIDE)
    rest = stop - (stop - start) % BLOCK
    for block in range(start, rest, BLOCK):  # no mask here: it would split the wide loads
        at = block + tl.arange(0, BLOCK)
        active, towards, decayed, stepped, weights = _piece(
            first, second, third, fourth, fifth, at, None, eta_lam, sign, n0, n1, n2, n3, n4, n5, n6,
            factor, own, key, offset, run, jump, active, towards, decayed, stepped, weights,
            RULE, UPDATE, METHOD, WRITE, WIDE, STRICT, SUMS,
        )  # fmt: skip
    if rest < stop:
        at = rest + tl.arange(0, BLOCK)
        active, towards, decayed, stepped, weights = _piece(
            first, second, third, fourth, fifth, at, at < stop, eta_lam, sign, n0, n1, n2, n3, n4, n5, n6,
            factor, own, key, offset, run, jump, active, towards, decayed, stepped, weights,
            RULE, UPDATE, METHOD, WRITE, WIDE, STRICT, SUMS,
        )  # fmt: skip
    if SUMS:
        _add_to(counts + tensor * 5, active, towards, decayed, stepped, weights, SUMS)
    elif COUNT:
        tl.atomic_add(counts + tensor, tl.sum(active).to(tl.int64))


# ---- the launch

watch = _eager.watch


def _uncompiled(function: _Function) -> _Function:
    """Keep ``function`` out of torch.compile, where tensors are fake and have no addresses."""
    uncompiled: _Function = torch.compiler.disable(function)
    return uncompiled


@_uncompiled
def decay_along(buckets: Sequence[Coming], *, count: bool, strict: bool = False, leak: float = 0.0) -> Sums:
    """`kernels.Backend.decay_along`, in one launch."""
    by_momentum = bool(buckets) and buckets[0].m is not None
    rows = [
        _row(bucket.eta_lam, *(_slope(bucket) if by_momentum else (math.copysign(1, bucket.b),)), own=leak)
        for bucket in buckets
    ]
    rule = _along_momentum if by_momentum else _along_gradient
    flags: dict[str, Any] = {"strict": strict, "count": count, "sums": 3, "own": leak != 0}
    return _launch(rule, _columns(buckets), rows, draws=_drawn(buckets), **flags)


@_uncompiled
def decay_from_snapshot(buckets: Sequence[Stepped], *, count: bool, strict: bool = False, leak: float = 0.0) -> Sums:
    """`kernels.Backend.decay_from_snapshot`, in one launch."""
    columns = [(bucket.w, bucket.x) for bucket in buckets]
    rows = [_row(bucket.eta_lam, own=leak) for bucket in buckets]
    flags: dict[str, Any] = {"strict": strict, "count": count, "sums": 5, "own": leak != 0}
    return _launch(_from_snapshot, columns, rows, draws=_drawn(buckets), **flags)


@_uncompiled
def step_whole(
    buckets: Sequence[Whole],
    *,
    count: bool,
    strict: bool = False,
    method: str = "with_decay",
    factor: Tensor | None = None,
    own: float = 0.0,
) -> Sums:
    """`kernels.Backend.step_whole`, in one launch before those that increase the counters."""
    if not buckets:
        return None
    flags: dict[str, Any] = {"strict": strict, "count": count, "sums": 5, "draws": _drawn(buckets)}
    flags["own"] = own != 0 or method == "with_p_norm"  # an exponent of 0 needs no kernel of its own
    sums, steps, after = _launch_updates(buckets, _BOUND[method], own, per_tensor=factor, **flags)
    if steps:
        torch._foreach_add_(list(steps), 1)
        return sums
    for bucket, new in zip(buckets, after, strict=True):
        _eager.set_counters(bucket, new)
    return sums


def _launch_updates(
    buckets: Sequence[Whole], method: Any, number: float, **options: Any
) -> tuple[Sums, Sequence[Tensor], list[list[Numbers]]]:
    """Launch the update of the buckets with a ``method`` and its own ``number``.

    Returns what `_launch` returns, the counters that the kernel has read, and those after the step if it has read none.
    """
    rows: list[_Row] = []
    row_of: list[int] = []
    after: list[list[Numbers]] = []
    in_kernel = _counts_in_kernel(buckets[0])
    for bucket in buckets:
        before = [(math.inf,)] * len(bucket.w) if in_kernel else _eager.counters(bucket)
        lr, eta = (1.0, bucket.lr) if _eager.on_a_device(bucket.lr) else (float(bucket.lr), 1.0)
        distinct, taken = bucket.update.steps(lr, before)
        row_of += [len(rows) + k for k in taken]
        rows += [(bucket.eta_lam, eta, _coefficients(bucket.update, numbers, number)) for numbers, _ in distinct]
        after.append([distinct[k][1] for k in taken])
    steps = joined([bucket.counters[0] for bucket in buckets]) if in_kernel else ()
    rule = _BOUND[buckets[0].update.formula]
    options |= {"update": True, "method": None if buckets[0].update.averages else method}
    return _launch(rule, _columns(buckets), rows, row_of=row_of, steps=steps, **options), steps, after


def _counts_in_kernel(bucket: Whole) -> bool:
    """Does the kernel read the counters? Those of a device can only be read there, without a wait."""
    return bucket.update.corrects_bias and bucket.counters[0][0].device == bucket.w[0].device


def _coefficients(update: Update, numbers: Numbers, own: float) -> tuple[float, ...]:
    """What the kernel of ``update`` reads from a row: see `ROW`."""
    betas = update.options[:2] if update.corrects_bias else (1.0, 1.0)
    logarithms = (math.log2(beta) if beta else -math.inf for beta in betas)
    sign = -1.0 if update.maximize else 1.0
    return (sign, *numbers, *[0.0] * (NUMBERS - len(numbers)), *logarithms, own)


@_uncompiled
def sums_of_step(buckets: Sequence[Stepped]) -> Tensor:
    """`kernels.Backend.sums_of_step`, in one launch."""
    columns, rows = [(bucket.w, bucket.x) for bucket in buckets], [_row(0.0)] * len(buckets)
    return cast("Tensor", _launch(_step, columns, rows, count=True, sums=5, write=False))


@_uncompiled
def copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """`kernels.Backend.copy`, in one launch."""
    _launch(_copy, [(to, source)], [_row(0.0)])


@_uncompiled
def count_nonzero(x: Sequence[Tensor]) -> Tensor:
    """`kernels.Backend.count_nonzero`, in one launch."""
    return _counts(_nonzero, [(x,)])


@_uncompiled
def count_agreeing(buckets: Sequence[Stepped] | Sequence[Whole]) -> Tensor:
    """`kernels.Backend.count_agreeing`, in one launch."""
    of_updates = [bucket for bucket in buckets if isinstance(bucket, Whole)]
    if not of_updates:
        return _counts(_agrees, _columns(buckets))
    return cast("Tensor", _launch_updates(of_updates, _BOUND["with_caution"], 0.0, count=True, write=False)[0])


@_uncompiled
def vector(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`kernels.Backend.vector`, without a launch."""
    with _guard(device):
        return table(plain, device, _bytes(list(numbers))).view(torch.int64)


@_uncompiled
def cautious_update(buckets: Sequence[Stepped], alpha: Tensor) -> None:
    """`kernels.Backend.cautious_update`, in one launch."""
    _launch(_cautious_update, _columns(buckets), [_row(bucket.eta_lam) for bucket in buckets], per_tensor=alpha)


@_uncompiled
def p_norm_decay(buckets: Sequence[Stepped], p: float, nonzero: Tensor) -> None:
    """`kernels.Backend.p_norm_decay`, in one launch."""
    columns = [(bucket.w, bucket.x) for bucket in buckets]
    rows = [_row(bucket.eta_lam, own=p - 2) for bucket in buckets]
    wide = torch.promote_types(buckets[0].w[0].dtype, torch.float32)
    _launch(_p_norm_decay, columns, rows, per_tensor=(nonzero != 0).to(wide) * p, own=True)


def _slope(bucket: Coming) -> tuple[float, float]:
    """(b, 1) where a*m + b*g is an average of the two, else (b/a, 0)."""
    return (bucket.b, 1.0) if bucket.b == 1 - bucket.a else (bucket.b / bucket.a, 0.0)


def _row(eta_lam: float | Tensor, *numbers: float, own: float = 0.0) -> _Row:
    """The row of a decay, which has no sign, no learning rate and no averages."""
    return eta_lam, 0.0, (1.0, *numbers, *[0.0] * (NUMBERS + 2 - len(numbers)), own)


def _columns(buckets: Sequence[Bucket]) -> list[tuple[Sequence[Tensor], ...]]:
    return [bucket.columns for bucket in buckets]


def _drawn(buckets: Sequence[Bucket]) -> list[Draws]:
    return [bucket.draws for bucket in buckets if bucket.draws is not None]


def _counts(rule: Any, of_buckets: Sequence[tuple[Sequence[Tensor], ...]]) -> Tensor:
    """For each tensor, in how many places ``rule`` says to count; nothing is written."""
    counts = _launch(rule, of_buckets, [_row(0.0)] * len(of_buckets), count=True, write=False)
    return cast("Tensor", counts)


def _launch(
    rule: Any,
    of_buckets: Sequence[tuple[Sequence[Tensor], ...]],
    rows: Sequence[_Row],
    *,
    row_of: list[int] | None = None,
    update: bool = False,
    method: Any = None,
    steps: Sequence[Tensor] = (),
    strict: bool = False,
    count: bool = False,
    sums: int = 0,
    draws: Sequence[Draws] = (),
    write: bool = True,
    per_tensor: Tensor | None = None,
    own: bool = False,
) -> Tensor | None:
    """Carry ``rule`` out on the columns of each bucket. Return counts or `rules.sums` if asked.

    ``row_of`` is the row of each tensor; if it is None, there is one for each bucket. ``method``: that of an update.
    It writes to the first column, and to the third and those after it if it is an ``update``. ``per_tensor`` is the
    factor of the method, or in place of the first coefficient of a decay. ``own``: do the
    rows have the method's own number?
    """
    columns = [joined(column) for column in zip(*of_buckets, strict=True)]
    sizes = list(map(Tensor.numel, columns[0])) if columns else []
    if not sizes:
        return None
    first = columns[0][0]
    device = first.device
    counts = _zeros(len(sizes), device, sums) if count else None
    if not any(sizes):
        return counts
    lines = _in_order(columns)
    types = [_TYPES[line[0].dtype] for line in lines]
    wide = torch.float64 if first.dtype == torch.float64 else torch.float32
    written = [0, *(range(2, len(columns)) if update else ())] if write else []
    addresses = _bytes(_pointers(lines))
    each_its_own = chain.from_iterable(repeat(i, len(of_one[0])) for i, of_one in enumerate(of_buckets))
    row_of = list(each_its_own) if row_of is None else row_of
    if {*map(Tensor.get_device, steps), *map(_DTYPE, steps)} != {first.get_device(), torch.float32}:
        steps = [step.to(device, torch.float32) for step in steps]
    counters = _bytes(list(map(Tensor.data_ptr, steps)))
    with _guard(device):
        rows = [(_on_device(eta_lam, device, wide), _on_device(lr, device, wide), more) for eta_lam, lr, more in rows]
        of_rows = table(plain, device, b"".join(map(_packed, rows)))
        streams, shards = None, None
        if draws and any(lines[column][0].element_size() == 2 for column in written):
            streams = draws[0].stream  # on the device: no sync, and each replay of a graph draws new numbers
            places = (
                (number, *place[:3]) for each in draws for number, place in zip(each.numbers, each.shards, strict=True)
            )
            shards = table(plain, device, _bytes(list(chain.from_iterable(places)))).view(torch.int64)
        for aligned, chosen in _by_alignment(addresses, len(sizes)):
            chunks = table(_chunks, device, _bytes(sizes), _bytes(row_of), chosen)
            if not len(chunks):
                continue
            _sweep[(len(chunks),)](
                table(plain, device, addresses).view(torch.int64),
                len(sizes),
                chunks,
                of_rows.view(torch.int64),
                of_rows.view(torch.float64),
                table(plain, device, counters).view(torch.int64) if counters else None,
                counts,
                streams,
                shards,
                per_tensor,
                RULE=rule,
                UPDATE=update,
                METHOD=method,
                WRITE=write,
                **dict(zip(_COLUMNS, [*types, None, None, None, None], strict=False)),
                ROW=ROW,
                WIDE=_TYPES[wide],
                ALIGNED=aligned,
                STRICT=strict,
                COUNT=count,
                SUMS=sums if count else 0,
                OWN=own,
                IN_RUNS=any(shard.run < shard.numel for each in draws for shard in each.shards),
                BLOCK=BLOCK,
                num_warps=THREADS // (64 if torch.version.hip else 32),
                enable_fp_fusion=False,  # w - mask * x * eta_lam is to round as in rules.py
            )
    for column in written if lines is not columns else ():
        for t, line, first in zip(columns[column], lines[column], columns[0], strict=True):
            if line is not t:
                _write_back(t, line, _order(first))
    return counts


def _pointers(lines: Sequence[Sequence[Tensor]]) -> list[int]:
    """The addresses, one column after the other. Raises ValueError if one that is read is 0."""
    pointers = list(map(Tensor.data_ptr, chain.from_iterable(lines)))
    if 0 in pointers and any(t.numel() and not t.data_ptr() for t in chain.from_iterable(lines)):
        raise ValueError(NO_MEMORY)
    return pointers


def _zeros(tensors: int, device: torch.device, sums: int) -> Tensor:
    """Room for the counts of the tensors, or for their sums."""
    shape, dtype = ((tensors, 5), torch.float64) if sums else ((tensors,), torch.int64)
    return torch.zeros(shape, dtype=dtype, device=device)


def _in_order(columns: Sequence[Sequence[Tensor]]) -> Sequence[Sequence[Tensor]]:
    """The columns, with each row contiguous and in one order of elements: views of dense tensors, copies of others."""
    if all(map(Tensor.is_contiguous, chain.from_iterable(columns))):
        return columns
    lines = [list(column) for column in columns]
    for i, row in enumerate(zip(*columns, strict=True)):
        if not all(map(Tensor.is_contiguous, row)):
            order = _order(row[0])
            for line, t in zip(lines, row, strict=True):
                line[i] = t.permute(order).contiguous()
    return lines


def _guard(device: torch.device) -> AbstractContextManager[object]:
    """Make ``device`` the current one, on which Triton launches, whatever device the tensors are on."""
    if device.type == "cpu":  # the interpreter
        return contextlib.nullcontext()
    guard: AbstractContextManager[object] = getattr(torch, device.type).device(device)
    return guard


def _on_device(scalar: float | Tensor, device: torch.device, wide: torch.dtype) -> float | Tensor:
    """A number, or a tensor of type ``wide`` on ``device``. Tensors on an accelerator are not read: that would wait."""
    if isinstance(scalar, Tensor) and (scalar.device.type != "cpu" or device.type == "cpu"):
        return scalar.to(device, wide, non_blocking=True)
    return float(scalar)


def _packed(row: _Row) -> bytes:
    """A row as it is in the table, see `ROW`."""
    *scalars, numbers = row
    addresses = array("q", (scalar.data_ptr() if isinstance(scalar, Tensor) else 0 for scalar in scalars))
    values = array("d", (0.0 if isinstance(scalar, Tensor) else scalar for scalar in scalars))
    values.extend(numbers)
    return addresses.tobytes() + values.tobytes()


# ---- the tables


def _chunks(sizes: bytes, rows: bytes, chosen: bytes) -> Tensor:
    """For each chunk of the ``chosen`` tensors: tensor, first element, the one after the last, row of the tensor."""
    numel, row = plain(sizes).view(torch.int64), plain(rows).view(torch.int64)
    chunks = (numel + CHUNK - 1) // CHUNK * plain(chosen)
    tensor = torch.repeat_interleave(torch.arange(len(numel), device="cpu"), chunks)
    number = torch.arange(len(tensor), device="cpu") - (chunks.cumsum(0) - chunks)[tensor]
    start = number * CHUNK
    return torch.stack([tensor, start, torch.minimum(start + CHUNK, numel[tensor]), row[tensor]], dim=1)


def _by_alignment(addresses: bytes, tensors: int) -> list[tuple[bool, bytes]]:
    """The aligned tensors and the others, each as (aligned, a byte for each tensor: 1 if it is one of these).

    ``addresses`` holds one column after the other; a tensor is aligned if it is in every column. No Python loop goes
    through the addresses.
    """
    unaligned = addresses[::8].translate(_UNALIGNED)  # lowest bytes: machines with such devices are little-endian
    if 1 not in unaligned:
        return [(True, b"\1" * tensors)]
    in_any = 0
    for start in range(0, len(unaligned), tensors):
        in_any |= int.from_bytes(unaligned[start : start + tensors], "little")
    all_ones = int.from_bytes(b"\1" * tensors, "little")
    some = [(True, in_any ^ all_ones), (False, in_any)]
    return [(aligned, chosen.to_bytes(tensors, "little")) for aligned, chosen in some if chosen]


def _bytes(numbers: list[int]) -> bytes:
    return array("q", numbers).tobytes()  # reading an iterator takes twice as long as a list
