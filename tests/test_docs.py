"""Every snippet of the documentation runs alone, and every link works.

The README's badges, commands and diffs are right, and so is the file tree.
"""

import contextlib
import doctest
import importlib
import io
import os
import pkgutil
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
import torch

import cwd_wrap

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])
MODULES = sorted(m.name for m in pkgutil.walk_packages(cwd_wrap.__path__, "cwd_wrap.") if m.name != "cwd_wrap.timm")


def snippets(page: Path) -> list[str]:
    """The python blocks of a page. One that begins with ``# needs X`` needs that package."""
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE)


SNIPPETS = [
    pytest.param(source, id=f"{page.name}-{number}") for page in PAGES for number, source in enumerate(snippets(page))
]


@pytest.mark.parametrize("source", SNIPPETS)
def test_a_snippet_runs_alone(source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each python block of a page runs by itself, as a reader copies it."""
    for package in re.findall(r"^# needs (\w+)", source, flags=re.MULTILINE):
        pytest.importorskip(package)
    if "optim.Muon" in source and not hasattr(torch.optim, "Muon"):
        pytest.skip("this torch has no Muon")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(source, "snippet", "exec"), {"__name__": "__main__"})


DIFFS = re.findall(r"^```diff\n(.*?)^```", (ROOT / "README.md").read_text(), flags=re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("sign", ["-", "+"])
@pytest.mark.parametrize("diff", DIFFS, ids=["line", "script"])
def test_the_diffs_of_the_readme_run(diff: str, sign: str) -> None:
    """Both sides of the README's two diffs run; the first is of one line that needs a model."""
    lines = [line[1:] for line in diff.splitlines() if line[:1] in {sign, " "}]
    given = [] if "import torch" in lines else ["import torch", "model = torch.nn.Linear(2, 2)"]
    namespace: dict[str, object] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec("\n".join([*given, *lines]), namespace)

    assert type(namespace["opt"]).__name__ == {"-": "AdamW", "+": "CautiousDecay"}[sign]


def test_the_commands_of_the_readme_are_those_of_ci() -> None:
    """The README's commands for a fresh machine are targets of the Makefile, and its command for tests is CI's."""
    commands = re.findall(r"^    make ([a-z]+) +#", (ROOT / "README.md").read_text(), flags=re.MULTILINE)
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    of_ci = (ROOT / ".ci" / "run").read_text().splitlines()

    assert {"demo", "test"} <= set(commands) <= set(targets)
    assert "make test" in of_ci


def test_what_texts_tell_the_reader_to_make_can_be_made() -> None:
    """Each target that a page, a script or a test names is in the Makefile, and has what it installs."""
    makefile = (ROOT / "Makefile").read_text()
    texts = [
        *PAGES,
        *(path for folder in ("benchmarks", "results", "examples") for path in (ROOT / folder).glob("*.py")),
    ]
    named = {target for path in texts for target in re.findall(r"`make ([a-z-]+)", path.read_text())}
    needed = set(re.findall(r"\$\(BIN\)/\.([a-z]+)", makefile)) - {"torch"}
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]

    assert {"peers", "test"} <= named <= set(re.findall(r"^([a-z-]+):", makefile, flags=re.MULTILINE))
    assert needed <= set(extras)


@pytest.mark.parametrize("name", ["cwd_wrap", *MODULES])
def test_docstrings_run(name: str) -> None:
    """The examples in the docstrings print the output that is shown."""
    for package, modules in {"numba": ("_numba", "_walk"), "triton": ("_triton",)}.items():
        if name.endswith(modules):
            pytest.importorskip(package)
    result = doctest.testmod(importlib.import_module(name))

    assert result.failed == 0


@pytest.mark.parametrize("page", ["docs/index.md", "docs/recipes.md", "docs/clients.md", "docs/how_it_works.md"])
def test_pages_have_snippets(page: str) -> None:
    """`snippets` finds blocks on these pages, so the check of snippets is not empty."""
    assert snippets(ROOT / page)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_name_files_that_exist(page: Path) -> None:
    """Every relative link of a page names a file of the repository."""
    for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_is_short() -> None:
    """The README has at most 120 lines."""
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


