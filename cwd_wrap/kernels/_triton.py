# Functions under triton.jit are compiled, not run: their arguments have no Python types, and constants are in capitals.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: ANN001, ANN202, ARG001, N803
"""The rules in Triton: one launch for all tensors of one device and the same types, whatever their number.

A launch works through chunks. A table on the device says which tensor each chunk is of, another where the tensors are;
both are sent up again only when something has moved. What changes from step to step, eta*lam above all, is read from
device memory, so that no value is ever compiled in and a CUDA graph sees new ones.

`_sweep` is the walk, the same for every rule. A rule is a function of the values of up to three tensors in one
place, of two coefficients and of a strength; it returns what to write, and whether to count it. A rule that needs a
number of each whole tensor takes two launches: one that counts, and one that reads what was made of the counts.
"""

import contextlib
import functools
from array import array
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from itertools import chain
from typing import Any, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from cwd_wrap.kernels._eager import _lines, _write_back

BLOCK = 1024  # elements that a program handles at once: 8 a thread, so that 16-bit types too move 128 bits at a time
THREADS = 128
CHUNK = 1 << 14  # elements that a program handles in all: its 32 bytes in the table are 0.05 % of them or less
ALIGNMENT = 16  # bytes
TABLES = 64  # kept on the device at once; an optimizer needs three to six for each combination of types

_TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

_recorded: list[Tensor] = []
"""Pinned memory that CUDA graphs copy from when they are replayed. Nobody says when a graph is gone, so it stays."""


# ---- the rules, each the twin of a function in _eager.py


@triton.jit
def _decay(w, x, mask, eta_lam):
    return w - mask.to(w.dtype) * x * eta_lam


@triton.jit
def _aligned(u, x, STRICT: tl.constexpr):
    # As rules.py: by comparison alone, since the product underflows.
    return (u > 0) & (x > 0) | (u < 0) & (x < 0) if STRICT else (u >= 0) & (x >= 0) | (u <= 0) & (x <= 0)


@triton.jit
def _along_gradient(x, g, z, sign, beta, eta_lam, STRICT: tl.constexpr):
    mask = _aligned(sign * g, x, STRICT)
    return _decay(x, x, mask, eta_lam), mask


@triton.jit
def _along_momentum(x, m, g, slope, is_average, eta_lam, STRICT: tl.constexpr):
    # Where a and b add up to 1, as torch.lerp computes it, so that near-cancellations come out as the optimizer's own.
    low = tl.abs(slope) < 0.5
    average = tl.fma(tl.where(low, slope, slope - 1), g - m, tl.where(low, m, g))
    u = tl.where(is_average != 0, average, tl.fma(slope, g, m))
    mask = _aligned(u, x, STRICT)
    return _decay(x, x, mask, eta_lam), mask


@triton.jit
def _from_snapshot(w, x, z, alpha, beta, eta_lam, STRICT: tl.constexpr):
    mask = (w < x) & (x > 0) | (w > x) & (x < 0) if STRICT else (w <= x) & (x >= 0) | (w >= x) & (x <= 0)
    return _decay(w, x, mask, eta_lam), mask


@triton.jit
def _copy(x, y, z, alpha, beta, strength, STRICT: tl.constexpr):
    return x, tl.zeros_like(x) == 0


@triton.jit
def _agrees(w, x, g, alpha, beta, strength, STRICT: tl.constexpr):
    return w, (w < x) & (g > 0) | (w > x) & (g < 0)


@triton.jit
def _nonzero(x, y, z, alpha, beta, strength, STRICT: tl.constexpr):
    return x, x != 0


@triton.jit
def _cautious_update(w, x, g, alpha, beta, eta_lam, STRICT: tl.constexpr):
    w, mask = _agrees(w, x, g, alpha, beta, eta_lam, STRICT)
    v = x + alpha * mask.to(w.dtype) * (w - x)
    return v - eta_lam * v, mask


@triton.jit
def _p_norm_decay(w, x, z, p, exponent, eta_lam, STRICT: tl.constexpr):
    # p is 0 for a tensor that was 0 as a whole. Of |x| = 0 the logarithm is -inf, and the power inf.
    strength = p * eta_lam
    power = tl.where(exponent == 0, 1.0, tl.exp2(exponent * tl.log2(tl.abs(x))))
    return tl.where(strength == 0, w, w / (1 + strength * power)), strength != 0


