"""Paths of the repository, and what several test files need: folders made once, copies of bundles."""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CUDA_PRECISIONS = ("bf16", "fp16")
CHECKPOINT = ROOT / "checkpoints" / "zimage-nano"
BUNDLE = ROOT / "engines" / "nano"
# In dB: pictures of one and the same arithmetic in fp32, by ONNX Runtime and by torch. They differ by rounding alone,
# which is the processor's: 80 dB and more are measured with AVX2, 0.03 levels of 255. At 60 dB, a quarter of a level, a
# new instruction set may round ten times as much. The same prompt with another seed is at 49 dB, without a LoRA at 17.
SAME_PICTURE = 60


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A folder that the test processes of a run share: the first that wants it makes it, the others wait. Nobody writes
    into it afterwards."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # each process has a folder in the run's own
    folder, done = shared / name, shared / f"{name}.done"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # half made, where making it failed before
            make(folder)
            done.touch()
    return folder


def copy_bundle(bundle: Path, folder: Path, *own: str) -> Path:
    """A bundle whose manifest, and whose modules of some names, can be changed; the rest are symbolic links.

    Hard links would be faults of the bundle's own: onnx refuses weights with a second name, and pytest keeps its
    folders for a while. ONNX Runtime refuses weights that a link leads to from a graph that is none.
    """

    def copy(source: str, target: str) -> None:
        if Path(source).name == "manifest.json" or Path(source).stem in own:
            shutil.copy(source, target)
        else:
            Path(target).symlink_to(Path(source).absolute())

    return shutil.copytree(bundle, folder, copy_function=copy)
