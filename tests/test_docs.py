"""Every snippet in the documentation runs, every link leads somewhere, and the tables say what the tests found."""

import contextlib
import doctest
import importlib
import io
import pkgutil
import re
from pathlib import Path

import pytest

import cwd_wrap

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
MODULES = sorted(m.name for m in pkgutil.walk_packages(cwd_wrap.__path__, "cwd_wrap.") if m.name != "cwd_wrap.timm")


def snippets(page: Path) -> list[str]:
    """The python blocks of a page. One that begins with ``# needs X`` needs that package."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_snippets_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The python blocks of a page run one after the other, in one namespace, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for number, source in enumerate(snippets(page)):
        for package in re.findall(r"^# needs (\w+)", source, flags=re.MULTILINE):
            pytest.importorskip(package)
        with contextlib.redirect_stdout(io.StringIO()):
            exec(compile(source, f"{page.name}, block {number}", "exec"), namespace)


@pytest.mark.parametrize("name", ["cwd_wrap", *MODULES])
def test_docstrings_run(name: str) -> None:
    """The examples in the docstrings print what they say."""
    if "triton" in name:
        pytest.importorskip("triton")
    result = doctest.testmod(importlib.import_module(name))

    assert result.failed == 0


def test_the_readme_has_snippets() -> None:
    """The check above is not one over nothing."""
    assert len(snippets(ROOT / "README.md")) >= 2


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    """Every relative link of a page names a file of the repository."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_file_tree_of_the_readme_is_complete() -> None:
    """The README's tree names every module of the package."""
    readme = (ROOT / "README.md").read_text()
    for path in (ROOT / "cwd_wrap").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.name in readme, path.name
