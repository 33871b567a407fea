"""Queries of NVIDIA's driver through ctypes: no CUDA toolkit and no other library is needed."""

from __future__ import annotations

import ctypes
import dataclasses
from collections.abc import Sequence

from .base import Device

LIBRARY = "libcuda.so.1"

# Names and numbers of cuda.h.
CUDA_ERROR_NO_DEVICE = 100
COMPUTE_CAPABILITY_MAJOR, COMPUTE_CAPABILITY_MINOR = 75, 76


@dataclasses.dataclass(frozen=True)
class Driver:
    """The driver's state.

    Attributes:
        problem: why no GPU can be used; None if one can.
        cuda_version: the newest CUDA that the driver supports, e.g. `13.0`; empty without a driver.
        devices: the GPUs by index.
    """

    problem: str | None = None
    cuda_version: str = ""
    devices: Sequence[Device] = ()


def query() -> Driver:
    """Query the driver; it creates no context, so that no device memory is allocated."""
    try:
        cuda = ctypes.CDLL(LIBRARY)
    except OSError:
        return Driver(f"no NVIDIA driver: {LIBRARY} was not found")
    version = ctypes.c_int()
    cuda.cuDriverGetVersion(ctypes.byref(version))
    # cuda.h: 1000 * major + 10 * minor
    text = f"{version.value // 1000}.{version.value % 1000 // 10}"
    status = cuda.cuInit(0)
    if status == CUDA_ERROR_NO_DEVICE:
        return Driver("the NVIDIA driver is here and sees no GPU; is one hidden by CUDA_VISIBLE_DEVICES?", text)
    if status:
        return Driver(f"the NVIDIA driver does not start: {_error(cuda, status)}; see nvidia-smi", text)
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    devices = [_device(cuda, index) for index in range(count.value)]
    return Driver(None if devices else "the NVIDIA driver is here and sees no GPU", text, devices)


def _device(cuda: ctypes.CDLL, index: int) -> Device:
    handle, major, minor = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory = ctypes.create_string_buffer(256), ctypes.c_size_t()
    cuda.cuDeviceGet(ctypes.byref(handle), index)
    cuda.cuDeviceGetName(name, len(name), handle)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), COMPUTE_CAPABILITY_MAJOR, handle)
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), COMPUTE_CAPABILITY_MINOR, handle)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), handle)
    return Device(name.value.decode(), (major.value, minor.value), memory.value)


def _error(cuda: ctypes.CDLL, status: int) -> str:
    text = ctypes.c_char_p()
    cuda.cuGetErrorString(status, ctypes.byref(text))
    return f"{(text.value or b'unknown error').decode()} ({status})"
