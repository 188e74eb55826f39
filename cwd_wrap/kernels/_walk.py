# Functions that numba compiles are not run: their arguments have no Python types.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators, allow-untyped-calls
# ruff: noqa: ANN001, ANN202
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
from numba import carray, cfunc, types
from numba.extending import intrinsic, overload, register_jitable
from torch import Tensor

from cwd_wrap.kernels import _threads
from cwd_wrap.kernels._eager import ByType
from cwd_wrap.tensors import Shard

CHUNK = 1 << 16  # elements
ALONE = 1 << 17  # elements below which a second thread costs more than it brings

COLUMNS, COUNTERS, NUMBERS = 5, 2, 11
OF_METHOD = 9
"""The place of a method's two numbers among the ``n``, after those of a `Row`: the factor of the tensor, and the
method's own number."""
_BFLOAT16, _FLOAT16 = types.uint16, types.int16  # numba has neither: these types hold their bits
TAGS: dict[torch.dtype, np.ndarray] = ByType(
    {
        torch.float32: np.empty(0, np.float32),
        torch.float64: np.empty(0, np.float64),
        torch.bfloat16: np.empty(0, np.uint16),
        torch.float16: np.empty(0, np.int16),
    }
)
Row = tuple[int, tuple[float, ...]]
"""How many tensors share a row of numbers ``n``, and the row."""
_WORD, _HALF = np.empty(0, np.int64), np.empty(0, np.int32)
_DOUBLE, _SINGLE = TAGS[torch.float64], TAGS[torch.float32]

# The places of a `_threads.Control`: three numbers, the addresses of the first and of the tables, and their sizes.
_TAKEN, _DONE, _CHUNKS, _SELF, _AT, _TABLE, _NUMBERS, _COUNTS, _KEYS, _SUMS, _TENSORS = range(11)
# For `_reader`: two C functions, its tables, and how many columns there are. How many counters each tensor has, and a
# table of their values.
_EXCHANGE, _CLEAR, _IDS, _SIZES, _TYPES, _FACTS, _ROWS, _COUNTED, _VALUES = range(11, 20)


# ---- what numba does not have


@intrinsic
def pointer(typing_context, address, tag):
    """An address as a pointer to elements of the type of the array ``tag``."""

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(tag.dtype)(address, tag), generate


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


@intrinsic
def _take(typing_context, address):
    """The number at ``address``, which is increased by one. No two threads get the same."""

    def generate(context, builder, signature, arguments):
        word = ir.IntType(64)
        return builder.atomic_rmw("add", builder.inttoptr(arguments[0], word.as_pointer()), word(1), "seq_cst")

    return types.int64(types.int64), generate


@intrinsic
def _call(typing_context, function, first, second):
    """What the C function at an address returns, an int, for two pointers."""

    def generate(context, builder, signature, arguments):
        word = ir.IntType(64)
        kind = ir.FunctionType(ir.IntType(32), [word, word]).as_pointer()
        return builder.call(builder.inttoptr(arguments[0], kind), arguments[1:])

    return types.int32(types.int64, types.int64, types.int64), generate


def _table(address, tag, shape):
    """The array at ``address``; None if there is no ``tag``."""


@overload(_table)
def _(address, tag, shape):
    if tag is types.none:
        return lambda address, tag, shape: None
    return lambda address, tag, shape: carray(pointer(address, tag), shape)


def _line(addresses, column, tensor, start, stop, tag):
    """The elements of a chunk in one column; None if there is no such column."""


