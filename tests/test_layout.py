"""The house: which module may import which, and what `import cwd_wrap` may load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "cwd_wrap"

# Each module with the modules of the package that it may import. Nothing else, and nothing the other way.
ARROWS: dict[str, set[str]] = {
    "rules": set(),
    "snapshot": set(),
    "tensors": set(),
    "quirks": set(),
    "params_first": set(),
    "monitor": set(),
    "plot": set(),
    "directions": set(),
    "pieces": set(),
    "weight_decay": {"quirks"},
    "batch": {"tensors"},
    "kernels._eager": {"rules"},
    "kernels": {"kernels._eager", "kernels._triton"},
    "kernels._triton": {"kernels._eager"},
    "contract": set(),
    "wrapper": {
        "batch", "contract", "directions", "kernels", "params_first", "quirks", "snapshot", "tensors", "weight_decay",
    },
    "wrappers": {"batch", "contract", "directions", "rules", "tensors", "weight_decay", "wrapper"},
    "timm": {"wrappers", "__init__"},
    "__init__": {"monitor", "plot", "wrappers"},
}  # fmt: skip
OUTSIDE = {"torch", "triton", "timm", "matplotlib"}


def imports(source: str) -> set[str]:
    """The modules that a source text names in import statements, wherever they stand."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def inside(source: str) -> set[str]:
    """The modules of the package among them, named as in `ARROWS`."""
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
def test_arrows_run_one_way(name: str) -> None:
    """No module imports more of the package than the picture of the house allows."""
    assert inside(modules()[name]) <= ARROWS[name]


def test_the_picture_has_no_circle() -> None:
    """Following the arrows never leads back."""

    def below(name: str, path: tuple[str, ...] = ()) -> None:
        assert name not in path, (*path, name)
        for other in ARROWS[name]:
            below(other, (*path, name))

    for name in ARROWS:
        below(name)


def test_the_check_can_fail() -> None:
    """An import that breaks the rule is seen, at the top or inside a function."""
    assert inside("from cwd_wrap.wrapper import OptimizerWrapper") == {"wrapper"}
    assert inside("def f():\n    from cwd_wrap.kernels import _eager") == {"kernels._eager"}
    assert not inside("from cwd_wrap import wrappers") <= ARROWS["rules"]


def test_only_torch_is_needed() -> None:
    """Outside the package itself, only the standard library, torch and the named optional packages are imported."""
    for name, source in modules().items():
        for imported in imports(source):
            top = imported.split(".")[0]
            assert top in {"cwd_wrap", *OUTSIDE, *sys.stdlib_module_names, "typing_extensions"}, (name, imported)


def test_import_loads_torch_and_nothing_else() -> None:
    """`import cwd_wrap` brings in no triton, timm or matplotlib beyond what torch itself brings."""
    program = (
        "import sys, torch; before = set(sys.modules); import cwd_wrap; "
        "print(sorted({m.split('.')[0] for m in set(sys.modules) - before} - set(sys.stdlib_module_names)))"
    )
    done = subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=ROOT.parent)

    assert done.stdout.strip() == "['cwd_wrap']"
