"""Components of a checkpoint in diffusers' and transformers' own classes, on any device and in any dtype."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from zimage_rt.export.checkpoint import Component

THREADS = min(8, os.cpu_count() or 1)  # tensors that are read at once


def load_model(component: Component, dtype: torch.dtype, device: str, config: Mapping[str, Any] | None = None) -> Any:
    """Loads a component into transformers or diffusers, in `dtype` on `device`."""
    settings = {key: value for key, value in (config or component.config).items() if not key.startswith("_")}
    with torch.device("meta"):
        if component.name == "text_encoder":
            from transformers import Qwen3Config, Qwen3Model

            model: Any = Qwen3Model(Qwen3Config(**settings))
        else:
            import diffusers

            diffusers.logging.set_verbosity_error()
            kinds = {"transformer": diffusers.ZImageTransformer2DModel, "tiny_vae": diffusers.AutoencoderTiny}
            model = kinds[component.name].from_config(settings)
    wanted = list(model.state_dict())
    with ThreadPoolExecutor(THREADS) as pool:
        tensors = pool.map(lambda name: component.tensors[name].load().to(device, dtype), wanted)
        model.load_state_dict(dict(zip(wanted, tensors, strict=True)), strict=True, assign=True)
    if component.name == "text_encoder":
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        with torch.device(device):
            model.rotary_emb = Qwen3RotaryEmbedding(model.config)  # the file does not contain its buffers
    return model.eval().requires_grad_(False)


def shorter_encoder(component: Component) -> dict[str, Any]:
    """The text encoder's config without the last layer, which `hidden_states[-2]` does not need."""
    layers = component.config["num_hidden_layers"] - 1
    config = {**component.config, "num_hidden_layers": layers}
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:layers]
    return config


def run_encoder(model: Any, input_ids: Tensor) -> Tensor:
    """The input of the final norm, which is `hidden_states[-2]` of the full model."""
    outputs: list[Tensor] = []
    hook = model.norm.register_forward_pre_hook(lambda _, inputs: outputs.append(inputs[0]))
    try:
        model(input_ids=input_ids, use_cache=False)
    finally:
        hook.remove()
    return outputs[0]
