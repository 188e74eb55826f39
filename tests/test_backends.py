"""The backend is chosen by device, refused where it cannot run, and imported only when chosen."""

import importlib.util
import os
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from processes import call
from support import weight
from torch.optim import SGD

from cwd_wrap import CautiousDecay, kernels

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter changes the choice")

CPU = torch.device("cpu")


HAS_NUMBA = importlib.util.find_spec("numba") is not None


@pytest.mark.parametrize("device", ["cpu", "meta", "mps"])
def test_eager_runs_everywhere(device: str) -> None:
    """Without a CUDA or ROCm device the choice is numba on the CPU, where it is installed, and otherwise eager."""
    expected = "numba" if device == "cpu" and HAS_NUMBA else "eager"

    assert kernels.name("eager", torch.device(device)) == "eager"
    assert kernels.name(None, torch.device(device)) == expected
    assert kernels.choose("eager", torch.device(device)).__name__ == "cwd_wrap.kernels._eager"


def test_triton_is_refused_where_it_cannot_run() -> None:
    """backend="triton" on the CPU raises at construction; the text says why and lists what can run."""
    can = "'eager', 'numba'" if HAS_NUMBA else "'eager'"

    with pytest.raises(ValueError, match=rf"backend='triton' cannot run on cpu: .*TRITON_INTERPRET=1.* {can}"):
        CautiousDecay(SGD([weight(1.0)], lr=0.1), lam=0.5, backend="triton")


def test_broken_numba_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """If numba is installed but cannot be imported, the step warns once and uses torch operations."""
    monkeypatch.setattr(kernels, "_obstacles", {("numba", CPU): None})
    monkeypatch.setitem(sys.modules, "cwd_wrap.kernels._numba", None)
    monkeypatch.delattr(kernels, "_numba", raising=False)
    p = weight(1.0, grad=[1.0])
    opt = CautiousDecay(SGD([p], lr=0.1), lam=0.5)

    with pytest.warns(
        UserWarning, match=r"cwd_wrap uses torch operations on cpu: numba cannot be imported \(.*Reinstall numba"
    ) as said:
        opt.step()
        opt.step()
    assert len(said) == 1
    assert "backend='eager'" in repr(opt)
    assert p.item() == pytest.approx(0.85 - 0.1 - 0.05 * 0.85)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_triton_that_cannot_build_its_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a C compiler the choice is eager, with one warning; backend="triton" raises with the reason."""
    import triton

    class Driver:
        @property
        def active(self) -> object:
            raise RuntimeError("Failed to find C compiler. Please specify via CC environment variable")

    cuda = torch.device("cuda", 0)
    monkeypatch.setattr(kernels, "_obstacles", {})
    monkeypatch.setattr(kernels, "_said", set())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(triton.runtime, "driver", Driver())

    assert kernels.name(None, cuda) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.choose("eager", cuda).__name__ == "cwd_wrap.kernels._eager"
    with pytest.warns(UserWarning, match=r"uses torch operations on cuda:0: Triton cannot .* C compiler") as said:
        assert all(kernels.choose(None, cuda).__name__ == "cwd_wrap.kernels._eager" for _ in range(3))
    assert len(said) == 1
    with pytest.raises(ValueError, match=r"on cuda:0: Triton cannot build its launcher.* C compiler.*CC env.*'eager'"):
        kernels.name("triton", cuda)

    monkeypatch.setattr(triton.runtime, "driver", SimpleNamespace(active=SimpleNamespace(utils=object())))
    monkeypatch.setattr(kernels, "_obstacles", {})

    assert kernels.name(None, cuda) == "triton"


def test_a_card_without_triton_gives_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without Triton, steps on a card use torch operations, without a warning."""
    monkeypatch.setattr(kernels, "_obstacles", {})
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    cuda = torch.device("cuda", 0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")

        assert kernels.choose(None, cuda).__name__ == "cwd_wrap.kernels._eager"
    assert kernels.obstacle("triton", cuda) == "Triton is not installed (pip install cwd-wrap[triton])"


@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
def test_numba_without_a_folder_for_its_cache() -> None:
    """Where numba finds no folder that it may write to (a container without a home), it compiles without a cache."""
    from cwd_wrap.kernels import _walk

    asked = []

    def cfunc(signature: str, **options: object) -> Callable[[object], object]:
        def decorate(function: object) -> object:
            asked.append((signature, options))
            if options.get("cache"):
                raise RuntimeError("cannot cache function 'f': no locator available for file '_walk.py'")
            return function

        return decorate

    function = object()

    assert _walk.compiled(cfunc, "void()", nogil=True)(function) is function
    assert asked == [("void()", {"cache": True, "nogil": True}), ("void()", {"nogil": True})]


@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
def test_numba_without_its_compiler_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """With NUMBA_DISABLE_JIT=1, which debuggers set, the CPU has torch operations; backend="numba" says why."""
    monkeypatch.setattr(kernels, "_obstacles", {})
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")

    assert kernels.name(None, CPU) == "eager"
    with pytest.raises(ValueError, match="NUMBA_DISABLE_JIT switches numba's compiler off"):
        CautiousDecay(SGD([weight(1.0)], lr=0.1), lam=0.5, backend="numba")


def three_loops(folder: str) -> None:
    """Have numba compile three loops of one rule into a folder."""
    from numba.core import config

    config.CACHE_DIR = folder
    for dtype, options in ((torch.float32, {}), (torch.float64, {}), (torch.float64, {"strict": True})):
        p = torch.nn.Parameter(torch.ones(2, dtype=dtype))
        p.grad = torch.ones_like(p)
        CautiousDecay(SGD([p], lr=0.1), lam=0.1, **options).step()


@pytest.mark.process
@pytest.mark.skipif(not HAS_NUMBA, reason="numba is not installed")
def test_each_loop_has_its_own_file_on_disk(tmp_path: Path) -> None:
    """In a common file, processes that compile two loops at once could mix them up: numba locks nothing."""
    call(three_loops, str(tmp_path))
    loops = [path.name for path in tmp_path.rglob("*.nbc") if "sgd_with_decay" in path.name]

    assert len(loops) == 3
    assert all(".1.nbc" in name for name in loops)
