"""Times the matrix products of a block in int8, float8 and bf16, each as a block runs it, on Gaussian numbers.

    python -m zimage_rt.benchmarks.quantized_products
    python -m zimage_rt.benchmarks.quantized_products --rows 1152 --json products.json
    python -m zimage_rt.benchmarks.quantized_products --errors

Needs `_cuda_kernels`, which `make cuda` builds in a working tree. A layer is the product with its epilogue: heads
rotated behind qkv, SwiGLU behind w1 and w3. Weights are read from memory, and precisions take turns in bursts, because
the card's limit is its power (LOG.md). `+ rows` quantises what SwiGLU gives, as w2 needs it. `portable` is the 8-bit
product for other GPUs.

`--errors` measures closeness instead, on fresh numbers: weights quantised as the exporter does, rows quantised on the
GPU, the product, beside float64 of the bf16 operands. It fails beyond `TARGETS`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from zimage_rt.benchmarks.outliers import FACTOR, channels
from zimage_rt.benchmarks.random_checkpoint import Z_IMAGE
from zimage_rt.export.modeling.quantized import quantized_columns, rotated, rotation_group
from zimage_rt.export.precision import PRECISIONS

from zimage_rt.backends.cuda_libraries import find_library

# Largest relative error of one product. Rounding Gaussian numbers gives 0.0122 and 0.0375; the rest is fast sums.
TARGETS = {"int8": 0.015, "fp8": 0.040}
SYSTEMS = ("bf16", "int8", "int8 + rows", "float8", "float8 + rows", "int8 portable", "float8 portable")


def shapes() -> dict[str, tuple[str, int, int]]:
    """Layer → kind, inputs and outputs, of Z-Image's blocks."""
    dim = int(Z_IMAGE["transformer"]["dim"])
    hidden = int(dim / 3 * 8)
    return {
        "qkv": ("qk_norm_rope", dim, 3 * dim),
        "out": ("linear", dim, dim),
        "w1+w3": ("swiglu", dim, 2 * hidden),
        "w2": ("linear", hidden, dim),
    }


def gaussian(rng: np.random.Generator, rows: int, columns: int, scale: float) -> np.ndarray:
    """Normal numbers in bf16, as the uint16 of their bits, truncated."""
    values = rng.standard_normal((rows, columns), np.float32) * np.float32(scale)
    return (values.view(np.uint32) >> 16).astype(np.uint16)


def layers(kernels: Any, kind: str, x: np.ndarray, weight: np.ndarray, rotation: str) -> dict[str, Any]:
    """A layer in each way that this GPU runs it."""
    library = find_library("cublasLt")
    made = {"bf16": kernels.LinearLayer(library, kind, x, weight)}
    for dtype in ("int8", "float8"):
        (left, left_scales), (right, right_scales) = (
            kernels.quantize_rows(matrix, dtype, rotation) for matrix in (x, weight)
        )
        make = partial(
            kernels.LinearLayer,
            library,
            kind,
            left,
            right,
            left_scales,
            right_scales,
            rotation=rotation,
            weight_rotation=rotation,
        )
        if kernels.fused_gemm_runs_here():
            made[dtype] = make()
            if kind == "swiglu":
                made[f"{dtype} + rows"] = make(quantize_output=True)
        if kernels.mma_gemm_8bit_runs_here(dtype):
            made[f"{dtype} portable"] = make(fused=False)
    return made


