"""The recipes of docs/diagnostics.md for TensorBoard and Weights & Biases, with stand-ins where they are missing."""

import importlib.util
import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs/diagnostics.md"
NUMBERS = ("share_decayed", "decay_norm", "update_norm", "weight_norm")


def recipe(package: str) -> str:
    """The page's block that needs the package."""
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), flags=re.DOTALL | re.MULTILINE)
    (source,) = (block for block in blocks if f"# needs {package}\n" in block)
    return str(source)


def stand_in(name: str, monkeypatch: pytest.MonkeyPatch, **members: Any) -> None:
    module = ModuleType(name)
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)


def test_tensorboard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each number of each row is written once, under the row's name and at its step."""
    written: list[tuple[str, int]] = []

    class SummaryWriter:
        def add_scalar(self, tag: str, value: float, step: int) -> None:
            assert isinstance(value, float)
            written.append((tag, step))

    stand_in("torch.utils.tensorboard", monkeypatch, SummaryWriter=SummaryWriter)
    exec(recipe("tensorboard"), {})

    assert [(f"group 0/{key}", step) for step in (1, 2, 3, 4) for key in NUMBERS] == written


def test_weights_and_biases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each row is logged with its own step, which is the axis of all its numbers."""
    axes: dict[str, str | None] = {}
    logged: list[dict[str, float]] = []

    class Run:
        def define_metric(self, name: str, step_metric: str | None = None) -> None:
            axes[name] = step_metric

        def log(self, numbers: dict[str, float]) -> None:
            logged.append(numbers)

        def finish(self) -> None:
            axes["finished"] = None

    stand_in("wandb", monkeypatch, init=lambda **_: Run())
    exec(recipe("wandb"), {})

    assert {"decay/step": None, "decay/*": "decay/step", "finished": None} == axes
    assert [1, 2, 3, 4] == [numbers["decay/step"] for numbers in logged]
    assert {"decay/step", *(f"decay/group 0/{key}" for key in NUMBERS)} == set(logged[0])


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_with_the_package_itself(package: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The recipe runs with the real package, which writes its files."""
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    exec(recipe(package), {})

    assert any(path.is_file() for path in tmp_path.rglob("*"))
