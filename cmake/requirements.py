"""Prints extras of pyproject.toml as pip takes them: what a build needs before the package itself can be installed.

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
    """The requirements of some extras. `nvcc` counts only on a machine that has no nvcc of its own."""
    declared = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    has_nvcc = shutil.which("nvcc") is not None or "CUDACXX" in os.environ
    return [wheel for extra in extras if extra != "nvcc" or not has_nvcc for wheel in declared[extra]]


if __name__ == "__main__":
    print("\n".join(requirements(sys.argv[1:])))
