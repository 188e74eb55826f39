# Functions that numba compiles are not run: their arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: ANN001, ANN002, ANN202
"""The loop over the tensors of a call, compiled by numba for each rule, and the tables that it reads (`Job`).

The work is cut into chunks. A table says which tensor each chunk is of, another where the tensors are. `walk_of` makes
the loop, the same for every rule. A rule is a function of the values of up to five tensors in one place and of eleven
numbers ``n``; it returns what to write into each of the five (None: nothing), whether to count the place, and what
`rules.sums` sums there. The sums are compiled in only if they are asked for.
"""

import ctypes
import functools
from array import array
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import cfunc, types
from numba.extending import intrinsic, overload, register_jitable
from torch import Tensor

from cwd_wrap.kernels import _threads
from cwd_wrap.kernels._eager import NO_MEMORY, ByType
from cwd_wrap.tensors import Shard

CHUNK = 1 << 16  # elements
ALONE = 1 << 17  # elements below which a second thread costs more than it brings

COLUMNS, COUNTERS, NUMBERS = 5, 2, 11
OF_METHOD = 9
"""The place of a method's two numbers among the ``n``, after those of a `Row`: the factor of the tensor, and the
method's own number."""
_BFLOAT16, _FLOAT16 = types.uint16, types.int16  # numba has neither: these types hold their bits
KINDS: dict[torch.dtype, type[np.generic]] = ByType(
    {torch.float32: np.float32, torch.float64: np.float64, torch.bfloat16: np.uint16, torch.float16: np.int16}
)
Row = tuple[int, tuple[float, ...]]
"""How many tensors share a row of numbers ``n``, and the row."""

# The places of a `_threads.Control`: three numbers, the addresses of the tables, and the number of tensors. The first
# three are not imported: numba compiles them in, and its cache on disk notices changes of this file only.
_TAKEN, _DONE, _CHUNKS, _AT, _TABLE, _NUMBERS, _COUNTS, _KEYS, _SUMS, _TENSORS = range(10)
# For `_reader`: two C functions, its tables, and how many columns there are. How many counters each tensor has, and a
# table of their values.
_EXCHANGE, _CLEAR, _IDS, _SIZES, _TYPES, _FACTS, _ROWS, _COUNTED, _VALUES = range(10, 19)


# ---- what numba does not have


@intrinsic
def entry(typing_context, address, place):
    """The 64-bit whole number at a ``place`` of the table at ``address``."""
    return _loading(types.int64, address, place)


@intrinsic
def load(typing_context, address, place, kind):
    """The element at a ``place`` of the table of ``kind`` at ``address``."""
    return _loading(kind.instance_type, address, place, kind)


def _loading(element, *given):
    def generate(context, builder, signature, arguments):
        return builder.load(_at(context, builder, element, *arguments[:2]))

    return element(*given), generate


@intrinsic
def store(typing_context, address, place, kind, value):
    """Write ``value`` to a ``place`` of the table of ``kind`` at ``address``."""
    element = kind.instance_type

    def generate(context, builder, signature, arguments):
        written = context.cast(builder, arguments[3], value, element)
        builder.store(written, _at(context, builder, element, *arguments[:2]))
        return context.get_dummy_value()

    return types.none(address, place, kind, value), generate


def _at(context, builder, element, address, place):
    return builder.gep(builder.inttoptr(address, context.get_value_type(element).as_pointer()), [place])


@intrinsic
def fma(typing_context, a, b, c):
    """a*b + c, rounded once."""

    def generate(context, builder, signature, arguments):
        return builder.fma(*arguments)

    return a(a, b, c), generate


@intrinsic
def number(typing_context, flag, like):
    """``flag`` as 0 or 1 of the type of ``like``."""

    def generate(context, builder, signature, arguments):
        bit = builder.trunc(arguments[0], ir.IntType(1))
        return builder.uitofp(bit, context.get_value_type(signature.return_type))

    return like(flag, like), generate


@intrinsic
def where(typing_context, condition, a, b):
    """``a`` if the condition holds, else ``b``. Both are computed, so that LLVM can vectorise it."""

    def generate(context, builder, signature, arguments):
        bit = builder.trunc(arguments[0], ir.IntType(1))
        return builder.select(bit, *arguments[1:])

    return a(condition, a, a), generate


