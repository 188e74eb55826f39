"""The rules in torch operations, in blocks that stay in cache between the first read and the last write.

Masks are kept as 0.0 and 1.0 in the weight's own (wide) type: on CPU a comparison into a bool tensor, or `torch.where`,
takes four to six times as long.
"""

from collections.abc import Hashable, Iterator, Sequence

import torch
from torch import Tensor

from cwd_wrap import rules

BLOCK_ON_CPU = 1 << 20  # elements: few enough for the last-level cache, enough to hide the cost of five calls
BLOCK_ELSEWHERE = 1 << 24
SMALL = 1 << 14  # tensors below this are laid side by side, up to PACK elements in one piece
PACK = 1 << 18
_SCALE = {torch.float32: 2.0**127, torch.float64: 2.0**1023}


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
    """w <- w - eta*lam * 1[(a*m + b*g)*w >= 0] * w in place, before the optimizer's step (a > 0 where m is not None).

    `rules.aligned` and `rules.decay`; one entry a tensor, all of one device and of the same types. Returns how many
    weights were decayed if ``count``, else 0. ``stochastic``: `rules.stochastic_rounding` of 16-bit weights.
    """
    active: int | Tensor = 0
    keys = [(mi is None, ai, bi, id(ci)) for mi, ai, bi, ci in zip(m, a, b, eta_lam, strict=True)]
    first = [gi if mi is None else mi for mi, gi in zip(m, g, strict=True)]
    d_all, x_all = _scratch(w, 2)
    for i, (x, m_or_g, grad) in _blocks(keys, w, first, g):
        d = d_all[: x.numel()]
        if m[i] is None:
            torch.mul(grad, 1.0 if b[i] > 0 else -1.0, out=d)
        else:
            average, step = (
                (m_or_g, grad) if m_or_g.dtype == grad.dtype == d.dtype else (d.copy_(m_or_g), grad.to(d.dtype))
            )
            if b[i] == 1 - a[i]:  # as Adam and Lion compute it, so that near-cancellations come out as theirs
                torch.lerp(average, step, b[i], out=d)
            else:
                torch.add(average, step, alpha=b[i] / a[i], out=d)
        wide = x if x.dtype == d.dtype else x_all[: x.numel()].copy_(x)
        active = active + _decay_unless_opposed(wide, wide, d, -1.0, eta_lam[i], strict, count, stochastic, out=x)
    return active


def decay_from_snapshot(
    w: Sequence[Tensor],
    x: Sequence[Tensor],
    eta_lam: Sequence[float | Tensor],
    *,
    strict: bool,
    count: bool,
    stochastic: bool = False,
) -> int | Tensor:
    """w <- w - eta*lam * 1[the step took x towards zero] * x in place, after the step.

    `rules.moved_towards_zero` and `rules.decay`; one entry a tensor, all of one device and of the same types. Returns
    how many weights were decayed if ``count``, else 0. ``stochastic``: `rules.stochastic_rounding` of 16-bit weights.
    """
    active: int | Tensor = 0
    d_all, x_all = _scratch(w, 2)
    for i, (after, before) in _blocks([id(ci) for ci in eta_lam], w, x):
        d = d_all[: after.numel()]
        w_wide, x_wide = after, before
        if after.dtype != d.dtype:
            w_wide, x_wide = after.to(d.dtype), x_all[: after.numel()].copy_(before)
        torch.sub(w_wide, x_wide, out=d)  # exact in sign: it is 0 only where the two are equal
        active = active + _decay_unless_opposed(
            w_wide, x_wide, d, 1.0, eta_lam[i], strict, count, stochastic, out=after
        )
    return active


def copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    """to <- source; one entry a tensor, all of one device and type."""
    torch._foreach_copy_(list(to), list(source))


def count_nonzero(x: Sequence[Tensor]) -> Tensor:
    """How many elements of each tensor are not 0; all of one device and type."""
    return torch.stack([t.count_nonzero() for t in x])


def count_agreeing(w: Sequence[Tensor], x: Sequence[Tensor], g: Sequence[Tensor]) -> Tensor:
    """In how many places of each tensor the step went down the gradient: `rules.agrees`; one entry a tensor."""
    return torch.stack([rules.agrees(*row).sum() for row in zip(w, x, g, strict=True)])


def vector(numbers: Sequence[int], device: torch.device) -> Tensor:
    """The ``numbers`` on ``device``, for which nothing waits."""
    return torch.cat([torch.full((1,), number, device=device) for number in numbers])


def cautious_update(
    w: Sequence[Tensor],
    x: Sequence[Tensor],
    g: Sequence[Tensor],
    alpha: Tensor,
    eta_lam: Sequence[float | Tensor],
) -> None:
    """w <- v - eta*lam*v with v = x + alpha * 1[u*g > 0] * (w - x) in place, after the step.

    `rules.agrees` and `rules.cautious_update`; one entry a tensor, all of one device and of the same types.
    """
    for after, before, gradient, factor, strength in zip(w, x, g, alpha, eta_lam, strict=True):
        mask = rules.agrees(after, before, gradient)
        after.copy_(rules.cautious_update(after, before, mask, factor, strength))