@overload(_line, inline="always")
def _(addresses, column, tensor, start, stop, tag):
    if tag is types.none:
        return lambda addresses, column, tensor, start, stop, tag: None
    return lambda addresses, column, tensor, start, stop, tag: carray(pointer(addresses[column, tensor], tag), stop)[
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


def _add_one(counts, count, mask):
    """The ``count`` with ``mask`` added, if there are ``counts``. In 32 bits: 64 would halve the width of vectors."""


@overload(_add_one, inline="always")
def _(counts, count, mask):
    if counts is types.none:
        return lambda counts, count, mask: count
    return lambda counts, count, mask: np.int32(count + mask)


def _note_count(counts, k, count):
    """Write the count of chunk ``k``, if there are ``counts``."""


@overload(_note_count)
def _(counts, k, count):
    if counts is types.none:
        return lambda counts, k, count: None

    def write(counts, k, count):
        counts[k] = count

    return write


def _note(sums, k, moved, decayed, step, weight):
    """Write the sums of chunk ``k``, if there are ``sums``."""


@overload(_note)
def _(sums, k, moved, decayed, step, weight):
    if sums is types.none:
        return lambda sums, k, moved, decayed, step, weight: None

    def write(sums, k, moved, decayed, step, weight):
        sums[k, 0], sums[k, 1], sums[k, 2], sums[k, 3] = moved, decayed, step, weight

    return write


def compiled(compiler: Callable[..., Any], *arguments: Any, **options: Any) -> Callable[[Callable[..., Any]], Any]:
    """numba's njit or cfunc, with a cache on disk if numba finds a folder for one that it may write to."""

    def made(function: Callable[..., Any]) -> Any:
        try:
            return compiler(*arguments, cache=True, **options)(function)
        except RuntimeError:
            return compiler(*arguments, **options)(function)

    return made


def walk_of(rule: Callable[..., Any]) -> Callable[..., int]:
    """The loop for ``rule``: a function that compiles it for given types, and returns its address.

    It takes the types of the columns, None where there is none, and of the numbers; is the rule ``strict``; does it
    draw random numbers; and how many of `rules.sums` are made for each chunk: 0, 1 or 5.
    """

    @functools.cache
    def walk(columns: tuple[torch.dtype | None, ...], wide: torch.dtype, strict: bool, draws: bool, counts: int) -> Any:
        tags = tuple(None if dtype is None else TAGS[dtype] for dtype in columns)
        of_numbers = TAGS[wide]
        of_keys, of_counts, of_sums = (
            _WORD if draws else None,
            _WORD if counts else None,
            _DOUBLE if counts > 1 else None,
        )

        @compiled(cfunc, types.void(types.CPointer(types.int64)), error_model="numpy")
        def walk(control):
            at = carray(control, _VALUES + 1)
            counters, tensors = at[_COUNTED], at[_TENSORS]
            last = at[_CHUNKS] - min(counters, 1)
            addresses = carray(pointer(at[_AT], _WORD), (COLUMNS + COUNTERS, tensors))
            values = carray(pointer(at[_VALUES], _DOUBLE), (COUNTERS, tensors))
            chunks = carray(pointer(at[_TABLE], _WORD), (last, 4))
            numbers = carray(pointer(at[_NUMBERS], of_numbers), (tensors, NUMBERS))
            counts = _table(at[_COUNTS], of_counts, last)
            keys = _table(at[_KEYS], of_keys, tensors)
            sums = _table(at[_SUMS], of_sums, (last, 4))
            while True:
                k = _take(at[_SELF])
                if k == last and counters > 0:  # here, so that no interrupt can part counters and weights
                    for i in range(counters):
                        for tensor in range(tensors):
                            carray(pointer(addresses[COLUMNS + i, tensor], _SINGLE), 1)[0] = values[i, tensor]
                    _take(at[_SELF] + 8)
                if k >= last:
                    break
                tensor, start, stop, place = chunks[k, 0], chunks[k, 1], chunks[k, 2], chunks[k, 3]
                row = numbers[tensor]
                n = (
                    row[0], row[1], row[2], row[3], row[4], row[5], row[6], row[7], row[8], row[9], row[10],
                )  # fmt: skip
                line0 = _line(addresses, 0, tensor, start, stop, tags[0])
                line1 = _line(addresses, 1, tensor, start, stop, tags[1])
                line2 = _line(addresses, 2, tensor, start, stop, tags[2])
                line3 = _line(addresses, 3, tensor, start, stop, tags[3])
                line4 = _line(addresses, 4, tensor, start, stop, tags[4])
                count = np.int32(0)
                moved = decayed = step = weight = number(False, n[0])
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
                    count = _add_one(counts, count, mask)
                    moved = _add_square(sums, moved, seen[0])
                    decayed = _add_square(sums, decayed, seen[1])
                    step = _add_square(sums, step, seen[2])
                    weight = _add_square(sums, weight, seen[3])
                _note_count(counts, k, count)
                _note(sums, k, moved, decayed, step, weight)
                _take(at[_SELF] + 8)

        return walk

    return lambda *types_of: int(walk(*types_of).address)


# ---- what a walk reads


@functools.cache
def _reader() -> Callable[[int], int]:
    """The compiled `read`, which holds the interpreter lock."""

    @compiled(cfunc, types.int32(types.CPointer(types.int64)))
    def read(control):
        """Note the tensors' addresses. Returns 0 if one is not as the tables of sizes and kinds say, else 1.

        Also returns 0 if a gradient, state or copy has another shape than its weight.

        A function of DLPack's C exchange API says what a tensor is, in a DLTensor (``facts``).
        """
        at = carray(control, _COUNTED + 1)
        rows, tensors = at[_ROWS], at[_TENSORS]
        addresses = carray(pointer(at[_AT], _WORD), (COLUMNS + COUNTERS, tensors))
        ids = carray(pointer(at[_IDS], _WORD), (COLUMNS + COUNTERS, tensors))
        sizes, kinds = (
            carray(pointer(at[_SIZES], _WORD), tensors),
            carray(pointer(at[_TYPES], _WORD), COLUMNS + COUNTERS),
        )
        facts, halves = carray(pointer(at[_FACTS], _WORD), 6), carray(pointer(at[_FACTS], _HALF), 12)
        for tensor in range(tensors):
            weight, dimensions = 0, 0  # the shape of the weight
            for i in range(rows + at[_COUNTED]):
                row = i if i < rows else COLUMNS + i - rows
                if _call(at[_EXCHANGE], ids[row, tensor], at[_FACTS]) != 0:
                    _call(at[_CLEAR], 0, 0)
                    return np.int32(0)
                shape, stride, size = facts[3], facts[4], 1
                if i == 0:
                    weight, dimensions = shape, halves[4]
                elif i < rows and halves[4] != dimensions:
                    return np.int32(0)
                for d in range(halves[4] - 1, -1, -1):
                    length = carray(pointer(shape + 8 * d, _WORD), 1)[0]
                    if length > 1 and stride != 0 and carray(pointer(stride + 8 * d, _WORD), 1)[0] != size:
                        return np.int32(0)  # not contiguous
                    if i < rows and length != carray(pointer(weight + 8 * d, _WORD), 1)[0]:
                        return np.int32(0)
                    size *= length
                if halves[2] != 1 or halves[5] != kinds[row] or (facts[0] == 0 and size > 0):
                    return np.int32(0)
                if size != (sizes[tensor] if i < rows else 1):
                    return np.int32(0)
                addresses[row, tensor] = facts[0] + facts[5]
        return np.int32(1)

    return ctypes.PYFUNCTYPE(ctypes.c_int, ctypes.c_void_p)(read.address)


@functools.cache
def _counter() -> Callable[[int], int]:
    """The compiled `count`, which holds the interpreter lock."""

    @compiled(cfunc, types.int32(types.CPointer(types.int64)))
    def count(control):
        """Note the counters of each tensor. Returns 1 if all tensors have the same, else 0."""
        at = carray(control, _VALUES + 1)
        tensors, same = at[_TENSORS], True
        addresses = carray(pointer(at[_AT], _WORD), (COLUMNS + COUNTERS, tensors))
        values = carray(pointer(at[_VALUES], _DOUBLE), (COUNTERS, tensors))
        for i in range(at[_COUNTED]):
            for tensor in range(tensors):
                values[i, tensor] = carray(pointer(addresses[COLUMNS + i, tensor], _SINGLE), 1)[0]
                same &= values[i, tensor] == values[i, 0]
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


_KINDS = ByType({torch.float32: 0x12002, torch.float64: 0x14002, torch.bfloat16: 0x11004, torch.float16: 0x11002})
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
        self.numbers = np.zeros((len(first), NUMBERS), TAGS[self.wide].dtype)
        self._sizes = np.fromiter(map(Tensor.numel, first), np.int64, len(first))
        self._total = int(self._sizes.sum())
        self._draws = False
        self._rows: Sequence[Row] = ()
        self._values = np.zeros((COUNTERS, len(first)))
        self._ids = np.zeros((COLUMNS + COUNTERS, len(first)), np.int64)
        self._of_ids: list[Sequence[Tensor] | None] = [None] * (COLUMNS + COUNTERS)
        self._addresses = np.zeros((COLUMNS + COUNTERS, len(first)), np.int64)
        types_of = (*self.types, *[torch.float32] * COUNTERS)
        self._kinds = np.array([_KINDS[torch.float32 if t is None else t] for t in types_of], np.int64)
        self._facts = np.zeros(6, np.int64)
        self._control = _threads.Control()
        self._at = self._control[_SELF] = ctypes.addressof(self._control)
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
            msg = (
                "a weight, gradient or state has no memory (a fake or meta tensor, or one whose storage was freed): "
                "give it memory before the step"
            )
            raise ValueError(msg)
        self.found = True

    def take(self, row: int, column: Sequence[Tensor]) -> None:
        """Note which tensors are in a column; the first counters are in row `COLUMNS`. For `find_again`."""
        if column is not self._of_ids[row]:
            self._ids[row, : len(column)] = list(map(id, column))
            self._of_ids[row] = column

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
