"""Writes ComfyUI's single files from a diffusers folder, and compares parity's reader with the exporter's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from zimage_rt.export.checkpoint import Component
from zimage_rt.export.parity.reference import load_reference


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
    """Checks that parity's reader and the exporter read the same numbers."""
    for name, tensor in load_reference(component).state_dict().items():
        ours = component.read(name, tuple(tensor.shape)).float()
        if exact:
            assert torch.equal(ours, tensor), name
        else:  # rotated: the sums round apart in the last bit
            torch.testing.assert_close(ours, tensor, rtol=1e-6, atol=1e-7 * float(tensor.abs().max()))


def ldm_vae(name: str) -> str:
    """diffusers' name of a VAE tensor -> ldm's (as ComfyUI has it)."""
    for i in range(4):
        name = name.replace(f"up_blocks.{i}.", f"up.{3 - i}.").replace(f"down_blocks.{i}.", f"down.{i}.")
    for i in range(2):
        name = name.replace(f"mid_block.resnets.{i}.", f"mid.block_{i + 1}.")
    for old, new in (
        ("mid_block.attentions.0.", "mid.attn_1."),
        ("resnets.", "block."),
        ("upsamplers.0.", "upsample."),
        ("downsamplers.0.", "downsample."),
        ("conv_shortcut", "nin_shortcut"),
        ("conv_norm_out", "norm_out"),
        ("group_norm", "norm"),
        ("to_out.0", "proj_out"),
        ("to_q", "q"),
        ("to_k", "k"),
        ("to_v", "v"),
    ):
        name = name.replace(old, new)
    return name


def write_single_file(checkpoint: Path, path: Path) -> None:
    """Writes a file with all models, under the names of ComfyUI's loaders."""
    source = load_file(checkpoint / "transformer" / "diffusion_pytorch_model.safetensors")
    tensors = comfyui_names(source)
    for name, tensor in load_file(checkpoint / "text_encoder" / "model.safetensors").items():
        tensors[f"text_encoders.qwen3_4b.transformer.model.{name}"] = tensor
    for name, tensor in load_file(checkpoint / "vae" / "diffusion_pytorch_model.safetensors").items():
        if "attentions" in name and tensor.ndim == 2:
            tensor = tensor[:, :, None, None]
        tensors["vae." + ldm_vae(name)] = tensor
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)
