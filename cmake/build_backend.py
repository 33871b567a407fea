"""setuptools' build backend, plus what compiling `_cuda` needs: NVIDIA's headers and compiler, from their wheels.

They are asked for only with ZIMAGE_RT_CUDA=ON, so that a plain `pip install .` downloads no CUDA.
"""

from __future__ import annotations

import os
from typing import Any

from requirements import requirements
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  # the hooks that stay as they are


def _cuda_requirements() -> list[str]:
    return requirements(["cuda-headers", "nvcc"]) if os.environ.get("ZIMAGE_RT_CUDA") == "ON" else []


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """See PEP 517."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _cuda_requirements()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """See PEP 660."""
    return build_meta.get_requires_for_build_editable(config_settings) + _cuda_requirements()
