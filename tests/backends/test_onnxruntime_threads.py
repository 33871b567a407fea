"""Threads of ONNX Runtime's sessions: how many there are, and how long they wait for work."""

from __future__ import annotations

from typing import Any

import onnxruntime
import pytest
from shared import BUNDLE

import zimage_rt
from zimage_rt.backends.onnxruntime import SPIN_MICROSECONDS


def test_sessions_have_the_threads_that_were_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[onnxruntime.SessionOptions] = []
    original = onnxruntime.InferenceSession

    def record(path: Any, options: onnxruntime.SessionOptions, *rest: Any, **more: Any) -> Any:
        seen.append(options)
        return original(path, options, *rest, **more)

    monkeypatch.setattr(onnxruntime, "InferenceSession", record)
    with zimage_rt.Engine.load(BUNDLE, backend_options={"num_threads": 3}):
        pass
    assert len(seen) == 3  # text encoder, context refiner, transformer
    for options in seen:
        assert options.intra_op_num_threads == 3
        assert options.get_session_config_entry("session.intra_op.spin_duration_us") == SPIN_MICROSECONDS


def test_onnxruntime_knows_how_long_threads_may_wait(capfd: pytest.CaptureFixture[str]) -> None:
    """An unknown entry would be ignored without a word; of a wrong value of this one it warns."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.spin_duration_us", "soon")
    onnxruntime.InferenceSession(str(BUNDLE / "context_refiner.onnx"), options, providers=["CPUExecutionProvider"])
    assert "spin_duration_us" in capfd.readouterr().err
