"""Builds sdist and wheel into dist/, checks their contents, and runs the README's example with the wheel alone.

`make wheel` runs it with the Python of an environment that has torch and build. The example runs in a second
environment, which has the wheel and uses torch from the first.
"""

import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
DIST = ROOT / "dist"
MODULES = {path.relative_to(ROOT).as_posix() for path in (ROOT / "cwd_wrap").rglob("*.py")}
NEEDED = {"README.md", "LICENSE", "CHANGELOG.md", "pyproject.toml", "tests/conftest.py"}


def run(*words: object, cwd: Path = ROOT) -> str:
    done = subprocess.run([str(word) for word in words], cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(map(str, words))}\n{done.stdout}{done.stderr}")
    return done.stdout


def check_wheel(wheel: Path) -> None:
    """The wheel holds the modules, py.typed and the metadata with the licence, and nothing else."""
    names = set(zipfile.ZipFile(wheel).namelist())
    info = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    assert names - info == MODULES | {"cwd_wrap/py.typed"}, sorted((names - info) ^ MODULES)
    assert any(name.endswith("licenses/LICENSE") for name in info), sorted(info)


def check_sdist(sdist: Path) -> None:
    """The sdist holds what is needed to build and test the package, and no environment, cache or build output."""
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    missing = (MODULES | NEEDED) - names
    assert not missing, sorted(missing)
    strange = {name for name in names if re.match(r"\.venv|\.git/|site/|dist/|demo/", name) or "__pycache__" in name}
    assert not strange, sorted(strange)


def run_example(wheel: Path, folder: Path) -> None:
    """Run the README's script (its last diff) where only the wheel can be imported, and not this checkout."""
    run(sys.executable, "-m", "venv", folder / "venv")
    bin_folder = "Scripts" if sys.platform == "win32" else "bin"
    python = folder / "venv" / bin_folder / "python"
    # Paths in a .pth file come after the environment's own, and .pth files in those folders are not read, so the
    # editable install of this checkout stays out.
    own = run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    (Path(own) / "torch_of_the_builder.pth").write_text(sysconfig.get_path("purelib") + "\n")
    run(python, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--ignore-installed", wheel)
    diff = (ROOT / "README.md").read_text(encoding="utf-8").split("```diff\n")[-1].split("```")[0]
    example = "".join(line[1:] for line in diff.splitlines(keepends=True) if line[0] != "-")
    (folder / "example.py").write_text(example, encoding="utf-8")
    where = run(python, "-I", "-c", "import cwd_wrap; print(cwd_wrap.__file__)", cwd=folder).strip()
    assert Path(where).is_relative_to(own), where
    print(run(python, "-I", folder / "example.py", cwd=folder), end="")
    assert run(python, "-I", "-m", "cwd_wrap", "env", cwd=folder).startswith("python ")
    version = run(python, "-I", "-c", "import cwd_wrap; print(cwd_wrap.__version__)", cwd=folder).strip()
    assert version == wheel.name.split("-")[1], version


def main() -> None:
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--outdir", DIST)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    check_wheel(wheel)
    check_sdist(sdist)
    with tempfile.TemporaryDirectory() as folder:
        run_example(wheel, Path(folder))
    print(f"{wheel.name} and {sdist.name} are complete")


if __name__ == "__main__":
    main()
