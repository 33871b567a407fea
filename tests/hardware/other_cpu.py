"""Draws with zimage-nano on an emulated processor and judges the images on this one; run by `other_cpu.sh`.

python tests/hardware/other_cpu.py draw OUT.npz           latents of a few images, and a small one decoded
python tests/hardware/other_cpu.py judge OUT.npz BESIDE   decodes and judges them; compares them with another run's
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from shared import BUNDLE, SAME_IMAGE
from zimage_rt.benchmarks.fidelity import psnr
from zimage_rt.benchmarks.quality.judge import Judge

import zimage_rt

# As few evaluations as show the subject: emulated, each takes most of a minute.
REQUESTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "plain": (
        {"prompt": "a red apple, white background, noto style", "seed": 3, "num_inference_steps": 4},
        {"subjects": ["1f34e"], "colour": "white", "style": "noto"},
    ),
    "guided": (
        {"prompt": "一只企鹅，蓝色背景，平面风格", "seed": 4, "num_inference_steps": 3, "guidance_scale": 1.5},
        {"subjects": ["1f427"], "colour": "blue", "style": "flat"},
    ),
}
CANVAS = {"layout": "single", "size": "medium", "width": 256, "height": 256}


def latents_of(engine: zimage_rt.Engine, request: Mapping[str, Any]) -> np.ndarray:
    """The latents of a request. It is cancelled after its last step: emulated, decoding 256 x 256 takes minutes."""
    kept: list[np.ndarray] = []

    def look(info: zimage_rt.StepInfo) -> bool:
        if info.step < info.num_steps - 1:
            return True
        kept.append(info.latents.copy())
        return False

    with contextlib.suppress(zimage_rt.Cancelled):
        engine.generate(**request, callback=look)
    return kept[0]


def draw(engine: zimage_rt.Engine, out: Path) -> None:
    """Write what `judge` reads."""
    arrays = {}
    for name, (request, _) in REQUESTS.items():
        start = time.perf_counter()
        arrays[name] = latents_of(engine, request)
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)
    small = np.random.default_rng(0).standard_normal((1, 16, 8, 8)).astype(np.float32)
    arrays["decoded"] = engine.decode(small, "tiny")
    np.savez(out, **arrays)


def judge(engine: zimage_rt.Engine, found: Mapping[str, np.ndarray], beside: Mapping[str, np.ndarray]) -> bool:
    """Print what each image shows and how near it is to the other run's; return whether all is right."""
    eyes, right = Judge(), True
    for name, (_, scene) in REQUESTS.items():
        image, other = (engine.decode(run[name], "tiny")[0] for run in (found, beside))
        answers, near = eyes.score(image, {**CANVAS, **scene}), psnr(image, other)
        right = right and near >= SAME_IMAGE and all(all(answer) for answer in answers.values())
        print(f"{name}: {answers}, {near:.1f} dB beside this processor's")
    # Rounding moves a pixel that lies between two grey levels, and none further.
    difference = int(np.abs(found["decoded"].astype(int) - beside["decoded"]).max())
    print(f"decoded: {difference} levels from this processor's at most")
    return right and difference <= 1


def main(command: str, *paths: str) -> int:
    """Run the command; return its exit status."""
    engine = zimage_rt.Engine.load(BUNDLE, backend_options={"num_threads": 1})
    if command == "draw":
        draw(engine, Path(paths[0]))
        return 0
    found, beside = (np.load(path) for path in paths)
    return 0 if judge(engine, found, beside) else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
