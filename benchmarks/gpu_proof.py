"""Checks on a card, row by row: tests, speeds, steps, graphs, streams, memory checks. At most eight minutes.

PYTHONPATH=. python benchmarks/gpu_proof.py [--no-tests] [--only kernels steps] [--out gpu_proof]

It needs torch, triton and pytest, and no network. The tests for cards run first, in at most ten further minutes. Each
part of the proof runs in its own process, so a crash ends that part only. Rows are independent: one that raises is
printed as failed, and the next one runs. Rows are printed at once, and written to rows.csv and page.md.

--dry: no card. The kernels are interpreted on the CPU, on small tensors, to show that the rows themselves work.
"""

import argparse
import csv
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, fields
from datetime import date
from pathlib import Path
from typing import cast
from unittest import mock

DRY = "--dry" in sys.argv
if DRY:
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

import torch  # noqa: E402
from gpu_step_time import BASELINE, PATHS, Row, captured, failed, models, on_the_device, steps  # noqa: E402
from torch import Tensor  # noqa: E402

HERE = Path(__file__).resolve()
ROOT = HERE.parents[1]
DEVICE = "cpu" if DRY else "cuda"
MINUTES, OF_TESTS = 8, 10
GPU_TESTS = (
    "test_triton_gpu.py",
    "test_triton_values.py",
    "test_kernels.py",
    "test_stochastic_rounding.py",
    "test_pieces.py",
)
WEIGHTS = 100 if DRY else 1 << 26  # in all, for the speeds of the kernels
TENSORS = 1 if DRY else 8
TRIALS = 1 if DRY else 15
WARM = 1 if DRY else 3  # steps before those that count
Trial = tuple[str, Callable[[], object]]
"""A row's name, and a function that returns its value, or the tuple (value, unit, ratio, remark) or its beginning."""


class Skipped(Exception):  # noqa: N818 - no error
    """The reason why this machine cannot run a row."""


def needs_a_card() -> None:
    if DRY:
        raise Skipped("needs a card")


def rows_of(part: str, trials: Iterable[Trial | Row]) -> Iterator[Row]:
    """Run each trial; one that raises becomes a failed row."""
    trials = iter(trials)
    while True:
        try:
            trial = next(trials, None)
        except Exception as error:
            traceback.print_exc()
            yield failed(part, "the rows that were left", error)
            return
        if trial is None:
            return
        if isinstance(trial, Row):
            yield trial
            continue
        what, run = trial
        try:
            found = run()
            yield Row(part, what, *(found if isinstance(found, tuple) else (found,)))
        except Skipped as reason:
            yield Row(part, what, remark=str(reason), outcome="skipped")
        except Exception as error:
            traceback.print_exc()
            yield failed(part, what, error)
        sys.stderr.flush()


# ---- versions


def output(*command: str, seconds: float = 60, **options: object) -> str:
    """What a program prints. Raises Skipped if it is not installed, RuntimeError with its last lines if it fails."""
    if shutil.which(command[0]) is None:
        raise Skipped(f"{command[0]} is not installed")
    done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, **options)
    if done.returncode:
        last = (done.stdout + done.stderr).strip().splitlines()[-3:]
        raise RuntimeError(f"exit {done.returncode}: {' / '.join(last)}")
    return done.stdout.strip()


def versions() -> Iterator[Trial]:
    import triton

    from cwd_wrap import kernels

    device = torch.device(DEVICE, 0) if not DRY else torch.device("cpu")

    def card() -> str:
        needs_a_card()
        found = torch.cuda.get_device_properties(0)
        return f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} processors"

    def compiler() -> str:
        name = os.environ.get("CC") or next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), "cc")
        return output(name, "--version").splitlines()[0]

    yield "date", lambda: str(date.today())
    yield "python", platform.python_version
    yield "torch", lambda: f"{torch.__version__}, CUDA {torch.version.cuda}, HIP {torch.version.hip}"
    yield "triton", lambda: triton.__version__
    yield "card", card
    yield "driver", lambda: output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    yield "C compiler", compiler
    yield "backend chosen", lambda: kernels.name(None, device)
    yield "obstacle to triton", lambda: str(kernels.obstacle("triton", device))


