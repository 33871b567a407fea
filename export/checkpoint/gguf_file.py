"""Opens GGUF files with the `gguf` package: transformers under ComfyUI's names, text encoders under llama.cpp's."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import CheckpointError, ReaderUnavailable, TensorError
from .layouts import ALTERNATIVES
from .tensor import CheckpointTensor, Plain, Stored

if TYPE_CHECKING:
    import numpy as np

_CHUNK = 1 << 24  # values dequantised at once

# (llama.cpp's name, transformers' name) of a Qwen3's tensors, without `.weight` (gguf-py's tensor_mapping.py).
_QWEN3 = (
    (r"token_embd", "embed_tokens"),
    (r"output_norm", "norm"),
    (r"output", "lm_head"),
    (r"blk\.(\d+)\.attn_norm", r"layers.\1.input_layernorm"),
    (r"blk\.(\d+)\.attn_([qkv])", r"layers.\1.self_attn.\2_proj"),
    (r"blk\.(\d+)\.attn_output", r"layers.\1.self_attn.o_proj"),
    (r"blk\.(\d+)\.attn_([qk])_norm", r"layers.\1.self_attn.\2_norm"),
    (r"blk\.(\d+)\.ffn_norm", r"layers.\1.post_attention_layernorm"),
    (r"blk\.(\d+)\.ffn_(gate|up|down)", r"layers.\1.mlp.\2_proj"),
)
_PAD_TOKENS = ("x_pad_token", "cap_pad_token")


@dataclasses.dataclass(frozen=True)
class Ggml:
    """A tensor in one of ggml's block formats, which `gguf.dequantize` converts to fp32.

    Attributes:
        format: ggml's name, e.g. Q4_K.
        numbers: bytes of the blocks, a row per row of the tensor.
        kind: `gguf.GGMLQuantizationType`.
        shape: shape of the values.
    """

    format: str
    numbers: np.ndarray
    kind: Any
    shape: tuple[int, ...]

    def values(self) -> Tensor:
        """See `Stored`."""
        import gguf

        numbers = self.numbers.reshape(-1, self.numbers.shape[-1])
        row = max(1, math.prod(self.shape) // len(numbers))
        result, count = torch.empty(len(numbers), row), max(1, _CHUNK // row)
        for first in range(0, len(numbers), count):
            values = gguf.dequantize(numbers[first : first + count], self.kind)
            result[first : first + count] = torch.from_numpy(values)
        return result.reshape(self.shape)

    def rows(self, first: int, count: int) -> Stored:
        """See `Stored`."""
        if self.numbers.shape[0] != self.shape[0]:  # blocks across rows, as ComfyUI-GGUF may write
            return Plain(self.values()[first : first + count])
        return dataclasses.replace(self, numbers=self.numbers[first : first + count], shape=(count, *self.shape[1:]))


def is_gguf(path: Path) -> bool:
    """Whether a file begins with GGUF's magic number."""
    try:
        with path.open("rb") as file:
            return file.read(4) == b"GGUF"
    except OSError:
        return False


def open_gguf(path: Path) -> tuple[dict[str, CheckpointTensor], Mapping[str, Any]]:
    """Opens a file: its tensors under their own names, mapped, and its metadata without arrays.

    Raises:
        ReaderUnavailable: the `gguf` package is not installed.
        CheckpointError: the file is damaged.
        TensorError: a tensor is in a format that the package cannot dequantise.
    """
    try:
        import gguf
    except ImportError as error:
        raise ReaderUnavailable(
            f"{path} is a GGUF file, which the package 'gguf' reads; it is not installed: pip install 'zimage-rt[gguf]'"
        ) from error
    try:
        reader = gguf.GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items() if _small(name, field)}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise CheckpointError(
            f"{path} cannot be read: {error}; the file is damaged or still being downloaded"
        ) from error
    tensors: dict[str, CheckpointTensor] = {}
    for tensor in reader.tensors:
        shape = tuple(int(size) for size in reversed(tensor.shape.tolist()))
        original = metadata.get(f"comfy.gguf.orig_shape.{tensor.name}")
        if original is not None:
            original = tuple(int(size) for size in original)
            if math.prod(original) != math.prod(shape):
                raise TensorError(f"{path}: tensor {tensor.name!r}: {shape} cannot be the {original} that it says")
            shape = original
        kind = tensor.tensor_type
        if kind.name not in ("F32", "F16", "F64") and not _readable(kind):
            raise TensorError(
                f"{path}: tensor {tensor.name!r}: ggml's {kind.name} is not read by gguf {_version()}; {ALTERNATIVES}"
            )
        tensors[tensor.name] = _tensor(tensor.data, kind, shape)
    return tensors, metadata


