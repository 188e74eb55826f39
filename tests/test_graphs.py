"""What a step does while a CUDA graph is captured, with the capture stubbed: on the CPU everything runs at once."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from support import weight
from torch import Tensor
from torch.optim import SGD, AdamW

from cwd_wrap import CautiousDecay, CautiousUpdate, MaskMonitor
from cwd_wrap.buckets import Part, Report
from cwd_wrap.draws import Stream
from cwd_wrap.graphs import capturing
from cwd_wrap.kernels import _tables
from cwd_wrap.snapshot import Buffers

CPU = torch.device("cpu")
Capture = Callable[[], "contextmanager[None]"]


@pytest.fixture
def capture(monkeypatch: pytest.MonkeyPatch) -> Capture:
    """A context in which torch says that it captures; memory is pinned by marking it."""
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
    """Before CUDA is initialised the answer is no, and torch is not asked; the stub says yes."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(torch.cuda, "is_initialized", lambda: False)
        m.setattr(torch.cuda, "is_current_stream_capturing", lambda: 1 / 0)

        assert not capturing()
    with capture():
        assert capturing()


# ---- tables


def test_a_graph_reads_the_table_that_warm_up_has_sent(capture: Capture) -> None:
    """A table from before the capture is used, whatever stream it was sent on, and nothing is pinned or sent."""
    warm = _tables.table(numbers, CPU, b"ab", b"cd")
    with capture(), pytest.MonkeyPatch.context() as m:
        m.setattr(Tensor, "pin_memory", lambda _: 1 / 0)
        m.setattr(_tables, "_allocated", lambda _: 1 / 0)

        assert _tables.table(numbers, CPU, b"ab", b"cd") is warm


def test_what_a_graph_reads_is_never_released(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that a graph reads outlives its place among those that are kept; others go."""
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
    assert tables.find((None, numbers, (bytes([5] + [0] * 7),))) is None  # no other call may read what is sent later


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
    """Tables that are sent again and again leave a few pieces of pinned memory of their size, and in all 64."""
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


def test_small_tables_are_kept_by_the_thousand(capture: Capture) -> None:
    """Two thousand optimizers of one parameter each keep three tables each; another device has room of its own."""
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


def test_large_tables_are_let_go_of(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond 64 tables the oldest go, as soon as all of them take more than 16 MiB."""
    for i in range(100):
        _tables.table(numbers, CPU, bytes([i]) * (1 << 20))
    tables = _tables._of_device[CPU]

    assert len(tables._kept) == _tables.SEVERAL == 64
    assert tables._bytes == 64 << 20
    assert tables.of_any_stream(numbers, (bytes([99]) * (1 << 20),)) is not None
    assert tables.of_any_stream(numbers, (bytes([0]) * (1 << 20),)) is None


def test_each_stream_has_tables_of_its_own(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A table is sent once for each stream, from pinned memory, so that none reads it before it has arrived."""
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


def copies(to: list[Tensor], source: list[Tensor]) -> None:
    torch._foreach_copy_(to, source)


@pytest.mark.parametrize("take", ["take", "take_piece"])
def test_the_copies_of_a_graph_are_its_own(capture: Capture, take: str) -> None:
    """Buffers that a capture writes to are made in it and not kept: no later step and no drop frees them."""
    buffers = Buffers()
    w = [torch.ones(3), torch.ones(2, 2)]

    def taken() -> list[Tensor]:
        arguments = (w, w) if take == "take" else (w,)
        return getattr(buffers, take)(*arguments, lambda _: copies)

    warm = taken()
    with capture():
        captured, again = taken(), taken()
    after = taken()
    places = [[t.data_ptr() for t in each] for each in (warm, captured, again, after)]

    assert places[0] == places[3]
    assert not set(places[1]) & {*places[0], *places[2]}
    assert all(torch.equal(a, b) for a, b in zip(captured, w, strict=True))


@pytest.mark.parametrize("path", ["snapshot", "pieces"])
def test_dropping_the_snapshot_leaves_graphs_alone(capture: Capture, path: str) -> None:
    """`drop_snapshot` frees only the memory of eager steps; a captured step keeps its own in the graph."""
    p = weight(1.0, 2.0, grad=[1.0, 1.0])
    opt = CautiousDecay(SGD([p], lr=0.1, momentum=0.9), lam=0.5, path=path)
    with capture():
        opt.step()

    assert not opt._buffers._whole
    assert not opt._buffers._piece
    opt.step()
    opt.drop_snapshot()
    assert p.tolist() != [1.0, 2.0]


def test_a_capture_does_not_look_at_gradients(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A captured first step keeps copying gradients, because the check whether it must would wait."""
    p = weight(1.0, grad=[1.0])
    opt = CautiousUpdate(SGD([p], lr=0.1))
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
    """A loaded checkpoint sets the counter of random numbers where it is, so a graph goes on counting there."""
    base = SGD([weight(1.0)], lr=0.1)
    stream = Stream(0)
    for _ in range(3):
        stream.advance(base)
        stream.on(CPU)
    counter = stream._counters[CPU]
    stream.restart()
    stream.advance(base)

    assert stream._counters[CPU] is counter
    assert counter.item() == 0


def report(active: int) -> Report:
    """Of one group of 1000 weights."""
    sums = torch.tensor([[float(active), 0.0, 0.0, 0.0, 0.0]])
    return Report([Part(0, "group 0", ["0.0"], [1000], 1, "direction", 0.1, sums)])


def test_a_monitor_keeps_twenty_bytes_a_step() -> None:
    """Sums on a device are put together, 256 in one tensor; the shares stay as they were."""
    monitor = MaskMonitor()
    for i in range(1000):
        monitor(report(i))
    sums = [part.sums.untyped_storage() for look in monitor._looks for part in look.parts]
    storages = {storage.data_ptr(): storage.nbytes() for storage in sums}

    assert len(storages) == 3 + 1000 % 256
    assert max(storages.values()) == 256 * 5 * 4
    assert monitor.ratios == [i / 1000 for i in range(1000)]


def test_a_monitor_leaves_earlier_sums_out_of_a_graph(capture: Capture) -> None:
    """While a graph is captured nothing is put together: its numbers come at each replay."""
    monitor = MaskMonitor()
    with capture():
        for i in range(300):
            monitor(report(i))

    assert len(monitor._apart) == 300
    monitor(report(300))
    assert not monitor._apart


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter runs where launches are counted")
def test_a_captured_launch_uses_the_tables_of_warm_up(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Triton launch under capture is given the tables of the step before, and nothing is built."""
    triton = pytest.importorskip("cwd_wrap.kernels._triton", exc_type=ImportError)
    from cwd_wrap.buckets import Stepped

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
