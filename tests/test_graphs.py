"""What a step does while a CUDA graph is captured. The capture is stubbed: on the CPU everything runs at once."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from support import weight
from torch import Tensor
from torch.optim import SGD, AdamW

from cwd_wrap import CautiousDecay, CautiousUpdate, MaskMonitor
from cwd_wrap.draws import Stream
from cwd_wrap.graphs import capturing
from cwd_wrap.kernels import _tables
from cwd_wrap.report import Part, Report
from cwd_wrap.step.snapshot import Buffers

CPU = torch.device("cpu")
Capture = Callable[[], "contextmanager[None]"]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """A context in which torch reports a capture; pinned memory is a copy."""
    monkeypatch.setattr(Tensor, "pin_memory", lambda t: t.clone())
    monkeypatch.setattr(_tables, "_of_device", {})
    monkeypatch.setattr(_tables, "_in_graphs", {})

    @contextmanager
    def stubbed() -> Iterator[None]:
        with monkeypatch.context() as m:
            m.setattr(torch.cuda, "is_initialized", lambda: True)
            m.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            yield

    return stubbed


def numbers(*parts: bytes) -> Tensor:
    return _tables.plain(*parts)


def test_nothing_is_captured_without_cuda(capture: Capture) -> None:
    """Before CUDA is initialised, `capturing` is False and does not call torch's check; in the stub it is True."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.cuda, "is_initialized", lambda: False)
        m.setattr(torch.cuda, "is_current_stream_capturing", lambda: 1 / 0)

        assert not capturing()
    with capture():
        assert capturing()


# ---- tables


def test_a_graph_reads_the_table_sent_in_warm_up(capture: Capture) -> None:
    """A capture uses the table from before it, and pins and sends nothing."""
    warm = _tables.table(numbers, CPU, b"ab", b"cd")
    with capture(), pytest.MonkeyPatch.context() as m:
        m.setattr(Tensor, "pin_memory", lambda _: 1 / 0)
        m.setattr(_tables, "_allocated", lambda _: 1 / 0)

        assert _tables.table(numbers, CPU, b"ab", b"cd") is warm


