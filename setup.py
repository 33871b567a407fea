"""Builds the C++ modules with CMake; static metadata is in pyproject.toml.

Environment variables, read only at build time: `ZIMAGE_RT_CUDA` is AUTO, ON or OFF; `CMAKE_ARGS` goes to CMake;
`ZIMAGE_RT_BUILD` is a folder for incremental builds; `ZIMAGE_RT_PYTHONS` and `ZIMAGE_RT_MANYLINUX_LINKER` are set by
cmake/make_wheel.py.
"""

from __future__ import annotations

import importlib
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).parent.resolve()
# `SOABI=include folder` per Python of a wheel, separated by semicolons; empty for only the running Python.
PYTHONS = os.environ.get("ZIMAGE_RT_PYTHONS", "")


def with_build_tools() -> dict[str, str]:
    """The environment with the folders of the cmake and ninja wheels first in PATH.

    Without build isolation, scripts of a virtual environment are on PATH only if it is activated.
    """
    folders = []
    for module, attribute in (("cmake", "CMAKE_BIN_DIR"), ("ninja", "BIN_DIR")):
        try:
            folders.append(getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError):
            continue  # use the system's
    return os.environ | {"PATH": os.pathsep.join([*folders, os.environ.get("PATH", os.defpath)])}


class CMakeBuild(build_ext):
    """Builds all extensions in one CMake build."""

    def build_extensions(self) -> None:
        """Configure and build; extensions that CMake skipped (_cuda, or those of tests) leave the list."""
        package = Path(self.get_ext_fullpath("zimage_rt._core")).resolve().parent
        # The build starts afresh unless ZIMAGE_RT_BUILD is set, so that no setting of another environment remains.
        kept = os.environ.get("ZIMAGE_RT_BUILD")
        build = Path(kept or self.build_temp).resolve()
        build.mkdir(parents=True, exist_ok=True)
        configure = [
            *([] if kept else ["--fresh"]),
            "-S",
            str(ROOT),
            "-B",
            str(build),
            "-G",
            "Ninja",
            "-DCMAKE_BUILD_TYPE=Release",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            f"-DPython_EXECUTABLE={sys.executable}",
            f"-DZIMAGE_RT_OUTPUT={package}",
            # Passed at every configure, so that the cached value is replaced.
            f"-DZIMAGE_RT_CUDA={os.environ.get('ZIMAGE_RT_CUDA', 'AUTO')}",
            f"-DZIMAGE_RT_TEST_MODULES={'ON' if self.editable_mode else 'OFF'}",
            f"-DZIMAGE_RT_PYTHONS={PYTHONS}",
            f"-DZIMAGE_RT_MANYLINUX_LINKER={os.environ.get('ZIMAGE_RT_MANYLINUX_LINKER', '')}",
            *shlex.split(os.environ.get("CMAKE_ARGS", "")),
        ]
        for stale in package.glob("_cuda*.so"):
            stale.unlink()
        tools = with_build_tools()
        cmake = shutil.which("cmake", path=tools["PATH"]) or "cmake"
        subprocess.run([cmake, *configure], check=True, env=tools)
        subprocess.run([cmake, "--build", str(build)], check=True, env=tools)
        self.extensions = [ext for ext in self.extensions if Path(self.get_ext_fullpath(ext.name)).exists()]


class Wheel(bdist_wheel):
    """A wheel whose tag names every Python that it has modules for."""

    def get_tag(self) -> tuple[str, str, str]:
        """The tag of one wheel for several Pythons: cp311.cp312-cp311.cp312-platform."""
        python, abi, platform = super().get_tag()
        if PYTHONS:
            # "cpython-311-x86_64-linux-gnu=/usr/include/python3.11" → "cp311"
            tags = ["cp" + entry.split("-")[1] for entry in PYTHONS.split(";")]
            python = abi = ".".join(tags)
        return python, abi, platform


# Top-level folders that are installed inside the package (package-dir in pyproject.toml).
INSIDE = ("export", "benchmarks")

setup(
    packages=[
        *find_packages(str(ROOT), include=["zimage_rt", "zimage_rt.*"]),
        *(f"zimage_rt.{name}" for top in INSIDE for name in find_packages(str(ROOT), include=[top, f"{top}.*"])),
    ],
    ext_modules=[Extension(f"zimage_rt.{name}", sources=[]) for name in ("_core", "_cuda", "_cuda_kernels")],
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": Wheel},
)
