"""Reads single files for the reference models of parity, independently of `export/checkpoint/`.

The two readers share no code, so that a misread number format, scale or name shows as a parity error. If a reference
library has a loader (diffusers' names of single files, diffusers' GGUF), it is used. The rest follows the formats'
definitions in plain numpy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

Array = np.ndarray
Layer = dict[str, Array]

_PLAIN: Mapping[str, Any] = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "I8": "i1", "U8": "u1"}
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")


def _table(exponent_bits: int, mantissa_bits: int, bias: int, *, infinite: bool = False) -> Array:
    """The value of every bit pattern of a small float, by its definition (OCP 8-bit and MX specifications)."""
    patterns = np.arange(1 << (1 + exponent_bits + mantissa_bits))
    sign = np.where(patterns >> (exponent_bits + mantissa_bits), -1.0, 1.0)
    exponent = patterns >> mantissa_bits & ((1 << exponent_bits) - 1)
    mantissa = (patterns & ((1 << mantissa_bits) - 1)) / (1 << mantissa_bits)
    normal = np.exp2(exponent - float(bias)) * (1 + mantissa)
    values = sign * np.where(exponent == 0, mantissa * 2.0 ** (1 - bias), normal)
    if infinite:  # e5m2 follows IEEE 754
        top = exponent == (1 << exponent_bits) - 1
        values = np.where(top, np.where(mantissa == 0, sign * np.inf, np.nan), values)
    elif exponent_bits == 4:  # e4m3 has one NaN of each sign and no infinity
        values = np.where(patterns & 127 == 127, np.nan, values)
    return values


_E4M3, _E5M2, _E2M1 = _table(4, 3, 7), _table(5, 2, 15, infinite=True), _table(2, 1, 1)
_E8M0 = np.exp2(np.arange(256) - 127.0)


def _header(path: Path) -> tuple[dict[str, Any], int]:
    """A safetensors file's header and the offset of its data."""
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)), 8 + size


class _File:
    """Tensors of a safetensors file as numpy arrays; fp8 stays bytes."""

    def __init__(self, path: Path) -> None:
        self.entries, self.start = _header(path)
        self.metadata: Mapping[str, str] = self.entries.pop("__metadata__", {})
        self.data = np.memmap(path, np.uint8, "r")

    def dtype(self, name: str) -> str:
        """A tensor's dtype in the file's terms."""
        return str(self.entries[name]["dtype"])

    def read(self, name: str) -> Array:
        """The stored numbers; bf16 as fp32, fp8 as bytes."""
        entry = self.entries[name]
        first, last = (self.start + offset for offset in entry["data_offsets"])
        data, kind = self.data[first:last], entry["dtype"]
        if kind == "BF16":
            wide = data.view("<u2").astype(np.uint32) << 16
            return wide.view(np.float32).reshape(entry["shape"])
        return data.view(_PLAIN.get(kind, "u1")).reshape(entry["shape"])

    def numbers(self, name: str) -> Array:
        """A tensor's values without scales."""
        table = {"F8_E4M3": _E4M3, "F8_E5M2": _E5M2, "F8_E8M0": _E8M0}.get(self.dtype(name))
        return self.read(name) if table is None else table[self.read(name)]

    def bytes(self, name: str) -> Array:
        """A tensor's bytes, [rows, bytes per row]."""
        return np.ascontiguousarray(self.read(name)).view(np.uint8)

    def layer_metadata(self) -> dict[str, dict[str, Any]]:
        """Metadata of each quantised layer."""
        found = {
            name.removesuffix(".comfy_quant"): json.loads(self.read(name).tobytes())
            for name in self.entries
            if name.endswith(".comfy_quant")
        }
        header = json.loads(self.metadata.get("_quantization_metadata", '{"layers": {}}'))["layers"]
        for layer, value in header.items():
            weight = next(name for name in self.entries if f".{name}".endswith(f".{_bare(layer)}.weight"))
            found[weight.removesuffix(".weight")] = value if isinstance(value, dict) else {"format": value}
        return found


