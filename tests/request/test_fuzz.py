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
from fuzzing import KINDS, try_inputs

INPUTS = 60


@pytest.mark.parametrize("name", list(KINDS))
def test_inputs_are_refused_or_right(name: str, bundle: Path, tmp_path: Path) -> None:
    try_inputs(name, KINDS[name](tmp_path, bundle), INPUTS)