def _tensor(data: np.ndarray, kind: Any, shape: tuple[int, ...]) -> CheckpointTensor:
    if kind.name in ("F32", "F16", "F64"):
        return CheckpointTensor.plain(shape, lambda: torch.from_numpy(data.copy()).reshape(shape))
    return CheckpointTensor(shape, lambda: Ggml(kind.name, data, kind, shape))


def _small(name: str, field: Any) -> bool:
    """Whether a metadata field is no long list, such as the tokenizer's."""
    return len(field.data) == 1 or name.startswith("comfy.gguf.orig_shape.")


def _version() -> str:
    import importlib.metadata

    return importlib.metadata.version("gguf")


def _readable(kind: Any) -> bool:
    import gguf
    import numpy as np

    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        return bool(gguf.dequantize(np.zeros((1, size), np.uint8), kind).size == block)
    except NotImplementedError:
        return False


def transformer_names(
    path: Path, tensors: Mapping[str, CheckpointTensor], metadata: Mapping[str, Any]
) -> dict[str, CheckpointTensor]:
    """The transformer's tensors, with pad tokens as matrices.

    stable-diffusion.cpp writes no architecture, so a file without one is accepted.

    Raises CheckpointError: the file's architecture is another one.
    """
    architecture = metadata.get("general.architecture")
    if architecture not in (None, "", "lumina2"):
        raise CheckpointError(
            f"{path} is a GGUF of {architecture!r}; expected 'lumina2', as ComfyUI-GGUF calls Z-Image's transformer"
        )
    result = dict(tensors)
    for name, tensor in tensors.items():
        if name.rpartition(".")[2] in _PAD_TOKENS and len(tensor.shape) == 1:
            result[name] = tensor.reshape((1, *tensor.shape))  # ggml drops leading dimensions of 1
    return result


def encoder_names(
    path: Path, tensors: Mapping[str, CheckpointTensor], metadata: Mapping[str, Any]
) -> tuple[dict[str, CheckpointTensor], dict[str, Any]]:
    """A text encoder's tensors under transformers' names, and config values from its metadata.

    Raises:
        CheckpointError: it is not a Qwen3, or has tensors that a Qwen3 does not have.
    """
    architecture = metadata.get("general.architecture")
    if architecture != "qwen3":
        raise CheckpointError(f"{path} is a GGUF of {architecture!r}; Z-Image's text encoder is a 'qwen3'")
    result: dict[str, CheckpointTensor] = {}
    for name, tensor in tensors.items():
        stem = name.removesuffix(".weight")
        for pattern, replacement in _QWEN3:
            if re.fullmatch(pattern, stem):
                result[re.sub(pattern, replacement, stem) + ".weight"] = tensor
                break
        else:
            if name != "rope_freqs.weight":
                raise CheckpointError(f"{path}: tensor {name!r} has no place in a Qwen3 text encoder")
    config: dict[str, Any] = {}
    theta = metadata.get("qwen3.rope.freq_base")
    if theta is not None:
        config["rope_parameters"] = {"rope_theta": float(theta), "rope_type": "default"}
    epsilon = metadata.get("qwen3.attention.layer_norm_rms_epsilon")
    if epsilon is not None:
        # The file has it in fp32, which holds 1e-6 inexactly.
        config["rms_norm_eps"] = float(f"{epsilon:.6g}")
    return result, config