# ---- the speed of each kernel


def milliseconds(call: Callable[[], object]) -> float:
    if DRY:
        start = time.perf_counter()
        call()
        return (time.perf_counter() - start) * 1e3
    call()
    return statistics.median(on_the_device(call) for _ in range(TRIALS))


def tensors(dtype: torch.dtype, odd: int) -> list[Tensor]:
    """Random tensors. With ``odd``, every ``odd``-th of them begins at an odd address."""
    each = WEIGHTS // TENSORS
    flat = [torch.randn(each + 8, device=DEVICE).to(dtype) for _ in range(TENSORS)]
    return [t[1 : each + 1] if odd and i % odd == 0 else t[:each] for i, t in enumerate(flat)]


def launch(kernel: object, *, sums: int = 0, odd: int = 0) -> Callable[[], object]:
    """A call that launches ``kernel`` (of compiled_kernels.KERNELS) on `tensors`."""
    from cwd_wrap import rules
    from cwd_wrap.draws import Draws
    from cwd_wrap.kernels import _triton
    from cwd_wrap.tensors import Shard

    of_torch = {tl_type: dtype for dtype, tl_type in _triton._TYPES.items()}
    columns = tuple(tensors(of_torch[each], odd) for each in kernel.types)
    numbers: tuple[float, ...] = (0.1, 1.0)
    counts = sums > 0 or not kernel.write
    options: dict[str, object] = {"update": kernel.update, "write": kernel.write, "count": counts, "sums": sums}
    if kernel.update:
        for column in columns[3:]:
            for t in column:
                t.abs_()
        numbers = (0.5,) * _triton.NUMBERS
        options["method"] = kernel.method and _triton._BOUND[kernel.method]
    if kernel.per_tensor:
        options["per_tensor"] = torch.full((TENSORS,), 0.8, device=DEVICE)
    if kernel.stochastic:
        stream = rules.stream(torch.tensor(0), torch.ones((), dtype=torch.int64, device=DEVICE))
        shards = [Shard(0, t.numel(), t.numel(), t.numel()) for t in columns[0]]
        options["draws"] = [Draws(stream, list(range(TENSORS)), shards)]
    row = (1e-9, 1e-9, (1.0, *numbers))
    return lambda: _triton._launch(kernel.rule, [columns], [row], **options)


