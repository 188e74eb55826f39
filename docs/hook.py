"""A hook of MkDocs: what lies outside docs/ and is linked from there becomes part of the site.

CHANGELOG.md and CONTRIBUTING.md become pages. So does each script or config, such as ../examples/with_timm.py,
to be read there.
"""

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md")
FOLDERS = ("examples", "tests", "benchmarks", "cwd_wrap")
LINK = re.compile(r"(?<=\]\()([^)#:\s]+)(?=[)#])")


def on_files(files: Files, *, config: Any) -> Files:
    for name in PAGES:
        files.append(File.generated(config, name, content=(ROOT / name).read_text()))
    for folder in FOLDERS:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in {".py", ".yaml"}:
                name = path.relative_to(ROOT).as_posix()
                code = f"````{path.suffix[1:]}\n{path.read_text()}````\n"
                content = f"---\nsearch: {{exclude: true}}\n---\n\n# {name}\n\n{code}"
                files.append(File.generated(config, f"files/{name}.md", content=content))
    return files


def on_page_markdown(markdown: str, *, page: Any, files: Files, **_: Any) -> str:
    """Point links that leave docs/ to the pages that `on_files` added."""
    source = page.file.src_uri
    if source.startswith("files/"):
        return markdown
    here = "" if source in PAGES else "docs"

    def inside(match: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(here, match[1]))
        if path.startswith("docs/"):
            return path.removeprefix("docs/")
        return f"files/{path}.md" if path.startswith(FOLDERS) else path

    return LINK.sub(inside, markdown)
