"""A GPU through NVIDIA's `cuda-bindings`: memory, copies, a stream and CUDA graphs, without torch or cupy."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
from cuda.bindings import runtime as cudart

from ..errors import OutOfMemory, ZImageError
from . import nvidia_driver

_SUCCESS = cudart.cudaError_t.cudaSuccess
_NO_MEMORY = cudart.cudaError_t.cudaErrorMemoryAllocation


def _text(status: Any) -> str:
    return f"{cudart.cudaGetErrorString(status)[1].decode()} ({status.name})"


def _check(doing: str, result: tuple[Any, ...]) -> Any:
    """The value of a runtime call. Raises ZImageError if it failed."""
    status, *values = result
    if status != _SUCCESS:
        # Clears the error, which a later call would report again.
        cudart.cudaGetLastError()
        raise ZImageError(f"{doing}: CUDA says: {_text(status)}")
    return values[0] if values else None


def megabytes(size: int) -> str:
    """A size in bytes for messages, such as `123 MiB`, rounded up."""
    return f"{-(-size // 2**20)} MiB"


def runtime_problem(index: int) -> str | None:
    """Why CUDA programs cannot run on GPU `index`; None if they can."""
    driver = nvidia_driver.query()
    if driver.problem is not None:
        return driver.problem
    if not 0 <= index < len(driver.devices):
        return f"no device {index}: there are {len(driver.devices)} GPUs"
    status, _ = cudart.cudaGetDeviceCount()
    if status != _SUCCESS:
        cudart.cudaGetLastError()
        return f"the driver serves CUDA {driver.cuda_version}: {_text(status)}; install a newer driver"
    return None


class Gpu:
    """A GPU and a stream on it. Not thread-safe: the caller holds a lock around every call.

    Attributes:
        name: NVIDIA's name of the GPU.
        compute_capability: e.g. `8.6`.
        driver: the newest CUDA that the driver supports, e.g. `13.0`.
        stream: the stream's handle, for `execute_async_v3`.
    """

    def __init__(self, index: int) -> None:
        """Open a GPU that has no `runtime_problem`."""
        driver = nvidia_driver.query()
        self.index = index
        self.name = driver.devices[index].name
        self.compute_capability = "{}.{}".format(*driver.devices[index].compute_capability)
        self.driver = driver.cuda_version
        self.make_current()
        # Not the legacy stream, which cannot be captured and synchronizes with all other streams of the process.
        self._stream = _check("making a stream", cudart.cudaStreamCreateWithFlags(cudart.cudaStreamNonBlocking))
        self.stream = int(self._stream)
        weakref.finalize(self, cudart.cudaStreamDestroy, self._stream).atexit = False

    def make_current(self) -> None:
        """Make this GPU the calling thread's current device."""
        _check(f"choosing device {self.index}", cudart.cudaSetDevice(self.index))

    def free_memory(self) -> tuple[int, int]:
        """Free and total device memory in bytes."""
        status, free, total = cudart.cudaMemGetInfo()
        return (free, total) if status == _SUCCESS else (0, 0)

    def out_of_memory(self, doing: str, needed: int) -> OutOfMemory:
        """The error to raise, with the memory that was needed and that is free."""
        free, total = self.free_memory()
        return OutOfMemory(
            f"{doing}: needs {megabytes(needed)} of device memory, {megabytes(free)} of {megabytes(total)} are free; "
            "ask for a smaller image or batch, or free memory on the GPU"
        )

    def buffer(self, what: str) -> Buffer:
        """An empty buffer; `what` names it in messages."""
        return Buffer(self, what)

    def upload(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy an array to the buffer's start, in stream order. The array may be changed when this returns."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyHostToDevice
        # Pageable memory is staged before the call returns.
        result = cudart.cudaMemcpyAsync(buffer.address, array.ctypes.data, array.nbytes, kind, self._stream)
        _check(f"copying {buffer.what} to the GPU", result)

    def download(self, buffer: Buffer, array: np.ndarray) -> None:
        """Copy the buffer's start to a contiguous array, in stream order; `synchronize` before reading it."""
        kind = cudart.cudaMemcpyKind.cudaMemcpyDeviceToHost
        result = cudart.cudaMemcpyAsync(array.ctypes.data, buffer.address, array.nbytes, kind, self._stream)
        _check(f"copying {buffer.what} from the GPU", result)

    def synchronize(self, doing: str) -> None:
        """Wait for the stream. Raises ZImageError if work on it failed."""
        _check(doing, cudart.cudaStreamSynchronize(self._stream))

    def capture(self, doing: str, enqueue: Callable[[], None]) -> Graph:
        """Capture the work that `enqueue` puts on the stream as a graph; the work does not run."""
        # Thread-local, so that other threads of the process can call CUDA meanwhile.
        mode = cudart.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        _check(doing, cudart.cudaStreamBeginCapture(self._stream, mode))
        try:
            enqueue()
        except BaseException:
            # A stream left capturing would refuse all further work.
            status, graph = cudart.cudaStreamEndCapture(self._stream)
            if status == _SUCCESS:
                cudart.cudaGraphDestroy(graph)
            cudart.cudaGetLastError()
            raise
        graph = _check(doing, cudart.cudaStreamEndCapture(self._stream))
        try:
            return Graph(self._stream, _check(doing, cudart.cudaGraphInstantiate(graph, 0)))
        finally:
            cudart.cudaGraphDestroy(graph)


class Buffer:
    """Device memory that grows on demand and is freed with the object.

    Attributes:
        address: 256-byte aligned, from cudaMalloc; 0 while empty.
        size: bytes.
    """

    def __init__(self, gpu: Gpu, what: str) -> None:
        self.what = what
        self.address, self.size = 0, 0
        self._gpu = gpu
        self._free: weakref.finalize[..., Buffer] | None = None

    def reserve(self, size: int) -> None:
        """Grow to at least `size` bytes; growing discards the content.

        Raises OutOfMemory, with the buffer empty and everything else as it was.
        """
        if size <= self.size:
            return
        self.release()
        status, address = cudart.cudaMalloc(size)
        if status == _NO_MEMORY:
            cudart.cudaGetLastError()
            raise self._gpu.out_of_memory(self.what, size)
        self.address = int(_check(f"allocating {self.what}", (status, address)))
        self.size = size
        self._free = weakref.finalize(self, cudart.cudaFree, self.address)
        self._free.atexit = False  # at exit the driver may be unloaded already; it frees the process's memory

    def release(self) -> None:
        """Free the memory; cudaFree waits for work that uses it."""
        if self._free is not None:
            self._free()
        self.address, self.size, self._free = 0, 0, None


class Graph:
    """An instantiated CUDA graph; destroyed with the object."""

    def __init__(self, stream: Any, executable: Any) -> None:
        self._stream, self._executable = stream, executable
        weakref.finalize(self, cudart.cudaGraphExecDestroy, executable).atexit = False

    def launch(self, doing: str) -> None:
        """Launch the graph on its stream."""
        _check(doing, cudart.cudaGraphLaunch(self._executable, self._stream))
