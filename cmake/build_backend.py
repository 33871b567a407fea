"""setuptools' build backend, which with ZIMAGE_RT_CUDA=ON also requires the wheels of NVIDIA's headers and compiler.

A plain `pip install .` downloads no CUDA.
"""

from __future__ import annotations

import os
from typing import Any

from requirements import requirements
from setuptools import build_meta
from setuptools.build_meta import *  # noqa: F403  # the other hooks, unchanged


def _cuda_requirements() -> list[str]:
    return requirements(["cuda-headers", "nvcc"]) if os.environ.get("ZIMAGE_RT_CUDA") == "ON" else []


def get_requires_for_build_wheel(config_settings: dict[str, Any] | None = None) -> list[str]:
    """See PEP 517."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _cuda_requirements()


def get_requires_for_build_editable(config_settings: dict[str, Any] | None = None) -> list[str]:
    """See PEP 660."""
    return build_meta.get_requires_for_build_editable(config_settings) + _cuda_requirements()
