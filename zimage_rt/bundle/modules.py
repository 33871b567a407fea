"""The table of module kinds: their inputs and outputs, how often they run, and whether LoRAs patch them.

A new kind of module is one line here; the exporter, the manifest's check, the engine and the LoRAs read the table.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Literal

VAES = ("tiny", "full")

# How often a module runs: once per prompt, per evaluation of the loop, or per image.
Runs = Literal["prompt", "evaluation", "image"]


@dataclasses.dataclass(frozen=True)
class ModuleKind:
    """One kind of module.

    Attributes:
        inputs, outputs: the names of its tensors.
        runs: how often it runs.
        eager: whether it is loaded with the engine; others are loaded on first use.
        takes_loras: whether LoRAs patch its weights. No two such modules have a layer of the same name.
    """

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    runs: Runs
    eager: bool = False
    takes_loras: bool = False


MODULES: Mapping[str, ModuleKind] = {
    "text_encoder": ModuleKind(("input_ids",), ("prompt_embeds",), "prompt", eager=True, takes_loras=True),
    "context_refiner": ModuleKind(("prompt_embeds",), ("context",), "prompt", eager=True, takes_loras=True),
    "transformer": ModuleKind(
        ("latents", "timestep", "context"), ("noise_pred",), "evaluation", eager=True, takes_loras=True
    ),
    # The transformer together with a ControlNet; it reads the transformer's weights too (`ModuleSpec.base`).
    "controlnet": ModuleKind(
        ("latents", "timestep", "context", "control_latents", "control_scale"), ("noise_pred",), "evaluation"
    ),
    **{f"{vae}_vae_encoder": ModuleKind(("image",), ("latents",), "image") for vae in VAES},
    **{f"{vae}_vae_decoder": ModuleKind(("latents",), ("image",), "image") for vae in VAES},
}

EAGER_MODULES = tuple(name for name, kind in MODULES.items() if kind.eager)
LORA_MODULES = tuple(name for name, kind in MODULES.items() if kind.takes_loras)


def runs(name: str) -> Runs | None:
    """How often a module runs; None for a module that is not in the table."""
    return MODULES[name].runs if name in MODULES else None


def vae_encoder(vae: str) -> str:
    """The module that encodes images for a VAE, `tiny` or `full`."""
    return f"{vae}_vae_encoder"


def vae_decoder(vae: str) -> str:
    """The module that decodes the latents of a VAE, `tiny` or `full`."""
    return f"{vae}_vae_decoder"


def denoiser(control: bool) -> str:
    """The module that evaluations of the loop run, with or without a control image."""
    return "controlnet" if control else "transformer"
