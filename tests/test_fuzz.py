"""Damaged and strange input of every kind: refused with a typed error, or taken and right. Nothing else.

A few hundred inputs by kind here; `tests/hardware/fuzz.py` runs as many as are asked for. An input that failed is made
again by its kind and its number.
"""

from __future__ import annotations

from pathlib import Path

import fuzz_checkpoints  # noqa: F401
import fuzz_files  # noqa: F401  registers its kinds
import fuzz_requests  # noqa: F401
import pytest
from fuzzing import KINDS, Kind, generator, time_limit

INPUTS = 60


@pytest.fixture(scope="module")
def kinds() -> dict[str, Kind]:
    return {}


@pytest.mark.parametrize("name", list(KINDS))
def test_inputs_are_refused_or_right(name: str, bundle: Path, tmp_path: Path) -> None:
    tried = KINDS[name](tmp_path, bundle)
    for number in range(INPUTS):
        try:
            with time_limit():
                tried.attempt(generator(name, number))
        except Exception as error:
            raise AssertionError(f"{name}, input {number}: {type(error).__name__}: {error}") from error
