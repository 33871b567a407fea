"""The C++ of `_core` with arguments of any shape, type and size; `tests/sanitizers.sh` runs this, too."""

from __future__ import annotations

from pathlib import Path

from fuzz_native import NativeCall
from fuzzing import generator, time_limit

INPUTS = 1500


def test_native_calls_are_refused_or_right(tmp_path: Path) -> None:
    tried = NativeCall(tmp_path, tmp_path)
    for number in range(INPUTS):
        try:
            with time_limit():
                tried.attempt(generator("native call", number))
        except Exception as error:
            raise AssertionError(f"input {number}: {type(error).__name__}: {error}") from error
