"""What several tests share: the nano bundle that `make bundle` exports from the committed checkpoint."""

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