def p_norm_decay(
    w: Sequence[Tensor], x: Sequence[Tensor], p: float, eta_lam: Sequence[float | Tensor], nonzero: Tensor
) -> None:
    """w <- w / (1 + p*eta*lam * |x|**(p-2)) in place, after the step, but w where all of x was 0.

    `rules.p_norm_decay`; one entry a tensor, all of one device and of the same types.
    """
    for after, before, strength, zero in zip(w, x, eta_lam, nonzero == 0, strict=True):
        after.copy_(rules.p_norm_decay(after, before, p, strength, zero))


def _decay_unless_opposed(
    w: Tensor,
    x: Tensor,
    d: Tensor,
    sign: float,
    eta_lam: float | Tensor,
    strict: bool,
    count: bool,
    stochastic: bool,
    out: Tensor,
) -> int | Tensor:
    """out <- w - eta*lam*x, but w where sign*d*x > 0 (>= 0 if ``strict``).

    ``d`` is used up; ``w`` is ``out`` or a wider copy of it.

    d*x is scaled by 2**127 before it can underflow (d + 2**127*d*x has its sign), which takes fewer passes than
    comparing signs. The mask is exact for every normal x; where d is infinite or x is 0 it may read 0.
    """
    d.addcmul_(d, x, value=sign * _SCALE[d.dtype])
    mask = d.lt_(0) if strict else d.le_(0)
    active = _count(mask) if count else 0
    if isinstance(eta_lam, Tensor):  # stays on its device: a schedule or a graph replay sees new values, nothing waits
        w.addcmul_(x, mask.mul_(eta_lam), value=-1)
    else:
        w.addcmul_(x, mask, value=-eta_lam)
    if w is not out:
        out.copy_(rules.stochastic_rounding(w, out.dtype, torch.rand_like(w)) if stochastic else w)
    return active


def _count(mask: Tensor) -> int | Tensor:
    total = mask.sum()  # exact: a block has at most 2**24 elements
    return int(total) if mask.device.type == "cpu" else total.long()


def _block_size(device: torch.device) -> int:
    return BLOCK_ON_CPU if device.type == "cpu" else BLOCK_ELSEWHERE


def _scratch(w: Sequence[Tensor], rows: int) -> list[Tensor]:
    """``rows`` flat buffers, each as long as the longest piece, in float32 or wider; an unused one costs nothing."""
    longest = min(max(PACK, *(t.numel() for t in w)), _block_size(w[0].device))
    wide = torch.promote_types(w[0].dtype, torch.float32)
    return [torch.empty(longest, dtype=wide, device=w[0].device) for _ in range(rows)]


def _blocks(
    keys: Sequence[Hashable], w: Sequence[Tensor], *others: Sequence[Tensor]
) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    """Flat, aligned pieces of each entry's tensors, and the entry's index; what is written to the first lands in ``w``.

    Small tensors in a row with equal keys come packed into one piece, under the index of the first of them.
    """
    run: list[int] = []
    length = 0
    for i, weight in enumerate(w):
        if weight.numel() < SMALL:
            length += weight.numel()
            if run and (keys[i] != keys[run[0]] or length > PACK):
                yield from _packed(run, w, *others)
                run, length = [], weight.numel()
            run.append(i)
            continue
        lines = _lines(weight, *(other[i] for other in others))
        for piece in zip(*(torch.split(line, _block_size(weight.device)) for line in lines), strict=True):
            yield i, piece
        _write_back(weight, lines[0])
    if run:
        yield from _packed(run, w, *others)


def _packed(run: list[int], *lists: Sequence[Tensor]) -> Iterator[tuple[int, tuple[Tensor, ...]]]:
    columns = list(zip(*(_lines(*(tensors[j] for tensors in lists)) for j in run), strict=True))
    piece = tuple(torch.cat(column) for column in columns)
    yield run[0], piece
    weights = columns[0]
    torch._foreach_copy_(weights, torch.split(piece[0], [line.numel() for line in weights]))
    for j, line in zip(run, weights, strict=True):
        _write_back(lists[0][j], line)


def _lines(*tensors: Tensor) -> list[Tensor]:
    """The tensors as lines of equal order: views where they are dense (channels_last too), else copies."""
    if all(t.is_contiguous() for t in tensors):
        return [t if t.dim() == 1 else t.view(-1) for t in tensors]
    order = _order(tensors[0])
    return [t.permute(order).reshape(-1) for t in tensors]


def _write_back(weight: Tensor, line: Tensor) -> None:
    if line.data_ptr() != weight.data_ptr():
        in_order = weight.permute(_order(weight))
        in_order.copy_(line.view_as(in_order))


def _order(t: Tensor) -> list[int]:
    """The dimensions from the widest stride to the narrowest: permuted so, a dense tensor is contiguous."""
    return sorted(range(t.dim()), key=t.stride, reverse=True)
