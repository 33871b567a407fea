"""The nano bundle against diffusers.ZImagePipeline: same checkpoint, prompts, latents and evaluations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from shared import CHECKPOINT
from zimage_rt.benchmarks.fidelity import SETTINGS, compare
from zimage_rt.benchmarks.quality.prompts import read_prompts
from zimage_rt.benchmarks.systems.base import System, load_system


@pytest.fixture(scope="module")
def reference() -> System:
    return load_system("diffusers", checkpoint=str(CHECKPOINT))


@pytest.mark.parametrize("setting", SETTINGS, ids=str)
def test_fp32_equals_diffusers(bundle: Path, reference: System, setting: dict[str, Any]) -> None:
    scores = compare(load_system("zimage_rt", bundle=str(bundle)), reference, read_prompts(5), setting)
    # As `shared.SAME_IMAGE` says, of the mean of five.
    assert np.mean(scores) >= 50, scores
