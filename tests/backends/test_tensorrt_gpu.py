"""The TensorRT backends on a GPU: our memory and graphs on any, engines on those that a package runs on."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tensorrt_plans import MODULE, WIDTH, reference, write_bundle

from zimage_rt.backends import nvidia_driver
from zimage_rt.backends.registry import load_backend
from zimage_rt.errors import OutOfMemory, RequestError

pytest.importorskip("cuda.bindings", reason="the TensorRT backends use cuda-bindings")
if (problem := nvidia_driver.query().problem) is not None:
    pytest.skip(problem, allow_module_level=True)

from cuda.bindings import runtime as cudart

from zimage_rt.backends._cuda_runtime import Gpu

pytestmark = pytest.mark.gpu


def test_device_memory_copies_and_graphs() -> None:
    gpu = Gpu(0)
    first, second = gpu.buffer("first"), gpu.buffer("second")
    for buffer in (first, second):
        buffer.reserve(1000)
        address = buffer.address
        buffer.reserve(10)
        assert (buffer.address, buffer.size) == (address, 1000)
    data = np.arange(250, dtype=np.float32)
    gpu.upload(first, data)
    got = np.zeros_like(data)
    gpu.download(first, got)
    gpu.synchronize("copying")
    assert (got == data).all()

    def copy() -> None:
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        cudart.cudaMemcpyAsync(second.address, first.address, 1000, kind, gpu.stream)

    graph = gpu.capture("capturing", copy)
    for factor in (2, 3):
        gpu.upload(first, data * factor)
        graph.launch("replaying")
        gpu.download(second, got)
        gpu.synchronize("replaying")
        assert (got == data * factor).all()
    with pytest.raises(ZeroDivisionError):
        gpu.capture("capturing", lambda: 1 // 0)
    gpu.synchronize("after a capture that failed")


def test_out_of_device_memory_leaves_the_gpu_usable() -> None:
    gpu = Gpu(0)
    buffer = gpu.buffer("activations")
    with pytest.raises(OutOfMemory, match=r"activations: needs \d+ MiB of device memory, \d+ MiB of \d+ MiB are free"):
        buffer.reserve(gpu.free_memory()[1] * 2)
    assert (buffer.address, buffer.size) == (0, 0)
    buffer.reserve(1 << 20)
    gpu.upload(buffer, np.ones(256, np.float32))
    gpu.synchronize("after running out")


@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
def test_a_split_module_runs(tmp_path: Path, name: str, cuda_graph: bool) -> None:
    """The whole path: two plans, both profiles, shapes that come and go, a refusal between."""
    trt = pytest.importorskip(name, reason=f"{name} is not installed")
    found = nvidia_driver.query().devices[0]
    target = "{}.{}".format(*found.compute_capability)
    if name == "tensorrt_rtx" and not hasattr(trt.ComputeCapability, "SM" + target.replace(".", "")):
        pytest.skip(f"TensorRT-RTX does not run on {found.name}")
    manifest = write_bundle(trt, tmp_path / "bundle", (target,))
    for start in ("cold", "with the first start's cache"):
        backend = load_backend(name, {"cuda_graph": cuda_graph})
        module = backend.open(tmp_path / "bundle", manifest, lambda name: None).module(MODULE)
        for batch in (1, 8, 32, 8, 70, 1, 1, 1):
            x = np.random.default_rng(batch).standard_normal((batch, WIDTH), dtype=np.float32)
            np.testing.assert_allclose(module({"x": x})["y"], reference(x), rtol=1e-3, atol=1e-3, err_msg=start)
        with pytest.raises(RequestError, match="outside every profile"):
            module({"x": np.zeros((0, WIDTH), np.float32)})
        np.testing.assert_allclose(module({"x": x})["y"], reference(x), rtol=1e-3, atol=1e-3)
    if name == "tensorrt_rtx":
        assert len([*(tmp_path / "bundle.cache").iterdir()]) == 2