def test_a_table_that_a_graph_reads_is_never_released(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that a graph reads is held after it has left the cache; other tables are not."""
    monkeypatch.setattr(_tables, "SEVERAL", 2)
    monkeypatch.setattr(_tables, "BYTES", 0)
    of_graph, other = (_tables.table(numbers, CPU, part) for part in (b"1", b"2"))
    with capture():
        _tables.table(numbers, CPU, b"1")
    for part in (b"3", b"4"):
        _tables.table(numbers, CPU, part)

    assert any(t is of_graph for t in _tables._in_graphs.values())
    assert not any(t is other for t in _tables._in_graphs.values())
    assert _tables._of_device[CPU].of_any_stream(numbers, (b"1",)) is None


def test_a_new_table_is_sent_by_the_graph(capture: Capture) -> None:
    """A new table comes from memory that was pinned before the capture and then belongs to the graph."""
    tables = _tables._of_device.setdefault(CPU, _tables._Tables())
    tables.spare(torch.zeros(8, dtype=torch.uint8))
    (spare,) = tables._spares
    with capture(), pytest.MonkeyPatch.context() as m:
        m.setattr(Tensor, "pin_memory", lambda _: 1 / 0)
        table = _tables.table(lambda *parts: numbers(*parts).view(torch.int64), CPU, bytes([5] + [0] * 7))

    assert table.tolist() == [5]
    assert [t.data_ptr() for t in _tables._in_graphs.values()] == [spare.data_ptr()]
    assert not tables._spares
    assert tables.find((None, numbers, (bytes([5] + [0] * 7),))) is None  # it is sent at the replay, so not cached


def test_a_capture_without_warm_up(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """If torch cannot pin memory during a capture, the error says what to do before it."""

    def refused(_: Tensor) -> Tensor:
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(Tensor, "pin_memory", refused)
    with (
        capture(),
        pytest.raises(
            RuntimeError, match=r"table of 3 bytes that no step.*pinned memory.*steps of the same.*side stream"
        ),
    ):
        _tables.table(numbers, CPU, b"abc")


def test_few_spares_are_kept() -> None:
    """At most 4 pieces of pinned memory of one size are kept, and at most 64 in all."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Tensor, "pin_memory", lambda t: t)
        tables = _tables._Tables()
        for _ in range(10):
            tables.spare(torch.zeros(8))

        assert len(tables._spares) == _tables.SPARES
        for size in range(100):
            tables.spare(torch.zeros(size + 10))
        assert len(tables._spares) == _tables.SEVERAL


# ---- the cache


def test_thousands_of_small_tables_are_kept(capture: Capture) -> None:
    """Three tables of each of 2,000 optimizers of one parameter are all kept; each device has a cache of its own."""
    built = []

    def build(*parts: bytes) -> Tensor:
        built.append(parts)
        return numbers(*parts)

    for _ in range(2):
        for i in range(6000):
            _tables.table(build, CPU, b"%d" % i)

    assert len(built) == 6000
    _tables.table(build, torch.device("cpu", 0), b"0")
    assert len(built) == 6001


def test_large_tables_are_released(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 64 tables, the oldest are released if all together take more than 16 MiB."""
    for i in range(100):
        _tables.table(numbers, CPU, bytes([i]) * (1 << 20))
    tables = _tables._of_device[CPU]

    assert len(tables._kept) == _tables.SEVERAL == 64
    assert tables._bytes == 64 << 20
    assert tables.of_any_stream(numbers, (bytes([99]) * (1 << 20),)) is not None
    assert tables.of_any_stream(numbers, (bytes([0]) * (1 << 20),)) is None


def test_each_stream_has_tables_of_its_own(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is sent once for each stream, so that no stream reads it before it has arrived."""
    sent: list[bool] = []
    now = ["first"]
    monkeypatch.setattr(Tensor, "to", lambda t, _, non_blocking: sent.append(non_blocking) or t)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: now[0])
    card = torch.device("cuda", 0)
    of_first = [_tables.table(numbers, card, b"1") for _ in range(2)]
    now[0] = "second"
    of_second = _tables.table(numbers, card, b"1")

    assert of_first[0] is of_first[1] is not of_second
    assert sent == [True, True]
    with capture():
        assert _tables.table(numbers, card, b"1") is of_first[0]
    assert sent == [True, True]


# ---- copies of weights and gradients


@pytest.mark.parametrize("take", ["whole", "piece"])
def test_a_graph_has_its_own_copies(capture: Capture, take: str) -> None:
    """A capture writes to buffers of its own, not to those of steps before or after it."""
    buffers = Buffers()
    w = [torch.ones(3), torch.ones(2, 2)]

    def taken() -> list[Tensor]:
        arguments = (w, w) if take == "whole" else (w,)
        return getattr(buffers, take)(*arguments)

    warm = taken()
    with capture():
        captured, again = taken(), taken()
    after = taken()
    places = [[t.data_ptr() for t in each] for each in (warm, captured, again, after)]

    assert places[0] == places[3]
    assert not set(places[1]) & {*places[0], *places[2]}


@pytest.mark.parametrize("path", ["snapshot", "pieces"])
def test_dropping_the_snapshot_frees_only_the_memory_of_eager_steps(capture: Capture, path: str) -> None:
    """A captured step puts nothing into the buffers; an eager step does, and `drop_snapshot` empties them."""
    p = weight(1.0, 2.0, grad=[1.0, 1.0])
    opt = CautiousDecay(SGD([p], lr=0.1, momentum=0.9), lam=0.5, path=path)
    with capture():
        opt.step()

    assert not opt._buffers._whole
    assert not opt._buffers._piece
    opt.step()
    assert opt._buffers._whole or opt._buffers._piece
    opt.drop_snapshot()
    assert not opt._buffers._whole
    assert not opt._buffers._piece
    assert p.tolist() != [1.0, 2.0]


def test_a_capture_does_not_read_gradients(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a captured first step gradients are still copied: to check whether that is needed would wait."""
    p = weight(1.0, grad=[1.0])
    opt = CautiousUpdate(SGD([p], lr=0.1), path="snapshot")
    with capture(), monkeypatch.context() as m:
        m.setattr(Tensor, "tolist", lambda _: 1 / 0)
        opt.step()

    assert opt._gradients.copied
    opt.step()
    assert not opt._gradients.copied


def test_gradients_are_compared_with_one_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first step checks once, for all gradients together, whether the base changed them."""
    parameters = [weight(1.0, grad=[1.0]) for _ in range(50)]
    opt = CautiousUpdate(AdamW(parameters, lr=0.1, fused=True))
    asked = []
    real = Tensor.tolist
    monkeypatch.setattr(Tensor, "tolist", lambda t: asked.append(1) or real(t))
    monkeypatch.setattr(Tensor, "__bool__", lambda _: 1 / 0)
    monkeypatch.setattr(torch, "equal", lambda *_: 1 / 0)
    opt.step()

    assert len(asked) == 1
    assert not opt._gradients.copied


# ---- counters


def test_the_counter_of_a_graph_stays_in_its_place() -> None:
    """A loaded checkpoint sets the counter of random numbers in place, so a graph still counts in it."""
    base = SGD([weight(1.0)], lr=0.1)
    stream = Stream(0)
    for _ in range(3):
        stream.begin(base)
        stream.on(CPU)
        stream.count()
    counter = stream._counters[CPU]
    stream.restart()
    stream.begin(base)

    assert stream._counters[CPU] is counter
    assert counter.item() == 0


def report(active: int) -> Report:
    """A report on one group of 1000 weights."""
    sums = torch.tensor([[float(active), 0.0, 0.0, 0.0, 0.0]])
    return Report([Part(0, "group 0", ["0.0"], [1000], 1, "direction", 0.1, sums)])


def test_a_monitor_keeps_twenty_bytes_per_step() -> None:
    """The sums of 256 steps are joined in one tensor, and the shares stay the same."""
    monitor = MaskMonitor()
    for i in range(1000):
        monitor(report(i))
    sums = [part.sums.untyped_storage() for look in monitor._looks for part in look.parts]
    storages = {storage.data_ptr(): storage.nbytes() for storage in sums}

    assert len(storages) == 3 + 1000 % 256
    assert max(storages.values()) == 256 * 5 * 4
    assert monitor.ratios == [i / 1000 for i in range(1000)]


def test_a_monitor_joins_no_sums_in_a_graph(capture: Capture) -> None:
    """While a graph is captured, no sums are joined, because they are computed at the replay."""
    monitor = MaskMonitor()
    with capture():
        for i in range(300):
            monitor(report(i))

    assert len(monitor._apart) == 300
    monitor(report(300))
    assert not monitor._apart


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs where launches are counted")
def test_a_captured_launch_uses_the_tables_of_warm_up(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured Triton launch gets the tables of the step before it."""
    triton = pytest.importorskip("cwd_wrap.kernels._triton", exc_type=ImportError)
    from cwd_wrap.kernels.buckets import Stepped

    seen = []
    recorder = type("Recorder", (), {"__getitem__": lambda *_: lambda *args, **_: seen.append(args)})
    monkeypatch.setattr(triton, "_sweep", recorder())
    w, x = [torch.zeros(10)], [torch.zeros(10)]
    for captured in (False, True):
        with capture() if captured else monkeypatch.context():
            triton.decay_from_snapshot([Stepped(w, w, x, None, 0.1)], strict=False, count=False)
    tables = [[t.data_ptr() for t in args if isinstance(t, Tensor)] for args in seen]

    assert tables[0] == tables[1]
    assert len(_tables._in_graphs) == 3
