"""The wheel, installed into a folder of its own and used from another: what users get, not the working tree."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from shared import ROOT

USE = """
import sys
from pathlib import Path
import zimage_rt, zimage_rt.export.cli, zimage_rt.benchmarks.quality.judge as judge
if sys.argv[3] == "cuda":
    import zimage_rt._cuda as cuda
    assert Path(cuda.__file__).is_relative_to(sys.argv[1]) and cuda.device_count() >= 0
assert not list(Path(zimage_rt.__file__).parent.glob("_cuda_kernels*"))  # for tests in a working tree
for module in (zimage_rt, zimage_rt._core, zimage_rt.export.cli, judge):
    assert Path(module.__file__).is_relative_to(sys.argv[1]), module.__file__
judge.Judge()
print(zimage_rt.Engine.load(sys.argv[2]).generate("a panda", num_inference_steps=2).images.shape)
"""


# What `make cuda` compiled; its objects are linked again here, not compiled again.
CUDA_BUILD = ROOT / "build" / "cuda"
HAS_CUDA = CUDA_BUILD.is_dir() and importlib.util.find_spec("zimage_rt._cuda") is not None


def test_the_wheel_holds_all_that_is_needed(bundle: Path, tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    wheels, site = tmp_path / "wheels", tmp_path / "site"
    build = [*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", wheels, ROOT]
    choice = {"ZIMAGE_RT_CUDA": "ON", "ZIMAGE_RT_BUILD": str(CUDA_BUILD)} if HAS_CUDA else {"ZIMAGE_RT_CUDA": "OFF"}
    run = subprocess.run(build, capture_output=True, text=True, env=os.environ | choice)
    assert run.returncode == 0, run.stderr
    (wheel,) = wheels.glob("zimage_rt-*.whl")
    subprocess.run([*pip, "install", "--no-deps", "--no-index", "--target", site, wheel], check=True)
    environment = os.environ | {"PYTHONPATH": str(site)}
    command = [sys.executable, "-c", USE, site, bundle.resolve(), "cuda" if HAS_CUDA else "cpu"]
    run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
    assert run.returncode == 0, run.stderr
    assert run.stdout.strip() == "(1, 256, 256, 3)"
