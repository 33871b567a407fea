"""What several tests share: the nano bundle that `make bundle` exports, and a small random one exported here."""

from __future__ import annotations

from pathlib import Path

import pytest

import zimage_rt

ROOT = Path(__file__).parent.parent
CHECKPOINT = ROOT / "checkpoints" / "zimage-nano"
BUNDLE = ROOT / "engines" / "nano"


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

    return make_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="session")
def small_bundle(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The fp32 bundle of `small_checkpoint`, with parity measured."""
    from export_checkpoints import recipe
    from zimage_rt.export.bundle import export

    out = tmp_path_factory.mktemp("bundles") / "fp32"
    export(recipe(small_checkpoint, out))
    return out
