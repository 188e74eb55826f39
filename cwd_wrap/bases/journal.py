"""What a step has changed in the base's param groups, written down before it is changed, so that it can be undone."""

from collections.abc import Iterator
from contextlib import contextmanager
from numbers import Real
from typing import Any

from cwd_wrap.bases import quirks

Group = dict[str, Any]


Entry = tuple[Group, str, Any, Any]
"""A change: a group, a key, the value before, and the value now, an object that nobody else has."""


class Journal:
    """Changes of param groups for the time of a step.

    An interrupt (Ctrl-C) can land at any line, also in a ``finally``. So each change is written down first, and `undo`
    may be called at any time and any number of times: it restores what is still changed.
    """

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def put(self, group: Group, key: str, value: object) -> None:
        """Set ``group[key]`` to ``value``."""
        self._entries.append((group, key, group[key], value))
        group[key] = value

    def __len__(self) -> int:
        return len(self._entries)

    def undo(self, since: int = 0) -> list[Entry]:
        """Restore what was put, the latest first; of ``since`` entries and more, only those after these.

        A value that a hook or a closure wrote meanwhile (a schedule) stays, unless it is a 0 that was computed from
        ours (``group["weight_decay"] *= 0.99``): these entries are returned, with what was written as ``now``.
        """
        overwritten: list[Entry] = []
        if not self._entries:
            return overwritten
        for group, key, before, ours in reversed(self._entries[since:]):
            now = group.get(key)
            if now is ours or key == "params":
                group[key] = before
            elif now is not before and isinstance(now, Real) and abs(float(now)) <= quirks.ALMOST_ZERO:
                overwritten.append((group, key, before, now))
                group[key] = before
        del self._entries[since:]
        return overwritten

    def follow(self, group: Group, copy: Group) -> bool:
        """Restore in the ``copy`` of a group what was put in the group. Returns whether there was any."""
        ours = [entry for entry in reversed(self._entries) if entry[0] is group and copy.get(entry[1]) is entry[3]]
        for _, key, before, _ in ours:
            copy[key] = before
        return bool(ours)

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Inside this context the groups are as they are between steps, for whoever reads them during one."""
        between = [entry for entry in reversed(self._entries) if entry[0].get(entry[1]) is entry[3]]
        try:
            for group, key, before, _ in between:
                group[key] = before
            yield
        finally:
            for group, key, _, now in reversed(between):
                group[key] = now
