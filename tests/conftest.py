"""Shared fixtures: the nano bundle that `make bundle` exports, and a small random one exported here."""

from __future__ import annotations

import os

# Parallel test processes get separate cores, before any library counts them: spinning threads of two processes on the
# same cores take twice the time.
if "PYTEST_XDIST_WORKER" in os.environ and hasattr(os, "sched_setaffinity"):
    _worker, _workers = int(os.environ["PYTEST_XDIST_WORKER"][2:]), int(os.environ["PYTEST_XDIST_WORKER_COUNT"])
    _cores = sorted(os.sched_getaffinity(0))
    os.sched_setaffinity(0, _cores[_worker % len(_cores) :: _workers])

from dataclasses import replace
from pathlib import Path

import pytest
from shared import BUNDLE, CUDA_PRECISIONS, ROOT, made_once

import zimage_rt

# The slowest files run first, so that the processes end together and shared folders are made early.
LONGEST = ("test_tensorrt_build", "test_export", "test_controlnet", "test_cookbook", "test_lora", "test_wheel")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(LONGEST)))  # stable: the others keep their order


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
    from export_checkpoints import make_checkpoint  # imports torch, only for tests of the exporter

    return made_once(tmp_path_factory, "small-checkpoint", make_checkpoint)


@pytest.fixture(scope="session")
def small_bundle(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 bundle of `small_checkpoint`, with parity measured."""
    from export_checkpoints import recipe
    from zimage_rt.export.bundle import export

    return made_once(tmp_path_factory, "small-bundle", lambda out: export(recipe(small_checkpoint, out)))


@pytest.fixture(scope="session")
def single_file(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`small_checkpoint` as a single file in ComfyUI's format."""
    from single_files import write_single_file

    path = tmp_path_factory.mktemp("single") / "z_image.safetensors"
    write_single_file(small_checkpoint, path)
    return path


@pytest.fixture(scope="session")
def cuda_bundles(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """zimage-nano's bundles by precision: fp32 for ONNX Runtime, the others for the `cuda` backend."""
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
    """ONNX Runtime in fp32, the reference of the `cuda` backend."""
    return zimage_rt.Engine.load(cuda_bundles["fp32"])


@pytest.fixture(scope="session", params=CUDA_PRECISIONS)
def cuda(request: pytest.FixtureRequest, cuda_bundles: dict[str, Path]) -> zimage_rt.Engine:
    return zimage_rt.Engine.load(cuda_bundles[request.param], backend="cuda")


@pytest.fixture(scope="session")
def bf16(cuda_bundles: dict[str, Path]) -> zimage_rt.Engine:
    return zimage_rt.Engine.load(cuda_bundles["bf16"], backend="cuda")
