"""The rules in torch operations, in blocks that stay in cache between the first read and the last write.

Masks are kept as 0.0 and 1.0 in the weight's own (wide) type: on CPU a comparison into a bool tensor, or `torch.where`,
takes four to six times as long. `kernels.Backend` says what each function does.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, repeat
from typing import Any, TypeVar

import torch
from torch import Tensor

from cwd_wrap import rules
from cwd_wrap.bases.updates import Numbers
from cwd_wrap.draws import Draws
from cwd_wrap.kernels.buckets import Bucket, Coming, Stepped, Sums, Whole
from cwd_wrap.tensors import has_numbers, marks

_V = TypeVar("_V")


class ByType(dict[torch.dtype, _V]):
    """A value for each type that kernels read. Any other raises ValueError."""

    def __missing__(self, dtype: torch.dtype) -> _V:
        msg = (
            f"a weight, gradient or state has the type {dtype}, but the kernels read only float32, float64, bfloat16 "
            "and float16: convert it before the step"
        )
        raise ValueError(msg)


NO_MEMORY = (
    "a weight, gradient or state has no memory (a fake or meta tensor, or one whose storage was freed): "
    "give it memory before the step"
)
"""The error of the compiled kernels for a tensor without an address."""

BLOCK_ON_CPU = 1 << 20  # elements: few enough for the last-level cache, enough to hide the cost of five calls
BLOCK_ELSEWHERE = 1 << 24
SMALL = 1 << 14  # tensors below this are laid side by side, up to PACK elements in one piece
PACK = 1 << 18
_READ = ByType(dict.fromkeys((torch.float32, torch.float64, torch.bfloat16, torch.float16)))
_SCALE = {torch.float32: 2.0**127, torch.float64: 2.0**1023}  # see `_mask_by_product`


def watch(buckets: Sequence[Bucket]) -> Callable[[], bool] | None:
    """`kernels.Backend.watch`."""
    before = [marks(bucket.columns) for bucket in buckets]
    return (lambda: [marks(bucket.columns) for bucket in buckets] == before) if all(before) else None


def decay_along(buckets: Sequence[Coming], *, count: bool, strict: bool = False, leak: float = 0.0) -> Sums:
    """`kernels.Backend.decay_along`."""
    parts: list[list[Tensor]] = []
    d_all, x_all = _scratch(buckets, 2)
    for bucket in buckets:
        if (draws := _draws(bucket)) is not None:
            rows = enumerate(zip(bucket.w, bucket.g if bucket.m is None else bucket.m, bucket.g, strict=True))
            for i, (x, m, g) in rows:
                d = torch.empty_like(x, dtype=torch.float32)
                _direction(bucket, m, g, out=d)
                mask = rules.aligned(d, x, strict)
                if count:
                    parts.append([rules.sums(mask, rules.aligned(d, x, strict=True), x, leak=leak)])
                x.copy_(rules.decay(x, x, mask, bucket.eta_lam, leak, _random(draws, i, 0, x.shape)))
            continue
        into = _parts_of(bucket, parts) if count else None
        for of, x, m, g in _blocks(bucket.w, bucket.g if bucket.m is None else bucket.m, bucket.g):
            d = d_all.narrow(0, 0, x.numel())
            _direction(bucket, m, g, out=d)
            wide = x if x.dtype == d.dtype else x_all.narrow(0, 0, x.numel()).copy_(x)
            _decay_unless_opposed(bucket, of, wide, wide, d, -1.0, strict, leak, out=x, into=into)
    return _per_tensor(parts, buckets) if count else None


def decay_from_snapshot(buckets: Sequence[Stepped], *, count: bool, strict: bool = False, leak: float = 0.0) -> Sums:
    """`kernels.Backend.decay_from_snapshot`."""
    parts: list[list[Tensor]] = []
    d_all, x_all = _scratch(buckets, 2)
    for bucket in buckets:
        if (draws := _draws(bucket)) is not None:
            for i, (w, x) in enumerate(zip(bucket.w, bucket.x, strict=True)):
                mask = rules.moved_towards_zero(x, w, strict)
                after = rules.decay(w, x, mask, bucket.eta_lam, leak, _random(draws, i, 0, w.shape))
                if count:
                    moved = rules.moved_towards_zero(x, w, strict=True)
                    parts.append([rules.sums(mask, moved, x, x.float() - w.float(), after, leak)])
                w.copy_(after)
            continue
        into = _parts_of(bucket, parts) if count else None
        for of, after, before in _blocks(bucket.w, bucket.x):
            d = d_all.narrow(0, 0, after.numel())
            w_wide, x_wide = after, before
            if after.dtype != d.dtype:
                w_wide, x_wide = after.to(d.dtype), x_all.narrow(0, 0, after.numel()).copy_(before)
            torch.sub(w_wide, x_wide, out=d)  # exact in sign: it is 0 only where the two are equal
            _decay_unless_opposed(bucket, of, w_wide, x_wide, d, 1.0, strict, leak, out=after, into=into)
    return _per_tensor(parts, buckets) if count else None


def step_whole(
    buckets: Sequence[Whole],
    *,
    count: bool,
    strict: bool = False,
    method: str = "with_decay",
    factor: Tensor | None = None,
    own: float = 0.0,
) -> Sums:
    """`kernels.Backend.step_whole`, as `rules` writes it: readable, tensor by tensor, and slow."""
    parts: list[list[Tensor]] = []
    factors = repeat(1.0) if factor is None else iter(factor)
    by_method = getattr(rules, method)
    for tensors in chain.from_iterable(bucket.columns for bucket in buckets):
        _READ[tensors[0].dtype]
    for bucket in buckets:
        steps, taken, rows = _updates(bucket)
        for i, (x, g, of_state, numbers) in enumerate(rows):
            w, _, *state = (column[i] for column in bucket.columns)
            if bucket.update.averages:
                direction, step, *values = _averaged(bucket, x, g, of_state, numbers, strict, own)
                mask = rules.aligned(direction, x, strict)
            else:
                direction, step, *new = _update(bucket, g, of_state, numbers)
                of_method = bucket.eta_lam, next(factors), own
                after, mask = by_method(x, g, direction, step, rules.aligned(direction, x, strict), *of_method)
                values = [after.to(x.dtype), *new]
            if count:
                parts.append([rules.sums(mask, rules.aligned(direction, x, strict=True), x, step, values[0], own)])
            for column, (old, value) in enumerate(zip((w, *state), values, strict=False)):
                if bucket.draws is not None and old.element_size() == 2:
                    random = _random(bucket.draws, i, column, w.shape)
                    old.copy_(rules.stochastic_rounding(value, old.dtype, random))
                else:
                    old.copy_(value)
        set_counters(bucket, [steps[k][1] for k in taken])
    return _per_tensor(parts, buckets) if count else None


def sums_of_step(buckets: Sequence[Stepped]) -> Tensor:
    """`kernels.Backend.sums_of_step`."""
    sums = []
    for bucket in buckets:
        for x, w in zip(bucket.x, bucket.w, strict=True):  # one by one: a difference is as large as the weights
            after = w.to(torch.promote_types(w.dtype, torch.float32))
            sums.append(torch.cat([rules.squares([x.to(after.dtype) - after]), rules.squares([after])]))
    return torch.nn.functional.pad(torch.stack(sums), (3, 0))


def copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """`kernels.Backend.copy`."""
    torch._foreach_copy_(list(to), list(source))


def count_nonzero(x: Sequence[Tensor]) -> Tensor:
    """`kernels.Backend.count_nonzero`."""
    return torch.stack([t.count_nonzero() for t in x])


def count_agreeing(buckets: Sequence[Stepped] | Sequence[Whole]) -> Tensor:
    """`kernels.Backend.count_agreeing`."""
    counts: list[Tensor] = []
    for bucket in buckets:
        if isinstance(bucket, Whole):
            for _, g, state, numbers in _updates(bucket)[2]:
                counts.append(rules.aligned(_update(bucket, g, state, numbers)[0], g, strict=True).sum())
        else:
            counts += [rules.agrees(*row).sum() for row in zip(*bucket.columns, strict=True)]
    return torch.stack(counts)


def vector(numbers: Sequence[int], device: torch.device) -> Tensor:
    """`kernels.Backend.vector`."""
    return torch.cat([torch.full((1,), number, device=device) for number in numbers])


def cautious_update(buckets: Sequence[Stepped], alpha: Tensor) -> None:
    """`kernels.Backend.cautious_update`."""
    factors = iter(alpha)
    for bucket in buckets:
        for after, before, gradient in zip(*bucket.columns, strict=True):
            mask = rules.agrees(after, before, gradient)
            after.copy_(rules.cautious_update(after, before, mask, next(factors), bucket.eta_lam))


def p_norm_decay(buckets: Sequence[Stepped], p: float, nonzero: Tensor) -> None:
    """`kernels.Backend.p_norm_decay`."""
    zeros = iter(nonzero == 0)
    for bucket in buckets:
        for after, before in zip(bucket.w, bucket.x, strict=True):
            after.copy_(rules.p_norm_decay(after, before, p, bucket.eta_lam, next(zeros)))


def _updates(bucket: Whole) -> tuple[list[tuple[Numbers, Numbers]], list[int], Iterator[tuple[Any, ...]]]:
    """`Update.steps` of the bucket, and for each tensor: x, the gradient to descend, state, the formula's numbers."""
    lr = 1.0 if on_a_device(bucket.lr) else float(bucket.lr)
    steps, taken = bucket.update.steps(lr, counters(bucket))

    def rows() -> Iterator[tuple[Any, ...]]:
        for k, (w, g, *state) in zip(taken, zip(*bucket.columns, strict=True), strict=True):
            x = w.to(torch.promote_types(w.dtype, torch.float32))
            descended = -g.to(x.dtype) if bucket.update.maximize else g.to(x.dtype)
            yield x, descended, [s.to(x.dtype) for s in state], steps[k][0]

    return steps, taken, rows()