@intrinsic
def _exponent(typing_context, a):
    """The exponent of the float32 ``a`` > 0 to base 2 for which `_mantissa` is between the roots of 1/2 and of 2."""

    def generate(context, builder, signature, arguments):
        return builder.sitofp(_exponent_bits(builder, arguments[0]), ir.FloatType())

    return types.float32(types.float32), generate


@intrinsic
def _mantissa(typing_context, a):
    """``a`` / 2**`_exponent`."""

    def generate(context, builder, signature, arguments):
        word = ir.IntType(32)
        exponent = builder.shl(_exponent_bits(builder, arguments[0]), word(23))
        return builder.bitcast(builder.sub(builder.bitcast(arguments[0], word), exponent), ir.FloatType())

    return types.float32(types.float32), generate


def _exponent_bits(builder, a):
    word, root_of_half = ir.IntType(32), 0x3F3504F3
    return builder.ashr(builder.sub(builder.bitcast(a, word), word(root_of_half)), word(23))


@intrinsic
def _power_of_two(typing_context, n):
    """2**n for a whole float32 ``n`` from -127, of which it makes 0, to 128, of which it makes infinity."""

    def generate(context, builder, signature, arguments):
        word = ir.IntType(32)
        biased = builder.add(builder.fptosi(arguments[0], word), word(127))
        return builder.bitcast(builder.shl(biased, word(23)), ir.FloatType())

    return types.float32(types.float32), generate


_ZERO, _ONE, _INFINITY, _NAN = (np.float32(x) for x in (0, 1, np.inf, np.nan))
_SCALE, _OF_SCALE = np.float32(2.0**24), np.float32(24)
_LOWEST, _HIGHEST, _TO_WHOLE = np.float32(-127), np.float32(128), np.float32(1.5 * 2**23)
# log2(1 + t) / t from the root of 1/2 to that of 2, and 2 * 2**r for r from -1/2 to 1/2: Chebyshev fits, right to 1e-7.
_L0, _L1, _L2, _L3, _L4, _L5, _L6, _L7 = map(
    np.float32,
    (1.4426949, -0.721352756, 0.48092404, -0.360241979,
     0.287075609, -0.24882181, 0.23420985, -0.146203533),
)  # fmt: skip
_E0, _E1, _E2, _E3, _E4, _E5, _E6 = map(
    np.float32,
    (2.0, 1.38629436, 0.480453014, 0.111007139,
     0.0192361139, 0.00267817336, 0.000309228955),
)  # fmt: skip


def power(a, exponent):
    """`rules.power`, of float32 by polynomials, right to 3 units: LLVM cannot vectorise a call of libm.

    From 2**104 on ``a`` counts as 2**104, where a power matters only for exponents near 0.
    """


@overload(power, inline="always")
def _(a, exponent):
    return _vector_power if a == types.float32 else lambda a, exponent: a**exponent


