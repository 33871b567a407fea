"""What following a request costs: progress, polling for a cancel, latents and previews, beside the same request alone.

    python -m zimage_rt.benchmarks.progress_cost engines/nano --size 256
    python -m zimage_rt.benchmarks.progress_cost /tmp/random-bf16 --backend cuda --json results/progress.json

Each way is timed right after a plain request of the same size, so that clocks and heat are the same for both; medians
over the rounds, ratios of each pair. `python -m zimage_rt.benchmarks.random_bundle` writes a bundle of the full size.
"""

from __future__ import annotations

import gc
import json
import statistics
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

import zimage_rt
from zimage_rt.request.types import Callback, StepInfo

PROMPT = "a small red house beside a quiet lake under tall pine trees"
SIZES = (256, 512, 1024)


class Bar:
    """What a command or a server does with progress: it keeps the last numbers."""

    def __init__(self) -> None:
        self.step, self.total = 0, 0

    def __call__(self, info: StepInfo) -> None:
        """A callback."""
        self.step, self.total = info.step + 1, info.num_steps


def callbacks() -> dict[str, Callback | None]:
    """Ways to follow a request, by name."""
    stop = threading.Event()
    return {
        "plain": None,
        "progress": Bar(),
        "cancel poll": lambda info: not stop.is_set(),
        "latents every step": lambda info: info.latents is not None,
        "a preview every step": lambda info: info.preview() is not None,
    }


@dataclass(frozen=True)
class Cost:
    """What a way took: medians over the rounds.

    Attributes:
        seconds: wall-clock seconds of one request.
        plain_seconds: of the plain requests just before.
        ratio: of each pair.
        denoise: seconds of the sampler loop, by the engine's own timing.
        first_step: seconds from the request to its first callback; None without one.
    """

    seconds: float
    plain_seconds: float
    ratio: float
    denoise: float
    first_step: float | None


@dataclass(frozen=True)
class _Run:
    seconds: float
    denoise: float
    first_step: float | None


def _draw(engine: zimage_rt.Engine, callback: Callback | None, fields: dict[str, Any]) -> _Run:
    first: list[float] = []

    def timed(info: StepInfo) -> bool | None:
        if not first:
            first.append(time.perf_counter())
        return None if callback is None else callback(info)

    start = time.perf_counter()
    result = engine.generate(PROMPT, callback=None if callback is None else timed, **fields)
    seconds = time.perf_counter() - start
    return _Run(seconds, result.timings["denoise"], first[0] - start if first else None)


def measure(engine: zimage_rt.Engine, size: int, evaluations: int, rounds: int) -> dict[str, Cost]:
    """Each way's cost at a size. Two rounds before the first, which capture and tune, are thrown away."""
    fields: dict[str, Any] = {
        "height": size,
        "width": size,
        "num_inference_steps": evaluations,
        "seed": 1,
        "vae": "tiny",
    }
    ways = callbacks()
    pairs: dict[str, list[tuple[_Run, _Run]]] = {name: [] for name in ways}
    gc.disable()  # a collection in the middle of one request is not what it costs
    try:
        for number in range(rounds + 2):
            for name, callback in ways.items():
                pair = (_draw(engine, None, fields), _draw(engine, callback, fields))
                if number >= 2:
                    pairs[name].append(pair)
            gc.collect()
    finally:
        gc.enable()
    median = statistics.median
    return {
        name: Cost(
            seconds=median(run.seconds for _, run in found),
            plain_seconds=median(plain.seconds for plain, _ in found),
            ratio=median(run.seconds / plain.seconds for plain, run in found),
            denoise=median(run.denoise for _, run in found),
            first_step=median(run.first_step or 0.0 for _, run in found) if ways[name] is not None else None,
        )
        for name, found in pairs.items()
    }


def main(
    bundle: Annotated[Path, typer.Argument(help="A bundle with the tiny VAE.")],
    backend: Annotated[str, typer.Option(help="onnxruntime or cuda.")] = "onnxruntime",
    size: Annotated[list[int] | None, typer.Option(help="Pixels a side; may be repeated.")] = None,
    evaluations: Annotated[int, typer.Option(help="Function evaluations.")] = 8,
    rounds: Annotated[int, typer.Option(help="Medians are of so many.")] = 15,
    output: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:
    """Print the seconds of each way to follow a request, and their ratio to a plain one."""
    engine = zimage_rt.Engine.load(bundle, backend=backend, verify=False)
    sizes = size or list(SIZES)
    found = {side: measure(engine, side, evaluations, rounds) for side in sizes}
    for side, costs in found.items():
        typer.echo(f"{bundle}, {backend}, {side}x{side}, {evaluations} evaluations, {rounds} rounds")
        for name, cost in costs.items():
            first = "" if cost.first_step is None else f", first callback after {1e3 * cost.first_step:.1f}"
            typer.echo(
                f"  {name}: {1e3 * cost.seconds:.2f} ms, {cost.ratio:.4f} of plain "
                f"(denoise {1e3 * cost.denoise:.2f}{first} ms)"
            )
    if output is not None:
        figures = {
            "backend": backend,
            "evaluations": evaluations,
            "rounds": rounds,
            "sizes": {str(side): {name: asdict(cost) for name, cost in costs.items()} for side, costs in found.items()},
        }
        output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
