"""Time of a step on this card: device, host and wall time, against fused AdamW with its own decay.

python benchmarks/gpu_step_time.py [--scale 4]

device: a CUDA graph of the step is replayed, so that no launch waits for Python. host: a step is launched while the
card is busy with other work, so that nothing waits for the card. wall: steps one after the other, with one wait for the
card at the end. The candidates take turns, and step the same weights with the same state.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from common import _sample, gpt2_small, interleaved, many_small

from cwd_wrap import CautiousDecay

BASELINE = "fused AdamW, own decay"
PATHS = ("one_pass", "direction", "snapshot", "pieces")
KINDS = ("device", "host", "wall")
SETTINGS = {"lr": 1e-3, "weight_decay": 0.1, "fused": True}
WARM_UP = 3
STEPS_OF_WALL = 5
MILLISECOND = 2_000_000  # cycles, about


@dataclass
class Row:
    """A line of a table. ``ratio``: to the baseline, or to the speed of a copy. ``outcome``: ok, failed or skipped."""

    part: str
    what: str
    value: float | str = ""
    unit: str = ""
    ratio: float | None = None
    remark: str = ""
    outcome: str = "ok"

    def __str__(self) -> str:
        value = f"{self.value:.4g}" if isinstance(self.value, float) else str(self.value)
        ratio = "" if self.ratio is None else f"{self.ratio:.3f} x"
        outcome = "" if self.outcome == "ok" else self.outcome.upper()
        return f"{self.part:10}{self.what:52}{value:>12} {self.unit:6}{ratio:>10}  {outcome} {self.remark}".rstrip()


def failed(part: str, what: str, error: BaseException) -> Row:
    lines = str(error).splitlines() or [""]
    return Row(part, what, remark=f"{type(error).__name__}: {lines[0]:.200}", outcome="failed")


# ---- milliseconds of a call


def on_the_device(call: Callable[[], object]) -> float:
    """Device time of all that ``call`` launches, enqueued before the card starts."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(5 * MILLISECOND)
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def on_the_host(call: Callable[[], object]) -> float:
    """Host time until ``call`` returns, while the card is busy with other work."""
    for busy in (30, 120, 480):
        torch.cuda.synchronize()
        torch.cuda._sleep(busy * MILLISECOND)
        begun = torch.cuda.Event()
        begun.record()
        ms = in_all(call, times=1, waits=False)
        if not begun.query():
            torch.cuda.synchronize()
            return ms
    msg = "the call waits for the card, or takes the host longer than a quarter of a second"
    raise RuntimeError(msg)


def in_all(call: Callable[[], object], times: int = STEPS_OF_WALL, *, waits: bool = True) -> float:
    """Wall time per call, until the card is done with all of them."""
    waits = waits and torch.cuda.is_available()
    if waits:
        torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(times):
        call()
    if waits:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) * 1e3 / times


def captured(call: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """A graph of ``call``, after warm-up calls on a side stream, which torch requires."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    return graph


# ---- steps


def moved(optimizer: torch.optim.Optimizer, call: Callable[[], object]) -> None:
    """Raise unless ``call`` moves the optimizer's weights, since the time of a step that does nothing means nothing."""
    before = _sample(optimizer)
    call()
    share = (_sample(optimizer) != before).float().mean().item()
    if not share > 0.9:
        msg = f"a step moved {share:.0%} of the weights only, so its time means nothing"
        raise RuntimeError(msg)


def candidates(parameters: Sequence[torch.nn.Parameter]) -> tuple[torch.optim.Optimizer, dict[str, Callable]]:
    """Fused AdamW and its step, and the steps of all paths around it."""
    base = torch.optim.AdamW(parameters, **SETTINGS, capturable=parameters[0].is_cuda)
    base.step()  # makes its state
    wrapped = {path: CautiousDecay(base, path=path, backend="triton").step for path in PATHS}
    return base, {BASELINE: base.step, **wrapped}


def steps(part: str, name: str, parameters: Sequence[torch.nn.Parameter], rounds: int) -> Iterator[Row]:
    """A row for each path and kind of time; without a card, only of the wall time."""
    base, calls = candidates(parameters)
    working = {}
    for path, call in calls.items():
        try:
            moved(base, call)
            working[path] = call
        except Exception as error:  # noqa: PERF203 - each stands alone
            yield failed(part, f"{name}: {path}", error)
    for kind in KINDS if torch.cuda.is_available() else KINDS[2:]:
        timed: dict[str, Callable[[], float]] = {}
        for path, call in working.items():
            try:
                timed[path] = _timed(kind, call)
                timed[path]()
            except Exception as error:  # noqa: PERF203
                timed.pop(path, None)
                yield failed(part, f"{name}: {path}, {kind}", error)
        yield from _compared(part, name, kind, timed, rounds)


def _timed(kind: str, call: Callable[[], object]) -> Callable[[], float]:
    if kind == "device":
        graph = captured(call)
        return lambda: on_the_device(graph.replay)
    return {"host": lambda: on_the_host(call), "wall": lambda: in_all(call)}[kind]


def _compared(part: str, name: str, kind: str, timed: Mapping[str, Callable[[], float]], rounds: int) -> Iterator[Row]:
    found: dict[str, list[float]] = {path: [] for path in timed}
    interleaved({path: lambda path=path: found[path].append(timed[path]()) for path in timed}, rounds)
    for path, ms in found.items():
        ratios = [t / b for t, b in zip(ms, found.get(BASELINE, ms), strict=True)][2:]
        low, ratio, high = statistics.quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        yield Row(part, f"{name}: {path}, {kind}", statistics.median(ms[2:]), "ms", ratio, f"{low:.3f} - {high:.3f}")


def models(device: str, scale: int, tensors: int) -> Iterator[tuple[str, list[torch.nn.Parameter]]]:
    """GPT-2 small in float32 and bfloat16, and many small tensors, one after the other."""
    for name, made, dtype in (
        ("GPT-2 small, float32", lambda: gpt2_small(scale), torch.float32),
        ("GPT-2 small, bfloat16", lambda: gpt2_small(scale), torch.bfloat16),
        (f"{tensors:,} x 64, float32", lambda: many_small(tensors), torch.float32),
    ):
        parameters = [torch.nn.Parameter(p.detach().to(device, dtype)) for p in made()]
        for p in parameters:
            p.grad = torch.randn_like(p)
        yield name, parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scale", type=int, default=1, help="divide the widths of GPT-2 small by this")
    parser.add_argument("--rounds", type=int, default=20)
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("needs a CUDA or ROCm device")
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}\n", flush=True)
    for name, parameters in models("cuda", arguments.scale, 3000):
        for row in steps("steps", name, parameters, arguments.rounds):
            print(row, flush=True)


if __name__ == "__main__":
    main()