@register_jitable(forceinline=True)
def _vector_power(a, exponent):
    # 2**(exponent * log2(a)), with polynomials in the form of Estrin. The whole part of the logarithm is multiplied
    # without rounding, so that its size costs no precision. Denormals are scaled with all others.
    of_zero, of_nan = where(exponent == _ZERO, _ONE, _INFINITY), where(exponent == _ZERO, _ONE, _NAN)
    scaled = a * _SCALE
    whole = _exponent(scaled) - _OF_SCALE
    t = _mantissa(scaled) - _ONE
    t2, slope = t * t, exponent * t
    low, high = fma(t2, fma(t, _L3, _L2), fma(t, _L1, _L0)), fma(t2, fma(t, _L7, _L6), fma(t, _L5, _L4))
    logarithm = fma(t2 * t2, high, low)
    n = (fma(slope, logarithm, exponent * whole) + _TO_WHOLE) - _TO_WHOLE
    r = fma(slope, logarithm, fma(exponent, whole, -n))
    r2 = r * r
    low, high = fma(r2, fma(r, _E3, _E2), fma(r, _E1, _E0)), fma(r2, _E6, fma(r, _E5, _E4))
    less = n - _ONE  # 2**n may be infinite where the power is not
    less = where(less < _LOWEST, _LOWEST, where(less > _HIGHEST, _HIGHEST, less))
    found = fma(r2 * r2, high, low) * _power_of_two(less)
    return where(a == _ZERO, of_zero, where(a == a, found, of_nan))  # noqa: PLR0124 - NaN


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
def _narrow(typing_context, value, kind):
    """The float32 ``value`` rounded to nearest, as 16 bits of ``kind``."""
    element = kind.instance_type

    def generate(context, builder, signature, arguments):
        if element == _FLOAT16:
            return builder.bitcast(builder.fptrunc(arguments[0], ir.HalfType()), ir.IntType(16))
        word = ir.IntType(32)
        bits = builder.bitcast(arguments[0], word)
        odd = builder.and_(builder.lshr(bits, ir.Constant(word, 16)), ir.Constant(word, 1))
        rounded = builder.add(bits, builder.add(odd, ir.Constant(word, 0x7FFF)))
        not_a_number = builder.fcmp_unordered("uno", arguments[0], arguments[0])
        chosen = builder.select(not_a_number, ir.Constant(word, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(chosen, ir.Constant(word, 16)), ir.IntType(16))

    return element(value, kind), generate


@intrinsic
def _add_square(typing_context, summing, total, value):
    """``total`` + ``value``**2 if ``summing``. LLVM may reorder the additions, so that it can vectorise them."""

    def generate(context, builder, signature, arguments):
        _, total, value = arguments
        if types.none in signature.args[::2]:
            return total
        return builder.fadd(total, builder.fmul(value, value), flags=("reassoc",))

    return total(summing, total, value), generate


@intrinsic
def _take(typing_context, address, place):
    """The whole number at a ``place`` of the table at ``address``, increased by one. No two threads get the same."""

    def generate(context, builder, signature, arguments):
        counted = _at(context, builder, types.int64, *arguments)
        return builder.atomic_rmw("add", counted, ir.IntType(64)(1), "seq_cst")

    return types.int64(address, place), generate


@intrinsic
def _call(typing_context, function, first, second):
    """What the C function at an address returns, an int, for two pointers."""

    def generate(context, builder, signature, arguments):
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [word, word]).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])

    return types.int32(types.int64, types.int64, types.int64), generate


@intrinsic
def _row(typing_context, address, place, kind):
    """The `NUMBERS` elements from a ``place`` of the table of ``kind`` at ``address``."""
    element = kind.instance_type

    def generate(context, builder, signature, arguments):
        first = _at(context, builder, element, *arguments[:2])
        values = [builder.load(builder.gep(first, [ir.IntType(64)(i)])) for i in range(NUMBERS)]
        return context.make_tuple(builder, signature.return_type, values)

    return types.UniTuple(element, NUMBERS)(address, place, kind), generate


def _get(address, place, kind, wide):
    """An element of a column in the type in which the rule computes; None if there is no such column."""


@overload(_get)
def _(address, place, kind, wide):
    if kind is types.none:
        return lambda address, place, kind, wide: None
    if kind.instance_type in (_BFLOAT16, _FLOAT16):
        return lambda address, place, kind, wide: _wide(load(address, place, kind))
    if wide.instance_type == types.float32:
        return lambda address, place, kind, wide: np.float32(load(address, place, kind))
    return lambda address, place, kind, wide: load(address, place, kind)


def _put(address, place, kind, value, random):
    """Write ``value``, stochastically rounded where there are ``random`` bits. None, and no column, write nothing."""


