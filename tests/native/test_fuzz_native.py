"""The C++ of `_core` with arguments of any shape, type and size; `tests/sanitizers.sh` runs this, too."""

from __future__ import annotations

from pathlib import Path

from fuzz_native import NativeCall
from fuzzing import try_inputs

INPUTS = 1500


def test_native_calls_are_refused_or_right(tmp_path: Path) -> None:
    try_inputs("native call", NativeCall(tmp_path, tmp_path), INPUTS)
