"""Times the `cuda` backend in bf16, int8 and fp8 beside hand-fused torch in fp8, in one run, on random weights.

    python -m zimage_rt.benchmarks.eight_bits --sizes 1024,512 --json eight-bits.json

Systems are loaded together and interleaved. Bundles of the full size are written to `--bundles` if they are missing:
40 GB for the three. The last lines are a table of medians with their ratios. `--gpu cpu --size nano` checks the code of
the torch system without a GPU; ours is then left out.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch._inductor.config
from zimage_rt.benchmarks.cold_start import cold_start, touch
from zimage_rt.benchmarks.gpu import EVALUATIONS, WORDS, Bench
from zimage_rt.benchmarks.random_bundle import NANO, SIZES
from zimage_rt.benchmarks.report import OURS, Report
from zimage_rt.benchmarks.systems.torch_best_transformer import COMPILE_MODES, TorchBestTransformer
from zimage_rt.benchmarks.timing import Run, timed, wall_times

BASE = "bf16"
PRECISIONS = (BASE, "int8", "fp8")
RIVAL = "hand-fused torch"
MEMORY_CASES: dict[str, dict[str, Any]] = {
    "everything resident": {},
    "text encoder on the host": {"text_encoder": "host"},
}


class EightBits:
    """A run of the command: all precisions side by side."""

    def __init__(self, arguments: argparse.Namespace, report: Report) -> None:
        self.arguments, self.report = arguments, report
        self.bench = Bench(arguments, report)
        self.medians: dict[tuple[str, str], dict[str, float]] = {}  # (figure, shape) → system → median

    def engines(self) -> dict[str, Any]:
        """Our engines that run here, by precision."""
        loaded = {precision: self.bench.ours(precision) for precision in self.arguments.precisions}
        return {precision: engine for precision, engine in loaded.items() if engine is not None}

    def rival(self, precision: str) -> TorchBestTransformer:
        """The transformer in hand-fused torch."""
        component, mode = self.bench.checkpoint.transformer, self.arguments.torch_mode
        name = f"{RIVAL} {precision}"
        return self.bench.once(name, lambda: TorchBestTransformer(component, precision, self.bench.device, mode))

    def add(self, values: list[float], system: str, precision: str, unit: str, evaluations: int, **fields: Any) -> None:
        """Records a system's values of a figure."""
        line = self.report.add(values, system=system, precision=precision, unit=unit, evaluations=evaluations, **fields)
        label = precision if system == OURS else f"{system} {precision}"
        self.medians.setdefault((line.figure, line.shape), {})[label] = line.median

    def compare(
        self, runs: dict[tuple[str, str], Run], repeats: int, unit: str, evaluations: int, **fields: Any
    ) -> None:
        """Interleaves runs by (system, precision) and records them; a run gives milliseconds."""
        named: dict[str, Run | None] = {f"{system} {precision}": run for (system, precision), run in runs.items()}
        found = self.bench.compare(named, repeats, precision="", **fields)
        for system, precision in runs:
            values = found.get(f"{system} {precision}")
            if values:
                scaled = [value / 1e3 for value in values] if unit == "s" else values
                self.add(scaled, system, precision, unit, evaluations, **fields)

    def evaluation(self) -> None:
        """One evaluation of the transformer."""
        config, device, tokens = self.bench.config, self.bench.device, self.arguments.context_tokens
        rivals = {precision: self.rival(precision) for precision in self.arguments.rivals}
        self.free()
        engines = self.engines()
        for height, width in self.arguments.sizes:
            latents = torch.randn(1, config.in_channels, height // 8, width // 8, device=device)
            timestep = torch.rand(1, device=device)
            embeds = torch.randn(1, tokens, config.cap_feat_dim, device=device)
            runs: dict[tuple[str, str], Run] = {
                (OURS, precision): partial(engine.pipeline.time_evaluation, height, width, tokens, 1)
                for precision, engine in engines.items()
            }
            for precision, rival in rivals.items():
                runs[RIVAL, precision] = timed(partial(rival, latents, timestep, rival.context(embeds)), device)
            shape = f"{width}x{height}, {tokens} caption tokens"
            self.compare(
                runs,
                self.arguments.repeats,
                "ms",
                1,
                figure="one evaluation",
                shape=shape,
                includes="transformer forward, context given, one CUDA graph",
            )

    def text_encoder(self) -> None:
        """`hidden_states[-2]` of prompts of several lengths."""
        engines = self.engines()
        for tokens in self.arguments.encoder_tokens:
            runs: dict[tuple[str, str], Run] = {
                (OURS, precision): partial(engine.pipeline.time_text_encoder, tokens)
                for precision, engine in engines.items()
            }
            includes = "token ids to prompt_embeds on the device"
            shape = f"{tokens} tokens"
            self.compare(runs, self.arguments.repeats, "ms", 0, figure="text encoder", shape=shape, includes=includes)

    def image(self) -> None:
        """A prompt string to a uint8 image on the host, warm, with a new prompt each time."""
        counter = iter(range(10**6))

        def draw(engine: Any, height: int, width: int) -> None:
            prompt = WORDS * self.arguments.prompt_repeats + f"number {100000 + next(counter)}"
            settings = {"height": height, "width": width, "num_inference_steps": EVALUATIONS}
            engine.generate(prompt, seed=next(counter), vae="tiny", **settings)

        engines = self.engines()
        for height, width in self.arguments.sizes:
            runs: dict[tuple[str, str], Run] = {
                (OURS, precision): partial(wall_times, partial(draw, engine, height, width))
                for precision, engine in engines.items()
            }
            self.compare(
                runs,
                1,
                "s",
                EVALUATIONS,
                figure="prompt to image, warm",
                shape=f"{width}x{height}",
                includes="prompt string to uint8 image on the host, wall clock",
            )
        for precision, engine in engines.items():
            self.report.notes[f"memory {precision}"] = dict(engine.pipeline.memory())

    def memory(self) -> None:
        """Peak of device memory of a new process that draws two images, in each place of the text encoder."""
        bundles = {precision: self.bench.bundle(precision) for precision in self.arguments.precisions}
        self.bench.release()
        height, width = self.arguments.sizes[0]
        for precision, bundle in bundles.items():
            touch(bundle)
            for case, options in MEMORY_CASES.items():
                try:
                    found = cold_start(bundle, "cuda", options, height, width, EVALUATIONS, self.bench.device)
                except RuntimeError as error:
                    self.report.leave_out(f"{OURS} {precision}, {case}", str(error))
                    continue
                self.report.notes[f"process {precision}, {case}"] = found
                self.add(
                    [found["peak_bytes"] / 1e9],
                    OURS,
                    precision,
                    "GB",
                    EVALUATIONS,
                    figure=f"peak memory, {case}",
                    shape=f"{width}x{height}",
                    includes="all device memory of a process, with its CUDA context",
                )

    def free(self) -> None:
        """Gives what torch keeps of the device's memory back: our engines allocate their own."""
        gc.collect()
        if self.bench.device != "cpu":
            torch.cuda.empty_cache()

    def run(self) -> None:
        """Runs the parts; one that fails is left out."""
        for precision in self.arguments.precisions if self.bench.device != "cpu" else ():
            self.bench.bundle(precision)  # before systems take the device's memory
        self.free()
        for part in PARTS:
            if part not in self.arguments.only:
                continue
            start = time.perf_counter()
            try:
                PARTS[part](self)
            except Exception as error:  # the other parts still run
                traceback.print_exc()
                self.report.leave_out(part, f"{type(error).__name__}: {error}")
            self.report.seconds[part] = time.perf_counter() - start

    def table(self) -> str:
        """Medians by figure and shape, each with its ratio to bf16, and fp8's to torch in fp8."""
        rows = []
        for (figure, shape), medians in self.medians.items():
            cells = []
            for label, median in medians.items():
                over = f" ({median / medians[BASE]:.3f})" if label != BASE and BASE in medians else ""
                cells.append(f"{label} {median:.3f}{over}")
            rows.append(f"{figure}, {shape}: " + "; ".join(cells))
            for precision in ("fp8", BASE):
                theirs, ours = medians.get(f"{RIVAL} {precision}"), medians.get(precision)
                if theirs and ours:
                    rows.append(f"    {precision} / {RIVAL} {precision} {ours / theirs:.3f}")
                    if precision == "fp8" and "int8" in medians:
                        rows[-1] += f"; int8 / {RIVAL} fp8 {medians['int8'] / theirs:.3f}"
        return "\n".join([f"medians (over {BASE})", *rows])


PARTS: dict[str, Callable[[EightBits], None]] = {
    "evaluation": EightBits.evaluation,
    "text_encoder": EightBits.text_encoder,
    "image": EightBits.image,
    "memory": EightBits.memory,
}


def _words(known: tuple[str, ...]) -> Callable[[str], list[str]]:
    def read(text: str) -> list[str]:
        values = [value for value in text.split(",") if value]
        for value in values:
            if value not in known:
                raise argparse.ArgumentTypeError(f"expected any of {', '.join(known)}, got {value!r}")
        return values

    return read


def _sizes(text: str) -> list[tuple[int, int]]:
    """`1024,832x1216` -> (height, width) of each."""
    sides = [size.split("x") for size in text.split(",")]
    return [(int(side[-1]), int(side[0])) for side in sides]


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m zimage_rt.benchmarks.eight_bits")
    parser.add_argument("--only", type=_words(tuple(PARTS)), default=list(PARTS), help=f"of {','.join(PARTS)}")
    parser.add_argument("--precisions", type=_words(PRECISIONS), default=list(PRECISIONS), help="ours")
    parser.add_argument("--rivals", type=_words(("fp8", BASE)), default=["fp8"], help=f"{RIVAL}: fp8, {BASE}")
    parser.add_argument("--sizes", type=_sizes, default=_sizes("1024,512"), help="images: SIDE or WIDTHxHEIGHT,…")
    parser.add_argument("--size", choices=SIZES, default="full", help="size of the model")
    parser.add_argument("--context-tokens", type=int, default=128, help="caption tokens of an evaluation")
    parser.add_argument(
        "--encoder-tokens",
        type=lambda text: [int(one) for one in text.split(",")],
        default=[64, 128, 512],
        help="lengths of the text encoder's prompts",
    )
    parser.add_argument("--prompt-repeats", type=int, default=5, help="length of `image`'s prompts; 5: 123 tokens")
    parser.add_argument("--rounds", type=int, default=8, help="rounds in which the systems are interleaved")
    parser.add_argument("--repeats", type=int, default=3, help="calls per system and round")
    parser.add_argument("--torch-mode", choices=COMPILE_MODES, default="default", help="torch.compile")
    parser.add_argument("--gpu", choices=["cuda", "cpu"], default="cuda", help="cpu only tests this code")
    parser.add_argument("--bundles", type=Path, default=Path("/tmp/zimage-random-bundles"), help="folder of bundles")
    parser.add_argument("--nano", type=Path, default=NANO, help="the small checkpoint, for its tokenizer")
    parser.add_argument("--json", type=Path, help="file for the report")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    arguments = parse(argv)
    torch._dynamo.config.recompile_limit = 64  # every shape is compiled separately
    torch._inductor.config.max_autotune_pointwise = True  # tries several configurations of the fused kernels
    start = time.perf_counter()
    report = Report(arguments.json, {key: str(value) for key, value in vars(arguments).items()})
    run = EightBits(arguments, report)
    run.run()
    table = run.table()
    report.notes["table"] = table.splitlines()
    print("\n" + report.finish())
    print(f"\n{table}\n{time.perf_counter() - start:.0f} s")
    return 1 if report.left_out else 0


if __name__ == "__main__":
    sys.exit(main())
