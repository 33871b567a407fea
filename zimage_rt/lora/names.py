"""Names of a bundle's layers in LoRA files."""

from __future__ import annotations

import re
from collections.abc import Mapping

import numpy as np

from ..bundle.manifest import LinearPlace, Manifest
from ..bundle.modules import LORA_MODULES
from ..bundle.safetensors_file import TensorFile
from ..errors import LoraError

# Prefixes that tools write before the checkpoint's name of a layer, any number of them.
_PREFIXES = re.compile(
    r"^(base_model\.model\.|default\.|transformer\.|model\.diffusion_model\.|diffusion_model\.|unet\.|text_encoder\."
    r"|text_encoders\.[^.]+\.(transformer\.)?|lora_unet__?|lora_transformer_|lora_te\d?_|lycoris_)*"
    r"(model[._])?"
)

# Parts of the checkpoint's names, and their spelling in the original code, ComfyUI and trainers, which
# export/checkpoint/single_file.py converts back.
_ALIASES = (
    (".attention.to_out.0", ".attention.out"),
    (".attention.to_out.0", ".attention.to_out"),
    (".attention.to_out.0", ".attention.out.0"),
    (".attention.to_out.0", ".attention.wo"),
    (".attention.norm_q", ".attention.q_norm"),
    (".attention.norm_k", ".attention.k_norm"),
    ("all_final_layer.2-1.", "final_layer."),
    ("all_x_embedder.2-1", "x_embedder"),
)


def strip_prefixes(name: str) -> str:
    """A layer's name without the prefixes of tools."""
    return _PREFIXES.sub("", name)


class LayerNames:
    """A bundle's linear layers by all their names."""

    def __init__(self, manifest: Manifest) -> None:
        self.places: dict[str, tuple[str, LinearPlace]] = {}
        for module in LORA_MODULES:
            for name, place in manifest.module(module).linears.items():
                self.places[name] = (module, place)
        if not self.places:
            raise LoraError(
                f"bundle {manifest.name!r} does not say where the checkpoint's layers lie in its weights; "
                "an older zimage-export made it: export it again to use LoRAs"
            )
        # Name in a file → the layers it stands for; a packed qkv stands for three.
        self._aliases: dict[str, tuple[str, ...]] = {}
        for name in self.places:
            meant: dict[str, tuple[str, ...]] = dict.fromkeys(_all_names(name), (name,))
            if name.endswith(".attention.to_q"):
                block = name.removesuffix("to_q")
                meant[f"{block}qkv"] = (name, f"{block}to_k", f"{block}to_v")
            for alias, names in meant.items():
                self._aliases[alias] = names
                self._aliases[alias.replace(".", "_")] = names
        self._idle = _idle_layers(manifest)

    def find(self, name: str) -> tuple[str, ...]:
        """The layers that a file's name stands for; empty if the bundle has no such layer."""
        return self._aliases.get(strip_prefixes(name)) or self._aliases.get(name, ())

    def is_idle(self, name: str) -> bool:
        """Whether the checkpoint has such a layer but never runs it for an image."""
        return self._idle.match(strip_prefixes(name)) is not None

    def summary(self) -> str:
        """The layers' names with ranges of their numbers: `layers.0…29.attention.to_q, …`."""
        numbers: dict[tuple[str, str], list[int]] = {}
        for name in self.places:
            match = re.match(r"(.*?layers|.*?refiner)\.(\d+)\.(.*)", name)
            key, number = ((match[1], match[3]), int(match[2])) if match else ((name, ""), 0)
            numbers.setdefault(key, []).append(number)
        return ", ".join(
            f"{first}.{'…'.join(map(str, dict.fromkeys((min(found), max(found)))))}.{rest}" if rest else first
            for (first, rest), found in numbers.items()
        )


class VectorNames:
    """A bundle's biases and norm weights by all their names, from its weight files."""

    def __init__(self, manifest: Manifest, files: Mapping[str, TensorFile]) -> None:
        # (name, part) → (module, tensor, width of a head that is stored half-split, or 0).
        self._places: dict[tuple[str, str], tuple[str, str, int]] = {}
        for module, file in files.items():
            split = manifest.module(module).config.get("rope_layout") == "half_split"
            for tensor in file.tensors:
                name, _, part = tensor.rpartition(".")
                if len(file.shape(tensor)) != 1 or part not in ("weight", "bias"):
                    continue
                head_dim = file.shape(tensor)[0] if split and name.endswith((".norm_q", ".norm_k")) else 0
                for alias in _all_names(name):
                    self._places[alias, part] = (module, tensor, head_dim)
                    self._places[alias.replace(".", "_"), part] = (module, tensor, head_dim)

    def find(self, name: str, part: str) -> tuple[str, str, int] | None:
        """Module, tensor and head width of a layer's `weight` or `bias`; None if the bundle has none."""
        return self._places.get((strip_prefixes(name), part)) or self._places.get((name, part))


def half_split(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows from the checkpoint's order to the stored one; see `LinearPlace.head_dim`. Shape `[rows, …]`."""
    if head_dim == 0:
        return rows
    return rows.reshape(-1, head_dim // 2, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _all_names(name: str) -> list[str]:
    return [name, *(name.replace(own, other) for own, other in _ALIASES if own in name)]


def _idle_layers(manifest: Manifest) -> re.Pattern[str]:
    """A pattern of layers that never run: the text encoder's last block and later layers, SigLIP's, and a norm.

    Z-Image reads the hidden states before that block; `norm_final` of the transformer's checkpoint is unused.
    """
    last = manifest.module("text_encoder").config.get("num_hidden_layers", 0) - 1
    parts = "self_attn|mlp|input_layernorm|post_attention_layernorm"
    return re.compile(rf"(layers[._]{last}[._]({parts})([._]|$)|siglip_|lm_head$|norm$|norm_final$)")