@overload(_put)
def _(address, place, kind, value, random):
    if kind is types.none or value is types.none:
        return lambda address, place, kind, value, random: None
    if kind.instance_type not in (_BFLOAT16, _FLOAT16):
        return lambda address, place, kind, value, random: store(address, place, kind, value)
    if random is types.none:
        return lambda address, place, kind, value, random: store(address, place, kind, _narrow(value, kind))
    as_bits = np.uint16 if kind.instance_type == _BFLOAT16 else np.int16

    def write(address, place, kind, value, random):
        # The twin of rules.stochastic_rounding.
        bits = _narrow(value, kind)
        nearest = _wide(bits)
        other_bits = as_bits(bits + (1 if abs(value) > abs(nearest) else -1))
        other = _wide(other_bits)
        chance = (value - nearest) / (other - nearest)
        store(address, place, kind, other_bits if np.float32(random) * np.float32(2**-16) < chance else bits)

    return write


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


def _bits(draws, keys, tensor, place):
    """`_random` if the loop ``draws``, else None for each tensor."""


@overload(_bits)
def _(draws, keys, tensor, place):
    if draws is types.none:
        return lambda draws, keys, tensor, place: (None, None, None, None)
    return lambda draws, keys, tensor, place: _random(entry(keys, tensor), place)


@intrinsic
def _add_one(typing_context, counting, count, mask):
    """The ``count`` with ``mask`` added, if ``counting``. In 32 bits: 64 would halve the width of vectors."""

    def generate(context, builder, signature, arguments):
        if counting is types.none:
            return arguments[1]
        bit = builder.trunc(arguments[2], ir.IntType(1))
        return builder.add(arguments[1], builder.zext(bit, ir.IntType(32)))

    return count(counting, count, mask), generate