@triton.jit
def _round_stochastically(wide, seed, tensor, block, FLOAT16: tl.constexpr, BLOCK: tl.constexpr):
    # The twin of rules.stochastic_rounding: add random bits below the last one that is kept, and cut them off.
    # Each counter (place, block, tensor) gives the random words of four neighbours.
    lane = tl.arange(0, BLOCK // 4)
    zero = lane * 0
    a, b, c, d = tl.philox(seed, lane, (zero + block // BLOCK).to(tl.int32), (zero + tensor).to(tl.int32), zero)
    random = tl.reshape(tl.join(tl.join(a, b), tl.join(c, d)), [BLOCK])
    bits = wide.to(tl.int32, bitcast=True)
    spare: tl.constexpr = 0x1FFF if FLOAT16 else 0xFFFF
    largest: tl.constexpr = 65504.0 if FLOAT16 else 3.3895313892515355e38
    rounded = ((bits + (random & spare).to(tl.int32)) & ~spare).to(tl.float32, bitcast=True)
    if FLOAT16:  # below 2**-14 its numbers are 2**-24 apart
        steps = tl.abs(wide) * 16777216.0
        whole = tl.floor(steps)
        whole += tl.where((random >> 8).to(tl.float32) < (steps - whole) * 16777216.0, 1.0, 0.0)
        small = whole * tl.where(bits < 0, -5.9604644775390625e-08, 5.9604644775390625e-08)
        rounded = tl.where(tl.abs(wide) < 6.103515625e-05, small, rounded)
    return tl.where(tl.abs(wide) <= largest, rounded, wide)  # NaN and what overflows as always


# ---- the walk


@triton.jit
def _pointer(addresses, tensor, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    # Triton 3.0 makes no pointer type of a constant, but of the type of a tensor.
    pointer = tl.load(addresses + tensor).to(tl.pointer_type(tl.zeros([1], TYPE).dtype))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _piece(
    out,
    first,
    second,
    third,
    at,
    inside,
    alpha,
    beta,
    strength,
    seed,
    tensor,
    block,
    RULE: tl.constexpr,
    WIDE: tl.constexpr,
    STRICT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    x = tl.load(first + at, mask=inside).to(WIDE)
    y = tl.load(second + at, mask=inside).to(WIDE) if second is not None else x
    z = tl.load(third + at, mask=inside).to(WIDE) if third is not None else x
    new, mask = RULE(x, y, z, alpha, beta, strength, STRICT)
    if seed is not None:
        new = _round_stochastically(new, seed, tensor, block, out.dtype.element_ty == tl.float16, BLOCK)
    if out is not None:
        tl.store(out + at, new.to(out.dtype.element_ty), mask=inside)
    return mask


@triton.jit(do_not_specialize=["addresses", "tensors", "chunks", "strengths", "coefficients"])
def _sweep(
    addresses,
    tensors,
    chunks,
    strengths,
    coefficients,
    counts,
    seeds,
    per_tensor,
    RULE: tl.constexpr,
    OUT: tl.constexpr,
    FIRST: tl.constexpr,
    SECOND: tl.constexpr,
    THIRD: tl.constexpr,
    COLUMN: tl.constexpr,
    WIDE: tl.constexpr,
    ALIGNED: tl.constexpr,
    STRICT: tl.constexpr,
    COUNT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Carry RULE out on chunk number ``program_id``.

    ``addresses``: columns of ``tensors`` each, first those of the inputs; what is written is in column COLUMN, and
    nothing is where OUT is None.
    ``chunks``: for each its tensor, its first element, the one after its last, and its row. For each row,
    ``coefficients`` holds two numbers and the strength, unless ``strengths`` has the address of one. ``seeds``: None
    rounds to nearest; otherwise the one seed there makes the random numbers that round. ``per_tensor``: None, or
    a number for each tensor, in place of the first coefficient.
    """
    chunk = chunks + tl.program_id(0).to(tl.int64) * 4
    tensor, start, stop, row = tl.load(chunk), tl.load(chunk + 1), tl.load(chunk + 2), tl.load(chunk + 3)
    start = tl.multiple_of(start, BLOCK)
    alpha = tl.load(coefficients + row * 3) if per_tensor is None else tl.load(per_tensor + tensor)
    beta = tl.load(coefficients + row * 3 + 1)
    number = tl.load(coefficients + row * 3 + 2)
    address = tl.load(strengths + row)
    strength = tl.load(address.to(coefficients.dtype), mask=address != 0, other=number)
    column = tl.cast(tensors, tl.int64)
    out = _pointer(addresses + column * COLUMN, tensor, OUT, ALIGNED) if OUT is not None else None
    first = _pointer(addresses, tensor, FIRST, ALIGNED)
    second = _pointer(addresses + column, tensor, SECOND, ALIGNED) if SECOND is not None else None
    third = _pointer(addresses + column * 2, tensor, THIRD, ALIGNED) if THIRD is not None else None
    seed = tl.load(seeds) if seeds is not None else None
    active = tl.zeros([BLOCK], tl.int32)
    rest = stop - (stop - start) % BLOCK
    for block in range(start, rest, BLOCK):  # no mask here: it would split the wide loads
        at = block + tl.arange(0, BLOCK)
        mask = _piece(
            out, first, second, third, at, None, alpha, beta, strength, seed, tensor, block, RULE, WIDE, STRICT, BLOCK
        )
        if COUNT:
            active += mask.to(tl.int32)
    if rest < stop:
        at = rest + tl.arange(0, BLOCK)
        inside = at < stop
        mask = _piece(
            out, first, second, third, at, inside, alpha, beta, strength, seed, tensor, rest, RULE, WIDE, STRICT, BLOCK
        )
        if COUNT:
            active += (mask & inside).to(tl.int32)
    if COUNT:
        tl.atomic_add(counts + tensor, tl.sum(active).to(tl.int64))


# ---- the launch


@torch.compiler.disable  # addresses mean nothing while tensors are fake
def decay_along(
    w: Sequence[Tensor],
    m: Sequence[Tensor | None],
    g: Sequence[Tensor],
    a: Sequence[float],
    b: Sequence[float],
    eta_lam: Sequence[float | Tensor],
    *,
    strict: bool,
    count: bool,
    stochastic: bool = False,
) -> int | Tensor:
    """What `_eager.decay_along` does, in one launch; ``m`` is None for all tensors or for none."""
    pairs = list(zip(a, b, strict=True))
    flags: dict[str, Any] = {"strict": strict, "count": count, "stochastic": stochastic}
    if m and m[0] is None:
        return _sum(_launch(_along_gradient, (w, g), pairs, _sign_of, eta_lam, **flags))
    momenta = cast("Sequence[Tensor]", m)
    return _sum(_launch(_along_momentum, (w, momenta, g), pairs, _slope_of, eta_lam, **flags))


@torch.compiler.disable
def decay_from_snapshot(
    w: Sequence[Tensor],
    x: Sequence[Tensor],
    eta_lam: Sequence[float | Tensor],
    *,
    strict: bool,
    count: bool,
    stochastic: bool = False,
) -> int | Tensor:
    """What `_eager.decay_from_snapshot` does, in one launch."""
    pairs = [(0.0, 0.0)] * len(w)
    flags: dict[str, Any] = {"strict": strict, "count": count, "stochastic": stochastic}
    return _sum(_launch(_from_snapshot, (w, x), pairs, _as_it_is, eta_lam, **flags))


@torch.compiler.disable
def copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """to <- source, in one launch; one entry a tensor, all of one device and type."""
    _launch(_copy, (source,), [(0.0, 0.0)] * len(to), _as_it_is, [0.0] * len(to), to=to)


@torch.compiler.disable
def count_nonzero(x: Sequence[Tensor]) -> Tensor:
    """What `_eager.count_nonzero` does, in one launch."""
    return _counts(_nonzero, x)


@torch.compiler.disable
def count_agreeing(w: Sequence[Tensor], x: Sequence[Tensor], g: Sequence[Tensor]) -> Tensor:
    """What `_eager.count_agreeing` does, in one launch."""
    return _counts(_agrees, w, x, g)


@torch.compiler.disable
def vector(numbers: Sequence[int], device: torch.device) -> Tensor:
    """What `_eager.vector` does, without a launch; not to be written to."""
    with _guard(device):
        return _table(_plain, device, array("q", numbers).tobytes()).view(torch.int64)


@torch.compiler.disable
def cautious_update(
    w: Sequence[Tensor],
    x: Sequence[Tensor],
    g: Sequence[Tensor],
    alpha: Tensor,
    eta_lam: Sequence[float | Tensor],
) -> None:
    """What `_eager.cautious_update` does, in one launch."""
    _launch(_cautious_update, (w, x, g), [(0.0, 0.0)] * len(w), _as_it_is, eta_lam, per_tensor=alpha)


@torch.compiler.disable
def p_norm_decay(
    w: Sequence[Tensor], x: Sequence[Tensor], p: float, eta_lam: Sequence[float | Tensor], nonzero: Tensor
) -> None:
    """What `_eager.p_norm_decay` does, in one launch."""
    wide = torch.promote_types(w[0].dtype, torch.float32)
    p_or_0 = (nonzero != 0).to(wide) * p
    _launch(_p_norm_decay, (w, x), [(0.0, p - 2)] * len(w), _as_it_is, eta_lam, per_tensor=p_or_0)


def _counts(rule: Any, *inputs: Sequence[Tensor]) -> Tensor:
    """For each tensor, in how many places ``rule`` says to count; nothing is written."""
    first = inputs[0]
    counts = _launch(rule, inputs, [(0.0, 0.0)] * len(first), _as_it_is, [0.0] * len(first), count=True, write=False)
    return torch.zeros(len(first), dtype=torch.int64, device=first[0].device) if counts is None else counts


def _sign_of(a: float, b: float) -> tuple[float, float]:
    return (-1.0 if b < 0 else 1.0), 0.0


def _slope_of(a: float, b: float) -> tuple[float, float]:
    return (b, 1.0) if b == 1 - a else (b / a, 0.0)


def _as_it_is(a: float, b: float) -> tuple[float, float]:
    return a, b


def _sum(counts: Tensor | None) -> int | Tensor:
    return 0 if counts is None else counts.sum()


def _launch(
    rule: Any,
    inputs: Sequence[Sequence[Tensor]],
    pairs: Sequence[tuple[float, float]],
    coefficients: Callable[[float, float], tuple[float, float]],
    eta_lam: Sequence[float | Tensor],
    *,
    strict: bool = False,
    count: bool = False,
    stochastic: bool = False,
    write: bool = True,
    to: Sequence[Tensor] | None = None,
    per_tensor: Tensor | None = None,
) -> Tensor | None:
    """Write ``rule`` of ``inputs`` over the first of them, or ``to``, elementwise. Return each tensor's count if asked.

    The lists run in parallel. The rule is given ``coefficients`` of the tensor's pair, or in place of the first of them
    the tensor's entry in ``per_tensor``.
    """
    columns = inputs if to is None else (*inputs, to)
    sizes = array("q", map(Tensor.numel, columns[0]))
    if not any(sizes):
        return None
    out = 0 if to is None else len(inputs)
    contiguous = all(map(Tensor.is_contiguous, chain.from_iterable(columns)))
    lines = columns if contiguous else list(zip(*map(_flat, columns[out], *columns), strict=True))[1:]
    types = [line[0].dtype for line in lines]
    wide = torch.float64 if types[out] == torch.float64 else torch.float32
    addresses = array("q", map(Tensor.data_ptr, chain.from_iterable(lines))).tobytes()
    # Tensors of one group share a row, so that a new learning rate is a few bytes to send.
    keys = list(zip(pairs, map(id, eta_lam), strict=True))
    rows = dict(zip(keys, eta_lam, strict=True))
    place = {key: row for row, key in enumerate(rows)}
    row_of = array("q", map(place.__getitem__, keys))
    device = columns[0][0].device
    with _guard(device):
        strengths = [_on_device(strength, device, wide) for strength in rows.values()]
        numbers, pointers = array("d" if wide == torch.float64 else "f"), array("q")
        for (pair, _), strength in zip(rows, strengths, strict=True):
            number, pointer = (0.0, strength.data_ptr()) if isinstance(strength, Tensor) else (strength, 0)
            numbers.extend((*coefficients(*pair), number))
            pointers.append(pointer)
        chunks = _table(_chunks, device, sizes.tobytes(), row_of.tobytes())
        table = _table(_plain, device, pointers.tobytes(), numbers.tobytes())
        counts = torch.zeros(len(sizes), dtype=torch.int64, device=device) if count else None
        seeds = None
        if stochastic and types[out].itemsize == 2:  # drawn on the device: nothing waits, and a graph draws anew
            seeds = torch.randint(-(1 << 63), (1 << 63) - 1, (1,), device=device)
        first, second, third = ([_TYPES[t] for t in types[: len(inputs)]] + [None, None])[:3]
        _sweep[(len(chunks),)](
            _table(_plain, device, addresses).view(torch.int64),
            len(sizes),
            chunks,
            table[: 8 * len(rows)].view(torch.int64),
            table[8 * len(rows) :].view(wide),
            counts,
            seeds,
            per_tensor,
            RULE=rule,
            OUT=_TYPES[types[out]] if write else None,
            FIRST=first,
            SECOND=second,
            THIRD=third,
            COLUMN=out,
            WIDE=_TYPES[wide],
            ALIGNED=_aligned_all(addresses),
            STRICT=strict,
            COUNT=count,
            BLOCK=BLOCK,
            num_warps=THREADS // (64 if torch.version.hip else 32),
            enable_fp_fusion=False,  # w - mask * x * eta_lam is to round as in rules.py
        )
    if write and not contiguous:
        for tensor, line in zip(columns[out], lines[out], strict=True):
            _write_back(tensor, line)
    return counts


def _flat(*tensors: Tensor) -> list[Tensor]:
    return [line.contiguous() for line in _lines(*tensors)]


def _guard(device: torch.device) -> AbstractContextManager[object]:
    """Triton launches on the current device, whatever device the tensors are on."""
    if device.type == "cpu":  # the interpreter
        return contextlib.nullcontext()
    guard: AbstractContextManager[object] = getattr(torch, device.type).device(device)
    return guard


def _on_device(strength: float | Tensor, device: torch.device, wide: torch.dtype) -> float | Tensor:
    """A number, or a tensor of type ``wide`` on ``device``; nothing that an accelerator may be writing is read here."""
    if isinstance(strength, Tensor) and (strength.device.type != "cpu" or device.type == "cpu"):
        return strength.to(device, wide, non_blocking=True)
    return float(strength)


# ---- the tables


def _chunks(sizes: bytes, rows: bytes) -> Tensor:
    """For each chunk of tensors of ``sizes``: tensor, first element, the one after the last, row of the tensor."""
    numel, row = _plain(sizes).view(torch.int64), _plain(rows).view(torch.int64)
    chunks = (numel + CHUNK - 1) // CHUNK
    tensor = torch.repeat_interleave(torch.arange(len(numel)), chunks)
    number = torch.arange(len(tensor)) - (chunks.cumsum(0) - chunks)[tensor]
    start = number * CHUNK
    return torch.stack([tensor, start, torch.minimum(start + CHUNK, numel[tensor]), row[tensor]], dim=1)


def _plain(*parts: bytes) -> Tensor:
    return torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8)


def _table(build: Callable[..., Tensor], device: torch.device, *parts: bytes) -> Tensor:
    """``build(*parts)`` on ``device``, sent there only if the parts differ from those of recent calls."""
    if device.type == "cpu":
        return _kept(build, parts, device, None)
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        # Recorded, not run: the table is not there for others to use, and what it is copied from must stay.
        _recorded.append(build(*parts).pin_memory())
        return _recorded[-1].to(device, non_blocking=True)
    # One table for each stream that works with it, so that none reads it before it has arrived.
    return _kept(build, parts, device, getattr(torch, device.type).current_stream(device))


@functools.lru_cache(TABLES)
def _kept(build: Callable[..., Tensor], parts: tuple[bytes, ...], device: torch.device, stream: object) -> Tensor:
    table = build(*parts)
    return table if device.type == "cpu" else table.pin_memory().to(device, non_blocking=True)


@functools.lru_cache(TABLES)
def _aligned_all(addresses: bytes) -> bool:
    return all(address % ALIGNMENT == 0 for address in memoryview(addresses).cast("q"))
