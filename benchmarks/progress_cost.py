"""Measures callbacks (progress, cancelling, latents, previews) against the same request without a callback.

    python -m zimage_rt.benchmarks.progress_cost engines/nano --size 256
    python -m zimage_rt.benchmarks.progress_cost /tmp/random-bf16 --backend cuda --json results/progress.json

Each callback is timed right after a plain request of the same size, at the same clocks and temperature. Figures are
medians over the rounds; ratios are per pair. For a bundle of the full size: `python -m
zimage_rt.benchmarks.random_bundle`.
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
    """Stores the last progress, as a command or a server does."""

    def __init__(self) -> None:
        self.step, self.total = 0, 0

    def __call__(self, info: StepInfo) -> None:
        """Callback of a request."""
        self.step, self.total = info.step + 1, info.num_steps


def callbacks() -> dict[str, Callback | None]:
    """Callbacks by name."""
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
    """Medians of a callback's times over the rounds.

    Attributes:
        seconds: wall-clock seconds of a request.
        plain_seconds: the same of the plain request before it.
        ratio: of the two, per pair.
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
    """Measures each callback at a size. The first two rounds, which capture graphs and tune, are dropped."""
    fields: dict[str, Any] = {
        "height": size,
        "width": size,
        "num_inference_steps": evaluations,
        "seed": 1,
        "vae": "tiny",
    }
    choices = callbacks()
    pairs: dict[str, list[tuple[_Run, _Run]]] = {name: [] for name in choices}
    gc.disable()  # a collection during a request would count as its cost
    try:
        for number in range(rounds + 2):
            for name, callback in choices.items():
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
            first_step=median(run.first_step or 0.0 for _, run in found) if choices[name] is not None else None,
        )
        for name, found in pairs.items()
    }


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle with the tiny VAE.")],
    backend: Annotated[str, typer.Option(help="Backend: onnxruntime or cuda.")] = "onnxruntime",
    size: Annotated[
        list[int] | None,
        typer.Option(help="Width and height in pixels; may be repeated. By default 256, 512 and 1024."),
    ] = None,
    evaluations: Annotated[int, typer.Option(help="Function evaluations per request.")] = 8,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are printed.")] = 15,
    output: Annotated[Path | None, typer.Option("--json", help="File to write the figures to as JSON.")] = None,
) -> None:
    """Print the seconds of a request with each callback, and their ratio to a plain request."""
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
