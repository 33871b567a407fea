"""Finds NVIDIA's libraries in their wheels or by the dynamic loader."""

from __future__ import annotations

import ctypes
import importlib.util
import re
import sys
from pathlib import Path

# Library → its file name, with the major versions of CUDA 13.
SONAMES = {"cublasLt": "libcublasLt.so.13", "cudnn": "libcudnn.so.9"}

# Library → its function that returns the version as one number: 92801 is 9.28.1.
VERSION_FUNCTIONS = {"cublasLt": "cublasLtGetVersion", "cudnn": "cudnnGetVersion"}


def find_library(name: str) -> str:
    """The path of a library in a wheel of this Python, or its file name for the dynamic loader.

    Wheels are searched first: `pip install 'zimage-rt[cuda]'` installs them, and they are tested.
    """
    soname = SONAMES[name]
    nvidia = importlib.util.find_spec("nvidia")
    places = list(nvidia.submodule_search_locations or []) if nvidia is not None else []
    places += [str(Path(entry) / "nvidia") for entry in sys.path]
    for place in places:
        for file in sorted(Path(place).glob(f"*/lib/{soname}")):
            return str(file)
    return soname


def library_version(name: str) -> str:
    """The version that a library reports. Raises OSError if it cannot be loaded."""
    get = getattr(ctypes.CDLL(find_library(name)), VERSION_FUNCTIONS[name])
    get.restype = ctypes.c_size_t
    number = get()
    return f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def has_code(architectures: str, compute_capability: tuple[int, int]) -> bool:
    """Whether a build for CMake's architectures, e.g. `80-real,90a-real,120`, runs on a GPU.

    Machine code runs on later GPUs of the same major version, and that of `90a` on no other GPU. Without `-real` there
    is PTX, which the driver compiles for any later GPU.
    """
    for word in architectures.split(","):
        match = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", word)
        if match is None:  # CMake's `native` and `all`, which cannot be decided here
            return True
        built = int(match[1]), int(match[2])
        if match[3] == "a":
            runs = compute_capability == built
        elif match[3] == "f" or match[4] == "-real":
            runs = compute_capability[0] == built[0] and compute_capability >= built
        else:
            runs = compute_capability >= built
        if runs:
            return True
    return False
