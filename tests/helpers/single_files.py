"""Single files as ComfyUI has them, made of a diffusers folder's tensors; parity's reader beside the exporter's."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from zimage_rt.export import parity
from zimage_rt.export.checkpoint import Component


def comfyui_names(source: Mapping[str, Tensor], prefix: str = "model.diffusion_model.") -> dict[str, Tensor]:
    """A transformer's tensors under ComfyUI's names, queries, keys and values in one matrix."""
    tensors = {}
    for name, tensor in source.items():
        if ".to_k." in name or ".to_v." in name:
            continue
        if ".to_q." in name:
            parts = [source[name.replace("to_q", part)] for part in ("to_q", "to_k", "to_v")]
            name, tensor = name.replace("to_q", "qkv"), torch.cat(parts)
        for old, new in (
            ("all_x_embedder.2-1", "x_embedder"),
            ("all_final_layer.2-1", "final_layer"),
            ("to_out.0", "out"),
            ("norm_q", "q_norm"),
            ("norm_k", "k_norm"),
        ):
            name = name.replace(old, new)
        tensors[prefix + name] = tensor
    return tensors


def check_second_reader(component: Component, exact: bool = True) -> None:
    """Parity's own reader finds the numbers that the exporter does."""
    for name, tensor in parity.load_reference(component).state_dict().items():
        ours = component.read(name, tuple(tensor.shape)).float()
        if exact:
            assert torch.equal(ours, tensor), name
        else:  # rotated: the sums round apart in the last bit
            torch.testing.assert_close(ours, tensor, rtol=1e-6, atol=1e-7 * float(tensor.abs().max()))
