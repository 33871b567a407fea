"""Measures the `cuda` backend and its rivals in one run on one GPU, with random weights of the full size.

    python -m zimage_rt.benchmarks.latency --device cuda --json benchmarks/results/h200.json
    python -m zimage_rt.benchmarks.latency --device cuda --only evaluation --precisions bf16

Systems of a precision are loaded together and interleaved; their memory is freed before the next precision. The rivals'
weights are made in memory, ours are read from bundles of the same numbers, which are written to `--bundles` once.
`--size nano --gpu cpu` runs the same code on small models without a GPU.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from zimage_rt.benchmarks.cold_start import cold_start, touch
from zimage_rt.benchmarks.library_ceiling import LibraryCeiling
from zimage_rt.benchmarks.random_bundle import NANO, SIZES, configs_of, write_random_bundle
from zimage_rt.benchmarks.random_checkpoint import random_checkpoint
from zimage_rt.benchmarks.report import OURS, Report
from zimage_rt.benchmarks.systems.reference_models import load_model, run_encoder
from zimage_rt.benchmarks.systems.torch_best import TinyDecoder, TorchBestSystem
from zimage_rt.benchmarks.systems.torch_best_transformer import COMPILE_MODES
from zimage_rt.benchmarks.timing import Run, interleave, timed, wall_times
from zimage_rt.export.modeling.transformer import SEQUENCE_MULTIPLE, TransformerConfig
from zimage_rt.export.precision import PRECISIONS

import zimage_rt
from zimage_rt.bundle.manifest import MANIFEST_NAME

PRECISION_OF_REFERENCES = "bf16"  # diffusers and transformers are timed in the precision of their documentation
EVALUATIONS = 8
WORDS = "a small red house beside a quiet lake under tall pine trees "


class Bench:
    """Settings, the report, and systems that are loaded on first use."""

    def __init__(self, arguments: argparse.Namespace, report: Report) -> None:
        self.arguments, self.report = arguments, report
        self.device: str = arguments.gpu
        configs = {name: config for name, config in configs_of(arguments.size, arguments.nano).items() if name != "vae"}
        self.checkpoint = random_checkpoint(arguments.nano / "tokenizer", configs, device=self.device)
        self.config = TransformerConfig.from_dict(self.checkpoint.transformer.config)
        self._systems: dict[str, Any] = {}

    def bundle(self, precision: str) -> Path:
        """Folder of our bundle, written on first use."""
        path: Path = self.arguments.bundles / f"{self.arguments.size}-{precision}"
        if not (path / MANIFEST_NAME).is_file():
            start = time.perf_counter()
            write_random_bundle(self.checkpoint, path, precision, device=self.device)
            self.report.seconds[f"write bundle {precision}"] = time.perf_counter() - start
        return path

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """A system by name, made on first use and cached until `release`."""
        if name not in self._systems:
            start = time.perf_counter()
            self._systems[name] = make()
            self.report.seconds[f"load {name}"] = time.perf_counter() - start
        return self._systems[name]

    def ours(self, precision: str) -> Any:
        """Our engine; None, with a line in the report, if it cannot run here."""

        def load() -> Any:
            try:
                return zimage_rt.Engine.load(self.bundle(precision), backend="cuda", verify=False)
            except Exception as error:
                self.report.leave_out(f"{OURS} {precision}", f"{type(error).__name__}: {error}")
                return None

        return self.once(f"{OURS} {precision}", load)

    def torch_best(self, precision: str) -> TorchBestSystem:
        """The hand-fused torch system."""
        mode = self.arguments.torch_mode
        return self.once(
            f"torch_best {precision}", lambda: TorchBestSystem(self.checkpoint, precision, self.device, mode)
        )

    def release(self) -> None:
        """Frees all systems and their memory."""
        self._systems.clear()
        torch._dynamo.reset()
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def compare(self, runs: Mapping[str, Run | None], repeats: int, **fields: Any) -> dict[str, list[float]]:
        """Interleaves the runs that are not None; leaves out and reports systems that fail. Returns the values."""
        working: dict[str, Run] = {}
        for name, run in runs.items():
            if run is None:
                continue
            start = time.perf_counter()
            try:
                run(1)  # compiles, captures and tunes
            except Exception as error:
                traceback.print_exc()
                self.report.leave_out(
                    f"{name} {fields['precision']} {fields['figure']} {fields['shape']}",
                    f"{type(error).__name__}: {error}",
                )
                continue
            self.report.seconds[f"warm {name} {fields['figure']} {fields['precision']} {fields['shape']}"] = (
                time.perf_counter() - start
            )
            working[name] = run
        return interleave(working, self.arguments.rounds, repeats)


def diffusers_models(bench: Bench, precision: str) -> tuple[Any, Any]:
    """diffusers' transformer, eager and compiled with cuDNN attention, on the same weights."""
    dtype = PRECISIONS[precision].storage
    eager = load_model(bench.checkpoint.transformer, dtype, bench.device)
    with torch.device("meta"):
        fast = type(eager).from_config(eager.config)
    fast.load_state_dict(eager.state_dict(), assign=True)
    fast.eval().requires_grad_(False)
    if bench.device != "cpu":
        fast.set_attention_backend("_native_cudnn")
        eager.set_attention_backend("native")  # the call above changed the default of every model
    if bench.arguments.torch_mode != COMPILE_MODES[0]:
        fast.compile_repeated_blocks(dynamic=False)
    return eager, fast