def _averaged(
    bucket: Whole, x: Tensor, g: Tensor, state: Sequence[Tensor], numbers: Numbers, strict: bool, leak: float
) -> tuple[Tensor, ...]:
    """(direction, eta*u, new weight, new state ...) of a schedule-free update with its decay."""
    # A tensor of shape (1,) and another type would widen the result.
    eta_lam: Any = bucket.eta_lam.reshape(()) if isinstance(bucket.eta_lam, Tensor) else bucket.eta_lam
    decay = rules.taken(x, rules.aligned(g, x, strict), eta_lam, leak)
    after, step, *new = getattr(rules, bucket.update.formula)(g, x, decay, *state, *numbers)
    return g, step, after, *new


def _update(bucket: Whole, g: Tensor, state: Sequence[Tensor], numbers: Numbers) -> tuple[Tensor, ...]:
    """(direction, eta*u, new state ...) of the bucket's update."""
    of_rules = getattr(rules, bucket.update.formula)
    eta = bucket.lr * numbers[0] if on_a_device(bucket.lr) else numbers[0]
    lacking = of_rules.__code__.co_argcount - 1 - len(state) - len(numbers)
    made: tuple[Tensor, ...] = of_rules(g, *state, *[None] * lacking, eta, *numbers[1:])
    return made