def _bare(layer: str) -> str:
    for prefix in _PREFIXES:
        layer = layer.removeprefix(prefix)
    return layer


def _hadamard(size: int) -> Array:
    """ConvRot's matrix: an odd number of base-4 digits of row and column that add up to 3 gives -1; over √size."""
    row, column = np.indices((size, size))
    signs = np.ones((size, size))
    place = 1
    while place < size:
        signs[(row // place % 4) + (column // place % 4) == 3] *= -1
        place *= 4
    return signs / np.sqrt(size)


def _unrotated(x: Array, size: int) -> Array:
    rows, columns = x.shape
    return (x.reshape(rows, columns // size, size) @ _hadamard(size)).reshape(rows, columns)


def _untiled(scales: Array, rows: int, columns: int) -> Array:
    """Block scales from cuBLAS' tiles, by the index formula of cuBLAS' documentation."""
    row, column = np.indices((rows, columns))
    tile = row // 128 * -(-columns // 4) + column // 4
    return scales.reshape(-1)[tile * 512 + row % 32 * 16 + row % 128 // 32 * 4 + column % 4]


def _spread(scale: Array, columns: int) -> Array:
    """[rows, groups] -> [rows, columns]."""
    return np.repeat(scale, columns // scale.shape[1], axis=1)


def _halves(packed: Array, *, high_first: bool) -> Array:
    result = np.empty((packed.shape[0], 2 * packed.shape[1]), np.int64)
    result[:, 0::2], result[:, 1::2] = (packed >> 4, packed & 15) if high_first else (packed & 15, packed >> 4)
    return result


def _layer(file: _File, name: str, metadata: Mapping[str, Any]) -> Array:
    """Values of a layer with metadata, fp64."""
    kind = metadata["format"]
    options = {**metadata.get("params", {}), **metadata}
    weight = f"{name}.weight"
    if kind in ("float8_e4m3fn", "float8_e5m2"):
        table = _E4M3 if kind.endswith("e4m3fn") else _E5M2
        scale = file.numbers(
            f"{name}.weight_scale" if f"{name}.weight_scale" in file.entries else f"{name}.scale_weight"
        )
        return table[file.bytes(weight)] * scale.reshape(-1, 1).astype(np.float64)
    if kind == "int8_tensorwise":
        x = file.read(weight) * file.numbers(f"{name}.weight_scale").reshape(-1, 1).astype(np.float64)
        return _unrotated(x, options.get("convrot_groupsize", 256)) if options.get("convrot") else x
    packed = file.bytes(weight)
    if kind == "mxfp8":
        rows, columns = packed.shape
        return _E4M3[packed] * _spread(
            _untiled(_E8M0[file.bytes(f"{name}.weight_scale")], rows, columns // 32), columns
        )
    if kind == "nvfp4":
        x = _E2M1[_halves(packed, high_first=True)]
        rows, columns = x.shape
        x = x * _spread(_untiled(_E4M3[file.bytes(f"{name}.weight_scale")], rows, columns // 16), columns)
        x = x * file.numbers(f"{name}.weight_scale_2").astype(np.float64).reshape(())
        before = f"{name}.pre_quant_scale"
        return x * file.numbers(before).astype(np.float64).reshape(1, -1) if before in file.entries else x
    if kind == "convrot_w4a4":
        codes = _halves(packed, high_first=False)
        x = (codes - 16 * (codes >= 8)) * file.numbers(f"{name}.weight_scale").reshape(-1, 1).astype(np.float64)
        return _unrotated(x, options.get("convrot_groupsize", 256))
    if kind == "awq_w4a16":
        codes = _halves(packed, high_first=False) - 8.0
        zero = f"{name}.weight_zeros" if f"{name}.weight_zeros" in file.entries else f"{name}.weight_zero"
        scale, offset = (file.numbers(key).T.astype(np.float64) for key in (f"{name}.weight_scale", zero))
        return codes * _spread(scale, codes.shape[1]) + _spread(offset, codes.shape[1])
    if kind == "asym_w4a8_int8":
        return _grouped(file, name, packed, options)
    raise ValueError(f"layer {name!r}: no second reader for {kind!r}")


def _grouped(file: _File, name: str, packed: Array, options: Mapping[str, Any]) -> Array:
    """4- and 6-bit codes of int8 numbers; see `asym_w4a8_int8` of comfy-kitchen 0.2.40."""
    relative = file.bytes(f"{name}.weight_s_rel")
    rows = packed.shape[0]
    if file.dtype(f"{name}.weight_s_rel") in ("F8_E4M3", "U8"):
        scales = _E4M3[relative].astype(np.float32)
    else:
        scales = file.numbers(f"{name}.weight_s_rel").astype(np.float32)
    columns = scales.shape[1] * options.get("group_size", 16)
    low = _halves(packed[:, : columns // 2], high_first=False)
    if packed.shape[1] * 8 == columns * 6:
        column = np.arange(columns)
        high = packed[:, columns // 2 + column // 4] >> (2 * (column % 4)) & 3
        levels = (low + 16 * high - 32).astype(np.float32)
    elif f"{name}.weight_codebook" in file.entries:
        levels = file.numbers(f"{name}.weight_codebook").astype(np.float32)[low]
    else:
        levels = (low - 8).astype(np.float32)
    grid = np.clip(np.rint(levels * _spread(scales, columns)), -127, 127)
    x = grid * file.numbers(f"{name}.weight_s_channel").reshape(rows, 1).astype(np.float64)
    if f"{name}.weight_correction" in file.entries:
        x = x + _spread(file.numbers(f"{name}.weight_correction").T.astype(np.float64), columns)
    return _unrotated(x, options.get("convrot_groupsize", 256))


def _safetensors(path: Path, wanted: Callable[[str], bool]) -> dict[str, Array]:
    """Values of the tensors for which `wanted` is true, fp32, under the file's names."""
    file = _File(path)
    layers, result = file.layer_metadata(), dict[str, Array]()
    for name in filter(wanted, file.entries):
        stem, _, leaf = name.rpartition(".")
        if leaf not in ("weight", "bias") and not leaf.endswith("pad_token"):
            continue
        if leaf == "weight" and stem in layers:
            value = _layer(file, stem, layers[stem])
        elif leaf == "weight" and f"{stem}.weight_scale_inv" in file.entries:
            value, scale = file.numbers(name), file.numbers(f"{stem}.weight_scale_inv").astype(np.float64)
            row, column = np.indices(value.shape)
            value = value * scale[row // 128, column // 128]
        else:
            value = file.numbers(name)
            for scale_name in (f"{stem}.weight_scale", f"{stem}.scale_weight"):
                if leaf == "weight" and scale_name in file.entries:
                    value = value * file.numbers(scale_name).astype(np.float64).reshape(-1, 1)
        result[name] = value.astype(np.float32)
    return result


def _gguf(path: Path, wanted: Callable[[str], bool]) -> dict[str, Array]:
    """As `_safetensors`, for a GGUF file, by diffusers' dequantisation (in torch, independent of gguf-py's)."""
    import gguf
    from diffusers.quantizers.gguf.utils import dequantize_functions

    reader, result = gguf.GGUFReader(path), {}
    for tensor in filter(lambda tensor: wanted(tensor.name), reader.tensors):
        shape = [int(size) for size in tensor.shape[::-1]]
        field = reader.get_field(f"comfy.gguf.orig_shape.{tensor.name}")
        if field is not None:
            shape = [int(field.parts[index][0]) for index in field.data]
        function = dequantize_functions.get(tensor.tensor_type)
        if function is None or tensor.tensor_type.name in ("F32", "F16"):
            # diffusers has no reader for these.
            value = gguf.dequantize(tensor.data, tensor.tensor_type)
        else:
            block, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
            blocks = torch.from_numpy(np.array(tensor.data).view(np.uint8).reshape(-1, size))
            value = function(blocks, block, size, dtype=torch.float32).float().numpy()
        result[tensor.name] = np.asarray(value, np.float32).reshape(shape)
    return result


def _is_gguf(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _within(count: int) -> Callable[[str], bool]:
    """A predicate of names: the tensor belongs to one of the first `count` layers, or to no layer."""

    def within(name: str) -> bool:
        match = re.search(r"(?:^|[.])(?:layers|blk)[.](\d+)[.]", name)
        return match is None or int(match[1]) < count

    return within


def _tensors(arrays: Mapping[str, Array]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}  # copies: a file is read-only


def _transformer(path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_z_image_transformer_checkpoint_to_diffusers

    within = _within(config["n_layers"])

    def wanted(name: str) -> bool:
        return not name.startswith(("text_encoders.", "vae.")) and within(name)

    arrays = (_gguf if _is_gguf(path) else _safetensors)(path, wanted)
    converted: dict[str, Tensor] = convert_z_image_transformer_checkpoint_to_diffusers(
        {_bare(name): tensor for name, tensor in _tensors(arrays).items() if "all_" not in name}
    )
    # diffusers' function mistakes its own names for ComfyUI's, because they contain "x_embedder.".
    converted.update({_bare(name): tensor for name, tensor in _tensors(arrays).items() if "all_" in name})
    for name in ("x_pad_token", "cap_pad_token"):
        converted[name] = converted[name].reshape(1, -1)
    return converted


def _text_encoder(path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    within = _within(config["num_hidden_layers"])
    if _is_gguf(path):
        import gguf

        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, config["num_hidden_layers"])
        arrays = _gguf(path, within)
        found = {}
        for name in _parameters(config):
            own = names.get_name(f"model.{name}", try_suffixes=(".weight", ".bias"))
            if own in arrays:
                found[name] = arrays[own]
        return _tensors(found)

    def wanted(name: str) -> bool:
        inside = name.startswith("text_encoders.") or not any(n.startswith("text_encoders.") for n in names_of)
        return inside and within(name)

    names_of = _header(path)[0]
    arrays = _safetensors(path, wanted)
    return _tensors(
        {
            re.sub(r"^(text_encoders\.[^.]+\.transformer\.)?(model\.)?", "", name): array
            for name, array in arrays.items()
        }
    )


def _parameters(config: Mapping[str, Any]) -> list[str]:
    from transformers import Qwen3Config, Qwen3Model

    with torch.device("meta"):
        return list(Qwen3Model(Qwen3Config(**config)).state_dict())


def _vae(path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    bundled = any(name.startswith("vae.") for name in _header(path)[0])
    arrays = _safetensors(path, lambda name: name.startswith("vae.") or not bundled)
    tensors = {name.removeprefix("vae."): tensor for name, tensor in _tensors(arrays).items()}
    if any(".mid_block." in name for name in tensors):
        return tensors
    converted: dict[str, Tensor] = convert_ldm_vae_checkpoint(tensors, config)
    return converted


def _controlnet(path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    from diffusers.loaders.single_file_utils import convert_z_image_controlnet_checkpoint_to_diffusers

    tensors = _tensors(_safetensors(path, lambda name: True))
    converted: dict[str, Tensor] = convert_z_image_controlnet_checkpoint_to_diffusers(tensors, config)
    return converted


_READERS: Mapping[str, Callable[[Path, Mapping[str, Any]], dict[str, Tensor]]] = {
    "transformer": _transformer,
    "text_encoder": _text_encoder,
    "vae": _vae,
    "controlnet": _controlnet,
}


def read(component: str, path: Path, config: Mapping[str, Any]) -> dict[str, Tensor]:
    """Reads a component from a single file: fp32 tensors under the reference model's names.

    Matrices of padded formats keep their padding. Layers beyond the config's number are left out.

    Args:
        component: `transformer`, `text_encoder`, `vae` or `controlnet`.
        path: a safetensors or GGUF file.
        config: the component's config.
    """
    return _READERS[component](path, config)
