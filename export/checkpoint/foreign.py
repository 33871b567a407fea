"""Detects quantisations that are not supported, by tensor names, headers and configs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .layouts import ALTERNATIVES

# (ending or part of a tensor's name, its writer); the first match decides.
_SIGNS = (
    (".quant_state.bitsandbytes__nf4", "bitsandbytes nf4"),
    (".quant_state.bitsandbytes__fp4", "bitsandbytes fp4"),
    (".SCB", "bitsandbytes int8"),
    (".wscales", "nunchaku SVDQuant"),
    (".wtscale", "nunchaku SVDQuant"),
    (".smooth_factor", "nunchaku SVDQuant"),
    (".weight_proj_down", "ComfyUI's SVDQuant"),
    (".svd_up", "SDNQ"),
    (".svd_down", "SDNQ"),
    (".g_idx", "GPTQ"),
    (".qzeros", "AWQ or GPTQ"),
    (".weight_packed", "compressed-tensors"),
    (".weight._data", "optimum-quanto"),
    (".absmax", "bitsandbytes"),
)
# `quant_method` of a config.json.
_METHODS = {
    "bitsandbytes": "bitsandbytes",
    "svdquant": "nunchaku SVDQuant",
    "sdnq": "SDNQ",
    "torchao": "torchao",
    "quanto": "optimum-quanto",
    "gptq": "GPTQ",
    "awq": "AWQ",
    "compressed-tensors": "compressed-tensors",
    "modelopt": "NVIDIA ModelOpt",
}


def _refuse(where: str, what: str, sign: str) -> CheckpointError:
    return CheckpointError(f"{where} is quantised by {what} ({sign}), which is not read; {ALTERNATIVES}")


def check_names(names: Collection[str], metadata: Mapping[str, str], where: str) -> None:
    """Raises CheckpointError: the file's tensors or header belong to a quantisation that is not supported."""
    for sign, what in _SIGNS:
        for name in names:
            if sign in name:
                raise _refuse(where, what, f"it has {name!r}")
    text = metadata.get("quantization_config")
    if text is not None:
        what = next((what for method, what in _METHODS.items() if method in text.lower()), "a library unknown here")
        raise _refuse(where, what, "its header has 'quantization_config'")


def fp8_block(config: Mapping[str, Any], folder: Path) -> tuple[int, int] | None:
    """Block size of transformers' fp8 in a config.json; None without a `quantization_config`.

    Raises:
        CheckpointError: the config has another quantisation.
    """
    found = config.get("quantization_config") or config.get("compression_config")
    if not found:
        return None
    method = str(found.get("quant_method", "")) if isinstance(found, Mapping) else ""
    if method == "fp8":
        block = found.get("weight_block_size")
        if isinstance(block, list | tuple) and len(block) == 2 and all(isinstance(n, int) and n > 0 for n in block):
            return block[0], block[1]
        raise _refuse(str(folder), "fp8 without blocks", f"weight_block_size {block!r} in config.json")
    if method == "bitsandbytes":
        bits = "nf4 or fp4" if found.get("load_in_4bit") or found.get("_load_in_4bit") else "int8"
        raise _refuse(str(folder), f"bitsandbytes {bits}", "'quantization_config' in config.json")
    raise _refuse(
        str(folder),
        _METHODS.get(method, f"{method or 'a library unknown here'}"),
        "'quantization_config' in config.json",
    )