def measure(kernels: Any, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Median milliseconds of each layer and precision, and its TFLOP/s."""
    rng = np.random.default_rng(0)
    results = []
    for name, (kind, inputs, outputs) in shapes().items():
        x = gaussian(rng, arguments.rows, inputs, 1.0)
        weight = gaussian(rng, outputs, inputs, inputs**-0.5)
        made = layers(kernels, kind, x, weight, arguments.rotation)
        times: dict[str, list[float]] = {system: [] for system in made}
        for layer in made.values():
            layer.time(3)  # loads the kernel, or lets cuBLASLt choose its algorithm
        for _ in range(arguments.rounds):
            for system, layer in made.items():
                times[system].append(layer.time(arguments.burst))
        flops = 2.0 * arguments.rows * inputs * outputs
        for system in SYSTEMS:
            if system in times:
                median = statistics.median(times[system])
                entry = {"layer": name, "system": system, "ms": median, "tflops": flops / median / 1e9}
                results.append(entry | {"of_bf16": median / statistics.median(times["bf16"])})
    return results


def _outliers(x: Tensor) -> Tensor:
    x[:, channels(x.shape[1])] *= FACTOR
    return x


INPUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "Gaussian": lambda x: x,
    "0.1 % of channels x 300": _outliers,
    "SwiGLU": lambda x: torch.nn.functional.silu(x) * torch.randn_like(x),
}


def exported(weight: Tensor, precision: str) -> tuple[np.ndarray, np.ndarray, str]:
    """A matrix [out, in] in 8 bits as the exporter stores it, with its scales and rotation, in the kernels' terms."""
    quantization = PRECISIONS[precision].quantization
    assert quantization is not None
    group = rotation_group(weight.shape[1], quantization)
    numbers, scales = quantized_columns(rotated(weight.float(), group).t(), quantization)
    codes = numbers.t().contiguous()
    if codes.dtype != torch.int8:
        codes = codes.view(torch.uint8)
    return codes.cpu().numpy(), scales.cpu().numpy(), "convrot" if group else "none"


def product_errors(kernels: Any, rows: int, device: str = "cuda") -> list[dict[str, Any]]:
    """Relative errors of the products of `out` and `w2` with every kind of input."""
    library = find_library("cublasLt")
    results = []
    for name in ("out", "w2"):
        _, inputs, outputs = shapes()[name]
        weight = (torch.randn(outputs, inputs, device=device) * inputs**-0.5).bfloat16()
        stored = {precision: exported(weight, precision) for precision in TARGETS}
        for kind, make in INPUTS.items():
            x = make(torch.randn(rows, inputs, device=device)).bfloat16()
            wanted = x.double() @ weight.double().t()
            bits = x.view(torch.int16).cpu().numpy().view(np.uint16)
            for precision, (codes, scales, rotation) in stored.items():
                dtype = "int8" if precision == "int8" else "float8"
                left, left_scales = kernels.quantize_rows(bits, dtype, rotation)
                runs_here = {
                    "fused": kernels.fused_gemm_runs_here(),
                    "portable": kernels.mma_gemm_8bit_runs_here(dtype),
                }
                for way in (way for way, runs in runs_here.items() if runs):
                    layer = kernels.LinearLayer(
                        library,
                        "linear",
                        left,
                        codes,
                        left_scales,
                        scales,
                        out_type="float32",
                        rotation=rotation,
                        weight_rotation=rotation,
                        fused=way == "fused",
                    )
                    error = torch.from_numpy(layer.run()).to(device).double() - wanted
                    relative = float(error.norm() / wanted.norm())
                    results.append(
                        {"layer": name, "input": kind, "precision": precision, "product": way, "error": relative}
                    )
    return results


def report_errors(results: list[dict[str, Any]]) -> int:
    """Prints the errors; 1 if one is beyond its target, or there are none."""
    failed = not results
    for entry in results:
        target = TARGETS[entry["precision"]]
        verdict = "ok" if entry["error"] <= target else "WRONG"  # NaN is wrong
        failed |= verdict != "ok"
        print("{layer:4} {input:24} {precision:5} {product:9} {error:.4f}".format(**entry), f"of {target:.3f}", verdict)
    return int(failed)


def main(argv: list[str] | None = None) -> int:
    """Print a table, and write it as JSON on request."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=4224, help="rows of the input: tokens of an image and a prompt")
    parser.add_argument("--burst", type=int, default=60, help="calls per burst")
    parser.add_argument("--rounds", type=int, default=7, help="bursts per precision")
    parser.add_argument("--rotation", default="convrot", choices=("none", "hadamard", "convrot"))
    parser.add_argument("--errors", action="store_true", help="measure errors instead of times; --rows of the input")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args(argv)
    try:
        kernels = importlib.import_module("zimage_rt._cuda_kernels")
    except ImportError as error:
        print(f"_cuda_kernels: {error}; run make cuda in a working tree", file=sys.stderr)
        return 1
    if arguments.errors:
        found = product_errors(kernels, arguments.rows)
        if arguments.json:
            arguments.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
        return report_errors(found)
    results = measure(kernels, arguments)
    print(f"{arguments.rows} rows, bursts of {arguments.burst}, medians of {arguments.rounds}")
    for entry in results:
        print("{layer:6} {system:16} {ms:8.4f} ms {tflops:7.0f} TFLOP/s {of_bf16:6.3f} of bf16".format(**entry))
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
