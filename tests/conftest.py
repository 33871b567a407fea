"""What several tests share: the nano bundle that `make bundle` exports, and a small random one exported here."""

from __future__ import annotations

import os

# Test processes side by side get cores of their own, before any library counts them: threads of two processes that spin
# against one another on the same cores take twice the time.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    _worker, _workers = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, _cores[_worker % len(_cores) :: _workers])

import fcntl
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

import zimage_rt

ROOT = Path(__file__).parent.parent
CUDA_PRECISIONS = ("bf16", "fp16")
CHECKPOINT = ROOT / "checkpoints" / "zimage-nano"
BUNDLE = ROOT / "engines" / "nano"
# In dB: pictures of one and the same arithmetic in fp32, by ONNX Runtime and by torch. They differ by rounding alone,
# which is the processor's: 80 dB and more are measured with AVX2, 0.03 levels of 255. At 60 dB, a quarter of a level, a
# new instruction set may round ten times as much. The same prompt with another seed is at 49 dB, without a LoRA at 17.
SAME_PICTURE = 60
# The files that take longest, first: the processes then end together, and what several files need is made by the first.
LONGEST = ("test_tensorrt_build", "test_export", "test_controlnet", "test_cookbook", "test_lora", "test_wheel")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))  # stable: the others stay in their order


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


@pytest.fixture(scope="session")
def bundle() -> Path:
    """The exported fp32 bundle of zimage-nano."""
    assert (BUNDLE / "manifest.json").is_file(), "no bundle to test: run `make bundle` first"
    return BUNDLE


@pytest.fixture(scope="session")
def engine(bundle: Path) -> zimage_rt.Engine:
    return zimage_rt.Engine.load(bundle)


@pytest.fixture(scope="session")
def small_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of random weights, much smaller than nano."""
    from export_checkpoints import make_checkpoint  # torch loads here, for the tests of the exporter alone

    return made_once(tmp_path_factory, "small-checkpoint", make_checkpoint)


@pytest.fixture(scope="session")
def small_bundle(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 bundle of `small_checkpoint`, with parity measured."""
    from export_checkpoints import recipe
    from zimage_rt.export.bundle import export

    return made_once(tmp_path_factory, "small-bundle", lambda out: export(recipe(small_checkpoint, out)))


@pytest.fixture(scope="session")
def cuda_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """zimage-nano's bundles by precision: fp32 for ONNX Runtime, the others' weights for the `cuda` backend."""
    from zimage_rt.export.bundle import export
    from zimage_rt.export.recipe import read_recipe

    recipes, folder = ROOT / "engines", tmp_path_factory.mktemp("bundles")
    paths = {"fp32": BUNDLE}
    for precision in CUDA_PRECISIONS:
        paths[precision] = folder / precision
        recipe = read_recipe(recipes / f"nano-{precision}.toml")
        export(replace(recipe, out=paths[precision], vae=("tiny",), backend="cuda"))
    if not (BUNDLE / "manifest.json").is_file():
        export(replace(read_recipe(recipes / "nano.toml"), parity=False))
    return paths


@pytest.fixture(scope="session")
def reference(cuda_bundles: dict[str, Path]) -> zimage_rt.Engine:
    """ONNX Runtime in fp32: what the `cuda` backend is held to."""
    return zimage_rt.Engine.load(cuda_bundles["fp32"])


@pytest.fixture(scope="session", params=CUDA_PRECISIONS)
def cuda(request: pytest.FixtureRequest, cuda_bundles: dict[str, Path]) -> zimage_rt.Engine:
    return zimage_rt.Engine.load(cuda_bundles[request.param], backend="cuda")


@pytest.fixture(scope="session")
def bf16(cuda_bundles: dict[str, Path]) -> zimage_rt.Engine:
    return zimage_rt.Engine.load(cuda_bundles["bf16"], backend="cuda")
