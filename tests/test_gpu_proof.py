"""The GPU proof, run without a card: each row works, and a failing row does not stop the others."""

import contextlib
import csv
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from processes import python

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import gpu_proof
import gpu_step_time
from gpu_step_time import Row

ROOT = Path(__file__).parents[1]
NEEDS_A_CARD = {"card", "driver"}


def rows_in(folder: Path) -> list[dict[str, str]]:
    with (folder / "rows.csv").open() as file:
        return list(csv.DictReader(file))


def test_every_row_that_can_run_without_a_card_does(tmp_path: Path) -> None:
    """All rows except those that need a card run in the interpreter on small tensors."""
    pytest.importorskip("triton")
    program = "import runpy, gpu_proof, interpreted; runpy.run_module('gpu_proof', run_name='__main__')"
    command = [sys.executable, "-c", program, "--dry", "--out", str(tmp_path), "--here"]
    found_in = os.pathsep.join(str(ROOT / folder) for folder in ("", "benchmarks", "tests"))
    environment = os.environ | {"PYTHONPATH": found_in, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    rows = rows_in(tmp_path)
    labels = [row["what"] for row in rows]

    assert done.returncode == 0, done.stdout + done.stderr
    assert {row["part"] for row in rows} == set(gpu_proof.PARTS)
    assert {row["what"] for row in rows if row["outcome"] != "ok"} <= NEEDS_A_CARD
    assert sum("block 2048, 8 warps, chunk 64K" in what for what in labels) == 3
    for path in gpu_proof.PATHS:
        assert any(row["what"] == f"GPT-2 small, float32: {path}, wall" and float(row["ratio"]) > 0 for row in rows)


def test_a_part_in_a_process_of_its_own(tmp_path: Path) -> None:
    """A part in its own process, as on a card, gives its rows as printed lines, a table and a page."""
    pytest.importorskip("triton")
    done = python("benchmarks/gpu_proof.py", "--dry", "--out", tmp_path, "--only", "large")
    rows = rows_in(tmp_path)

    assert done.returncode == 0, done.stdout + done.stderr
    assert [row["what"] for row in rows if row["part"] == "large"] == ["direction", "snapshot", "one_pass, SGD"]
    assert "| one_pass, SGD | right |  | 16,389 weights |" in (tmp_path / "page.md").read_text()
    assert "large     one_pass, SGD" in done.stdout


def test_without_a_card_the_proof_exits_with_a_text() -> None:
    """Without a card the proof exits with a text that says how to see the rows."""
    if torch.cuda.is_available():
        pytest.skip("there is a card")
    done = python("benchmarks/gpu_proof.py")

    assert done.returncode == 1
    assert done.stderr.strip() == "needs a CUDA or ROCm device; --dry shows the rows without one"


def test_a_failing_row_does_not_stop_the_others(capsys: pytest.CaptureFixture[str]) -> None:
    """A failing row holds its error, and later rows run; an error between two rows ends the part with a row."""

    def trials() -> Iterator[object]:
        def skipped() -> None:
            raise gpu_proof.Skipped("not here")

        yield "fails", lambda: 1 / 0
        yield "skips", skipped
        yield "works", lambda: (1.5, "ms", 2.0)
        raise ValueError("of the part")

    rows = list(gpu_proof.rows_of("part", trials()))

    assert rows == [
        Row("part", "fails", remark="ZeroDivisionError: division by zero", outcome="failed"),
        Row("part", "skips", remark="not here", outcome="skipped"),
        Row("part", "works", 1.5, "ms", 2.0),
        Row("part", "the rows that were left", remark="ValueError: of the part", outcome="failed"),
    ]
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("program", "seconds", "expected"),
    [
        ("import os; os.abort()", 60, ("the process", "failed", r"exit -?\d+, see errors\.txt")),
        ("import time; time.sleep(60)", 3, ("the rows that were left", "skipped", "no time: 3 s are over")),
    ],
    ids=["crash", "too long"],
)
def test_a_crash_ends_only_its_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str, seconds: int, expected: tuple[str, str, str]
) -> None:
    """A process that dies or takes too long keeps its rows so far, and adds one that says what happened."""
    child = tmp_path / "child.py"
    row = '{"part": "p", "what": "first", "value": 1.0}'
    child.write_text(f"print({row!r}, flush=True); {program}")
    monkeypatch.setattr(gpu_proof, "HERE", child)
    first, last = gpu_proof.in_another_process("p", seconds, tmp_path / "errors.txt")

    assert first == Row("p", "first", 1.0)
    assert (last.what, last.outcome) == expected[:2]
    assert re.fullmatch(expected[2], last.remark)


