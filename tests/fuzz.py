"""Looks for sequences that break a promise: a few with a fixed seed, or new ones for as long as `make fuzz` says."""

import os
import secrets
import time
import zlib
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st


def search(check: Callable[[Any], None], sequences: st.SearchStrategy[Any], number: int, examples: int) -> None:
    """Check random sequences, and shrink one that fails. The same ``number`` gives the same sequences."""
    of_run = settings(
        max_examples=examples,
        deadline=None,
        database=None,
        phases=[Phase.generate, Phase.shrink],
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )

    @seed(number)
    @of_run
    @given(sequences)
    def run(sequence: Any) -> None:
        check(sequence)

    run()


def look(check: Callable[[Any], None], sequences: st.SearchStrategy[Any], name: str, cases: int) -> None:
    """Search five sequences, the same at each call with ``name``.

    With FUZZ_SECONDS it looks for new sequences for that time over all ``cases``. FUZZ_SEED repeats those of a run.
    """
    if "FUZZ_SECONDS" not in os.environ:
        search(check, sequences, zlib.crc32(name.encode()), examples=5)
        return
    end = time.monotonic() + float(os.environ["FUZZ_SECONDS"]) / cases
    while time.monotonic() < end:
        number = int(os.environ.get("FUZZ_SEED", secrets.randbits(32)))
        print(f"FUZZ_SEED={number}")
        search(check, sequences, number, examples=100)
