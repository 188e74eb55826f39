"""Sets the seed and the threads (OMP_NUM_THREADS, or 1), makes the cases of tests over paths, prints the versions."""

import gc
import importlib.metadata
import importlib.util
import os
from collections.abc import Iterator

import pytest
import torch
from support import ALL_PATHS, BASES_ON_PATHS, METHODS_ON_PATHS, METHODS_ONCE, PAIRS, param

from cwd_wrap.step import paths

LIBRARIES = ("torch", "numba", "triton", "timm", "prodigyopt", "hypothesis")

torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
if not torch.cuda.is_available():  # torch's own would note for each absent kind of card where it was called: 2 ms
    torch.manual_seed = torch.default_generator.manual_seed

if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
    import interpreted  # noqa: F401 - it patches the interpreter

    from cwd_wrap.kernels import _triton

    _triton.CHUNK = 2 * _triton.BLOCK  # the interpreter takes milliseconds for a block


def pytest_report_header() -> str:
    """Name the versions that the results depend on."""
    return "versions: " + ", ".join(_version(name) for name in LIBRARIES)


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"


def pytest_collection_finish() -> None:
    """Take the libraries' own objects out of every later collection of garbage, which would look at all of them."""
    gc.collect()
    gc.freeze()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make the cases of a test over paths, bases or methods.

    ``every_path``: each path. ``every_base`` with ``every_path``: each base and each path. ``every_method``: each
    method and each path. ``every_pair``: each method, base and path. ``every_rule``: the methods that have a
    reference, because they draw no random numbers. ``every_formula``: each of these on each of its paths, for tests of
    the maths.
    """
    if "every_base" in metafunc.fixturenames:
        metafunc.parametrize(("every_base", "every_path"), BASES_ON_PATHS)
    elif "every_path" in metafunc.fixturenames:
        metafunc.parametrize("every_path", [param(path, path=path) for path in ALL_PATHS])
    if "every_method" in metafunc.fixturenames:
        metafunc.parametrize("every_method", METHODS_ONCE)
    if "every_pair" in metafunc.fixturenames:
        metafunc.parametrize("every_pair", PAIRS)
    for name, methods in (("every_rule", METHODS_ONCE), ("every_formula", METHODS_ON_PATHS)):
        if name in metafunc.fixturenames:
            metafunc.parametrize(name, [case for case in methods if case.values[0].reference is not None])


@pytest.fixture(autouse=True)
def _small_pieces(request: pytest.FixtureRequest) -> Iterator[None]:
    """Make pieces small, so that tests over every path step in more than one piece."""
    whole = paths.PIECE
    if {"every_path", "path_in_turn", "every_pair", "every_method", "every_rule", "every_formula"} & set(
        request.fixturenames
    ):
        paths.PIECE = 16
    yield
    paths.PIECE = whole


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