def test_no_part_begins_after_the_last_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After eight minutes, each remaining part becomes a row that says so."""
    monkeypatch.setattr(gpu_proof, "MINUTES", 0)
    rows = list(gpu_proof.all_rows(["graphs", "large"], with_tests=False, isolated=True, log=tmp_path / "errors.txt"))

    assert [(row.part, row.outcome, row.remark) for row in rows] == [
        (part, "skipped", "no time: 0 minutes are over") for part in ("graphs", "large")
    ]
    assert gpu_proof.page(rows).splitlines()[2].startswith("2 rows, 0 failed, 2 skipped.")


def test_the_row_of_the_tests(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """pytest's last line is a row, which fails if pytest fails; without pytest the row says so."""
    monkeypatch.setattr(gpu_proof, "GPU_TESTS", ["test_gpu_proof.py"])
    (row,) = gpu_proof.tests()

    assert (row.part, row.outcome) == ("tests", "failed")
    assert "deselected" in row.remark  # none of these is for a card, so pytest returns 5
    monkeypatch.setattr(gpu_proof.importlib.util, "find_spec", lambda _: None)
    (row,) = gpu_proof.tests()
    assert (row.outcome, row.remark) == ("skipped", "pytest is not installed")


def test_a_step_that_does_nothing_is_not_timed() -> None:
    """If a step does not change the weights, its benchmark raises an error."""
    parameters = [torch.nn.Parameter(torch.ones(64))]
    parameters[0].grad = torch.ones(64)
    opt = torch.optim.SGD(parameters, lr=0.1)
    gpu_step_time.moved(opt, opt.step)

    with pytest.raises(RuntimeError, match="a step moved 0% of the weights only, so its time means nothing"):
        gpu_step_time.moved(opt, lambda: None)


def stub_cuda(monkeypatch: pytest.MonkeyPatch, busy: bool) -> None:
    """Replace torch.cuda: any two events are 2 ms apart, and replaying a graph does nothing."""

    class Event:
        def __init__(self, enable_timing: bool = False) -> None: ...

        def record(self) -> None: ...

        def synchronize(self) -> None: ...

        def query(self) -> bool:
            return not busy

        def elapsed_time(self, _: object) -> float:
            return 2.0

    class Graph:
        def replay(self) -> None: ...

    class Stream:
        def wait_stream(self, _: object) -> None: ...

    stubs = {"Event": Event, "CUDAGraph": Graph, "Stream": Stream, "current_stream": Stream}
    nothing = ("_sleep", "synchronize")
    stubs |= {"is_available": lambda: True, **{name: lambda *_: None for name in nothing}}
    stubs |= {name: lambda _: contextlib.nullcontext() for name in ("stream", "graph")}
    for name, stub in stubs.items():
        monkeypatch.setattr(torch.cuda, name, stub)


@pytest.mark.parametrize("busy", [True, False])
def test_the_three_times_of_a_step(monkeypatch: pytest.MonkeyPatch, busy: bool) -> None:
    """On a stubbed card, each path and time has a row, and a failure affects its own row only."""
    stub_cuda(monkeypatch, busy)
    p = torch.nn.Parameter(torch.zeros(16))
    p.grad = -torch.ones(16)
    base = torch.optim.SGD([p], lr=0.1)
    calls = {gpu_step_time.BASELINE: base.step, "one_pass": base.step, "direction": lambda: 1 / 0, "pieces": lambda: 0}
    monkeypatch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda _: None, raising=False)
    monkeypatch.setattr(torch.optim.Optimizer, "_cuda_graph_capture_health_check", lambda _: None, raising=False)
    monkeypatch.setattr(gpu_step_time, "candidates", lambda _: (base, calls))
    rows = {row.what: row for row in gpu_step_time.steps("steps", "net", [p], 3)}

    assert rows["net: direction"].remark == "ZeroDivisionError: division by zero"
    assert "moved 0% of the weights" in rows["net: pieces"].remark
    assert (rows["net: one_pass, device"].value, rows["net: one_pass, device"].ratio) == (2.0, 1.0)
    assert rows["net: one_pass, wall"].outcome == "ok"
    if busy:
        assert rows["net: one_pass, host"].value > 0
    else:
        assert "the call waits for the card" in rows["net: one_pass, host"].remark
