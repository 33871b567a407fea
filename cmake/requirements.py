"""Prints extras of pyproject.toml as arguments of pip, for builds that need them before the package is installed.

python cmake/requirements.py build cuda-headers nvcc
"""

from __future__ import annotations

import os
import shutil
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parent.parent / "pyproject.toml"


def requirements(extras: Sequence[str]) -> list[str]:
    """Requirements of some extras; `nvcc` is skipped on a machine that has one."""
    declared = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    has_nvcc = shutil.which("nvcc") is not None or "CUDACXX" in os.environ
    return [wheel for extra in extras if extra != "nvcc" or not has_nvcc for wheel in declared[extra]]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