@torch.no_grad()
def forward(model: Any, latents: list[torch.Tensor], timestep: torch.Tensor, embeds: list[torch.Tensor]) -> None:
    """Calls diffusers' transformer as its pipeline does."""
    model(latents, timestep, embeds, return_dict=False)


def evaluation(bench: Bench, precision: str) -> None:
    """Measures a transformer evaluation of every system, and the libraries alone."""
    config, device, dtype = bench.config, bench.device, PRECISIONS[precision].storage
    tokens, batch = bench.arguments.context_tokens, bench.arguments.batch
    best = bench.torch_best(precision).transformer
    eager = fast = None
    if precision == PRECISION_OF_REFERENCES:
        eager, fast = bench.once("diffusers", lambda: diffusers_models(bench, precision))
    ours = bench.ours(precision)
    for height, width in bench.arguments.sizes:
        latents = torch.randn(batch, config.in_channels, height // 8, width // 8, device=device)
        timestep = torch.rand(batch, device=device)
        embeds = torch.randn(batch, tokens, config.cap_feat_dim, device=device, dtype=dtype)
        context = best.context(embeds)
        image_tokens = (height // 8 // config.patch_size) * (width // 8 // config.patch_size)
        image_tokens += -image_tokens % SEQUENCE_MULTIPLE
        ceiling = LibraryCeiling(config, image_tokens, context.shape[1], batch, dtype, device)
        inputs = (list(latents.to(dtype).unsqueeze(2)), timestep.to(dtype), list(embeds))
        own = partial(ours.pipeline.time_evaluation, height, width, tokens, batch) if ours is not None else None
        includes = {
            "diffusers eager": "transformer forward with its context refiner",
            "diffusers compiled": "the same, compile_repeated_blocks and cuDNN attention",
            "torch_best": "transformer forward, context given, one CUDA graph",
            OURS: "transformer forward, context given, one CUDA graph",
            "cuBLAS + cuDNN alone": "matrix products and attentions of all layers, nothing else",
        }
        runs: dict[str, Run | None] = {
            "diffusers eager": timed(partial(forward, eager, *inputs), device) if eager is not None else None,
            "diffusers compiled": timed(partial(forward, fast, *inputs), device) if fast is not None else None,
            "torch_best": timed(partial(best, latents, timestep, context), device),
            OURS: own,
            "cuBLAS + cuDNN alone": ceiling,
        }
        fields: dict[str, Any] = {
            "figure": "one evaluation",
            "precision": precision,
            "shape": f"{width}x{height}, {tokens} caption tokens, batch {batch}",
        }
        for name, values in bench.compare(runs, bench.arguments.repeats, **fields).items():
            detail = ceiling.detail() if name == "cuBLAS + cuDNN alone" else {}
            bench.report.add(
                values, system=name, evaluations=1, includes=includes[name], unit="ms", detail=detail, **fields
            )
        del ceiling


def text_encoder(bench: Bench, precision: str) -> None:
    """Measures `hidden_states[-2]` of a prompt."""
    tokens, device = bench.arguments.encoder_tokens, bench.device
    vocabulary = bench.checkpoint.text_encoder.config["vocab_size"]
    ids = torch.randint(0, vocabulary, (1, tokens), device=device)
    ours = bench.ours(precision)
    runs: dict[str, Run | None] = {OURS: partial(ours.pipeline.time_text_encoder, tokens) if ours is not None else None}
    if precision == PRECISION_OF_REFERENCES:
        model = bench.torch_best(precision).text_encoder
        runs["transformers eager"] = timed(torch.no_grad()(lambda: run_encoder(model, ids)), device)
    fields: dict[str, Any] = {"figure": "text encoder", "precision": precision, "shape": f"{tokens} tokens"}
    for name, values in bench.compare(runs, bench.arguments.repeats, **fields).items():
        includes = "token ids to prompt_embeds on the device, without the unused last layer"
        bench.report.add(values, system=name, evaluations=0, includes=includes, unit="ms", **fields)


def decode(bench: Bench, precision: str) -> None:
    """Measures the tiny VAE: latents to uint8 pixels on the device."""
    component, device = bench.checkpoint.tiny_vae, bench.device
    if component is None:
        raise ValueError("the checkpoint has no tiny VAE")
    height, width = bench.arguments.sizes[0]
    latents = torch.randn(1, bench.config.in_channels, height // 8, width // 8, device=device)
    ours = bench.ours(precision)

    def rival(channels_last: bool) -> Run:
        decoder = TinyDecoder(component, precision, device, channels_last=channels_last, compiled=False)
        return timed(lambda: decoder(latents), device)

    best = bench.torch_best(precision).decoder
    runs: dict[str, Run | None] = {
        "diffusers NCHW": rival(False),
        "diffusers channels-last": rival(True),
        "torch_best": timed(lambda: best(latents), device),
        OURS: partial(ours.pipeline.time_decode, height, width) if ours is not None else None,
    }
    fields: dict[str, Any] = {"figure": "tiny VAE decode", "precision": precision, "shape": f"{width}x{height}"}
    for name, values in bench.compare(runs, bench.arguments.repeats, **fields).items():
        includes = "latents to uint8 pixels on the device"
        bench.report.add(values, system=name, evaluations=0, includes=includes, unit="ms", **fields)


def image(bench: Bench, precision: str) -> None:
    """Measures a prompt string to a uint8 image on the host, warm, with a new prompt each time."""
    height, width = bench.arguments.sizes[0]
    settings = {"height": height, "width": width, "num_inference_steps": EVALUATIONS}
    counter = iter(range(10**6))
    ours, best = bench.ours(precision), bench.torch_best(precision)

    def prompt() -> str:
        # The number has a fixed count of digits, so that all prompts have about the same length in tokens.
        return WORDS * bench.arguments.prompt_repeats + f"number {100000 + next(counter)}"

    def own() -> object:
        return ours.generate(prompt(), seed=next(counter), vae="tiny", **settings).images

    def theirs() -> object:
        return best.generate([prompt()], [next(counter)], **settings)

    runs: dict[str, Run | None] = {
        "torch_best": partial(wall_times, theirs),
        OURS: partial(wall_times, own) if ours is not None else None,
    }
    tokens = best.encode(prompt()).shape[1]
    fields: dict[str, Any] = {
        "figure": "prompt to image, warm",
        "precision": precision,
        "shape": f"{width}x{height}, {tokens} caption tokens, batch 1",
    }
    for name, values in bench.compare(runs, 1, **fields).items():
        bench.report.add(
            [value / 1e3 for value in values],
            system=name,
            evaluations=EVALUATIONS,
            includes="prompt string to uint8 image on the host, wall clock",
            unit="s",
            **fields,
        )
    if ours is not None:
        bench.report.notes[f"memory {precision}"] = dict(ours.pipeline.memory())


def cold(bench: Bench, precision: str) -> None:
    """Measures the time from process start to the first image, and the peak memory, in new processes."""
    bundle = bench.bundle(precision)
    bench.release()
    touch(bundle)
    height, width = bench.arguments.sizes[0]
    cases = {
        "everything resident": {},
        "text encoder moved out": bench.arguments.moved_out,
    }
    for name, options in cases.items():
        repeats = bench.arguments.cold_repeats if not options else 1
        try:
            starts = [
                cold_start(bundle, bench.arguments.cold_backend, options, height, width, EVALUATIONS, bench.device)
                for _ in range(repeats)
            ]
        except RuntimeError as error:
            bench.report.leave_out(f"{OURS} {precision}, cold, {name}", str(error))
            continue
        common: dict[str, Any] = {
            "system": OURS,
            "precision": precision,
            "shape": f"{width}x{height}, batch 1",
            "evaluations": EVALUATIONS,
            "detail": {"starts": starts},
        }
        if not options:
            bench.report.add(
                [start["stages"]["first image"] for start in starts],
                figure="process start to image",
                includes="a new process, weights in the page cache, to the first uint8 image",
                unit="s",
                **common,
            )
        if all(start["peak_bytes"] for start in starts):
            bench.report.add(
                [start["peak_bytes"] / 1e9 for start in starts],
                figure=f"peak memory, {name}",
                includes="all device memory of the process, with its CUDA context",
                unit="GB",
                **common,
            )


PARTS: dict[str, Callable[[Bench, str], None]] = {
    "evaluation": evaluation,
    "text_encoder": text_encoder,
    "decode": decode,
    "image": image,
    "cold": cold,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""

    def names(known: Mapping[str, object]) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            values = text.split(",")
            for value in values:
                if value not in known:
                    raise argparse.ArgumentTypeError(f"expected any of {', '.join(known)}, got {value!r}")
            return values

        return read

    def sizes(text: str) -> list[tuple[int, int]]:
        pairs = [size.split("x") for size in text.split(",")]
        return [(int(height), int(width)) for width, height in pairs]

    def options(text: str) -> dict[str, Any]:
        import json

        return dict(json.loads(text))

    parser = argparse.ArgumentParser(prog="python -m zimage_rt.benchmarks.latency --device cuda")
    parser.add_argument(
        "--only", type=names(PARTS), default=list(PARTS), help=f"parts to run, comma-separated, of {','.join(PARTS)}"
    )
    parser.add_argument("--precisions", type=names(PRECISIONS), default=["bf16", "fp16"], help="comma-separated")
    parser.add_argument("--size", choices=SIZES, default="full", help="size of the model")
    parser.add_argument(
        "--sizes", type=sizes, default=[(1024, 1024), (512, 512)], help="image sizes in pixels, WIDTHxHEIGHT,…"
    )
    parser.add_argument("--batch", type=int, default=1, help="samples per evaluation")
    parser.add_argument("--context-tokens", type=int, default=128, help="caption tokens of an evaluation")
    parser.add_argument("--encoder-tokens", type=int, default=64, help="tokens of the text encoder's prompt")
    parser.add_argument(
        "--prompt-repeats", type=int, default=5, help="length of the prompts of `image`; 5 gives 123 tokens"
    )
    parser.add_argument("--rounds", type=int, default=8, help="rounds in which the systems are interleaved")
    parser.add_argument("--repeats", type=int, default=3, help="calls per system and round")
    parser.add_argument("--cold-repeats", type=int, default=3, help="processes of `cold`")
    parser.add_argument("--cold-backend", default="cuda", help="backend of `cold`")
    parser.add_argument(
        "--moved-out",
        type=options,
        default={"text_encoder": "host"},
        help="backend options of the second case of `cold`, JSON",
    )
    parser.add_argument("--torch-mode", choices=COMPILE_MODES, default=COMPILE_MODES[-1], help="torch.compile")
    parser.add_argument("--gpu", choices=["cuda", "cpu"], default="cuda", help="cpu only tests this code")
    parser.add_argument(
        "--bundles", type=Path, default=Path("/tmp/zimage-random-bundles"), help="folder of our bundles"
    )
    parser.add_argument("--nano", type=Path, default=NANO, help="the small checkpoint, for its tokenizer")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/h200.json"), help="file for the report")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    arguments = parse(argv)
    torch._dynamo.config.recompile_limit = 64  # every shape is compiled separately
    torch.backends.cudnn.benchmark = True
    report = Report(arguments.json, {key: str(value) for key, value in vars(arguments).items()})
    bench = Bench(arguments, report)
    for precision in arguments.precisions:
        # `cold` last: it needs the whole device.
        for part in (part for part in PARTS if part in arguments.only):
            start = time.perf_counter()
            try:
                PARTS[part](bench, precision)
            except Exception as error:  # the other parts still run
                traceback.print_exc()
                report.leave_out(f"{part} {precision}", f"{type(error).__name__}: {error}")
            report.seconds[f"{part} {precision}"] = time.perf_counter() - start
        bench.release()
    print("\n" + report.finish())
    return 1 if report.left_out else 0


if __name__ == "__main__":
    sys.exit(main())
