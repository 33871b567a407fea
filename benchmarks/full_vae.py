"""Times our full VAE beside diffusers' AutoencoderKL on one GPU, with random weights of the real architecture.

    python -m zimage_rt.benchmarks.full_vae --size 1024
    python -m zimage_rt.benchmarks.full_vae --size 1024 2048 --dtype float16 --json full_vae.json

Decoding ends in uint8 with ours and in bf16 with diffusers; encoding starts likewise. diffusers runs in bf16 and
channels_last, once eager and once compiled. Systems are interleaved in bursts. Decibels are against diffusers in fp32,
relative to the range of its output. Memory is the peak beyond the weights.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file
from zimage_rt.benchmarks.random_checkpoint import Z_IMAGE
from zimage_rt.benchmarks.timing import Run, interleave, timed

from zimage_rt import _cuda
from zimage_rt.backends.cuda import weight_entries
from zimage_rt.backends.cuda_libraries import find_library
from zimage_rt.bundle.modules import vae_decoder, vae_encoder

DECODER, ENCODER = vae_decoder("full"), vae_encoder("full")
FACTOR = 8  # pixels per latent


def make_vae(widths: tuple[int, ...] | None = None, seed: int = 0) -> diffusers.AutoencoderKL:
    """A random AutoencoderKL in fp32, of the real widths or of others; norms have random weights too."""
    config: dict[str, Any] = {key: value for key, value in Z_IMAGE["vae"].items() if not key.startswith("_")}
    if widths is not None:
        config["block_out_channels"] = widths
    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKL(**config)
    for name, parameter in vae.named_parameters():
        if "norm" in name:
            parameter.data.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
    return vae.requires_grad_(False).eval()


def write_weights(vae: diffusers.AutoencoderKL, path: Path, half: str, dtype: torch.dtype) -> None:
    """Write `decoder` or `encoder` as the exporter does: linear layers as [in, out], their biases and norms in fp32."""
    tensors = {}
    for name, tensor in vae.state_dict().items():
        if not name.startswith(f"{half}."):
            continue
        linear = ".to_" in name
        if linear and name.endswith("weight"):
            tensor = tensor.t()
        keeps = "norm" in name or (linear and name.endswith("bias"))
        tensors[name] = tensor.to(torch.float32 if keeps else dtype).contiguous().cpu()
    save_file(tensors, path)


def native_pipeline(vae: diffusers.AutoencoderKL, folder: Path, dtype: str, fused_gemm: bool = True) -> _cuda.Pipeline:
    """Our pipeline with both halves of a VAE, whose weights are stored in `dtype`."""
    pipeline = _cuda.Pipeline(
        device=0,
        cublaslt=find_library("cublasLt"),
        cudnn="",
        cache_file="",
        memory_limit=0,
        keep_text_encoder=True,
        fused_gemm=fused_gemm,
    )
    for module, half in ((DECODER, "decoder"), (ENCODER, "encoder")):
        path = folder / f"{module}.safetensors"
        write_weights(vae, path, half, getattr(torch, dtype))
        pipeline.load(module, str(path), weight_entries(path), dict(vae.config))
    return pipeline


@torch.no_grad()
def reference_decode(vae: diffusers.AutoencoderKL, latents: np.ndarray) -> np.ndarray:
    """The transformer's latents to images by diffusers, one by one."""
    z = torch.from_numpy(latents).to(vae.device) / vae.config.scaling_factor + vae.config.shift_factor
    return np.concatenate([vae.decode(z[i : i + 1]).sample.float().cpu().numpy() for i in range(len(z))])


@torch.no_grad()
def reference_encode(vae: diffusers.AutoencoderKL, image: np.ndarray) -> np.ndarray:
    """Images to the transformer's latents by diffusers: the mean of the posterior."""
    x = torch.from_numpy(image).to(vae.device)
    means = [vae.encode(x[i : i + 1]).latent_dist.mean.float().cpu().numpy() for i in range(len(x))]
    return (np.concatenate(means) - vae.config.shift_factor) * vae.config.scaling_factor


def signal_to_noise(values: np.ndarray, reference: np.ndarray) -> float:
    """PSNR in dB, relative to the range of the reference; NaN gives NaN."""
    error = float(np.mean((values.astype(np.float64) - reference) ** 2))
    span = float(reference.max() - reference.min())
    return float(10 * np.log10(span**2 / error)) if error != 0 else 200.0