def on_a_device(lr: float | Tensor) -> bool:
    """Must it stay there, since to read it would wait?"""
    return isinstance(lr, Tensor) and lr.device.type != "cpu"


def counters(bucket: Whole) -> list[Numbers]:
    """The counters of each tensor."""
    if not bucket.counters:
        return [()] * len(bucket.w)
    return list(zip(*(map(float, column) for column in bucket.counters), strict=True))


def set_counters(bucket: Whole, after: Sequence[Numbers]) -> None:
    """Set the counters of each tensor to those ``after`` the step."""
    for column, values in zip(bucket.counters, zip(*after, strict=True), strict=True):
        for counter, value in zip(column, values, strict=True):
            counter.fill_(value)


def _direction(bucket: Coming, m: Tensor, g: Tensor, out: Tensor) -> None:
    """out <- `rules.heading` in place, by torch's own operations. Without momentum ``m`` is not read."""
    a, b = bucket.a, bucket.b
    if bucket.m is None:
        torch.mul(g, 1.0 if b > 0 else -1.0, out=out)
        return
    average, step = (m, g) if m.dtype == g.dtype == out.dtype else (out.copy_(m), g.to(out.dtype))
    if b == 1 - a:  # as Adam and Lion compute it, so that near-cancellations come out as theirs
        torch.lerp(average, step, b, out=out)
    else:
        torch.add(average, step, alpha=b / a, out=out)


