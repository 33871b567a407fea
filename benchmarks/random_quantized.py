"""Writes quantised single files of random numbers at Z-Image's size, to measure how fast they are read.

    python -m zimage_rt.benchmarks.random_quantized /tmp/z.safetensors --layout int8_convrot

Names, shapes and the choice of quantised layers follow Comfy-Org's `z_image_turbo_int8_convrot` (857 tensors: five
matrices and the modulation of every block, the rest fp32) and `z_image_turbo_nvfp4` (993 tensors: only the main blocks,
the rest bf16). Scales keep activations near 1. One tensor is in memory at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import torch
import typer
from torch import Tensor
from zimage_rt.benchmarks.random_checkpoint import Z_IMAGE, plain, tensor_shapes

Make = Callable[[], Tensor]
# dtype in the file, shape, function that makes the numbers
Entry = tuple[str, tuple[int, ...], Make]

_NAMES = (
    ("all_x_embedder.2-1", "x_embedder"),
    ("all_final_layer.2-1", "final_layer"),
    ("to_out.0", "out"),
    ("norm_q", "q_norm"),
    ("norm_k", "k_norm"),
)
_MATRICES = ("qkv.weight", "out.weight", "w1.weight", "w2.weight", "w3.weight", "adaLN_modulation.0.weight")
_ITEM = {"F32": 4, "BF16": 2, "I8": 1, "U8": 1, "F8_E4M3": 1}


def comfyui_shapes() -> dict[str, tuple[int, ...]]:
    """The transformer's tensors under ComfyUI's names."""
    shapes: dict[str, tuple[int, ...]] = {}
    for name, shape in tensor_shapes("transformer", Z_IMAGE["transformer"]).items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            name, shape = name.replace("to_q", "qkv"), (3 * shape[0], *shape[1:])
        for old, new in _NAMES:
            name = name.replace(old, new)
        shapes[name] = shape
    return shapes


def _normal(shape: tuple[int, ...], mean: float, deviation: float, dtype: torch.dtype) -> Make:
    return lambda: torch.randn(shape).mul_(deviation).add_(mean).to(dtype)


def _int8(name: str, shape: tuple[int, ...]) -> Mapping[str, Entry]:
    rows, columns = shape
    scale = columns**-0.5 / 40  # the numbers' standard deviation is 40
    mark = b'{"format": "int8_tensorwise", "convrot": true, "convrot_groupsize": 256}'
    return {
        f"{name}.weight": ("I8", shape, lambda: torch.randn(shape).mul_(40).round_().clamp_(-127, 127).to(torch.int8)),
        f"{name}.weight_scale": ("F32", (rows, 1), lambda: torch.rand(rows, 1).add_(0.5).mul_(scale)),
        f"{name}.comfy_quant": ("U8", (len(mark),), lambda: torch.frombuffer(bytearray(mark), dtype=torch.uint8)),
    }


def _nvfp4(name: str, shape: tuple[int, ...]) -> Mapping[str, Entry]:
    rows, columns = shape
    packed, blocks = (rows, columns // 2), (-(-rows // 128) * 128, -(-columns // 64) * 4)
    whole = columns**-0.5 / 3 / 100  # codes are about 3, block scales about 100
    mark = b'{"format": "nvfp4"}'
    return {
        f"{name}.weight": ("U8", packed, lambda: torch.randint(0, 256, packed, dtype=torch.uint8)),
        f"{name}.weight_scale": (
            "F8_E4M3",
            blocks,
            lambda: torch.rand(blocks).add_(0.5).mul_(100).to(torch.float8_e4m3fn),
        ),
        f"{name}.weight_scale_2": ("F32", (), lambda: torch.tensor(whole)),
        f"{name}.input_scale": ("F32", (), lambda: torch.tensor(0.01)),
        f"{name}.comfy_quant": ("U8", (len(mark),), lambda: torch.frombuffer(bytearray(mark), dtype=torch.uint8)),
    }


# Function that makes a layer's tensors, prefixes of quantised layers, format of the other tensors.
LAYOUTS = {
    "int8_convrot": (_int8, ("layers.", "noise_refiner.", "context_refiner."), "F32", torch.float32),
    "nvfp4": (_nvfp4, ("layers.",), "BF16", torch.bfloat16),
}


def entries(layout: str) -> dict[str, Entry]:
    """Tensors of the file, in order."""
    quantized, prefixes, kind, dtype = LAYOUTS[layout]
    result: dict[str, Entry] = {}
    for name, shape in comfyui_shapes().items():
        if name.startswith(prefixes) and name.endswith(_MATRICES):
            result.update(quantized(name.removesuffix(".weight"), shape))
        else:
            result[name] = (kind, shape, _normal(shape, *plain("transformer", name, shape), dtype))
    return result


def write(path: Path, layout: str) -> int:
    """Writes the file; returns the bytes of its tensors."""
    tensors = entries(layout)
    header: dict[str, object] = {}
    position = 0
    for name, (kind, shape, _) in tensors.items():
        end = position + _ITEM[kind] * math.prod(shape)
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, _, make in tensors.values():
            file.write(make().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return position


def main(
    out: Annotated[Path, typer.Argument(help="File to write.")],
    layout: Annotated[
        str, typer.Option(help=f"Layout of the quantised layers: {' or '.join(LAYOUTS)}.")
    ] = "int8_convrot",
) -> None:
    """Write a quantised transformer of random numbers as a single file."""
    if layout not in LAYOUTS:
        raise typer.BadParameter(f"expected {' or '.join(LAYOUTS)}, got {layout!r}", param_hint="--layout")
    typer.echo(f"{out}: {write(out, layout) / 1e9:.2f} GB in {len(entries(layout))} tensors")


if __name__ == "__main__":
    typer.run(main)