def _exact() -> None:
    """Makes fp32 in torch be fp32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


class Diffusers:
    """diffusers in bf16 and channels_last, as runs that take and give tensors on the device."""

    def __init__(self, vae: diffusers.AutoencoderKL, size: int, mode: str | None) -> None:
        self.vae = vae
        latents = torch.randn(1, 16, size // FACTOR, size // FACTOR, device=vae.device, dtype=vae.dtype)
        image = torch.rand(1, 3, size, size, device=vae.device, dtype=vae.dtype) * 2 - 1
        self.latents, self.image = (x.to(memory_format=torch.channels_last) for x in (latents, image))
        compiled = (lambda function: torch.compile(function, mode=mode)) if mode else (lambda function: function)
        self._decode, self._encode = compiled(vae.decoder), compiled(vae.encoder)

    def runs(self) -> dict[str, Run]:
        """Decoding and encoding."""
        return {
            "decode": timed(torch.no_grad()(lambda: self._decode(self.latents)), "cuda"),
            "encode": timed(torch.no_grad()(lambda: self._encode(self.image)), "cuda"),
        }

    def peak(self) -> dict[str, float]:
        """Megabytes that each takes beyond what is allocated before it."""
        found = {}
        for name, run in self.runs().items():
            run(1)
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run(1)
            found[name] = (torch.cuda.max_memory_allocated() - before) / 1e6
        return found


def _quality(pipeline: _cuda.Pipeline, vae: diffusers.AutoencoderKL, half: diffusers.AutoencoderKL, size: int) -> Any:
    """Decibels against fp32 of ours and of diffusers in bf16."""
    rng = np.random.default_rng(0)
    latents = rng.standard_normal((1, 16, size // FACTOR, size // FACTOR), np.float32)
    image = np.tanh(rng.standard_normal((1, 3, size, size), np.float32))
    decoded, encoded = reference_decode(vae, latents), reference_encode(vae, image)
    scale, shift = vae.config.scaling_factor, vae.config.shift_factor
    z = torch.from_numpy(latents).cuda() / scale + shift
    with torch.no_grad():
        theirs = half.decode(z.to(half.dtype)).sample.float().cpu().numpy()
        mean = half.encode(torch.from_numpy(image).cuda().to(half.dtype)).latent_dist.mean.float().cpu().numpy()
    return {
        "ours": {
            "decode": signal_to_noise(pipeline.decode(latents, DECODER), decoded),
            "encode": signal_to_noise(pipeline.encode_image(image, ENCODER), encoded),
        },
        "diffusers bf16": {
            "decode": signal_to_noise(theirs, decoded),
            "encode": signal_to_noise((mean - shift) * scale, encoded),
        },
    }


def _kernels(pipeline: _cuda.Pipeline, size: int) -> list[str]:
    """Our decoder's kernels in their order, each with its microseconds, launched one by one."""
    latents = np.random.default_rng(0).standard_normal((1, 16, size // FACTOR, size // FACTOR), np.float32)
    pipeline.decode_pixels(latents, DECODER)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        pipeline.decode_pixels(latents, DECODER)
        torch.cuda.synchronize()
    events = sorted((event for event in profile.events() or []), key=lambda event: event.time_range.start)
    return [f"{event.time_range.elapsed_us():9.1f} {event.name[:120]}" for event in events]


def measure(size: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one size."""
    side = size // FACTOR
    vae = make_vae().cuda()
    half = make_vae().to("cuda", torch.bfloat16).to(memory_format=torch.channels_last)
    with tempfile.TemporaryDirectory() as folder:
        ours = native_pipeline(vae, Path(folder), arguments.dtype)
        portable = native_pipeline(vae, Path(folder), arguments.dtype, fused_gemm=False) if arguments.portable else None
    systems = {"diffusers eager": Diffusers(half, size, None)}
    if arguments.compile:
        systems["diffusers compiled"] = Diffusers(half, size, arguments.compile)
    runs: dict[str, Run] = {}
    for name, pipeline in (("ours", ours), ("ours, portable kernels", portable)):
        if pipeline is not None:
            runs[f"{name}: decode"] = partial(pipeline.time_decode, DECODER, side, side)
            runs[f"{name}: encode"] = partial(pipeline.time_encode, ENCODER, side, side)
    for name, system in systems.items():
        runs |= {f"{name}: {work}": run for work, run in system.runs().items()}
    times = interleave(runs, arguments.rounds, arguments.repeats)
    weights = ours.memory()["weights"]
    result = {
        "size": size,
        "milliseconds": {name: statistics.median(values) for name, values in times.items()},
        "peak_megabytes": {
            "ours": ours.memory()["workspace"] / 1e6,
            **{name: system.peak() for name, system in systems.items()},
        },
        "weights_megabytes": {"ours": weights / 1e6},
    }
    if arguments.kernels:
        result["kernels"] = _kernels(ours, size)
    if not arguments.no_quality:
        del systems, runs
        result["decibels"] = _quality(ours, vae, half, size)
    return result


def main() -> None:
    """Measure and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, nargs="+", default=[1024], help="pixels of a side")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"], help="our weights'")
    parser.add_argument("--compile", default="max-autotune-no-cudagraphs", help="mode of torch.compile; '' for none")
    parser.add_argument("--portable", action="store_true", help="also time the kernels of other GPUs")
    parser.add_argument("--no-quality", action="store_true", help="leave out the comparison with fp32")
    parser.add_argument("--kernels", action="store_true", help="also list our decoder's kernels with their times")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the result here")
    arguments = parser.parse_args()
    _exact()
    report = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "dtype": arguments.dtype,
        "results": [measure(size, arguments) for size in arguments.size],
    }
    text = json.dumps(report, indent=2)
    if arguments.json:
        arguments.json.write_text(text + "\n")
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    main()