def compiled(compiler: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's njit or cfunc, with a cache on disk if numba finds a folder for one that it may write to."""

    def made(function: Callable[..., Any]) -> Any:
        try:
            return compiler(*arguments, cache=True, **options)(function)
        except RuntimeError:
            return compiler(*arguments, **options)(function)

    return made


@register_jitable
def _write_counters(control):
    counters, tensors = entry(control, _COUNTED), entry(control, _TENSORS)
    addresses, values = entry(control, _AT), entry(control, _VALUES)
    for i in range(counters):
        for tensor in range(tensors):
            address = entry(addresses, (COLUMNS + i) * tensors + tensor)
            store(address, 0, np.float32, load(values, i * tensors + tensor, np.float64))


def walk_of(name: str, rule: Callable[..., Any]) -> Callable[..., int]:
    """The loop for the ``rule`` of a name: a function that compiles it for given types, and returns its address.

    It takes the types of the columns, None where there is none, and of the numbers; is the rule ``strict``; does it
    draw random numbers; and how many of `rules.sums` are made for each chunk: 0, 1 or 5.
    """

    @functools.cache
    def walk(columns: tuple[torch.dtype | None, ...], wide: torch.dtype, strict: bool, draws: bool, counts: int) -> Any:
        kind0, kind1, kind2, kind3, kind4 = (None if dtype is None else KINDS[dtype] for dtype in columns)
        wide_kind = KINDS[wide]
        drawing, counting, summing = draws or None, counts > 0 or None, counts > 1 or None

        def walk(control):
            counters, tensors = entry(control, _COUNTED), entry(control, _TENSORS)
            addresses, numbers, chunks = entry(control, _AT), entry(control, _NUMBERS), entry(control, _TABLE)
            keys, counts, sums = entry(control, _KEYS), entry(control, _COUNTS), entry(control, _SUMS)
            last = entry(control, _CHUNKS) - min(counters, 1)
            while True:
                k = _take(control, _TAKEN)
                if k == last and counters > 0:  # here, so that no interrupt can part counters and weights
                    _write_counters(control)
                    _take(control, _DONE)
                if k >= last:
                    break
                tensor, start, stop, place = (
                    entry(chunks, 4 * k), entry(chunks, 4 * k + 1), entry(chunks, 4 * k + 2), entry(chunks, 4 * k + 3),
                )  # fmt: skip
                n = _row(numbers, NUMBERS * tensor, wide_kind)
                line0 = entry(addresses, tensor)
                line1 = entry(addresses, tensors + tensor)
                line2 = entry(addresses, 2 * tensors + tensor)
                line3 = entry(addresses, 3 * tensors + tensor)
                line4 = entry(addresses, 4 * tensors + tensor)
                count = np.int32(0)
                moved = decayed = step = weight = number(False, n[0])
                for j in range(stop - start):
                    i = start + j
                    new0, new1, new2, new3, new4, mask, seen = rule(
                        _get(line0, i, kind0, wide_kind), _get(line1, i, kind1, wide_kind),
                        _get(line2, i, kind2, wide_kind), _get(line3, i, kind3, wide_kind),
                        _get(line4, i, kind4, wide_kind), n, strict,
                    )  # fmt: skip
                    random = _bits(drawing, keys, tensor, place + j)
                    _put(line0, i, kind0, new0, random[0])
                    _put(line1, i, kind1, new1, None)
                    _put(line2, i, kind2, new2, random[1])
                    _put(line3, i, kind3, new3, random[2])
                    _put(line4, i, kind4, new4, random[3])
                    count = _add_one(counting, count, mask)
                    moved = _add_square(summing, moved, seen[0])
                    decayed = _add_square(summing, decayed, seen[1])
                    step = _add_square(summing, step, seen[2])
                    weight = _add_square(summing, weight, seen[3])
                if counting:
                    store(counts, k, np.int64, count)
                if summing:
                    store(sums, 4 * k, np.float64, moved)
                    store(sums, 4 * k + 1, np.float64, decayed)
                    store(sums, 4 * k + 2, np.float64, step)
                    store(sums, 4 * k + 3, np.float64, weight)
                _take(control, _DONE)

        # A file on disk for each loop: processes that compile two loops at once could mix them up in a common one.
        parts = ("none" if kind is None else kind.__name__ for kind in (kind0, kind1, kind2, kind3, kind4, wide_kind))
        walk.__qualname__ = "_".join((name, *parts, *map(str, (strict, draws, counts))))
        return compiled(cfunc, types.void(types.int64), error_model="numpy")(walk)

    return lambda *types_of: int(walk(*types_of).address)


# ---- what a walk reads


@functools.cache
def _reader() -> Callable[[int], int]:
    """The compiled `read`, which holds the interpreter lock."""

    @compiled(cfunc, types.int32(types.int64))
    def read(control):
        """Note the tensors' addresses. Returns 0 if one is not as the tables of sizes and kinds say, else 1.

        Also returns 0 if a gradient, state or copy has another shape than its weight.

        A function of DLPack's C exchange API says what a tensor is, in a DLTensor (``facts``).
        """
        rows, tensors, counted = entry(control, _ROWS), entry(control, _TENSORS), entry(control, _COUNTED)
        addresses, ids = entry(control, _AT), entry(control, _IDS)
        sizes, kinds, facts = entry(control, _SIZES), entry(control, _TYPES), entry(control, _FACTS)
        exchange, clear = entry(control, _EXCHANGE), entry(control, _CLEAR)
        for tensor in range(tensors):
            weight, dimensions = 0, 0  # the shape of the weight
            for i in range(rows + counted):
                row = i if i < rows else COLUMNS + i - rows
                if _call(exchange, entry(ids, row * tensors + tensor), facts) != 0:
                    _call(clear, 0, 0)
                    return np.int32(0)
                data, shape, stride = entry(facts, 0), entry(facts, 3), entry(facts, 4)
                device, rank, kind = load(facts, 2, np.int32), load(facts, 4, np.int32), load(facts, 5, np.int32)
                size = 1
                if i == 0:
                    weight, dimensions = shape, rank
                elif i < rows and rank != dimensions:
                    return np.int32(0)
                for d in range(rank - 1, -1, -1):
                    length = entry(shape, d)
                    if length > 1 and stride != 0 and entry(stride, d) != size:
                        return np.int32(0)  # not contiguous
                    if i < rows and length != entry(weight, d):
                        return np.int32(0)
                    size *= length
                if device != 1 or kind != entry(kinds, row) or (data == 0 and size > 0):
                    return np.int32(0)
                if size != (entry(sizes, tensor) if i < rows else 1):
                    return np.int32(0)
                store(addresses, row * tensors + tensor, np.int64, data + entry(facts, 5))
        return np.int32(1)

    return ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(read.address)


@functools.cache
def _counter() -> Callable[[int], int]:
    """The compiled `count`, which holds the interpreter lock."""

    @compiled(cfunc, types.int32(types.int64))
    def count(control):
        """Note the counters of each tensor. Returns 1 if all tensors have the same, else 0."""
        tensors, same = entry(control, _TENSORS), True
        addresses, values = entry(control, _AT), entry(control, _VALUES)
        for i in range(entry(control, _COUNTED)):
            for tensor in range(tensors):
                address = entry(addresses, (COLUMNS + i) * tensors + tensor)
                value = np.float64(load(address, 0, np.float32))
                store(values, i * tensors + tensor, np.float64, value)
                same &= value == load(values, i * tensors, np.float64)
        return np.int32(same)

    return ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(count.address)


class _Exchange(ctypes.Structure):
    """DLPackExchangeAPI (DLPack 1.2 or newer)."""

    _fields_ = (
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        *((name, ctypes.c_void_p) for name in ("older", "allocate", "from_object", "to_object", "dltensor", "stream")),
    )


def can_find_again() -> bool:
    """True if torch has DLPack's C exchange API (torch 2.10 or newer)."""
    return _exchange() is not None


@functools.cache
def _exchange() -> tuple[int, int] | None:
    """The addresses of the C functions that tell what a tensor is, and that clear a Python error; None without them."""
    capsule = getattr(Tensor, "__dlpack_c_exchange_api__", None)
    if capsule is None:
        return None
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)
    api = _Exchange.from_address(get(capsule, b"dlpack_exchange_api"))
    clear = ctypes.cast(ctypes.pythonapi.PyErr_Clear, ctypes.c_void_p).value or 0
    return (int(api.dltensor), clear) if api.major == 1 and api.dltensor else None


