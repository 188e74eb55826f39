"""What users may rely on is written in public.txt: names, arguments, keys. A change of it is noticed, and wanted.

If one is wanted, `python tests/test_public.py` writes the file anew. Say in CHANGELOG.md what users will notice.
"""

import dataclasses
import difflib
import importlib
import importlib.util
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import SGD, AdamW, Optimizer

import cwd_wrap
from cwd_wrap import CautiousDecay, CautiousUpdate, MaskMonitor, PNormDecay
from cwd_wrap.methods.cautious_decay import MASKS, ROUNDINGS
from cwd_wrap.methods.cautious_update import SCALES
from cwd_wrap.optim import cautious
from cwd_wrap.report import Part, Report
from cwd_wrap.step.choice import PATHS, PathOfGroup

STATED = Path(__file__).with_name("public.txt")


def arguments(function: Callable[..., Any]) -> str:
    """The signature without types, which tell no caller apart."""
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()]
    return str(inspect.Signature([p for p in parameters if p.name != "self"]))


def stepped(wrap: Callable[[Optimizer], Any]) -> Any:
    """An optimizer, or a wrapper, after a step."""
    p = torch.nn.Parameter(torch.ones(1))
    p.grad = torch.ones(1)
    optimizer = wrap(AdamW([p], weight_decay=0.5))
    optimizer.step()
    return optimizer


def keys(optimizer: Optimizer) -> set[str]:
    """All keys of a state dict: its own, those of a group and those of the state of a parameter."""
    saved = optimizer.state_dict()
    return {*saved, *saved["param_groups"][0], *saved["state"][0]}


def members(thing: Any, beside: object) -> Iterator[str]:
    """The public attributes of an object that ``beside`` lacks, and the arguments of its methods."""
    for name in dir(thing):
        if name.startswith("_") or hasattr(beside, name) or not hasattr(thing, name):
            continue
        value = getattr(thing, name)
        yield f"    .{name}{arguments(value) if inspect.ismethod(value) else ''}"


def lines() -> Iterator[str]:
    """The public surface, one name a line."""
    yield f"cwd_wrap: {', '.join(sorted([*cwd_wrap.__all__, '__version__', 'optim']))}"
    for method in (CautiousDecay, CautiousUpdate, PNormDecay):
        plain, wrapped = stepped(lambda base: base), stepped(method)
        yield f"cwd_wrap.{method.__name__}{arguments(method.__init__)}"
        yield from members(wrapped, plain)
        beside = keys(wrapped) ^ keys(plain)
        yield f"    .state_dict(), its keys beside the optimizer's own: {', '.join(beside) or 'none'}"
    yield f"what paths() lists: {', '.join(PathOfGroup._fields)}"
    yield f"path: {', '.join(map(repr, (*PATHS, None)))}; in paths() also 'plain'"
    for name, known in (("mask", MASKS), ("rounding", ROUNDINGS), ("scale", SCALES)):
        yield f"{name}: {', '.join(map(repr, known))}"
    yield f"backend: {', '.join(map(repr, (*cwd_wrap.kernels.BACKENDS, None)))}"
    yield "what an observer gets:"
    yield from members(Report([]), object)
    yield f"    .parts, each with {', '.join(field.name for field in dataclasses.fields(Part))}"
    yield f"cwd_wrap.MaskMonitor{arguments(MaskMonitor.__init__)}"
    yield from members(MaskMonitor(), object)
    yield f"    .rows(), the keys of a row: {', '.join(cwd_wrap.monitor.COLUMNS)}"
    for name in cwd_wrap.__all__:
        if name.startswith("plot"):
            yield f"cwd_wrap.{name}{arguments(getattr(cwd_wrap, name))}"
    yield "cwd_wrap.optim: a class for each of torch.optim, with its name"
    options = set(inspect.signature(cwd_wrap.optim.SGD).parameters) - set(inspect.signature(SGD).parameters)
    yield f"    .SGD takes, beside torch's arguments: {', '.join(sorted(options))}"
    yield f"    .cautious{arguments(cautious)}"
    if importlib.util.find_spec("timm"):
        timm = importlib.import_module("cwd_wrap.timm")
        for function in (timm.register, timm.run_script):
            yield f"cwd_wrap.timm.{function.__name__}{arguments(function)}"


def differences(stated: list[str], found: list[str]) -> list[str]:
    """What was added and taken away."""
    return [line for line in difflib.ndiff(stated, found) if line[0] in "+-"]


def test_the_public_surface_is_as_stated() -> None:
    """Names, arguments, options, keys of state dicts, names in paths() and in reports are those of public.txt."""
    stated = STATED.read_text(encoding="utf-8").splitlines()
    if not importlib.util.find_spec("timm"):
        stated = [line for line in stated if not line.startswith("cwd_wrap.timm")]
    changed = "\n".join(differences(stated, list(lines())))

    assert not changed, (
        f"what users may rely on has changed:\n{changed}\nIf that is wanted, run `python tests/test_public.py` and say "
        "it in CHANGELOG.md under [Unreleased]"
    )


@pytest.mark.parametrize(
    ("was", "now"),
    [("lam=None", "decay=None"), ("'snapshot'", "'copy'"), (".observer", ".watcher"), ("eta_lam", "strength")],
)
def test_a_change_is_found(was: str, now: str) -> None:
    """An argument, a path, an attribute or a field of another name is found: as the old line, and as the new one."""
    found = list(lines())
    changed = differences([line.replace(was, now) for line in found], found)

    assert any(line.startswith("-") and now in line for line in changed)
    assert any(line.startswith("+") and was in line for line in changed)


if __name__ == "__main__":
    STATED.write_text("\n".join(lines()) + "\n", encoding="utf-8")
