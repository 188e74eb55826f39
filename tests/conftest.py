"""One thread, one seed, and a header that says with which versions a run was made."""

import importlib.metadata

import pytest
import torch

LIBRARIES = ("torch", "triton", "timm", "prodigyopt", "hypothesis")

torch.set_num_threads(1)


def pytest_report_header() -> str:
    """The versions that decide what a test means."""
    return "versions: " + ", ".join(_version(name) for name in LIBRARIES)


def _version(name: str) -> str:
    try:
        return f"{name} {importlib.metadata.version(name)}"
    except importlib.metadata.PackageNotFoundError:
        return f"no {name}"


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)
