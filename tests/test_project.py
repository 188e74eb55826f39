"""Facts stated in two places agree: versions of Python, of torch and of this package. Actions are pinned."""

import importlib.util
import re
from datetime import date
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PYPROJECT, CITATION, MAKEFILE, CI, BUG = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in (
        "pyproject.toml", "CITATION.cff", "Makefile", ".github/workflows/ci.yml", ".github/ISSUE_TEMPLATE/bug.yml",
    )
)  # fmt: skip


def test_the_citation_has_the_version_of_the_package() -> None:
    """CITATION.cff and pyproject.toml name one version."""
    (version,) = re.findall(r'^version = "(.+)"$', PYPROJECT, re.MULTILINE)

    assert f"\nversion: {version}\n" in CITATION


def release() -> Any:
    """The script that `make release` runs."""
    spec = importlib.util.spec_from_file_location("release", ROOT / ".ci" / "release.py")
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


TODAY = date(2026, 12, 1)
VERSIONED, CITED = '[project]\nversion = "0.2.0"\n', "type: software\nversion: 0.2.0\n"
LOGGED = "# Changelog\n\n## [Unreleased]\n\n## [0.2.0] - 2026-12-01\n\n- More.\n"


def test_a_version_with_a_dated_section_can_be_released() -> None:
    """`make release` finds nothing wrong if all texts, the tag and the files are of the version in pyproject.toml."""
    check = release()

    assert check.wrong_texts(VERSIONED, CITED, LOGGED, TODAY) == []
    assert check.wrong_tag("0.2.0", "abc", "", "") == check.wrong_tag("0.2.0", "abc", "abc", "") == []
    assert check.wrong_files("0.2.0", {"cwd_wrap-0.2.0-py3-none-any.whl", "cwd_wrap-0.2.0.tar.gz"}) == []


@pytest.mark.parametrize(
    ("text", "was", "now", "found"),
    [
        (1, "0.2.0", "0.1.0", "CITATION.cff does not name version 0.2.0"),
        (2, "[Unreleased]\n", "[Unreleased]\n\n- New.\n", "does not begin with an empty [Unreleased]"),
        (2, "## [Unreleased]\n\n", "", "does not begin with an empty [Unreleased]"),
        (2, " - 2026-12-01", "", "no section [0.2.0] with a date"),
        (2, "[0.2.0]", "[0.1.0]", "no section [0.2.0] with a date"),
        (2, "2026-12-01", "2026-12-02", "is to come"),
    ],
)
def test_a_release_that_is_not_ready_is_found(text: int, was: str, now: str, found: str) -> None:
    """Another version in the citation, lines in [Unreleased], and a missing or later date each have their sentence."""
    texts = [VERSIONED, CITED, LOGGED]
    texts[text] = texts[text].replace(was, now)

    assert found in "; ".join(release().wrong_texts(*texts, TODAY))


def test_a_tag_elsewhere_and_other_files_are_found() -> None:
    """A tag on another commit, a changed file, and files of another version rule a release out."""
    check = release()

    assert "another commit" in check.wrong_tag("0.2.0", "abc", "def", "")[0]
    assert "not committed" in check.wrong_tag("0.2.0", "abc", "", " M README.md")[0]
    assert "run make wheel" in check.wrong_files("0.2.0", {"cwd_wrap-0.1.0.tar.gz"})[0]


def test_every_python_that_is_claimed_is_tested() -> None:
    """The classifiers equal the versions of the test matrix, and the lowest equals requires-python."""
    claimed = re.findall(r'Python :: (3\.\d+)"', PYPROJECT)
    (tested,) = re.findall(r"^ +python: \[(.+)\]$", CI, re.MULTILINE)

    assert claimed == tested.replace('"', "").split(", ")
    assert f'requires-python = ">={claimed[0]}"' in PYPROJECT


def test_the_oldest_torch_that_is_claimed_is_tested() -> None:
    """The matrix and `make test-oldest` run on the torch that pyproject.toml names as the oldest."""
    (oldest,) = re.findall(r'"torch>=(\d+\.\d+)"', PYPROJECT)

    assert re.findall(r"torch: torch==(\d+\.\d+)\.\d+,", CI) == [oldest, oldest]
    assert re.findall(r"VENV\)-oldest.* torch==(\d+\.\d+)\.\d+", MAKEFILE) == [oldest]


# A file of a folder of the repository, or the words of which $(addprefix ...) and $(addsuffix ...) make files.
NAMED = r"(?<![\w./])(?:\.ci|benchmarks|docs|examples|results|tests)/[\w/-]+(?:\.\w+)?"
MADE = r"\$\(addprefix (?:--ignore=)?(\S+),\$\(addsuffix (\S+),([^)]*)\)\)"


def named_files(text: str) -> set[str]:
    """The files and folders of the repository that a Makefile or a script names."""
    made = {
        f"{before}{word}{after}"
        for before, after, words in re.findall(MADE, text)
        for word in words.split()
        if word != "\\"
    }
    return made | set(re.findall(NAMED, re.sub(rf"{MADE}|\(wildcard [^)]*\)", "", text)))


def test_every_file_that_make_and_ci_name_exists() -> None:
    """A file that was removed or renamed is no longer named in the Makefile, in .ci or in a workflow."""
    texts = [MAKEFILE, *(path.read_text(encoding="utf-8") for path in (ROOT / ".ci").iterdir())]
    texts += [path.read_text(encoding="utf-8") for path in (ROOT / ".github").rglob("*.yml")]
    named = {name for text in texts for name in named_files(text)}

    assert {"benchmarks/step_time.py", "tests/test_masks.py", ".ci/wheel.py", "results/study.py"} <= named
    assert [] == sorted(name for name in named if not (ROOT / name).exists())


def test_a_file_that_is_missing_is_found() -> None:
    """The check sees a script behind a target, a test that is left out, and a word of a list."""
    text = "\tpython benchmarks/a.py --rows 3\nX := --ignore tests/b.py\n"
    text += "Y := $(addprefix tests/test_,$(addsuffix .py,c \\\n\td))"

    assert {"benchmarks/a.py", "tests/b.py", "tests/test_c.py", "tests/test_d.py"} == named_files(text)


def test_actions_are_pinned() -> None:
    """Every action of the workflows is named by the hash of a commit, with its version beside it."""
    used = [
        line
        for path in (ROOT / ".github" / "workflows").glob("*.yml")
        for line in re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))
        if not line.startswith("./")
    ]

    assert len(used) > 10
    assert all(re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line) for line in used)


def test_the_bug_template_asks_for_the_report() -> None:
    """The bug template names the command that describes the machine."""
    assert "python -m cwd_wrap env" in BUG
