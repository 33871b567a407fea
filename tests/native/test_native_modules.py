"""What the native modules show to the process that loads them."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

MODULES = [
    name for name in ("_core", "_cuda", "_cuda_kernels") if importlib.util.find_spec(f"zimage_rt.{name}") is not None
]


def path_of(module: str) -> Path:
    spec = importlib.util.find_spec(f"zimage_rt.{module}")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_exports_its_init_function_alone(module: str) -> None:
    """An exported symbol of the C++ library can be replaced by the process's version, and then the module crashes."""
    run = subprocess.run(["nm", "-D", "--defined-only", path_of(module)], capture_output=True, text=True, check=True)
    assert [line.split()[-1] for line in run.stdout.splitlines()] == [f"PyInit_{module}"]


@pytest.mark.parametrize("module", MODULES)
def test_a_module_needs_no_library_of_nvidia_to_load(module: str) -> None:
    """The CUDA runtime is inside, and cuBLASLt and cuDNN are opened when a pipeline is made."""
    run = subprocess.run(["readelf", "-d", path_of(module)], capture_output=True, text=True, check=True)
    needed = [line.split("[")[1].rstrip("]") for line in run.stdout.splitlines() if "(NEEDED)" in line]
    allowed = ("libc.", "libm.", "libstdc++.", "libgcc_s.", "libpthread.", "libdl.", "librt.", "ld-linux")
    assert all(name.startswith(allowed) for name in needed), needed


def test_the_modules_load_into_one_process() -> None:
    """Each of the CUDA modules has a CUDA runtime of its own."""
    subprocess.run([sys.executable, "-c", "\n".join(f"import zimage_rt.{name}" for name in MODULES)], check=True)


def test_gpu_tests_skip_where_the_cuda_backend_is_not_built() -> None:
    """They did not, in a clone where nobody had run `make cuda`."""
    files = sorted((Path(__file__).parents[1] / "backends").glob("test_cuda_*.py"))
    assert len(files) > 5
    without = "import sys, pytest; sys.modules['zimage_rt._cuda'] = None; sys.exit(pytest.main())"
    options = ("--collect-only", "-q", "-rs", "-p", "no:cacheprovider")
    run = subprocess.run([sys.executable, "-c", without, *options, *files], capture_output=True, text=True)
    assert run.returncode == pytest.ExitCode.NO_TESTS_COLLECTED, run.stdout
    assert f"SKIPPED [{len(files)}]" in run.stdout, run.stdout