_DLPACK = ByType({torch.float32: 0x12002, torch.float64: 0x14002, torch.bfloat16: 0x11004, torch.float16: 0x11002})
"""Each type in DLPack: its code, its bits, and one lane."""


class Job:
    """The tables of a call on ``columns`` of contiguous tensors, which compiled code finds by their addresses.

    ``counters``: columns of float32 tensors of one element, which count the steps of each tensor.
    """

    def __init__(self, columns: Sequence[Sequence[Tensor]], counters: Sequence[Sequence[Tensor]] = ()) -> None:
        first = columns[0]
        self.found = False
        """True if the addresses are those of the tensors of the coming `run`."""
        of_columns: list[torch.dtype | None] = [column[0].dtype for column in columns]
        self.types = tuple(of_columns + [None] * (COLUMNS - len(columns)))
        self.wide = torch.float64 if first[0].dtype == torch.float64 else torch.float32
        self.numbers = np.zeros((len(first), NUMBERS), KINDS[self.wide])
        self._sizes = np.fromiter(map(Tensor.numel, first), np.int64, len(first))
        self._total = int(self._sizes.sum())
        self._draws = False
        self._rows: Sequence[Row] = ()
        self._values = np.zeros((COUNTERS, len(first)))
        self._ids = np.zeros((COLUMNS + COUNTERS, len(first)), np.int64)
        self._of_ids: list[Sequence[Tensor] | None] = [None] * (COLUMNS + COUNTERS)
        self._addresses = np.zeros((COLUMNS + COUNTERS, len(first)), np.int64)
        types_of = (*self.types, *[torch.float32] * COUNTERS)
        self._kinds = np.array([_DLPACK[torch.float32 if t is None else t] for t in types_of], np.int64)
        self._facts = np.zeros(6, np.int64)
        self._control = _threads.Control()
        self._at = ctypes.addressof(self._control)
        self._control[_TENSORS], self._control[_ROWS] = len(first), len(columns)
        self._control[_COUNTED] = len(counters)
        tables = (self._addresses, self.numbers, self._sizes, self._values, self._ids, self._kinds, self._facts)
        for place, table in zip((_AT, _NUMBERS, _SIZES, _VALUES, _IDS, _TYPES, _FACTS), tables, strict=True):
            self._point(place, table)
        self._control[_EXCHANGE], self._control[_CLEAR] = _exchange() or (0, 0)
        self._lay_out(_chunks(self._sizes.tobytes()))

    def find(self, columns: Sequence[Sequence[Tensor]], counters: Sequence[Sequence[Tensor]] = ()) -> None:
        """Note where the tensors are. Raises ValueError for one that has no memory."""
        of_counters = self._addresses[COLUMNS : COLUMNS + len(counters)]
        for row, column in (*zip(self._addresses, columns, strict=False), *zip(of_counters, counters, strict=True)):
            row[:] = list(map(Tensor.data_ptr, column))
        if not (self._addresses[: len(columns), self._sizes > 0].all() and of_counters.all()):
            raise ValueError(NO_MEMORY)
        self.found = True

    def take(self, row: int, column: Sequence[Tensor], *, lasts: bool) -> None:
        """Note which tensors are in a column; the first counters are in row `COLUMNS`. For `find_again`.

        ``lasts``: the same list comes again in the next step, and its owner lets gradients go.
        """
        if column is not self._of_ids[row]:
            self._ids[row, : len(column)] = list(map(id, column))
            self._of_ids[row] = column if lasts else None

    def find_again(self) -> bool:
        """Note where the tensors are now. Returns False if they have other types, shapes or layouts than at first.

        Only where DLPack has a C exchange API (`can_find_again`), and after `take`.
        """
        self.found = _reader()(self._at) == 1
        return self.found

    def counters(self) -> list[tuple[float, ...]]:
        """The counters of each tensor; one tuple for all if they are the same."""
        counted = self._control[_COUNTED]
        if counted == 0 or not self._sizes.size:
            return [()]
        if _counter()(self._at):
            return [tuple([self._values.item(k, 0) for k in range(counted)])]
        return list(zip(*self._values[:counted].tolist(), strict=True))

    def count(self, after: Sequence[tuple[float, ...]]) -> None:
        """Have `run` write these counters at its end: one tuple for each tensor, or one for all."""
        for row, values in zip(self._values, zip(*after, strict=True), strict=False):
            row[:] = values if len(values) > 1 else values[0]

    def draw(self, streams: np.ndarray, shards: np.ndarray) -> None:
        """Use random numbers. ``streams`` has the stream of each tensor, ``shards`` the `Shard` that it holds."""
        self._draws, self._streams = True, streams
        self._point(_KEYS, streams)
        self._lay_out(_chunks(self._sizes.tobytes(), shards.tobytes()))

    def run(
        self, walk: Callable[..., int], rows: Sequence[Row], *, strict: bool = False, sums: int = 0
    ) -> list[np.ndarray]:
        """Carry out a rule, whose loop is ``walk``. Returns the first 0, 1 or 5 of `rules.sums` of each chunk."""
        made = np.zeros((len(self._table), 4)) if sums > 1 else None
        if made is not None:
            self._point(_SUMS, made)
        if rows != self._rows:
            first, kind = 0, "d" if self.wide == torch.float64 else "f"
            for tensors, numbers in rows:  # an array makes 0 of numbers that are too small, whatever np.seterr says
                of_row = np.frombuffer(array(kind, numbers), self.numbers.dtype)
                self.numbers[first : first + tensors, : len(numbers)] = of_row
                first += tensors
            self._rows = rows
        address = walk(self.types, self.wide, strict, self._draws, sums)
        self.found = False
        _threads.run(address, self._control, min(torch.get_num_threads(), 1 + self._total // ALONE))
        return [self._counts] if made is None else [self._counts, *made.T]

    def per_tensor(self, of_chunks: Sequence[np.ndarray]) -> np.ndarray:
        """A row for each tensor, from what `run` returned for the chunks."""
        tensors = self._table[:, 0]
        return np.stack([np.bincount(tensors, column, len(self._sizes)) for column in of_chunks], axis=1)

    def _lay_out(self, table: np.ndarray) -> None:
        self._table = table
        self._counts = np.zeros(len(table), np.int64)
        self._point(_TABLE, table)
        self._point(_COUNTS, self._counts)
        self._control[_CHUNKS] = len(table) + min(self._control[_COUNTED], 1)

    def _point(self, place: int, array: np.ndarray) -> None:
        self._control[place] = array.ctypes.data


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