def _draws(bucket: Coming | Stepped) -> Draws | None:
    """The draws that round the bucket's weights; None where they are rounded to nearest."""
    return bucket.draws if bucket.w[0].element_size() == 2 else None


def _random(draws: Draws, i: int, column: int, shape: torch.Size) -> Tensor:
    """A number in [0, 1) for each place of tensor ``i``: see `rules.uniform` for ``column``."""
    return rules.uniform(draws.words(i), column).view(shape)


def _decay_unless_opposed(
    bucket: Coming | Stepped,
    of: list[int],
    w: Tensor,
    x: Tensor,
    d: Tensor,
    sign: float,
    strict: bool,
    leak: float,
    out: Tensor,
    into: list[list[Tensor]] | None,
) -> None:
    """out <- w - eta*lam*x, but w - leak*eta*lam*x where sign*d*x > 0 (>= 0 if ``strict``).

    ``of``: the tensors of the bucket that these are parts of.

    ``d`` is overwritten; ``w`` is ``out`` or a wider copy of it. Unless ``into`` is None, the block's `rules.sums` are
    appended to its lists: all five after the step (``sign`` > 0), the first three before it.
    """
    eta_lam = bucket.eta_lam
    table = None if into is None else torch.empty((5 if sign > 0 else 3, d.numel()), dtype=d.dtype, device=d.device)
    if table is not None and sign > 0:
        torch.mul(d, d, out=table[3])
    take_mask = _mask_by_product if d.device.type == "cpu" else _mask_by_signs
    mask = take_mask(d, x, sign, strict, None if table is None else table[1])
    if table is not None:
        table[0].copy_(mask)
    if leak:
        mask.clamp_(min=leak)
    if table is not None:
        torch.mul(mask, x, out=table[2]).square_()
    if isinstance(eta_lam, Tensor):  # stays on its device: schedules and graph replays read new values, without a sync
        w.addcmul_(x, mask.mul_(eta_lam), value=-1)
    else:
        w.addcmul_(x, mask, value=-eta_lam)
    if w is not out:
        out.copy_(w)
    if into is not None and table is not None:
        if sign > 0:
            torch.mul(w, w, out=table[4])
        sizes = [bucket.w[i].numel() for i in of] if len(of) > 1 else [w.numel()]
        for i, part in zip(of, torch.split(table, sizes, dim=1), strict=True):
            into[i].append(part.sum(1))  # the count is exact: a block has at most 2**24 elements


def _parts_of(bucket: Coming | Stepped, parts: list[list[Tensor]]) -> list[list[Tensor]]:
    """An empty list for the sums of each tensor's blocks. The lists are also added to ``parts``."""
    of_bucket: list[list[Tensor]] = [[] for _ in bucket.w]
    parts += of_bucket
    return of_bucket


def _per_tensor(parts: list[list[Tensor]], buckets: Sequence[Bucket]) -> Tensor:
    """A row of five sums for each tensor, from those of its blocks; sums that are missing are 0."""
    device = buckets[0].w[0].device
    rows = torch.stack(list(chain.from_iterable(parts))).to(rules.exact(device))
    if len(rows) > len(parts):
        rows = torch.stack([of_one.sum(0) for of_one in torch.split(rows, list(map(len, parts)))])
    return torch.nn.functional.pad(rows, (0, 5 - rows.shape[1]))


