"""Random LoRAs for zimage-nano in every layout, and their effect on a torch model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from zimage_rt.bundle.manifest import Manifest
from zimage_rt.bundle.modules import LORA_MODULES

LAYERS = ("to_q", "to_k", "to_v", "to_out.0", "w1", "w2", "w3", "adaLN_modulation.0")


@dataclasses.dataclass(frozen=True)
class Lora:
    """Layer name → (down [rank, in], up [out, rank]), and what the product is divided by rank and multiplied by."""

    layers: Mapping[str, tuple[Tensor, Tensor]]
    alpha: float

    def deltas(self) -> Iterator[tuple[str, Tensor]]:
        """Change of each layer's weight."""
        for name, (down, up) in self.layers.items():
            yield name, up.double() @ down.double() * (self.alpha / len(down))


def random_lora(model: nn.Module, seed: int, alpha: float = 6.0, rank: int = 4, size: float = 0.4) -> Lora:
    """A LoRA of every kind of layer of a transformer; each change is `size` of the weight it changes."""
    generator = torch.Generator().manual_seed(seed)
    layers = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name.endswith(LAYERS):
            down = torch.randn(rank, layer.in_features, generator=generator)
            up = torch.randn(layer.out_features, rank, generator=generator)
            change = (up @ down).norm() * (alpha / rank)
            layers[name] = down, up * (size * layer.weight.norm() / change)
    return Lora(layers, alpha)


def peft(lora: Lora) -> dict[str, Tensor]:
    """As `save_lora_weights` writes it, the scale in the weights."""
    tensors = {}
    for name, (down, up) in lora.layers.items():
        tensors[f"transformer.{name}.lora_A.weight"] = down
        tensors[f"transformer.{name}.lora_B.weight"] = up * (lora.alpha / len(down))
    return tensors


def kohya(lora: Lora) -> dict[str, Tensor]:
    tensors = {}
    for name, (down, up) in lora.layers.items():
        own = "lora_unet_" + name.replace(".", "_")
        tensors[f"{own}.lora_down.weight"] = down
        tensors[f"{own}.lora_up.weight"] = up
        tensors[f"{own}.alpha"] = torch.tensor(lora.alpha)
    return tensors


def comfyui(lora: Lora) -> dict[str, Tensor]:
    """The original code's names; queries, keys and values are one matrix, its rank the sum of the three."""
    tensors = {}
    for name, (down, up) in lora.layers.items():
        if name.endswith(("to_k", "to_v")):
            continue
        own = name.replace("to_out.0", "out")
        if name.endswith("to_q"):
            three = [lora.layers[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            own = name.replace("to_q", "qkv")
            down, up = torch.cat([d for d, _ in three]), torch.block_diag(*(u for _, u in three)) * 3
        tensors[f"diffusion_model.{own}.lora_A.weight"] = down
        tensors[f"diffusion_model.{own}.lora_B.weight"] = up
        tensors[f"diffusion_model.{own}.alpha"] = torch.tensor(lora.alpha)
    return tensors


LAYOUTS: dict[str, Callable[[Lora], dict[str, Tensor]]] = {"peft": peft, "kohya": kohya, "comfyui": comfyui}


def write(path: Path, tensors: Mapping[str, Tensor], dtype: torch.dtype = torch.float32) -> Path:
    save_file({name: tensor.to(dtype).contiguous() for name, tensor in tensors.items()}, path)
    return path


def changed(model: nn.Module, lora: Lora, weight: float = 1.0) -> None:
    """Adds a LoRA to a torch model's weights."""
    with torch.no_grad():
        for name, delta in lora.deltas():
            model.get_submodule(name).weight += weight * delta.float()


def random_lora_of(manifest: Manifest, path: Path, seed: int, modules: tuple[str, ...] = LORA_MODULES) -> Path:
    """Writes a LoRA for every linear layer of a bundle's modules in PEFT's layout; needs no model."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in modules:
        prefix = "text_encoder" if module == "text_encoder" else "transformer"
        for name, place in manifest.modules[module].linears.items():
            down = torch.randn(5, place.in_features, generator=generator)
            up = torch.randn(place.columns, 5, generator=generator)
            tensors[f"{prefix}.{name}.lora_A.weight"] = down
            tensors[f"{prefix}.{name}.lora_B.weight"] = up * (0.1 / place.in_features**0.5)
    return write(path, tensors)