def test_the_badges_say_what_the_package_says() -> None:
    """The README's badges name the versions and the licence of pyproject.toml."""
    project = (ROOT / "pyproject.toml").read_text()
    python, torch, licence = (
        re.search(pattern, project)[1]
        for pattern in (r'requires-python = ">=([\d.]+)"', r'"torch>=([\d.]+)"', r'license = "(\w+)"')
    )
    badges = re.findall(r"img\.shields\.io/badge/([^)]+)-blue", (ROOT / "README.md").read_text())

    assert [unquote(badge) for badge in badges] == [f"python-≥ {python}", f"torch-≥ {torch}", f"licence-{licence}"]


def test_the_file_tree_is_complete() -> None:
    """The tree in CONTRIBUTING.md names every module of the package, once, and the folders in place of their inits."""
    tree = re.findall(r"^ {4,8}(\w+\.py) ", (ROOT / "CONTRIBUTING.md").read_text(), flags=re.MULTILINE)

    modules = [path.name for path in (ROOT / "cwd_wrap").rglob("*.py")]

    assert sorted(set(tree) - {"__init__.py"}) == sorted(set(modules) - {"__init__.py"})
    assert len(tree) == len(set(tree))


@pytest.mark.parametrize("name", ["step", "mask"])
def test_the_drawings_come_from_their_script(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/draw.py produces the SVG files in the repository."""
    monkeypatch.syspath_prepend(ROOT / "docs")

    assert getattr(importlib.import_module("draw"), name)() == (ROOT / f"docs/{name}.svg").read_text()


# ------------------------------------------------------------------------------------------------
# The site
# ------------------------------------------------------------------------------------------------


class Html(HTMLParser):
    """The links of a page and its anchors."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.targets: list[str] = []
        self.ids: set[str] = {""}
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.ids |= {value for key, value in attrs if key in {"id", "name"} and value}
        self.targets += [value for key in ("href", "src") if (value := found.get(key)) is not None]


def broken(site: Path) -> list[str]:
    """The broken links, pictures, scripts and styles in a folder of pages."""
    pages = {path: Html(path) for path in site.rglob("*.html")}
    bad = []
    for page, html in pages.items():
        for target in html.targets:
            url = urlsplit(target)
            if url.scheme or url.netloc:
                continue
            start = site if url.path.startswith("/") else page.parent
            path = (start / unquote(url.path).lstrip("/")).resolve() if url.path else page
            path = path / "index.html" if path.is_dir() else path
            if not path.is_file() or (path in pages and unquote(url.fragment) not in pages[path].ids):
                bad.append(f"{page.relative_to(site)}: {target}")
    return bad


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the built site."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers"):
        pytest.importorskip(package, reason=f"the site needs the docs extra: no {package}")
    folder = tmp_path_factory.mktemp("site").resolve()
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(folder)]
    built = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    )

    assert built.returncode == 0, built.stderr
    return folder


def test_the_site_has_no_broken_link(site: Path) -> None:
    """Every link, anchor, picture, script and style of the built site exists."""
    assert broken(site) == []


def test_the_site_loads_nothing_from_another_host(site: Path) -> None:
    """Pictures, scripts, styles and fonts come with the site."""
    loaded = re.compile(r"<(?:script|img|link)\b[^>]*?\b(?:src|href)=[\"']?(https?://[^\"'\s>]+)")
    for page in site.rglob("*.html"):
        assert not loaded.findall(page.read_text()), page.name


def test_formulas_keep_their_stars(site: Path) -> None:
    """No formula is turned into emphasis: `eta*lam*x` without backticks would lose its stars."""
    for page in site.glob("*.html"):
        assert not re.findall(r".*\w<em>.*|.*</em>\w.*", page.read_text()), page.name


def test_every_page_is_part_of_the_site(site: Path) -> None:
    """Each page of docs/ is built, and the navigation of the first page leads to it."""
    linked = {urlsplit(target).path for target in Html(site / "index.html").targets}

    assert {f"{page.stem}.html" for page in (ROOT / "docs").glob("*.md")} <= linked | {"index.html"}


def test_the_api_page_has_every_public_name(site: Path) -> None:
    """The API page documents all of cwd_wrap's names, from their docstrings."""
    assert {f"cwd_wrap.{name}" for name in cwd_wrap.__all__} <= Html(site / "api.html").ids


def test_broken_links_are_found(tmp_path: Path) -> None:
    """The check can fail: it finds a missing page, picture and anchor, and passes existing ones."""
    (tmp_path / "a.html").write_text(
        '<p id="x"><a href="b.html">1</a><a href="#y">2</a><a href="a.html#x">3</a><img src="c.png">'
    )

    assert broken(tmp_path) == ["a.html: b.html", "a.html: #y", "a.html: c.png"]
