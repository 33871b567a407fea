"""`Checkpoint` and its components, under diffusers' and transformers' names."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from zimage_rt.bundle.json_codec import parse_json
from zimage_rt.bundle.manifest import shape_text

from ..errors import CheckpointError, TensorError
from .tensor import CheckpointTensor

# Parts with a config of their own, then all parts.
CONFIGURED = ("transformer", "text_encoder", "vae", "tiny_vae", "controlnet", "scheduler")
PARTS = (*CONFIGURED, "tokenizer")


@dataclasses.dataclass(frozen=True)
class Component:
    """A model of a checkpoint: its config and its tensors, under diffusers' or transformers' names.

    `folder` is the diffusers folder it was read from; None for a single file and for a model made in memory.
    """

    name: str
    config: Mapping[str, Any]
    tensors: Mapping[str, CheckpointTensor]
    files: tuple[Path, ...]
    folder: Path | None = None

    @property
    def elements(self) -> int:
        """Number of weights."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())

    def read(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Reads a tensor. Raises TensorError: it is missing or has another shape."""
        tensor = self.tensors.get(name)
        where = ", ".join(str(file) for file in self.files)
        if tensor is None:
            raise TensorError(
                f"{self.name}: tensor {name!r} of shape {shape_text(shape)} is missing in {where}; "
                "the checkpoint is incomplete: download it again"
            )
        if not tensor.fits(shape):
            raise TensorError(
                f"{self.name}: tensor {name!r}: expected {shape_text(shape)}, "
                f"got {shape_text(tensor.shape)} in {where}; config and weights do not belong together"
            )
        return tensor.load_as(shape)


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Parts of a Z-Image model. `tokenizer` is a folder; `tiny_vae`, `vae` and `controlnet` may be None."""

    format: str
    path: Path
    transformer: Component
    text_encoder: Component
    vae: Component | None
    tiny_vae: Component | None
    scheduler: Mapping[str, Any]
    tokenizer: Path
    controlnet: Component | None = None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object. Raises CheckpointError."""
    try:
        value = parse_json(path.read_bytes())
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the checkpoint is incomplete") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: expected an object, got {type(value).__name__}")
    return value
