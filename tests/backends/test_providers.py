"""ONNX Runtime's providers: what is not here, what was not taken and what is not known are errors, never the CPU.

The wheel for CPUs has one provider beside its CPU's that takes no operator of any graph, Azure's: with it, everything
falls to the CPU, for real.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

import zimage_rt
from zimage_rt.backends import nvidia_driver
from zimage_rt.backends.onnxruntime_binding import MAX_SHAPES, BoundSession

AZURE = "AzureExecutionProvider"
REQUEST: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 3, "guidance_scale": 1.5}

needs_azure = pytest.mark.skipif(
    AZURE not in ort.get_available_providers(), reason=f"this onnxruntime has no {AZURE}, which takes no operator"
)


def load(bundle: Path, **options: Any) -> zimage_rt.Engine:
    return zimage_rt.Engine.load(bundle, backend_options=options)


def test_the_cpu_by_name_and_io_binding_draw_the_same_bytes(bundle: Path, engine: zimage_rt.Engine) -> None:
    expected = engine.generate(["a panda", "two words more: a red house"], seed=5, **REQUEST).images.tobytes()
    for options in ({"provider": "cpu"}, {"provider": "CPUExecutionProvider", "io_binding": True}):
        bound = load(bundle, **options)
        for _ in range(2):  # the second runs in the buffers of the first
            assert (
                bound.generate(["a panda", "two words more: a red house"], seed=5, **REQUEST).images.tobytes()
                == expected
            )


def test_bound_results_are_the_callers_and_buffers_stay(bundle: Path) -> None:
    session = ort.InferenceSession(str(bundle / "context_refiner.onnx"), providers=["CPUExecutionProvider"])
    bound = BoundSession(session, ["context"], "cpu", 0)
    rng = np.random.default_rng(0)
    # More shapes than are kept, then the first of them again.
    lengths = [*range(1, MAX_SHAPES + 3), 1]
    given = [rng.standard_normal((1, length, 256), dtype=np.float32) for length in lengths]
    results = [bound.run({"prompt_embeds": array})[0] for array in given for _ in range(2)]
    for array, first, second in zip(given, results[::2], results[1::2], strict=True):
        expected = session.run(["context"], {"prompt_embeds": array})[0]
        np.testing.assert_array_equal(first, expected)
        np.testing.assert_array_equal(second, expected)
    assert not any(np.shares_memory(results[0], result) for result in results[1:])
    # What was given is not written to: the buffers are copies.
    before = given[-1].copy()
    bound.run({"prompt_embeds": before + 1})
    np.testing.assert_array_equal(given[-1], before)


@needs_azure
def test_a_session_that_would_fall_to_the_cpu_is_refused(bundle: Path) -> None:
    with pytest.raises(
        zimage_rt.BundleMismatch, match=r"text_encoder: provider .* left \d+ of \d+ operators to the CPU"
    ):
        load(bundle, provider=AZURE)
    with pytest.raises(zimage_rt.BundleMismatch, match="context_refiner") as refusal:
        load(bundle, provider=AZURE, allow_cpu=["text_encoder"])
    assert "MatMul (7)" in str(refusal.value)
    assert "'allow_cpu': ['Add', " in str(refusal.value)


@needs_azure
def test_what_is_allowed_by_name_runs_on_the_cpu(bundle: Path, engine: zimage_rt.Engine) -> None:
    modules = ["text_encoder", "context_refiner", "tiny_vae_decoder"]
    with pytest.raises(zimage_rt.BundleMismatch, match="transformer") as refusal:
        load(bundle, provider=AZURE, allow_cpu=modules)
    # The message's own advice, followed to the letter, by operators instead of by module.
    advice = str(refusal.value).split("'allow_cpu': [")[1].split("]")[0]
    allowed = [*modules, *(name.strip(" '") for name in advice.split(","))]
    mixed = load(bundle, provider=AZURE, allow_cpu=allowed)
    assert (
        mixed.generate("a panda", seed=1, **REQUEST).images.tobytes()
        == engine.generate("a panda", seed=1, **REQUEST).images.tobytes()
    )
    # One operator less is an error again: a softmax a block.
    config = engine.manifest.module("transformer").config
    blocks = config["n_layers"] + config["n_refiner_layers"]
    left = rf"left {blocks} of \d+ operators to the CPU: Softmax \({blocks}\); "
    with pytest.raises(zimage_rt.BundleMismatch, match=left):
        load(bundle, provider=AZURE, allow_cpu=[name for name in allowed if name != "Softmax"])


@pytest.mark.parametrize(
    ("provider", "extra"),
    [("cuda", "onnxruntime-gpu"), ("tensorrt", "onnxruntime-gpu"), ("nv_tensorrt_rtx", "onnxruntime-rtx")],
)
def test_a_provider_that_is_not_here_is_refused(bundle: Path, provider: str, extra: str) -> None:
    if nvidia_driver.query().problem is None:
        pytest.skip("this machine has an NVIDIA GPU: the provider may well be here")
    with pytest.raises(zimage_rt.BackendUnavailable, match=r"no NVIDIA driver|sees no GPU") as refusal:
        load(bundle, provider=provider)
    assert repr(provider) in str(refusal.value)
    if ort.package_name == "onnxruntime":
        assert f"pip install 'zimage-rt[{extra}]'" in str(refusal.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"provider": "teapot"}, "expected one of cpu, cuda, tensorrt, nv_tensorrt_rtx"),
        ({"provider": "cpu", "device": 1}, "device: expected 0"),
        ({"provider": "cpu", "provider_options": {"arena": 1}}, "provider 'cpu' has no option 'arena'"),
        ({"provider": "cuda", "provider_options": {"device_id": 1}}, "choose the GPU with the backend option device"),
        ({"provider": "cuda", "provider_options": {"enable_cuda_graph": [1]}}, "names with text or numbers"),
        ({"provider": "cuda", "provider_options": "enable_cuda_graph"}, "expected names and values"),
        ({"allow_cpu": "Shape"}, "allow_cpu: expected a list"),
        ({"provder": "cuda"}, "provder"),
    ],
)
def test_wrong_options_are_refused(bundle: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(zimage_rt.RequestError, match=message):
        load(bundle, **options)


ON_ONE_CORE = """
import os, sys
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
import numpy, onnxruntime, zimage_rt
from pathlib import Path
before = len(list(Path("/proc/self/task").iterdir()))
zimage_rt.Engine.load(sys.argv[1], verify=False)
print(len(list(Path("/proc/self/task").iterdir())) - before)
"""


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux says which cores a process may use")
def test_threads_are_as_many_as_the_cores_that_this_process_may_use(bundle: Path) -> None:
    child = subprocess.run([sys.executable, "-c", ON_ONE_CORE, bundle], capture_output=True, text=True, check=True)
    assert int(child.stdout) == 0  # the caller's own is enough for one core; ONNX Runtime makes one more for each other
