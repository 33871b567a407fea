"""Compares the `cuda` backend at full size with diffusers and transformers in fp32 on the same GPU.

    python -m zimage_rt.benchmarks.full_size_parity --json parity.json

The weights are random with the rule `random_checkpoint.loud`: attention is peaked and the post-norms' inputs exceed
1e5, as on the real weights. Both are measured in the reference, printed, and required.

Modules of the full width with few layers are judged by the relative error ||out - reference|| / ||reference||, at sizes
and caption lengths that cover what is served. Then the full depth runs once from token ids to pixels. It is reported
without a verdict, because random layers amplify rounding; diffusers in our precision is reported next to it, against
the same reference. The weights are rounded to bf16 first, so all systems have the same numbers.

int8 and fp8 are judged per block, against the fp32 reference of the weights before they were quantised:

    python -m zimage_rt.benchmarks.full_size_parity --precisions int8,fp8 --refiner-layers 0 --skip-end-to-end

`--outliers` makes 0.1 % of the channels of every quantised product's input 300 times larger (`outliers`).
`--backend export` tests the exporter's torch modules instead of the engine, which needs no GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from zimage_rt.benchmarks.outliers import with_outliers
from zimage_rt.benchmarks.random_bundle import NANO, SIZES, configs_of, default_device, shortened, write_random_bundle
from zimage_rt.benchmarks.random_checkpoint import RULES, random_checkpoint
from zimage_rt.benchmarks.report import gpu_state, versions
from zimage_rt.benchmarks.systems.reference_models import load_model
from zimage_rt.export.checkpoint import Checkpoint
from zimage_rt.export.modeling.transformer import SEQUENCE_MULTIPLE
from zimage_rt.export.parity.reference import reference_function
from zimage_rt.export.plan import plan_modules
from zimage_rt.export.precision import PRECISIONS

import zimage_rt
from zimage_rt.errors import ZImageError

TOLERANCES = {"fp32": 1e-4, "bf16": 1e-2, "fp16": 3e-3, "int8": 0.02, "fp8": 0.0625}
# Their errors add up from block to block: the tolerance is one block's, fp8's three times int8's, as one product's is.
PER_BLOCK = ("int8", "fp8")
LOUD_PEAK = 1e5  # the post-norms' inputs must exceed this
PEAKED = 0.05  # least mean of the largest attention weight per query; uniform attention over 1,000 keys gives 0.001
QUERIES = 64  # number of queries for that measurement

# (width, height, caption tokens, batch): every size, every length and both batches occur.
CASES = (
    (512, 512, 1, 1),
    (512, 512, 31, 3),
    (512, 512, 512, 1),
    (1024, 1024, 32, 1),
    (1024, 1024, 33, 3),
    (832, 1216, 200, 1),
    (832, 1216, 31, 3),
    (1536, 1536, 512, 1),
)
SMALL_CASES = ((64, 64, 1, 1), (208, 96, 33, 3), (96, 160, 200, 1))
TOKENS = (1, 31, 32, 33, 200, 512)

Runner = Callable[[str, Mapping[str, np.ndarray]], np.ndarray]


class Loudness:
    """Statistics of the reference's modulated blocks: the largest post-norm input, and the peaks of attention."""

    def __init__(self) -> None:
        self.peak: dict[str, float] = {}
        self.favourite: list[float] = []

    @contextmanager
    def watch(self, model: nn.Module) -> Iterator[None]:
        """Records every forward pass of the model's modulated blocks."""
        queries: list[Tensor] = []
        handles = []

        def norm(name: str) -> Callable[..., None]:
            def record(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
                self.peak[name] = max(self.peak.get(name, 0.0), float(inputs[0].abs().max()))

            return record

        def query(_: nn.Module, __: Any, out: Tensor) -> None:
            queries.append(out)

        def key(_: nn.Module, __: Any, out: Tensor) -> None:
            # Before RoPE, which keeps lengths: [heads, QUERIES, tokens] of the first sample.
            q, k = queries.pop()[0, :QUERIES].transpose(0, 1), out[0].transpose(0, 1)
            scores = q @ k.transpose(1, 2) / q.shape[-1] ** 0.5
            self.favourite.append(float(scores.softmax(-1).amax(-1).mean()))

        for name, module in model.named_modules():
            if name.startswith(("layers.", "noise_refiner.")):
                last = name.rpartition(".")[2]
                if last in ("attention_norm2", "ffn_norm2"):
                    handles.append(module.register_forward_pre_hook(norm(last)))
                elif last in ("norm_q", "norm_k"):
                    handles.append(module.register_forward_hook(query if last == "norm_q" else key))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def summary(self) -> dict[str, float]:
        """Figures by name."""
        peaks = {f"largest input of {name}": peak for name, peak in self.peak.items()}
        return {**peaks, "mean weight of the favourite key": float(np.mean(self.favourite))}

    def loud_enough(self) -> bool:
        """Whether the statistics reach those of the real weights."""
        return min(self.peak.values()) > LOUD_PEAK and min(self.favourite) > PEAKED


def exported_runner(checkpoint: Checkpoint, bundle: Path, precision: str, device: str) -> Runner:
    """Runs the exporter's torch modules with a bundle's weights."""
    plans = {plan.name: plan for plan in plan_modules(checkpoint, PRECISIONS[precision], ("tiny",))}
    modules: dict[str, nn.Module] = {}

    @torch.no_grad()
    def run(name: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        if name not in modules:
            module = plans[name].meta_module()
            module.load_state_dict(load_file(bundle / f"{name}.safetensors", device=device), assign=True)
            modules[name] = module
        return modules[name](*(torch.from_numpy(array).to(device) for array in inputs.values())).float().cpu().numpy()

    return run


def engine_runner(bundle: Path, backend: str) -> Runner:
    """Runs the engine's modules on arrays."""
    pipeline: Any = zimage_rt.Engine.load(bundle, backend=backend, verify=False).pipeline

    def run(name: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        outputs: Mapping[str, np.ndarray] = pipeline.module(name)(dict(inputs))
        return next(iter(outputs.values()))

    return run


def errors(got: np.ndarray, wanted: np.ndarray) -> tuple[float, float]:
    """Relative error and largest absolute error; infinite if shapes differ or numbers are not finite."""
    if got.shape != wanted.shape or not np.isfinite(got).all():
        return float("inf"), float("inf")
    difference = got.astype(np.float64) - wanted
    return float(np.linalg.norm(difference) / np.linalg.norm(wanted.astype(np.float64))), float(abs(difference).max())


class Parity:
    """A run of the command."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.device = arguments, arguments.device
        self.loudness = Loudness()
        self.rows: list[dict[str, Any]] = []
        # On the CPU, so that the numbers do not depend on the device.
        self._random = torch.Generator().manual_seed(arguments.seed)

    def checkpoint(self, layers: bool) -> Checkpoint:
        """A random checkpoint of the full width; with few layers unless `layers` is True."""
        configs = configs_of(self.arguments.size, self.arguments.nano)
        configs.pop("vae", None)
        if not layers:
            configs = shortened(configs, self.arguments.layers, self.arguments.refiner_layers, self.arguments.layers)
        folder = self.arguments.nano / "tokenizer"
        checkpoint = random_checkpoint(
            folder, configs, seed=self.arguments.seed, rule=RULES["loud"], device=self.arguments.device
        )
        return with_outliers(checkpoint) if self.arguments.outliers else checkpoint

    def normal(self, *shape: int) -> np.ndarray:
        """Normally distributed numbers, fp32."""
        return torch.randn(shape, generator=self._random).numpy()

    def ids(self, checkpoint: Checkpoint, batch: int, tokens: int) -> np.ndarray:
        """Random token ids [batch, tokens]."""
        vocabulary = checkpoint.text_encoder.config["vocab_size"]
        return torch.randint(0, vocabulary, (batch, tokens), generator=self._random).numpy()

    def timesteps(self, batch: int) -> np.ndarray:
        """Random timesteps [batch]."""
        return torch.rand(batch, generator=self._random).numpy()

    def module_cases(self, checkpoint: Checkpoint) -> list[tuple[str, str, dict[str, np.ndarray], np.ndarray]]:
        """(module, shape, inputs, reference output) per judged case."""
        found = []
        references: dict[str, Any] = {
            name: load_model(component, torch.float32, self.device)
            for name, component in (("transformer", checkpoint.transformer), ("text_encoder", checkpoint.text_encoder))
        }

        def run(module: str, component: str, inputs: dict[str, np.ndarray], shape: str) -> np.ndarray:
            function = reference_function(module, references[component])
            with torch.no_grad():
                tensors = [torch.from_numpy(array).to(self.device) for array in inputs.values()]
                wanted = function(*tensors).float().cpu().numpy()
            found.append((module, shape, inputs, wanted))
            return wanted

        config = checkpoint.transformer.config
        with self.loudness.watch(references["transformer"]):
            for i, tokens in enumerate(TOKENS):
                batch = 3 if i % 2 else 1
                shape = f"{tokens} tokens, batch {batch}"
                run("text_encoder", "text_encoder", {"input_ids": self.ids(checkpoint, batch, tokens)}, shape)
                if self.arguments.refiner_layers == 0:  # a context refiner without layers is an embedder
                    continue
                embeds = {"prompt_embeds": self.normal(batch, tokens, config["cap_feat_dim"])}
                run("context_refiner", "transformer", embeds, shape)
            for width, height, tokens, batch in CASES if self.arguments.size == "full" else SMALL_CASES:
                rows = -(-tokens // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE
                inputs = {
                    "latents": self.normal(batch, config["in_channels"], height // 8, width // 8),
                    "timestep": self.timesteps(batch),
                    "context": self.normal(batch, rows, config["dim"]),
                }
                shape = f"{width}x{height}, {tokens} tokens, batch {batch}"
                run("transformer", "transformer", inputs, shape)
        return found

    def runner(self, checkpoint: Checkpoint, precision: str, name: str) -> Runner:
        """The system under test, on a bundle of this checkpoint."""
        bundle = self.arguments.bundles / f"{name}-{precision}"
        write_random_bundle(checkpoint, bundle, precision, device=self.device)
        if self.arguments.backend == "export":
            return exported_runner(checkpoint, bundle, precision, self.device)
        return engine_runner(bundle, self.arguments.backend)

    def judge(self) -> None:
        """Compare modules with few layers in every case and precision."""
        checkpoint = self.checkpoint(layers=False)
        cases = self.module_cases(checkpoint)
        self.free()
        for precision in self.arguments.precisions:
            run = self.runner(checkpoint, precision, "few-layers")
            for module, shape, inputs, wanted in cases:
                # A text encoder's random layer has next to no residual, so that its error is that of four products.
                judged = module == "transformer" or precision not in PER_BLOCK
                self.add(module, precision, shape, run(module, inputs), wanted, judged=judged)
            del run
            self.free()

    def end_to_end(self) -> None:
        """Compare every module at full depth, from token ids to pixels, each side on its own outputs."""
        checkpoint = self.checkpoint(layers=True)
        config = checkpoint.transformer.config
        side = 128 if self.arguments.size == "full" else 16
        ids = self.ids(checkpoint, 1, 128)
        latents, timestep = self.normal(1, config["in_channels"], side, side), self.timesteps(1)

        def chain(run: Runner) -> dict[str, np.ndarray]:
            embeds = run("text_encoder", {"input_ids": ids})
            context = run("context_refiner", {"prompt_embeds": embeds})
            noise_pred = run("transformer", {"latents": latents, "timestep": timestep, "context": context})
            image = run("tiny_vae_decoder", {"latents": latents + noise_pred})
            return {
                "text_encoder": embeds,
                "context_refiner": context,
                "transformer": noise_pred,
                "tiny_vae_decoder": image,
            }

        shape = f"end to end, {8 * side}x{8 * side}, 128 tokens"
        wanted = chain(self.reference_runner(checkpoint, torch.float32))
        self.free()
        for precision in self.arguments.precisions:
            run = self.runner(checkpoint, precision, "all-layers")
            for name, got in chain(run).items():
                self.add(name, precision, shape, got, wanted[name], judged=False)
            del run
            self.free()
            reference = chain(self.reference_runner(checkpoint, PRECISIONS[precision].storage))
            self.free()
            for name, got in reference.items():
                self.add(name, precision, f"{shape}, diffusers itself", got, wanted[name], judged=False)

    def reference_runner(self, checkpoint: Checkpoint, dtype: torch.dtype) -> Runner:
        """The reference modules in `dtype`; one component is loaded at a time, because all take 41 GB."""
        tiny = checkpoint.tiny_vae
        if tiny is None:
            raise ValueError("the checkpoint has no tiny VAE")
        components = {
            "text_encoder": checkpoint.text_encoder,
            "context_refiner": checkpoint.transformer,
            "transformer": checkpoint.transformer,
            "tiny_vae_decoder": tiny,
        }
        loaded: dict[str, Any] = {}

        def tensor(name: str, array: np.ndarray) -> Tensor:
            value = torch.from_numpy(array).to(self.device)
            # As in diffusers' pipeline: latents in the model's dtype, the timestep in fp32.
            return value.to(dtype) if value.is_floating_point() and name != "timestep" else value

        def run(name: str, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
            component = components[name]
            if component.name not in loaded:
                loaded.clear()
                self.free()
                loaded[component.name] = load_model(component, dtype, self.device)
            with torch.no_grad():
                function = reference_function(name, loaded[component.name])
                return function(*(tensor(name, array) for name, array in inputs.items())).float().cpu().numpy()

        return run

    def add(
        self, module: str, precision: str, shape: str, got: np.ndarray, wanted: np.ndarray, *, judged: bool
    ) -> None:
        """Record and print a comparison."""
        relative, largest = errors(got, wanted)
        passed = relative <= TOLERANCES[precision]
        self.rows.append(
            {
                "module": module,
                "precision": precision,
                "shape": shape,
                "relative_error": relative,
                "max_abs_error": largest,
                "reference_rms": float(np.sqrt(np.mean(wanted.astype(np.float64) ** 2))),
                "tolerance": TOLERANCES[precision] if judged else None,
            }
        )
        verdict = ("ok" if passed else "WRONG") if judged else "not judged"
        print(f"{module:<18} {precision:<5} {shape:<55} relative {relative:.2e}  largest {largest:.2e}  {verdict}")

    def failures(self) -> list[str]:
        """Descriptions of all failed checks."""
        found = [
            f"{row['module']} {row['precision']} {row['shape']}: {row['relative_error']:.2e}"
            for row in self.rows
            if row["tolerance"] is not None and not row["relative_error"] <= row["tolerance"]
        ]
        if self.loudness.peak and not self.loudness.loud_enough():
            found.append(f"the weights are not loud enough to prove anything: {self.loudness.summary()}")
        return found

    def free(self) -> None:
        """Free cached device memory."""
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()


def main(argv: list[str] | None = None) -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser(prog="python -m zimage_rt.benchmarks.full_size_parity")
    parser.add_argument(
        "--backend", default="cuda", help="backend of the engine, or `export` for the exporter's torch modules"
    )
    parser.add_argument(
        "--precisions", type=lambda text: text.split(","), default=["bf16", "fp16"], help="comma-separated"
    )
    parser.add_argument("--size", choices=SIZES, default="full", help="size of the model")
    parser.add_argument("--layers", type=int, default=1, help="main layers (and text encoder layers) of judged modules")
    parser.add_argument("--refiner-layers", type=int, default=1, help="refiner layers of judged modules")
    parser.add_argument("--outliers", action="store_true", help="outlier channels before every quantised product")
    parser.add_argument("--skip-modules", action="store_true", help="only run the full depth")
    parser.add_argument("--skip-end-to-end", action="store_true", help="do not run the full depth")
    parser.add_argument("--seed", type=int, default=0, help="seed of weights and inputs")
    parser.add_argument("--device", default=default_device(), help="device of the references")
    parser.add_argument(
        "--bundles", type=Path, default=Path("/tmp/zimage-parity-bundles"), help="folder of our bundles"
    )
    parser.add_argument("--nano", type=Path, default=NANO, help="the small checkpoint, for its tokenizer")
    parser.add_argument("--json", type=Path, help="file to write the report to")
    arguments = parser.parse_args(argv)
    if unknown := set(arguments.precisions) - set(TOLERANCES):
        parser.error(f"--precisions: expected any of {', '.join(TOLERANCES)}, got {', '.join(unknown)}")
    blocks = arguments.layers + arguments.refiner_layers
    if not arguments.skip_modules and blocks > 1 and set(arguments.precisions) & set(PER_BLOCK):
        parser.error(
            f"{', '.join(PER_BLOCK)} are judged per block: add --layers 1 --refiner-layers 0 or --skip-modules"
        )
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    start = time.perf_counter()
    parity = Parity(arguments)
    stopped: list[str] = []
    try:
        if not arguments.skip_modules:
            parity.judge()
        if not arguments.skip_end_to_end:
            parity.end_to_end()
    except (ZImageError, torch.OutOfMemoryError) as error:
        stopped.append(f"stopped: {type(error).__name__}: {error}")
    loudness = parity.loudness.summary() if parity.loudness.peak else {}
    for name, value in loudness.items():
        print(f"{name}: {value:.3g}")
    failures = stopped + parity.failures()
    print("\n".join(failures) or f"all within {TOLERANCES}", f"({time.perf_counter() - start:.0f} s)")
    if arguments.json:
        report = {
            "gpu": gpu_state(),
            "versions": versions(),
            "backend": arguments.backend,
            "layers": [arguments.layers, arguments.refiner_layers],
            "outliers": arguments.outliers,
            "loudness": loudness,
            "rows": parity.rows,
            "failures": failures,
        }
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
