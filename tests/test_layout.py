"""Which module may import which, and what `import cwd_wrap` may load."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1] / "cwd_wrap"

# The rooms, each with the modules in it. A module imports from its own room and from those above it.
ROOMS: dict[str, set[str]] = {
    "": {"rules", "tensors", "notices", "graphs", "report", "plot", "params_first", "draws"},
    "bases": {
        "known", "directions", "schedule_free", "updates", "pieces", "quirks", "values", "copies", "probe", "measured",
        "journal",
        "weight_decay",
    },
    "kernels": {"bind", "buckets", "_eager", "_threads", "_walk", "_numba", "_tables", "_triton"},
    "step": {"choice", "snapshot", "paths", "plan", "step"},
    "methods": {"contract", "wrapper", "shared", "cautious_decay", "cautious_update", "p_norm_decay"},
    "outside": {"monitor", "optim", "timm", "env", "wrappers", "__main__", "__init__"},
}  # fmt: skip
# Each module with the modules of the package that it may import.
ARROWS: dict[str, set[str]] = {
    "rules": set(),
    "tensors": set(),
    "notices": set(),
    "graphs": set(),
    "report": set(),
    "plot": set(),
    "params_first": {"notices"},
    "draws": {"rules", "tensors"},
    "bases": set(),
    "bases.known": set(),
    "bases.directions": {"bases.known"},
    "bases.schedule_free": {"bases.known"},
    "bases.updates": {"bases.known", "bases.schedule_free"},
    "bases.pieces": {"bases.known"},
    "bases.quirks": {"bases.known", "bases.schedule_free"},
    "bases.values": set(),
    "bases.copies": {"bases.quirks", "bases.values"},
    "bases.probe": {"bases.copies", "bases.known", "bases.quirks"},
    "bases.measured": {"bases.probe", "bases.quirks"},
    "bases.journal": {"bases.quirks"},
    "bases.weight_decay": {
        "bases.journal", "bases.known", "bases.measured", "bases.probe", "bases.quirks", "notices",
    },
    "kernels": {"kernels.buckets", "kernels._eager", "kernels._numba", "kernels._triton", "notices"},
    "kernels.bind": {"rules"},
    "kernels.buckets": {"bases.directions", "bases.updates", "draws", "graphs", "report", "tensors"},
    "kernels._eager": {"bases.updates", "draws", "kernels.buckets", "rules", "tensors"},
    "kernels._threads": set(),
    "kernels._walk": {"kernels._eager", "kernels._threads", "tensors"},
    "kernels._numba": {"kernels._eager", "kernels._walk", "kernels.bind", "kernels.buckets", "rules", "tensors"},
    "kernels._tables": {"graphs"},
    "kernels._triton": {
        "bases.updates", "draws", "kernels._eager", "kernels._tables", "kernels.bind", "kernels.buckets",
    },
    "step": set(),
    "step.choice": {
        "bases.directions", "bases.known", "bases.pieces", "bases.quirks", "bases.schedule_free", "bases.updates",
        "bases.weight_decay", "kernels", "kernels.buckets",
    },
    "step.snapshot": {"graphs", "kernels.buckets", "tensors"},
    "step.paths": {
        "bases.journal", "bases.probe", "bases.quirks", "draws", "kernels", "kernels.buckets", "notices", "report",
        "step.choice", "step.snapshot", "tensors",
    },
    "step.plan": {
        "bases.directions", "bases.quirks", "bases.schedule_free", "bases.updates", "bases.weight_decay", "graphs",
        "kernels.buckets", "step.choice", "step.paths", "tensors",
    },
    "step.step": {
        "bases.journal", "bases.known", "bases.weight_decay", "step.choice", "step.paths", "step.plan",
    },
    "methods": {"methods.cautious_decay", "methods.cautious_update", "methods.p_norm_decay"},
    "methods.contract": {"notices"},
    "methods.wrapper": {
        "bases.journal", "bases.quirks", "bases.weight_decay", "draws", "kernels", "methods.contract", "notices",
        "params_first", "report", "step.choice", "step.paths", "step.plan", "step.snapshot", "step.step", "tensors",
    },
    "methods.shared": {"kernels.buckets", "rules"},
    "methods.cautious_decay": {
        "bases.weight_decay", "kernels", "kernels.buckets", "methods.shared", "methods.wrapper", "notices", "rules",
        "step.choice", "tensors",
    },
    "methods.cautious_update": {
        "kernels", "kernels.buckets", "methods.shared", "methods.wrapper", "rules", "step.choice", "tensors",
    },
    "methods.p_norm_decay": {
        "bases.weight_decay", "kernels", "kernels.buckets", "methods.shared", "methods.wrapper", "step.choice",
        "tensors",
    },
    "wrappers": {"methods"},
    "monitor": {"graphs", "notices", "report"},
    "optim": {"methods", "methods.wrapper", "params_first"},
    "timm": {"methods", "__init__"},
    "env": {
        "bases.directions", "bases.known", "bases.pieces", "bases.quirks", "bases.updates", "kernels",
        "kernels._threads",
    },
    "__main__": {"env"},
    "__init__": {"methods", "monitor", "optim", "plot"},
}  # fmt: skip
# Each other package, with the only modules that may import it.
OUTSIDE = {
    "llvmlite": {"kernels._walk"},
    "matplotlib": {"plot"},
    "numba": {"kernels._numba", "kernels._walk"},
    "numpy": {"kernels._numba", "kernels._walk"},
    "timm": {"timm"},
    "triton": {"kernels._triton"},
}


def imports(source: str) -> set[str]:
    """The modules that a source text imports, at the top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(source: str) -> set[str]:
    """The modules of the package that a source text imports, named as in `ARROWS`."""
    modules = set()
    for name in imports(source):
        if name.split(".")[0] != "cwd_wrap":
            continue
        parts = name.split(".")[1:]
        modules.add(next((m for n in (2, 1) if (m := ".".join(parts[:n])) in ARROWS), "__init__"))
    return modules


