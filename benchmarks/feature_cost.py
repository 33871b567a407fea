"""Measures each feature of a request against plain generation, as a ratio of warm wall-clock times.

    python -m zimage_rt.benchmarks.feature_cost engines/nano
    python -m zimage_rt.benchmarks.feature_cost /tmp/random-bf16 --backend cuda --size 1024

Every feature is timed right after a plain request with the same number of evaluations. Image to image and inpainting
run at strength 1, so that no step is skipped.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import zimage_rt

PROMPT = "a small red house beside a quiet lake under tall pine trees"


def features(size: int, controlled: bool) -> dict[str, dict[str, Any]]:
    """Request fields by name of the feature; each runs the whole schedule.

    Args:
        size: side of the images in pixels.
        controlled: whether the bundle has a ControlNet.
    """
    image = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    mask = np.zeros((size, size), np.uint8)
    mask[:, : size // 2] = 255
    found: dict[str, dict[str, Any]] = {
        "plain": {},
        "guidance": {"guidance_scale": 4.0, "negative_prompt": "a dog"},
        "guidance, truncated half way": {"guidance_scale": 4.0, "negative_prompt": "a dog", "cfg_truncation": 0.5},
        "normalised guidance": {"guidance_scale": 4.0, "negative_prompt": "a dog", "cfg_normalization": 1.0},
        "image, strength 1": {"image": image, "strength": 1.0},
        "mask, strength 1": {"image": image, "strength": 1.0, "mask": mask},
        "dpmpp_2m, karras": {"sampler": "dpmpp_2m", "schedule": "karras"},
        "decoding in tiles": {"vae_tile": max(64, size // 2)},
        "a preview every step": {"callback": lambda info: info.preview() is not None},
    }
    if controlled:
        found["a control image"] = {"control_image": image}
    return found


@dataclass(frozen=True)
class Cost:
    """Medians of a feature's times over the rounds.

    Attributes:
        seconds: wall-clock seconds of a request.
        plain_seconds: the same of the plain request before it.
        ratio: of the two, per pair.
        stages: seconds of the engine's own timings by name, and `rest`, the time outside of them.
    """

    seconds: float
    plain_seconds: float
    ratio: float
    stages: dict[str, float]


def stages_of(result: zimage_rt.GenerateResult, seconds: float) -> dict[str, float]:
    """The engine's timings without their total, and `rest`, the time outside of them."""
    stages = {name: value for name, value in result.timings.items() if name != "total"}
    return {**stages, "rest": seconds - sum(stages.values())}


def measure(engine: zimage_rt.Engine, size: int, evaluations: int, rounds: int) -> dict[str, Cost]:
    """Measures each feature. The first two rounds, which capture graphs and tune, are dropped."""
    common: dict[str, Any] = {
        "height": size,
        "width": size,
        "num_inference_steps": evaluations,
        "seed": 1,
        "vae": "tiny",
    }
    runs = {
        name: partial(engine.generate, PROMPT, **common, **fields)
        for name, fields in features(size, "controlnet" in engine.manifest.modules).items()
    }

    def timed(run: Callable[[], zimage_rt.GenerateResult]) -> tuple[float, dict[str, float]]:
        start = time.perf_counter()
        result = run()
        seconds = time.perf_counter() - start
        return seconds, stages_of(result, seconds)

    pairs: dict[str, list[tuple[float, float, dict[str, float]]]] = {name: [] for name in runs}
    for number in range(rounds + 2):
        for name, run in runs.items():
            # A GPU's clock depends on its recent load, so each run is compared with the one just before it.
            plain, _ = timed(runs["plain"])
            seconds, stages = timed(run)
            if number >= 2:
                pairs[name].append((plain, seconds, stages))
    median = statistics.median
    return {
        name: Cost(
            seconds=median(seconds for _, seconds, _ in found),
            plain_seconds=median(plain for plain, _, _ in found),
            ratio=median(seconds / plain for plain, seconds, _ in found),
            stages={stage: median(stages[stage] for _, _, stages in found) for stage in found[0][2]},
        )
        for name, found in pairs.items()
    }


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle with the tiny VAE.")],
    backend: Annotated[str, typer.Option(help="Backend: onnxruntime or cuda.")] = "onnxruntime",
    size: Annotated[int, typer.Option(help="Width and height in pixels.")] = 256,
    evaluations: Annotated[int, typer.Option(help="Function evaluations per request.")] = 8,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are printed.")] = 5,
    output: Annotated[Path | None, typer.Option("--json", help="File to write the figures to as JSON.")] = None,
) -> None:
    """Print each feature's seconds and its ratio to plain generation."""
    engine = zimage_rt.Engine.load(bundle, backend=backend, verify=False)
    costs = measure(engine, size, evaluations, rounds)
    typer.echo(f"{bundle}, {backend}, {size}x{size}, {evaluations} evaluations, {rounds} rounds")
    for name, cost in costs.items():
        stages = ", ".join(f"{stage} {1e3 * value:.1f}" for stage, value in cost.stages.items())
        typer.echo(f"  {name}: {cost.seconds:.4f} s, {cost.ratio:.3f} of plain ({stages} ms)")
    if output is not None:
        found = {name: asdict(cost) for name, cost in costs.items()}
        figures = {"backend": backend, "size": size, "evaluations": evaluations, "rounds": rounds, "features": found}
        output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
