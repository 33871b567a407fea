"""The weights of an upscale model's file, by name, whatever its format."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ...bundle.safetensors_file import TensorFile
from .pickled import Tensor
from .torch_file import TorchFile

# Numbers of a model: the usual ones have 17 million.
MAX_NUMBERS = 1 << 27
# Where files of training have their weights; ComfyUI looks for them in this order.
_NESTED = ("state_dict", "model_state_dict", "params_ema", "params-ema", "params", "model", "net")
# What wrappers put before every name.
_PREFIXES = ("module.", "netG.")


@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of a file; read on access.

    Attributes:
        shapes: by name.
        load: the numbers of a name, fp32.
        used: the names that were read.
    """

    shapes: Mapping[str, tuple[int, ...]]
    load: Callable[[str], np.ndarray]
    used: set[str] = dataclasses.field(default_factory=set)

    def read(self, name: str, *shape: int) -> np.ndarray:
        """The numbers of a name, fp32. Raises ValueError if it is missing, has another shape, or is not finite."""
        if name not in self.shapes:
            raise ValueError(f"expected {name} of {list(shape)}, got nothing; the file lacks a part of the model")
        if self.shapes[name] != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(self.shapes[name])}")
        try:
            found = self.load(name)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if not np.isfinite(found).all():
            raise ValueError(f"{name}: expected finite numbers, got NaN or infinity; the file is damaged")
        self.used.add(name)
        return found

    def renamed(self, rename: Callable[[str], str | None]) -> Weights:
        """These weights by other names, without those whose new name is None."""
        names = {new: name for name in self.shapes if (new := rename(name)) is not None}
        return Weights({new: self.shapes[name] for new, name in names.items()}, lambda new: self.load(names[new]))


def open_weights(path: Path) -> Weights:
    """The weights of a .safetensors file, or of a file of `torch.save`. Raises ValueError, or OSError."""
    if path.suffix.lower() in (".safetensors", ".sft"):
        tensors = TensorFile(path)
        weights = Weights({name: tensors.shape(name) for name in tensors.tensors}, tensors.read)
    else:
        file = TorchFile(path)
        state = _state(file.value)
        weights = Weights({name: tensor.shape for name, tensor in state.items()}, lambda name: file.read(state[name]))
    if not weights.shapes:
        raise ValueError("expected tensors by name, got none")
    count = sum(math.prod(shape) for shape in weights.shapes.values())
    if count > MAX_NUMBERS:
        raise ValueError(f"expected an upscale model of at most {MAX_NUMBERS} numbers, got {count}")
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in weights.shapes):
            weights = weights.renamed(lambda name, prefix=prefix: name.removeprefix(prefix))  # type: ignore[misc]
    return weights


def _state(value: Any) -> dict[str, Tensor]:
    """The tensors by name in what was saved: it, or a dict inside it."""
    for _ in range(4):
        if not isinstance(value, dict):
            break
        inner = next((value[key] for key in _NESTED if isinstance(value.get(key), dict)), None)
        if inner is None and len(value) == 1:
            (inner,) = value.values()
        if not isinstance(inner, dict):
            break
        value = inner
    if not isinstance(value, dict):
        raise ValueError("expected a dict of tensors, got another value; save the model's state_dict")
    return {name: tensor for name, tensor in value.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