def _mask_by_product(d: Tensor, x: Tensor, sign: float, strict: bool, moved: Tensor | None = None) -> Tensor:
    """1[sign*d*x <= 0], or < 0 if ``strict``, in the type of ``d``, which is overwritten; ``moved`` <- the strict mask.

    d*x is scaled by 2**127 before it can underflow (d + 2**127*d*x has the sign of d*x), which takes fewer passes than
    a comparison of signs. The mask is exact for every normal x; where d is infinite or x is 0 it may be 0.
    """
    d.addcmul_(d, x, value=sign * _SCALE[d.dtype])
    if moved is not None:
        torch.lt(d, 0, out=moved)
    return d.lt_(0) if strict else d.le_(0)


def _mask_by_signs(d: Tensor, x: Tensor, sign: float, strict: bool, moved: Tensor | None = None) -> Tensor:
    """The same for devices such as CUDA, which multiply d*x before they scale it. Exact for every d and x."""
    d.mul_(-sign)
    if moved is not None:
        moved.copy_(rules.aligned(d, x, strict=True))
    return rules.aligned(d, x, strict).to(d.dtype)


def _block_size(device: torch.device) -> int:
    return BLOCK_ON_CPU if device.type == "cpu" else BLOCK_ELSEWHERE


def _scratch(buckets: Sequence[Coming | Stepped], rows: int) -> list[Tensor]:
    """``rows`` flat buffers, each as long as the longest piece, in float32 or wider. On a CPU unused ones are free."""
    w = buckets[0].w[0]
    longest = min(max(PACK, *(t.numel() for bucket in buckets for t in bucket.w)), _block_size(w.device))
    wide = torch.promote_types(w.dtype, torch.float32)
    return [torch.empty(longest, dtype=wide, device=w.device) for _ in range(rows)]


def _blocks(w: Sequence[Tensor], *others: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
    """For each piece, the indices of its tensors and then a flat piece of ``w`` and of each of the ``others``.

    Pieces hold equal places, part of one large tensor or several small ones in a row. What the caller writes to the
    first is written to ``w``.
    """
    run: list[int] = []
    length = 0
    for i, weight in enumerate(w):
        if weight.numel() < SMALL:
            length += weight.numel()
            if length > PACK:
                yield from _packed(run, w, *others)
                run, length = [], weight.numel()
            run.append(i)
            continue
        lines = _lines(weight, *(other[i] for other in others))
        yield from zip(repeat([i]), *(torch.split(line, _block_size(weight.device)) for line in lines), strict=False)
        _write_back(weight, lines[0])
    if run:
        yield from _packed(run, w, *others)


def _packed(run: list[int], *lists: Sequence[Tensor]) -> Iterator[tuple[Any, ...]]:
    columns = list(zip(*(_lines(*(tensors[j] for tensors in lists)) for j in run), strict=True))
    piece = tuple(torch.cat(column) for column in columns)
    yield (run, *piece)
    weights = columns[0]
    torch._foreach_copy_(weights, torch.split(piece[0], [line.numel() for line in weights]))
    for j, line in zip(run, weights, strict=True):
        _write_back(lists[0][j], line)


def _lines(*tensors: Tensor) -> list[Tensor]:
    """The tensors, flat and in one order of elements: views where they are dense (channels_last too), else copies."""
    if all(t.is_contiguous() for t in tensors):
        return [t if t.dim() == 1 else t.view(-1) for t in tensors]
    order = _order(tensors[0])
    return [t.permute(order).reshape(-1) for t in tensors]


def _write_back(t: Tensor, line: Tensor, order: list[int] | None = None) -> None:
    if has_numbers(t) and line.data_ptr() != t.data_ptr():
        in_order = t.permute(_order(t) if order is None else order)
        in_order.copy_(line.view_as(in_order))


def _order(t: Tensor) -> list[int]:
    """The dimensions from the widest stride to the narrowest: permuted so, a dense tensor is contiguous."""
    return sorted(range(t.dim()), key=t.stride, reverse=True)
