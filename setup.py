"""Builds the C++ modules with CMake; everything static stands in pyproject.toml."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()


class CMakeBuild(build_ext):
    """Configure, build and install one CMake component per extension."""

    def build_extension(self, ext: Extension) -> None:
        """Build one extension into the folder where setuptools expects it."""
        output = Path(self.get_ext_fullpath(ext.name)).resolve().parent
        build = Path(self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            "cmake",
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DZIMAGE_RT_OUTPUT={output}",
            # AUTO, ON or OFF; passed at every configure, so that a cached choice never sticks.
            f"-DZIMAGE_RT_CUDA={os.environ.get('ZIMAGE_RT_CUDA', 'AUTO')}",
        ]
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(
    ext_modules=[Extension("zimage_rt._core", sources=[])],
    cmdclass={"build_ext": CMakeBuild},
)
