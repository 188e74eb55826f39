"""Facts stated in two places agree: versions of Python, of torch and of this package. Actions are pinned."""

import re
from pathlib import Path

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
