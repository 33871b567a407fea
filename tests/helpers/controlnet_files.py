"""Random ControlNets for small checkpoints, of each kind that diffusers loads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import ZImageControlNetModel
from PIL import Image, ImageDraw
from safetensors.torch import load_file

# `add_control_noise_refiner` of the Fun-Union ControlNets 1, 2.0 and 2.1.
KINDS = (None, "control_layers", "control_noise_refiner")

WEIGHTS = "diffusion_pytorch_model.safetensors"


def make_controlnet(folder: Path, kind: str | None, **config: Any) -> Path:
    """Write one as diffusers does; its hints, which training begins from zero, are large enough to be seen."""
    generator = torch.Generator().manual_seed(1)
    sizes = {"dim": 384, "n_heads": 3, "n_kv_heads": 3, "n_refiner_layers": 1, "control_layers_places": [0, 2]}
    own = {
        "control_in_dim": 16 if kind is None else 33,
        "control_refiner_layers_places": None if kind is None else [0],
        "add_control_noise_refiner": kind,
    }
    net = ZImageControlNetModel(**{**sizes, **own, **config})
    for name, parameter in net.named_parameters():
        size = 0.2 if parameter.ndim == 1 else 0.5 / parameter.shape[-1] ** 0.5
        parameter.data = size * torch.randn(parameter.shape, generator=generator)
        if "norm" in name:
            parameter.data += 1.0
    net.save_pretrained(folder)
    return folder


def control_card() -> Image.Image:
    """A control image, 192 wide and 256 high."""
    image = Image.new("RGB", (192, 256), "black")
    draw = ImageDraw.Draw(image)
    draw.ellipse((30, 40, 160, 170), outline="white", width=6)
    draw.rectangle((20, 180, 170, 240), fill="orange")
    return image


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """A folder's weights by name."""
    return load_file(folder / WEIGHTS)
