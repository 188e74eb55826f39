"""What was measured of optimizers that no table vouches for (`probe`), and when it is measured again."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any
from weakref import WeakKeyDictionary

from torch.optim import Optimizer

from cwd_wrap.bases import probe, quirks

Group = Mapping[str, Any]
_SCHEDULED = {"lr", "weight_decay", "momentum"}
_OFTEN = 3  # An option that changed more often is on a schedule.


@dataclass
class _Measured:
    """What was measured of the groups of an optimizer."""

    found: dict[str, probe.Found] = field(default_factory=dict)
    last: dict[str, tuple[dict[str, object], probe.Found]] = field(default_factory=dict)
    """The options of each group at the last look, and what was found."""
    changes: Counter[tuple[str, str]] = field(default_factory=Counter)
    """How often an option of a group changed."""


# None for optimizers that tables vouch for.
_measured: WeakKeyDictionary[Optimizer, _Measured | None] = WeakKeyDictionary()


def find(base: Optimizer, group: Group, where: str, by_options: probe.Eta) -> probe.Found | None:
    """What `probe` finds out about the group at its first use; None if tables vouch for its optimizer.

    It is measured again when an option changes that neither its own steps nor a schedule writes. ``by_options`` is the
    step size as the options say.

    Raises ValueError if the group cannot be wrapped.
    """
    if base not in _measured:
        _measured[base] = None if probe.is_vouched(base) else _Measured()
    of_base = _measured[base]
    if of_base is None or not group.get("params"):
        return None
    plain = ((key, value) for key, value in group.items() if isinstance(value, int | float | str))
    options: dict[str, object] = {key: value for key, value in plain if key not in _SCHEDULED}
    options["dtype of params"] = group["params"][0].dtype
    before, found = of_base.last.get(where, (None, None))
    if before is None or found is None:
        found = _anew(base, group, of_base, by_options)
    elif options != before:
        changed = {key for key in before.keys() | options.keys() if before.get(key) != options.get(key)} - found.counts
        of_base.changes.update((where, key) for key in changed)
        if any(of_base.changes[where, key] <= _OFTEN for key in changed):
            now = _anew(base, group, of_base, by_options)
            found = found if now.unmeasured else now
    of_base.last[where] = options, found
    if found.fault is not None:
        msg = f"{where} cannot be wrapped: {found.fault}"
        raise ValueError(msg)
    return found


def forget(base: Optimizer, wheres: Iterable[str]) -> None:
    """Forget what was found out about some groups of the optimizer."""
    of_base = _measured.get(base)
    if of_base is not None:
        for where in wheres:
            of_base.last.pop(where, None)


def _anew(base: Optimizer, group: Group, of_base: _Measured, by_options: probe.Eta) -> probe.Found:
    if (constraint := quirks.constraint(group)) is not None:
        return probe.Found(fault=constraint)
    alike = probe.alike(base, group)
    if alike not in of_base.found:
        of_base.found[alike] = probe.measure(base, group, by_options)
    return of_base.found[alike]
