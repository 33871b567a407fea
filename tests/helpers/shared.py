"""Shared by test files: paths of the repository, folders that are made once, copies of bundles."""

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
# Least PSNR in dB of images from the same fp32 arithmetic in ONNX Runtime and torch, which differ by rounding. AVX2
# gives 80 dB and more, 0.03 levels of 255. At 60 dB, a quarter of a level, another instruction set may round ten times
# as much. The same prompt with another seed is at 49 dB, without a LoRA at 17.
SAME_IMAGE = 60


def made_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """A read-only folder that the test processes of a run share; the first process makes it, the others wait."""
    shared = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # the run's folder contains one per process
    folder, done = shared / name, shared / f"{name}.done"
    with (shared / f"{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(folder, ignore_errors=True)  # incomplete, if an earlier attempt failed
            make(folder)
            done.touch()
    return folder


def copy_bundle(bundle: Path, folder: Path, *own: str) -> Path:
    """A copy of a bundle with its own manifest and its own files of the modules `own`; the rest are symbolic links.

    Hard links would break the original: onnx refuses weights with a second name, and pytest keeps its folders for a
    while. ONNX Runtime refuses linked weights of a graph that is not a link.
    """

    def copy(source: str, target: str) -> None:
        if Path(source).name == "manifest.json" or Path(source).stem in own:
            shutil.copy(source, target)
        else:
            Path(target).symlink_to(Path(source).absolute())

    return shutil.copytree(bundle, folder, copy_function=copy)