def kernels() -> Iterator[Trial]:
    """GB/s, counting the bytes that must be moved, and the ratio to torch's copy in the same type."""
    import compiled_kernels
    from compiled_kernels import KERNELS

    from cwd_wrap.kernels import _tables, _triton

    ceiling: dict[int, float] = {}

    def speed(bytes_each: float, call: Callable[[], object]) -> float:
        return bytes_each * (WEIGHTS // TENSORS) * TENSORS / milliseconds(call) / 1e6

    def copy(dtype: torch.dtype) -> tuple[float, str, float]:
        source, to = (torch.empty(WEIGHTS, dtype=dtype, device=DEVICE).normal_() for _ in range(2))
        ceiling[dtype.itemsize] = speed(2 * dtype.itemsize, lambda: to.copy_(source))
        return ceiling[dtype.itemsize], "GB/s", 1.0

    def measured(kernel: compiled_kernels.Kernel, **options: int) -> tuple[float, str, float | None]:
        bytes_each = sum(t.primitive_bitwidth // 8 for t in (*kernel.read, *kernel.written))
        found = speed(bytes_each, launch(kernel, **options))
        of = ceiling.get(kernel.types[0].primitive_bitwidth // 8)
        return found, "GB/s", found / of if of else None

    def tuned(kernel: compiled_kernels.Kernel, block: int, warps: int, chunk: int) -> tuple[float, str, float | None]:
        lanes = 64 if torch.version.hip else 32
        with ExitStack() as patches:
            for name, value in (("BLOCK", block), ("THREADS", warps * lanes), ("CHUNK", chunk)):
                patches.enter_context(mock.patch.object(_triton, name, value))
            patches.enter_context(mock.patch.object(_tables, "_of_device", {}))
            return measured(kernel)

    for dtype in (torch.float32, torch.bfloat16):
        yield f"torch copy_, {dtype}", lambda dtype=dtype: copy(dtype)
    for name, kernel in KERNELS.items():
        yield name, lambda kernel=kernel: measured(kernel)
    important = ("direction", "snapshot", "adam", "direction, bf16", "snapshot, bf16", "adam, bf16")
    for name in important:
        yield f"{name}, unaligned", lambda name=name: measured(KERNELS[name], odd=1)
        yield f"{name}, one of two unaligned", lambda name=name: measured(KERNELS[name], odd=2)
    for name in important:
        sums = 3 if name.startswith("direction") else 5  # before the step or after it
        yield f"{name}, with a monitor", lambda name=name, sums=sums: measured(KERNELS[name], sums=sums)
    for name in ("direction", "adam", "adam, bf16"):
        for block in (1024, 2048):
            for warps in (4, 8):
                for chunk in (1 << 14, 1 << 15, 1 << 16):
                    what = f"{name}, block {block}, {warps} warps, chunk {chunk >> 10}K"
                    yield what, lambda a=(KERNELS[name], block, warps, chunk): tuned(*a)


# ---- steps against fused AdamW


def step_times() -> Iterator[Row]:
    for name, parameters in models(DEVICE, 96 if DRY else 1, 3 if DRY else 3000):
        small = parameters[-1:] if DRY else parameters
        yield from steps("steps", name, small, 1 if DRY else 10)


# ---- graphs, streams and memory checks


def small_net(dtype: torch.dtype) -> list[torch.nn.Parameter]:
    """Some small weights with gradients, the same at each call; on a card one is larger than a chunk."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), ()] if DRY else [(300, 100), (1000,), (64, 64), (3,), ()]
    parameters = []
    for shape in shapes:
        p = torch.nn.Parameter(torch.randn(shape, generator=generator).to(DEVICE, dtype))
        p.grad = torch.randn(shape, generator=generator).to(DEVICE, dtype)
        parameters.append(p)
    return parameters


def wrapped(
    path: str, parameters: list[torch.nn.Parameter], lr: float | Tensor, **options: object
) -> torch.optim.Optimizer:
    """The optimizer of a row: AdamW in CautiousDecay on ``path``, or in the wrapper of that name."""
    import cwd_wrap

    base = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.1, fused=True, capturable=not DRY)
    if path in PATHS:
        return cwd_wrap.CautiousDecay(base, path=path, backend="triton", **options)
    return getattr(cwd_wrap, path)(base, backend="triton")


EVERY = (*PATHS, "CautiousUpdate", "PNormDecay")


def weights(parameters: Iterable[Tensor]) -> Tensor:
    return torch.cat([p.detach().flatten().double() for p in parameters]).cpu()


def same(one: Tensor, other: Tensor, what: str) -> None:
    if not torch.equal(one, other):
        off = (one - other).abs().max().item()
        raise AssertionError(f"{what}: {(one != other).sum()} of {one.numel()} weights differ, by up to {off:.3g}")


def replay_of(step: Callable[[], object]) -> Callable[[], object]:
    """The replay of a graph of ``step``, after three steps on a side stream; without a card, the step itself."""
    if not DRY:
        return captured(step).replay
    for _ in range(WARM):
        step()
    return step


def graphs() -> Iterator[Trial]:
    """Replays under new learning rates equal steps outside a graph, bit for bit."""

    def trained(path: str, dtype: torch.dtype, graphed: bool, **options: object) -> list[Tensor]:
        parameters = small_net(dtype)
        lr = torch.tensor(0.01, device=DEVICE)
        opt = wrapped(path, parameters, lr, **options)
        step: Callable[[], object] = opt.step
        if graphed:
            step = replay_of(step)
            opt.drop_snapshot()
        else:
            for _ in range(WARM):
                step()
        canaries = [torch.full((1 << 10 if DRY else 1 << 20,), 7.0, device=DEVICE) for _ in range(8)]
        after = []
        for rate in (0.01, 0.001, 0.02, 0.02):
            lr.fill_(rate)
            step()
            after.append(weights(parameters))
        if not all(bool((c == 7).all()) for c in canaries):
            raise AssertionError("a replay wrote to memory that was freed")
        return after

    def check(path: str, dtype: torch.dtype, **options: object) -> tuple[str, str, None, str]:
        found = [trained(path, dtype, graphed, **options) for graphed in (False, True)]
        for i, (one, other) in enumerate(zip(*found, strict=True)):
            same(one, other, f"replay {i + 1}")
        if torch.equal(*found[0][-2:]):
            raise AssertionError("the last step moved nothing")
        return "equal", "", None, "4 steps, not captured" if DRY else "4 replays"

    for path in EVERY:
        yield f"{path}, float32", lambda path=path: check(path, torch.float32)
    for path in PATHS:
        yield f"{path}, bfloat16, stochastic", lambda p=path: check(p, torch.bfloat16, rounding="stochastic", seed=3)

    def backward_inside() -> str:
        """The gradients are made in the graph, at addresses that warm-up did not use."""
        found = []
        for graphed in (False, True):
            torch.manual_seed(0)
            model = torch.nn.Linear(64, 64).to(DEVICE)
            x = torch.ones(4, 64, device=DEVICE)
            opt = wrapped("one_pass", list(model.parameters()), 0.01)

            def step(model: torch.nn.Module = model, x: Tensor = x, opt: torch.optim.Optimizer = opt) -> None:
                opt.zero_grad(set_to_none=True)
                model(x).square().mean().backward()
                opt.step()

            replay = replay_of(step) if graphed else step
            for _ in range(4 if graphed else 4 + WARM):
                replay()
            found.append(weights(model.parameters()))
        torch.testing.assert_close(*found)
        return "equal"

    yield "one_pass, forward and backward captured", backward_inside


def streams() -> Iterator[Trial]:
    """Two streams step with gradients at changing addresses, while at most three tables are kept."""

    def check(path: str, steps: int = 2 if DRY else 30) -> tuple[str, str, None, str]:
        from cwd_wrap.kernels import _tables

        found = []
        for together in (False, True):
            nets = [small_net(torch.float32) for _ in range(2)]
            optimizers = [wrapped(path, net, 0.01) for net in nets]
            side = [None if DRY or not together else torch.cuda.Stream() for _ in nets]
            if not DRY:
                torch.cuda.synchronize()
            kept: list[Tensor] = []
            with mock.patch.object(_tables, "SEVERAL", 3), mock.patch.object(_tables, "BYTES", 0):
                for i in range(steps):
                    for net, opt, stream in zip(nets, optimizers, side, strict=True):
                        with torch.cuda.stream(stream) if stream else ExitStack():
                            kept = [*kept[-3:], *(p.grad for p in net)]  # so that the next ones have other addresses
                            for p in net:
                                p.grad = p.grad * (1 - 2 * (i % 2))
                            opt.step()
            if not DRY:
                torch.cuda.synchronize()
            found.append([weights(net) for net in nets])
        for one, other in zip(*found, strict=True):
            same(one, other, "two streams")
        return "equal", "", None, f"{steps} steps"

    for path in EVERY:
        yield path, lambda path=path: check(path)


SMALL_STEP = """
import sys; sys.path.insert(0, {here!r}); sys.argv = ["gpu_proof.py"{dry}]
import gpu_proof, torch
for path in gpu_proof.EVERY:
    for dtype in (torch.float32, torch.bfloat16):
        opt = gpu_proof.wrapped(path, gpu_proof.small_net(dtype), 0.01)
        for _ in range(2):
            opt.step()
gpu_proof.waited()
"""


def waited() -> None:
    if not DRY:
        torch.cuda.synchronize()


def memcheck() -> Iterator[Trial]:
    def check() -> tuple[str, str, None, str]:
        program = SMALL_STEP.format(here=str(HERE.parent), dry=', "--dry"' if DRY else "")
        if DRY:
            output(sys.executable, "-W", "ignore", "-c", program)
            return "ran", "", None, "without the tool"
        places = (shutil.which("compute-sanitizer"), "/usr/local/cuda/bin/compute-sanitizer")
        tool = next((place for place in places if place and Path(place).exists()), None)
        if tool is None:
            raise Skipped("compute-sanitizer is not installed")
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}  # one allocation per tensor
        command = (tool, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-W", "ignore", "-c", program)
        said = output(*command, seconds=150, env=environment)
        return "clean", "", None, next((line for line in said.splitlines() if "ERROR SUMMARY" in line), "")

    yield "one small step of every path", check


def large() -> Iterator[Trial]:
    """Indices beyond 2**31: the last weights are reached, and all are counted."""
    from cwd_wrap.bases.updates import Update, find
    from cwd_wrap.kernels import _triton
    from cwd_wrap.kernels.buckets import Coming, Stepped, Whole

    numel = (1 << 14) + 5 if DRY else (1 << 31) + 5

    def ones(columns: int) -> list[list[Tensor]]:
        needed = columns * 2 * numel
        if not DRY and torch.cuda.mem_get_info()[0] < needed + (2 << 30):
            raise Skipped(f"needs {needed >> 30} GiB")
        return [[torch.ones(numel, dtype=torch.bfloat16, device=DEVICE)] for _ in range(columns)]

    def check(w: Tensor, expected: float, sums: Tensor) -> tuple[str, str, None, str]:
        active = int(sums[0, 0])
        if active != numel:
            raise AssertionError(f"{active} of {numel} weights were counted")
        for piece in w.split(1 << 28):
            if not bool((piece == expected).all()):
                raise AssertionError(f"{(piece != expected).sum()} weights of a piece are not {expected}")
        return "right", "", None, f"{numel:,} weights"

    flags = {"strict": False, "count": True}

    def direction() -> object:
        w, g = ones(2)
        return check(w[0], 0.5, _triton.decay_along([Coming(w, g, None, 0.0, 1.0, 0.5)], **flags))

    def from_snapshot() -> object:
        w, x = ones(2)
        return check(w[0], 0.5, _triton.decay_from_snapshot([Stepped(w, w, x, None, 0.5)], **flags))

    def one_pass() -> object:
        w, g, m = ones(3)
        base = torch.optim.SGD(w, lr=0.25, momentum=0.5)
        sgd = cast("Update", find(base, base.param_groups[0]))
        return check(w[0], 0.125, _triton.step_whole([Whole(w, g, (m,), (), sgd, 0.25, 0.5)], **flags))

    yield from (("direction", direction), ("snapshot", from_snapshot), ("one_pass, SGD", one_pass))


FIRST_STEPS = """
import sys, time; sys.path.insert(0, {here!r}); sys.argv = ["gpu_proof.py"{dry}]
import gpu_proof, torch
parameters = gpu_proof.small_net(torch.float32); gpu_proof.waited()
opt = gpu_proof.wrapped({path!r}, parameters, 0.01)
for _ in range(3):
    start = time.perf_counter(); opt.step(); gpu_proof.waited(); print((time.perf_counter() - start) * 1e3)
"""


def first_steps() -> Iterator[Trial]:
    """In a new process, the first step imports and compiles, or finds the compiled kernels on disk."""

    def check(path: str, folder: str) -> tuple[float, str, None, str]:
        program = FIRST_STEPS.format(here=str(HERE.parent), dry=', "--dry"' if DRY else "", path=path)
        said = output(sys.executable, "-W", "ignore", "-c", program, env=os.environ | {"TRITON_CACHE_DIR": folder})
        first, second, third = map(float, said.splitlines()[-3:])
        return first, "ms", None, f"then {second:.1f} and {third:.1f} ms"

    with tempfile.TemporaryDirectory() as folder:
        for path in PATHS[:1] if DRY else PATHS[:3]:
            for cache in ("cold", "warm"):
                yield f"{path}, {cache} cache", lambda p=path: check(p, f"{folder}/{p}")


def sync() -> Iterator[Trial]:
    """Ten steps that would raise if one of them made the host wait for the card."""

    def check(path: str, lr: float, as_tensor: bool, observed: bool, **options: object) -> tuple[str, str, None, str]:
        from cwd_wrap import MaskMonitor

        rate = torch.tensor(lr, device=DEVICE) if as_tensor else lr
        opt = wrapped(path, small_net(torch.bfloat16 if options else torch.float32), rate, **options)
        if observed:
            opt.observer = MaskMonitor()
        for _ in range(WARM):
            opt.step()
        waited()
        with ExitStack() as stack:
            if not DRY:
                torch.cuda.set_sync_debug_mode("error")
                stack.callback(torch.cuda.set_sync_debug_mode, "default")
            for i in range(2 if DRY else 10):
                if not as_tensor:
                    opt.param_groups[0]["lr"] = lr / (i + 1)
                opt.step()
        return "no wait", "", None, "10 steps"

    for path in EVERY:
        yield f"{path}, lr a number that changes", lambda p=path: check(p, 0.01, False, False)
        yield f"{path}, lr a tensor, observed", lambda p=path: check(p, 0.01, True, True)
    for path in PATHS:
        yield f"{path}, stochastic", lambda p=path: check(p, 0.01, True, False, rounding="stochastic")


def compiled() -> Iterator[Trial]:
    def check(path: str) -> tuple[str, str, None, str]:
        found = []
        for compile_it in (False, True):
            torch._dynamo.reset()
            torch.manual_seed(0)
            model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.Tanh(), torch.nn.Linear(32, 1)).to(DEVICE)
            opt = wrapped(path, list(model.parameters()), 0.01)
            x = torch.linspace(-1, 1, 64, device=DEVICE).view(4, 16)

            def train(model: torch.nn.Module = model, opt: torch.optim.Optimizer = opt, x: Tensor = x) -> Tensor:
                loss = (model(x) - 1).square().mean()
                loss.backward()
                opt.step()
                opt.zero_grad()
                return loss.detach()

            run = torch.compile(train, backend="aot_eager" if DRY else "inductor") if compile_it else train
            losses = [float(run()) for _ in range(4)]
            if not losses[-1] < losses[0]:
                raise AssertionError(f"the loss did not fall: {losses}")
            found.append(weights(model.parameters()))
        torch.testing.assert_close(*found, rtol=1e-3, atol=1e-4)
        return "equal", "", None, f"loss {losses[0]:.3f} to {losses[-1]:.3f}"

    for path in PATHS:
        yield path, lambda path=path: check(path)


# ---- running the parts

PARTS: dict[str, tuple[Callable[[], Iterable[Trial | Row]], int]] = {  # the most seconds of each
    "versions": (versions, 60),
    "sync": (sync, 60),
    "graphs": (graphs, 90),
    "streams": (streams, 45),
    "steps": (step_times, 120),
    "kernels": (kernels, 150),
    "large": (large, 60),
    "first step": (first_steps, 90),
    "compile": (compiled, 90),
    "memcheck": (memcheck, 160),
}


def in_this_process(part: str) -> Iterator[Row]:
    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", ".*is too small for bfloat16"
        )  # it is lost in bfloat16, which does not matter here
        yield from rows_of(part, PARTS[part][0]())


def in_another_process(part: str, seconds: float, log: Path) -> Iterator[Row]:
    """The rows of a part, each at once; a crash or a timeout ends the part with a row of its own."""
    command = [sys.executable, str(HERE), "--child", part, *(["--dry"] if DRY else [])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))}
    with log.open("a") as errors:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment)
        stop = threading.Timer(seconds, child.kill)
        stop.start()
        try:
            for line in child.stdout or ():
                if line.startswith("{"):
                    yield Row(**json.loads(line))
            code = child.wait()
        finally:
            timed_out = not stop.is_alive()
            stop.cancel()
            child.kill()
    if timed_out:
        yield Row(part, "the rows that were left", remark=f"no time: {seconds:.0f} s are over", outcome="skipped")
    elif code:
        yield Row(part, "the process", remark=f"exit {code}, see {log.name}", outcome="failed")


def tests() -> Iterator[Row]:
    """Print pytest's output; its last line is the row."""
    if importlib.util.find_spec("pytest") is None:
        yield Row("tests", "pytest -m gpu", remark="pytest is not installed", outcome="skipped")
        return
    files = [str(ROOT / "tests" / name) for name in GPU_TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *files]
    try:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        stop = threading.Timer(OF_TESTS * 60, child.kill)
        stop.start()
        last = ""
        for line in child.stdout or ():
            print(line, end="", flush=True)
            last = line.strip() or last
        stop.cancel()
        yield Row("tests", "pytest -m gpu", remark=last, outcome="failed" if child.wait() else "ok")
    except OSError as error:
        yield failed("tests", "pytest -m gpu", error)


def page(rows: list[Row]) -> str:
    """The rows as Markdown, part by part."""
    failures = sum(row.outcome == "failed" for row in rows)
    skipped = sum(row.outcome == "skipped" for row in rows)
    lines = ["# Proof on a card" + (" (dry: interpreted on the CPU)" if DRY else "")]
    lines += ["", f"{len(rows)} rows, {failures} failed, {skipped} skipped. Ratios are to {BASELINE}, or to a copy."]
    for part in dict.fromkeys(row.part for row in rows):
        lines += ["", f"## {part}", "", "| what | value | ratio | remark |", "|---|---|---|---|"]
        for row in rows:
            if row.part == part:
                value = f"{row.value:.4g}" if isinstance(row.value, float) else str(row.value)
                ratio = "" if row.ratio is None else f"{row.ratio:.3f}"
                said = " ".join(filter(None, ("" if row.outcome == "ok" else row.outcome, row.remark)))
                cells = (row.what, f"{value} {row.unit}".strip(), ratio, said)
                lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines) + "\n"


def all_rows(parts: list[str], with_tests: bool, isolated: bool, log: Path) -> Iterator[Row]:
    if with_tests:
        yield from tests()
    deadline = time.monotonic() + MINUTES * 60
    for part in parts:
        left = deadline - time.monotonic()
        if left < 5:
            yield Row(part, "all rows", remark=f"no time: {MINUTES} minutes are over", outcome="skipped")
        else:
            yield from in_another_process(part, min(left, PARTS[part][1]), log) if isolated else in_this_process(part)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="no card: interpreted on the CPU, on small tensors")
    parser.add_argument("--no-tests", action="store_true", help="leave the tests out")
    parser.add_argument(
        "--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=f"of {list(PARTS)}"
    )
    parser.add_argument("--out", type=Path, default=Path("gpu_proof"), help="the folder for rows.csv and page.md")
    parser.add_argument("--here", action="store_true", help="all parts in this process")
    parser.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        for row in in_this_process(arguments.child):
            print(json.dumps(asdict(row)), flush=True)
        return
    if not DRY and not torch.cuda.is_available():
        sys.exit("needs a CUDA or ROCm device; --dry shows the rows without one")
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows = []
    with (arguments.out / "rows.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, [field.name for field in fields(Row)])
        table.writeheader()
        with_tests = not (arguments.no_tests or DRY)
        for row in all_rows(arguments.only, with_tests, not arguments.here, arguments.out / "errors.txt"):
            rows.append(row)
            print(row, flush=True)
            table.writerow(asdict(row))
            file.flush()
            (arguments.out / "page.md").write_text(page(rows))
    failures = sum(row.outcome == "failed" for row in rows)
    print(f"\n{len(rows)} rows, {failures} failed; see {arguments.out}")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
