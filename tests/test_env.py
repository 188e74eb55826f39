"""`python -m cwd_wrap env`: the description of a machine for a bug report."""

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import call
from torch.optim import LBFGS, SGD, AdamW, NAdam, Optimizer, Rprop

from cwd_wrap import CautiousDecay, __main__, env, kernels
from cwd_wrap.bases import quirks
from cwd_wrap.kernels import _threads

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("cls", "options", "path"),
    [
        (AdamW, {"fused": True}, "one_pass"),
        (SGD, {}, "one_pass"),
        (NAdam, {}, "one_pass"),
        (Rprop, {}, "pieces"),
        (LBFGS, {}, "snapshot"),
    ],
)
def test_path_is_the_one_that_a_wrapper_takes(cls: type[Optimizer], options: dict[str, bool], path: str) -> None:
    """The path printed for a class is that of its wrapped instance, on a device with a compiled backend."""
    opt = CautiousDecay(cls([torch.nn.Parameter(torch.ones(2))], **options), lam=0.1)
    taken = opt.paths()[0].path

    assert env.path_of(cls) == path
    assert taken == ("direction" if path == "one_pass" and kernels.name(None, CPU) == "eager" else path)


def test_refused_classes_are_listed() -> None:
    """The report marks a class as refused by its own name or that of a parent."""

    class TRAC(SGD):
        __module__ = "pytorch_optimizer.optimizer.trac"

    class Mine(TRAC): ...

    assert env.path_of(TRAC) == env.path_of(Mine) == "refused"
    assert quirks.refusal_of(SGD) is None


def test_each_backend_can_run_or_says_why_not() -> None:
    """For each device every backend has a line, and the one that the library chooses is marked."""
    lines = env.report().splitlines()
    of_cpu = lines[next(i for i, line in enumerate(lines) if line.startswith("cpu: ")) :][1:4]

    assert [line.split(":")[0].strip() for line in of_cpu] == list(kernels.BACKENDS)
    assert all(line.endswith(("can run", "(chosen)")) or "cannot run: " in line for line in of_cpu)
    assert [line for line in of_cpu if "(chosen)" in line] == [f"  {kernels.name(None, CPU)}: can run (chosen)"]


def test_the_threads_that_numba_uses_are_named() -> None:
    """The report tells whether numba's kernels run on torch's own threads; without numba it does not speak of them."""
    of_threads = [line for line in env.report().splitlines() if "threads: " in line]

    if kernels.obstacle("numba", CPU) is None:
        assert of_threads == [f"  numba's threads: {_threads.described()}"]
    else:
        assert of_threads == []


def test_a_card_is_listed_with_its_compute_capability(monkeypatch: pytest.MonkeyPatch) -> None:
    """A card is listed with name, memory and compute capability; one too old for Triton uses eager."""
    card = SimpleNamespace(name="Old Card", total_memory=8 << 30, major=6, minor=1)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: card)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (6, 1))
    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(kernels, "_obstacles", {})
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    lines = env.report().splitlines()
    of_card = lines[next(i for i, line in enumerate(lines) if line.startswith("cuda:0: ")) :][:4]

    assert of_card[0].startswith("cuda:0: Old Card, 8 GiB, compute capability 6.1, CUDA ")
    assert of_card[1:] == [
        "  eager: can run (chosen)",
        "  numba: cannot run: numba's kernels run on the CPU only",
        "  triton: cannot run: Triton needs compute capability 7.0 or higher",
    ]


def test_versions_are_listed() -> None:
    """The report starts with Python's version and contains torch's."""
    lines = env.report().splitlines()

    assert lines[0].startswith(f"python {sys.version.split()[0]} on ")
    assert f"torch {torch.__version__.split('+')[0]}" in {line.split("+")[0] for line in lines}


def test_optimizers_are_counted_and_listed() -> None:
    """A library's counts add up to its classes, and the list names each of them once."""
    ours = env.classes("torch.optim")
    lines = env.report(optimizers=True).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("torch.optim: "))
    counted = sum(int(part.split()[-1]) for part in lines[start].split(": ")[1].split(","))

    assert counted == len(ours) > 10
    assert lines[start + 1 : start + 1 + counted] == [f"  {cls.__qualname__}: {env.path_of(cls)}" for cls in ours]


def test_broken_packages_are_listed_and_do_not_stop_the_report(tmp_path: Path) -> None:
    """Packages that are installed but raise when imported appear with their errors."""
    (tmp_path / "numba.py").write_text("raise ImportError('no LLVM here')")
    broken = ("schedulefree", "heavyball", "pytorch_optimizer", "timm")
    for name in broken:
        (tmp_path / f"{name}.py").write_text("print('noise'); raise RuntimeError('not with this torch')")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[1]}"}
    told = subprocess.check_output([sys.executable, "-m", "cwd_wrap", "env"], text=True, env=environment)

    assert "  numba: cannot run: numba cannot be imported (no LLVM here)" in told
    for name in broken:
        assert re.search(rf"{name}(\.optim)?: cannot be imported \(RuntimeError: not with this torch\)", told)
    assert "torch.optim: " in told
    assert "noise" not in told


@pytest.mark.parametrize(("words", "flag"), [(["env"], False), (["env", "--optimizers"], True)])
def test_env_prints_the_report(
    words: list[str], flag: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`env` prints the report, and with --optimizers the list of classes."""
    monkeypatch.setattr(sys, "argv", ["cwd_wrap", *words])
    monkeypatch.setattr(env, "report", lambda *, optimizers: f"report, optimizers={optimizers}")
    __main__.main()

    assert capsys.readouterr().out == f"report, optimizers={flag}\n"


def test_without_a_command_the_usage_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """`python -m cwd_wrap` alone prints how it is used; a command that does not exist is an error."""
    monkeypatch.setattr(sys, "argv", ["cwd_wrap"])
    __main__.main()
    told = capsys.readouterr().out

    assert told.startswith("usage: python -m cwd_wrap")
    assert "versions, devices, backends and paths" in told
    monkeypatch.setattr(sys, "argv", ["cwd_wrap", "environment"])
    with pytest.raises(SystemExit, match="2"):
        __main__.main()
    assert "invalid choice: 'environment'" in capsys.readouterr().err


def devices_without_fork() -> list[str]:
    del os.register_at_fork
    return list(env._devices())


def test_numba_can_run_where_there_is_no_fork() -> None:
    """On a system without fork, such as Windows, the report lists numba as able to run."""
    pytest.importorskip("numba")
    assert any(line.startswith("  numba: can run") for line in call(devices_without_fork))
