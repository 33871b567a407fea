"""Compares the quantised layouts with the readers of those who write them: comfy-kitchen 0.2.40 and gguf.

    pip install comfy-kitchen==0.2.40
    python tests/hardware/checkpoint_formats.py

For every layout a random matrix is quantised by comfy-kitchen's own code, or by tests/helpers/quantized_files.py
where it only reads. It is stored under ComfyUI's names and read by the exporter; the judge is comfy-kitchen's eager
dequantisation on the CPU. That rounds scales to its output's dtype first: in fp32 it is the exporter's number, in bf16
within 0.4 %.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from comfy_kitchen.registry import registry
from comfy_kitchen.tensor import (
    AsymW4A8Int8Layout,
    TensorCoreAWQW4A16Layout,
    TensorCoreConvRotW4A4Layout,
    TensorCoreFP8Layout,
    TensorCoreMXFP8Layout,
    TensorCoreNVFP4Layout,
    TensorWiseINT8Layout,
)
from safetensors.torch import save_file
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from quantized_files import awq_w4a16
from zimage_rt.export.checkpoint import open_safetensors

ROWS, COLUMNS = 160, 768
# (layout, its class, options of `quantize`, the mark)
CASES: tuple[tuple[str, Any, Mapping[str, Any], Mapping[str, Any]], ...] = (
    ("float8_e4m3fn", TensorCoreFP8Layout, {}, {}),
    ("float8_e5m2", TensorCoreFP8Layout, {"dtype": torch.float8_e5m2}, {}),
    ("mxfp8", TensorCoreMXFP8Layout, {}, {}),
    ("nvfp4", TensorCoreNVFP4Layout, {}, {}),
    ("int8_tensorwise", TensorWiseINT8Layout, {}, {}),
    ("int8_tensorwise", TensorWiseINT8Layout, {"per_channel": True}, {}),
    (
        "int8_tensorwise",
        TensorWiseINT8Layout,
        {"per_channel": True, "convrot": True},
        {"convrot": True, "convrot_groupsize": 256},
    ),
    ("convrot_w4a4", TensorCoreConvRotW4A4Layout, {}, {"convrot_groupsize": 256}),
    ("asym_w4a8_int8", AsymW4A8Int8Layout, {}, {"group_size": 16, "convrot_groupsize": 256}),
    (
        "asym_w4a8_int8",
        AsymW4A8Int8Layout,
        {"symmetric": False},
        {"group_size": 16, "convrot_groupsize": 256},
    ),
    ("asym_w4a8_int8", AsymW4A8Int8Layout, {"bits": 6}, {"group_size": 16, "convrot_groupsize": 256}),
)


def read(tensors: Mapping[str, Tensor], mark: Mapping[str, Any]) -> Tensor:
    """What the exporter reads of a file with one layer."""
    stored = {f"layer.{name}": tensor.contiguous() for name, tensor in tensors.items()}
    stored["layer.comfy_quant"] = torch.frombuffer(bytearray(json.dumps(mark).encode()), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "one.safetensors"
        save_file(stored, path)
        tensor = open_safetensors(path)["layer.weight"]
        return tensor.load_as((ROWS, COLUMNS)).float().clone()


def report(name: str, ours: Tensor, exact: Tensor, half: Tensor) -> bool:
    """Print the largest relative differences; whether they are within what rounding explains."""
    size = float(ours.abs().max())
    precise = float((ours - exact.float()).abs().max()) / size
    rounded = float((ours - half.float()).norm() / ours.norm())
    right = precise < 1e-6 and rounded < 4e-3
    verdict = "right" if right else "WRONG"
    print(f"{name:<44} fp32 {precise:.1e} of the largest   bf16 {100 * rounded:.2f} %   {verdict}")
    return right


def main() -> int:
    """Exit code 1 where any layout differs."""
    torch.manual_seed(0)
    weight, right = torch.randn(ROWS, COLUMNS) * 0.05, []
    with registry.use_backend("eager"):
        for kind, layout, options, mark in CASES:
            numbers, params = layout.quantize(weight, **options)
            stored = {f"weight{ending}": part for ending, part in layout.state_dict_tensors(numbers, params).items()}
            ours = read(stored, {"format": kind, **mark})
            in_half = type(params)(**{**vars(params), "orig_dtype": torch.bfloat16})
            name = f"{kind} {dict(options) or ''}"
            exact, half = (layout.dequantize(numbers, one)[:ROWS, :COLUMNS] for one in (params, in_half))
            right.append(report(name, ours, exact, half))
        # It reads this one and writes none.
        written = awq_w4a16(weight.double().numpy())
        assert written is not None
        parts = written.tensors
        exact, half = (
            TensorCoreAWQW4A16Layout.dequantize(
                parts["weight"],
                TensorCoreAWQW4A16Layout.Params(
                    scale=parts["weight_scale"].to(dtype),
                    zeros=parts["weight_zeros"].to(dtype),
                    orig_dtype=dtype,
                    orig_shape=(ROWS, COLUMNS),
                ),
            )
            for dtype in (torch.float32, torch.bfloat16)
        )
        right.append(report("awq_w4a16", read(parts, written.mark or {}), exact, half))
    return 0 if all(right) else 1


if __name__ == "__main__":
    sys.exit(main())
