"""Says whether this commit can be released, and how: version, changelog, tag, and the files in dist/.

`make release` builds and checks these files first (wheel.py), then runs this. It makes no tag and publishes nothing.
"""

import re
import subprocess
import sys
from datetime import date
from pathlib import Path

ROOT = Path(__file__).parents[1]


def version_of(pyproject: str) -> str:
    (version,) = re.findall(r'^version = "(.+)"$', pyproject, re.MULTILINE)
    return version


def wrong_texts(pyproject: str, citation: str, changelog: str, today: date) -> list[str]:
    """What is wrong with the three texts that name the version."""
    version, found = version_of(pyproject), []
    if f"\nversion: {version}\n" not in citation:
        found.append(f"CITATION.cff does not name version {version} of pyproject.toml")
    sections = re.split(r"^## \[", changelog, flags=re.MULTILINE)[1:]
    if not sections or sections[0].strip() != "Unreleased]":
        found.append("CHANGELOG.md does not begin with an empty [Unreleased]: move its lines into the version")
    dated = re.match(rf"{re.escape(version)}\] - (\d{{4}}-\d\d-\d\d)\n", sections[1] if len(sections) > 1 else "")
    if dated is None:
        found.append(f"CHANGELOG.md has no section [{version}] with a date after [Unreleased]")
    elif date.fromisoformat(dated[1]) > today:
        found.append(f"the date of [{version}] in CHANGELOG.md, {dated[1]}, is to come")
    return found


def wrong_tag(version: str, head: str, tagged: str, changed: str) -> list[str]:
    """What is wrong in git: the commits of HEAD and of the tag ("" if there is none), and the changed files."""
    found = [f"not committed:\n{changed}"] if changed else []
    if tagged not in ("", head):
        found.append(f"the tag v{version} is of another commit, {tagged[:9]}: raise the version")
    return found


def wrong_files(version: str, names: set[str]) -> list[str]:
    """What is wrong with the files in dist/."""
    wanted = {f"cwd_wrap-{version}-py3-none-any.whl", f"cwd_wrap-{version}.tar.gz"}
    return [f"dist/ holds {sorted(names)}, not {sorted(wanted)}: run make wheel"] if names != wanted else []


def git(*words: str) -> str:
    return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip()


def main() -> None:
    pyproject, citation, changelog = (
        (ROOT / name).read_text(encoding="utf-8") for name in ("pyproject.toml", "CITATION.cff", "CHANGELOG.md")
    )
    version = version_of(pyproject)
    tagged = git("rev-list", "-n", "1", f"v{version}", "--")
    found = [
        *wrong_texts(pyproject, citation, changelog, date.today()),
        *wrong_tag(version, git("rev-parse", "HEAD"), tagged, git("status", "--porcelain")),
        *wrong_files(version, {path.name for path in (ROOT / "dist").glob("*")}),
    ]
    if found:
        sys.exit("\n".join(["this commit cannot be released:", *found]))
    how = f"push the tag: git push origin v{version}" if tagged else f"git tag v{version} && git push origin v{version}"
    print(f"version {version} can be released; {how}")


if __name__ == "__main__":
    main()
