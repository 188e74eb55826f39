"""The threads of compiled steps on the CPU: torch's own, or Python's where these cannot be had."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW

from cwd_wrap import CautiousDecay

pytest.importorskip("numba")
from cwd_wrap.kernels import _threads


@pytest.fixture(autouse=True)
def _as_many_threads_as_before() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def big_step(threads: int) -> Tensor:
    """Weights after three steps that are large enough for two threads."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(1 << 18))
    opt = CautiousDecay(AdamW([p], lr=0.1, weight_decay=0.5), backend="numba")
    for _ in range(3):
        p.grad = torch.randn(1 << 18)
        opt.step()
    return p.detach()


def test_a_step_is_the_same_on_every_number_of_threads() -> None:
    """One thread, two and five make the same weights, bit for bit."""
    assert torch.equal(big_step(1), big_step(2))
    assert torch.equal(big_step(1), big_step(5))


def test_as_many_of_torchs_threads_as_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.set_num_threads says how many threads of its OpenMP runtime a step uses; with 1 it uses none."""
    used: list[int] = []

    def parallel(function: int, argument: int, threads: int, flags: int) -> None:
        used.append(threads)
        _threads._function(function)(argument)

    monkeypatch.setattr(_threads, "_obstacle", lambda: None)
    monkeypatch.setattr(_threads, "_entry", lambda: parallel)
    alone = big_step(1)

    assert [] == used
    assert torch.equal(alone, big_step(2))
    assert {2} == set(used)


@pytest.mark.skipif(not _threads._runtimes(), reason="torch has loaded no OpenMP runtime that is known here")
def test_the_runtime_is_the_one_that_torch_has_loaded() -> None:
    """Where torch has loaded one OpenMP runtime, its name is told."""
    assert _threads.described().startswith("torch's own OpenMP threads (lib")


@pytest.mark.parametrize(
    ("runtimes", "told"),
    [
        ([], "Python threads: torch has loaded no OpenMP runtime that is known here"),
        (
            ["/a/libgomp.so.1", "/b/libiomp5.so"],
            "Python threads: several OpenMP runtimes are loaded (libgomp.so.1, libiomp5.so)",
        ),
    ],
    ids=["none", "two"],
)
def test_python_threads_elsewhere(monkeypatch: pytest.MonkeyPatch, runtimes: list[str], told: str) -> None:
    """Without a runtime, or with two of them, Python threads make the same weights, and the reason is told."""
    alone = big_step(1)
    monkeypatch.setattr(_threads, "_runtimes", lambda: runtimes)

    assert told == _threads.described()
    assert torch.equal(alone, big_step(2))


def test_a_forked_process_takes_python_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """OpenMP's threads do not survive a fork, so a forked process starts Python threads."""
    alone = big_step(1)
    monkeypatch.setattr(_threads, "_forked", True)

    assert _threads.described().startswith("Python threads: this process was forked")
    assert torch.equal(alone, big_step(2))


def test_an_interrupt_waits_for_the_end_of_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """An interrupt while Python threads are started is raised when the whole step is done."""
    alone = big_step(1)
    monkeypatch.setattr(_threads, "_forked", True)
    torch.set_num_threads(2)
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(1 << 18))
    opt = CautiousDecay(AdamW([p], lr=0.1, weight_decay=0.5), backend="numba")
    for step in range(3):
        p.grad = torch.randn(1 << 18)
        if step < 2:
            opt.step()
    with monkeypatch.context() as patch:
        patch.setattr(_threads.threading.Thread, "start", _interrupted)
        with pytest.raises(KeyboardInterrupt):
            opt.step()

    assert torch.equal(alone, p.detach())


def _interrupted(*_: object) -> None:
    raise KeyboardInterrupt
