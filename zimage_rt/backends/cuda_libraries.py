"""Where NVIDIA's libraries are: in their wheels, or wherever the loader finds them."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

# Library → the pip packages that bring it. The versions are those of CUDA 13.
SONAMES = {"cublasLt": "libcublasLt.so.13", "cudnn": "libcudnn.so.9"}


def find_library(name: str) -> str:
    """The library's file in a wheel of this Python, or its bare name for the loader to find.

    Wheels are searched first: they are what `pip install 'zimage-rt[cuda]'` brings and tests.
    """
    soname = SONAMES[name]
    nvidia = importlib.util.find_spec("nvidia")
    places = list(nvidia.submodule_search_locations or []) if nvidia is not None else []
    places += [str(Path(entry) / "nvidia") for entry in sys.path]
    for place in places:
        for file in sorted(Path(place).glob(f"*/lib/{soname}")):
            return str(file)
    return soname
