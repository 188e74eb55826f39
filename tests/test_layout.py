"""Which module may import which, and what `import cwd_wrap` may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "cwd_wrap"

# Each module with the modules of the package that it may import.
ARROWS: dict[str, set[str]] = {
    "rules": set(),
    "known": set(),
    "directions": {"known"},
    "schedule_free": {"known"},
    "updates": {"known", "schedule_free"},
    "pieces": {"known"},
    "tensors": set(),
    "quirks": {"known", "schedule_free"},
    "copies": {"quirks"},
    "probe": {"copies", "known", "quirks"},
    "notices": set(),
    "contract": {"notices"},
    "params_first": {"notices"},
    "monitor": {"buckets", "graphs", "notices"},
    "plot": set(),
    "graphs": set(),
    "snapshot": {"graphs", "tensors"},
    "journal": {"quirks"},
    "weight_decay": {"journal", "known", "notices", "probe", "quirks"},
    "draws": {"rules", "tensors"},
    "buckets": {"directions", "draws", "graphs", "snapshot", "tensors", "updates"},
    "kernels.bind": {"rules"},
    "kernels._eager": {"buckets", "draws", "rules", "tensors", "updates"},
    "kernels._threads": set(),
    "kernels._walk": {"kernels._eager", "kernels._threads", "tensors"},
    "kernels._numba": {"buckets", "kernels._eager", "kernels._walk", "kernels.bind", "rules", "tensors"},
    "kernels._tables": {"graphs"},
    "kernels._triton": {"buckets", "draws", "kernels._eager", "kernels._tables", "kernels.bind", "updates"},
    "kernels": {"buckets", "kernels._eager", "kernels._numba", "kernels._triton", "notices"},
    "choice": {
        "buckets", "directions", "kernels", "known", "pieces", "quirks", "schedule_free", "updates", "weight_decay",
    },
    "paths": {
        "buckets", "choice", "draws", "graphs", "journal", "kernels", "notices", "probe", "quirks", "snapshot",
        "tensors", "updates",
    },
    "plan": {
        "buckets", "choice", "directions", "graphs", "paths", "quirks", "schedule_free", "tensors", "weight_decay",
    },
    "step": {"choice", "journal", "known", "paths", "plan", "weight_decay"},
    "wrapper": {
        "buckets", "choice", "contract", "draws", "journal", "kernels", "notices", "params_first", "paths", "plan",
        "quirks", "snapshot", "step", "tensors", "weight_decay",
    },
    "wrappers": {"buckets", "choice", "kernels", "notices", "rules", "tensors", "weight_decay", "wrapper"},
    "optim": {"params_first", "wrapper", "wrappers"},
    "timm": {"wrappers", "__init__"},
    "env": {"directions", "kernels", "known", "kernels._threads", "pieces", "quirks", "updates"},
    "__main__": {"env"},
    "__init__": {"monitor", "optim", "plot", "wrappers"},
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


def test_the_check_can_fail() -> None:
    """The check finds a forbidden import at the top or inside a function."""
    assert inside("from cwd_wrap.wrapper import OptimizerWrapper") == {"wrapper"}
    assert inside("def f():\n    from cwd_wrap.kernels import _eager") == {"kernels._eager"}
    assert not inside("from cwd_wrap import wrappers") <= ARROWS["rules"]


def test_only_torch_is_needed() -> None:
    """Each optional package is imported only by the modules that need it."""
    needed = {"cwd_wrap", "torch", "typing_extensions", *sys.stdlib_module_names}
    for name, source in modules().items():
        for imported in {module.split(".")[0] for module in imports(source)} - needed:
            assert name in OUTSIDE.get(imported, set()), (name, imported)


LOADED = "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"


def loaded(*program: str) -> str:
    """The packages that the lines load beyond torch's own, in a separate process."""
    lines = ["import sys, torch; before = set(sys.modules)", *program, LOADED]
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], check=True, capture_output=True, text=True, cwd=ROOT.parent
    )
    return done.stdout.strip()


@pytest.mark.process
def test_import_loads_torch_and_nothing_else() -> None:
    """`import cwd_wrap` loads no numba, triton, timm or matplotlib beyond what torch loads."""
    assert loaded("import cwd_wrap") == "['cwd_wrap']"


WRAPPED = (
    "import cwd_wrap; p = torch.nn.Parameter(torch.ones(2)); p.grad = torch.ones(2)",
    "base = torch.optim.AdamW([p], fused=True); before = set(sys.modules)",
    "opt = cwd_wrap.CautiousDecay(base, lam=0.1); repr(opt), opt.paths(), opt.snapshot_bytes",
)


@pytest.mark.process
def test_a_wrapper_loads_nothing_before_its_first_step() -> None:
    """Building a wrapper and calling paths() do not import numba, which takes half a second."""
    assert loaded(*WRAPPED) == "[]"


@pytest.mark.process
def test_the_first_step_loads_numba() -> None:
    """The first step imports numba, where it is installed."""
    pytest.importorskip("numba")

    assert "numba" in loaded(*WRAPPED, "opt.step()")
