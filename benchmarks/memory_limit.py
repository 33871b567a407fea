"""Measures images under limits of device memory: what the streaming of the transformer's layers costs.

    python -m zimage_rt.benchmarks.memory_limit /tmp/random-int8 --limits 0,11.5e9,7.6e9,6e9,5e9 --size 1024

All engines are loaded together, and their images are interleaved, so that ratios are of one run.
Every image has a new prompt. Each limit's first image is compared with the first limit's to the byte.
"""

from __future__ import annotations

import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer

import zimage_rt
from zimage_rt.errors import OutOfMemory

PROMPT = "a small red house beside a quiet lake under tall pine trees, number "
CONTEXT_TOKENS = 128  # of the evaluation that is timed alone


@dataclass
class Case:
    """An engine under a limit, and what was measured of it.

    Attributes:
        limit: `memory_limit` in bytes; 0 for none.
        engine: None after a refusal.
        refusal: the message of OutOfMemory.
        load_seconds: of `Engine.load`.
        first_seconds: of the first image, which captures graphs and moves layers until everything has its room.
        device_bytes: what the device has less since before the load, without the CUDA context.
        image_seconds, evaluation_ms: of each round.
        memory, streaming: the pipeline's own figures after the last image.
    """

    limit: int
    engine: Any = None
    refusal: str = ""
    load_seconds: float = 0.0
    first_seconds: float = 0.0
    device_bytes: int = 0
    same_image: bool = True
    image_seconds: list[float] = field(default_factory=list)
    evaluation_ms: list[float] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    streaming: dict[str, int] = field(default_factory=dict)

    def figures(self) -> dict[str, Any]:
        """Everything but the engine, for JSON."""
        return {name: value for name, value in vars(self).items() if name != "engine"}


@dataclass(frozen=True)
class Settings:
    """Settings of all images."""

    bundle: str
    text_encoder: str
    size: int
    evaluations: int
    rounds: int


class Bench:
    """The cases in the order of their limits."""

    def __init__(self, settings: Settings) -> None:
        self.settings, self.cases = settings, list[Case]()
        self._first: np.ndarray | None = None

    def draw(self, case: Case, number: int) -> tuple[np.ndarray, float]:
        """An image of a numbered prompt, and its seconds."""
        size = self.settings.size
        start = time.perf_counter()
        result = case.engine.generate(
            f"{PROMPT}{100000 + number}",
            height=size,
            width=size,
            num_inference_steps=self.settings.evaluations,
            seed=number,
            vae="tiny",
        )
        return result.images, time.perf_counter() - start

    def evaluate(self, case: Case) -> float:
        """Milliseconds of one evaluation."""
        size = self.settings.size
        return statistics.median(case.engine.pipeline.time_evaluation(size, size, CONTEXT_TOKENS, 1, 5))

    def add(self, limit: int) -> Case:
        """Loads an engine under a limit and draws its first image; a refusal is kept as a case."""
        options: dict[str, Any] = {"text_encoder": self.settings.text_encoder}
        if limit:
            options["memory_limit"] = limit
        case = Case(limit)
        self.cases.append(case)
        start = time.perf_counter()
        try:
            case.engine = zimage_rt.Engine.load(
                self.settings.bundle, backend="cuda", verify=False, backend_options=options
            )
            case.load_seconds = time.perf_counter() - start
            image, case.first_seconds = self.draw(case, 0)
            self.evaluate(case)
        except OutOfMemory as error:
            if case.engine is not None:
                case.engine.close()
            case.engine, case.refusal = None, str(error)
            return case
        if self._first is None:
            self._first = image
        case.same_image = bool(np.array_equal(image, self._first))
        return case

    def measure(self) -> None:
        """Interleaves the engines and times them; the first round is dropped."""
        running = [case for case in self.cases if case.engine is not None]
        for round_number in range(self.settings.rounds + 1):
            for case in running:
                seconds, milliseconds = self.draw(case, 1 + round_number)[1], self.evaluate(case)
                if round_number:
                    case.image_seconds.append(seconds)
                    case.evaluation_ms.append(milliseconds)
        for case in running:
            case.memory, case.streaming = case.engine.pipeline.memory(), case.engine.pipeline.streaming()


def free_bytes() -> int:
    """Free memory of the device, by CUDA; makes the CUDA context if there is none."""
    import torch

    return int(torch.cuda.mem_get_info()[0])


def table(cases: list[Case]) -> list[str]:
    """The rows of the table, in Markdown; ratios are to the first case that runs."""
    lines = [
        "| limit | device memory | counted | streamed layers | page-locked | image | ratio | evaluation | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    first: Case | None = None
    for case in cases:
        limit = f"{case.limit / 1e9:.2f} GB" if case.limit else "none"
        if case.engine is None:
            lines.append(f"| {limit} | refused: {case.refusal} | | | | | | | |")
            continue
        first = first or case
        image, evaluation = statistics.median(case.image_seconds), statistics.median(case.evaluation_ms)
        ratio = statistics.median(a / b for a, b in zip(case.image_seconds, first.image_seconds, strict=True))
        own = statistics.median(a / b for a, b in zip(case.evaluation_ms, first.evaluation_ms, strict=True))
        counted = sum(case.memory[name] for name in ("weights", "workspace", "graphs"))
        layers, host = case.streaming["layers"], case.streaming["host_bytes"]
        lines.append(
            f"| {limit} | {case.device_bytes / 1e9:.2f} GB | {counted / 1e9:.2f} GB | {layers} | {host / 1e9:.2f} GB "
            f"| {image:.3f} s | {ratio:.3f} | {evaluation:.2f} ms | {own:.3f} |"
            + ("" if case.same_image else " ANOTHER IMAGE")
        )
    return lines


def parse_limits(text: str) -> list[int]:
    """Bytes of a comma-separated list such as `0,11.5e9`."""
    try:
        limits = [int(float(part)) for part in text.split(",")]
    except ValueError:
        raise typer.BadParameter(f"expected bytes such as 0,11.5e9,6e9, got {text!r}") from None
    if min(limits) < 0:
        raise typer.BadParameter(f"expected bytes from 0, got {text!r}")
    return limits


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle for the cuda backend, with the tiny VAE.")],
    limits: Annotated[str, typer.Option(help="Bytes of device memory, comma-separated; 0 for none.")],
    text_encoder: Annotated[str, typer.Option(help="Backend option of all engines: resident or host.")] = "host",
    size: Annotated[int, typer.Option(help="Width and height in pixels.")] = 1024,
    evaluations: Annotated[int, typer.Option(help="Function evaluations per image.")] = 8,
    rounds: Annotated[int, typer.Option(help="Rounds; medians are printed.")] = 5,
    output: Annotated[Path | None, typer.Option("--json", help="File to write the figures to as JSON.")] = None,
) -> None:
    """Print memory and times under each limit."""
    settings = Settings(str(bundle), text_encoder, size, evaluations, rounds)
    bench = Bench(settings)
    for limit in parse_limits(limits):
        before = free_bytes()
        case = bench.add(limit)
        case.device_bytes = max(0, before - free_bytes())
        typer.echo(
            f"{limit}: loaded in {case.load_seconds:.2f} s, first image {case.first_seconds:.2f} s{case.refusal}"
        )
    bench.measure()
    lines = table(bench.cases)
    typer.echo("\n".join([f"{bundle}, {size}x{size}, {evaluations} evaluations, text encoder {text_encoder}", *lines]))
    if output is not None:
        figures = {**asdict(settings), "cases": [case.figures() for case in bench.cases]}
        output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