def modules() -> dict[str, str]:
    found = {}
    for path in ROOT.rglob("*.py"):
        name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        found[name.removesuffix(".__init__")] = path.read_text()
    return found


@pytest.mark.parametrize("name", sorted(modules()))
def test_a_module_imports_no_more_than_it_may(name: str) -> None:
    """No module imports more of the package than `ARROWS` allows."""
    assert inside(modules()[name]) <= ARROWS[name]


def test_the_allowed_imports_have_no_cycle() -> None:
    """The allowed imports have no cycle."""

    def below(name: str, path: tuple[str, ...] = ()) -> None:
        assert name not in path, (*path, name)
        for other in ARROWS[name]:
            below(other, (*path, name))

    for name in ARROWS:
        below(name)


def room_of(name: str) -> int:
    """The number of the room that a module is in."""
    room, _, rest = name.rpartition(".")
    if name in ROOMS or room:
        assert not room or rest in ROOMS[room], name
        return list(ROOMS).index(room or name)
    return 0 if name in ROOMS[""] else len(ROOMS) - 1


def test_arrows_between_rooms_go_one_way() -> None:
    """A module imports only from its own room and from those before it."""
    for name, others in ARROWS.items():
        for other in others:
            assert room_of(other) <= room_of(name), (name, other)


def test_the_check_can_fail() -> None:
    """The check finds a forbidden import at the top or inside a function."""
    assert inside("from cwd_wrap.methods.wrapper import OptimizerWrapper") == {"methods.wrapper"}
    assert inside("def f():\n    from cwd_wrap.kernels import _eager") == {"kernels._eager"}
    assert not inside("from cwd_wrap import methods") <= ARROWS["rules"]


def test_only_torch_is_needed() -> None:
    """Each optional package is imported only by the modules that need it."""
    needed = {"cwd_wrap", "torch", "typing_extensions", *sys.stdlib_module_names}
    for name, source in modules().items():
        for imported in {module.split(".")[0] for module in imports(source)} - needed:
            assert name in OUTSIDE.get(imported, set()), (name, imported)


# What is loaded when, in one new process: the first `now` is of the import, the next of a wrapper, the last of a step.
LOADS = """
import json, sys
import torch

before = set(sys.modules)

def now():
    loaded = set(sys.modules) - before
    before.update(loaded)
    return sorted(loaded)

import cwd_wrap
stages = [now()]
from cwd_wrap import params_first
classes = len(params_first._made)
p = torch.nn.Parameter(torch.ones(2))
p.grad = torch.ones(2)
base = torch.optim.AdamW([p], fused=True)
before.update(sys.modules)
opt = cwd_wrap.CautiousDecay(base, lam=0.1)
repr(opt), opt.paths(), opt.snapshot_bytes
stages.append(now())
opt.step()
stages.append(now())
print(json.dumps([classes, *stages]))
"""


def packages(modules: list[str]) -> set[str]:
    """The packages that modules are of, other than the standard library."""
    return {module.split(".")[0] for module in modules} - set(sys.stdlib_module_names)


@pytest.fixture(scope="module")
def loads() -> list[Any]:
    """How many classes the import makes, and which modules import, wrapper and first step load."""
    done = subprocess.run([sys.executable, "-c", LOADS], check=True, capture_output=True, text=True, cwd=ROOT.parent)
    found: list[Any] = json.loads(done.stdout)
    return found


@pytest.mark.process
def test_import_loads_torch_and_nothing_else(loads: list[Any]) -> None:
    """`import cwd_wrap` loads no numba, triton, timm or matplotlib beyond what torch loads, and makes no class."""
    classes, imported, _, _ = loads

    assert packages(imported) == {"cwd_wrap"}
    assert {"cwd_wrap.env", "cwd_wrap.__main__"}.isdisjoint(imported)
    assert classes == 0


@pytest.mark.process
def test_a_wrapper_loads_nothing_before_its_first_step(loads: list[Any]) -> None:
    """Building a wrapper and calling paths() do not import numba, which takes half a second."""
    assert packages(loads[2]) == set()


@pytest.mark.process
def test_the_first_step_loads_the_kernels_of_its_backend(loads: list[Any]) -> None:
    """The first step on the CPU imports numba, where it is installed, and never the kernels of Triton."""
    pytest.importorskip("numba")

    assert "numba" in packages(loads[3])
    assert "cwd_wrap.kernels._numba" in loads[3]
    assert "cwd_wrap.kernels._triton" not in {*loads[1], *loads[2], *loads[3]}
