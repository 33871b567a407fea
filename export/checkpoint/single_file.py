"""Opens ComfyUI's single `.safetensors` and `.gguf` files under diffusers' and transformers' names.

A file holds the transformer, with or without the prefix `model.diffusion_model.` or `diffusion_model.`. It can have
the text encoder under `text_encoders.<name>.transformer.model.`, and the VAE under `vae.` with ldm's or diffusers'
names. Sizes are derived from the tensors.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError
from .component import Checkpoint, Component, read_json
from .folder import read_component
from .gguf_file import encoder_names, is_gguf, open_gguf, transformer_names
from .safetensors_file import open_safetensors, tensor_names
from .tensor import CheckpointTensor

Tensors = dict[str, CheckpointTensor]

_TRANSFORMER_NAMES = (
    (r"^final_layer\.", "all_final_layer.2-1."),
    (r"^x_embedder\.", "all_x_embedder.2-1."),
    (r"\.attention\.out\.", ".attention.to_out.0."),
    (r"\.attention\.q_norm\.", ".attention.norm_q."),
    (r"\.attention\.k_norm\.", ".attention.norm_k."),
)
# Every Z-Image has heads of 128, which RoPE splits over its axes as (32, 48, 48).
_AXES_DIMS = (32, 48, 48)
# Lengths of the rotary tables by the transformer's width, which a file does not contain. 3840 is the 6 B model, whose
# config.json (Tongyi-MAI/Z-Image-Turbo) has 1536; other widths get diffusers' default.
_AXES_LENS = {3840: (1536, 512, 512)}
_DEFAULT_AXES_LENS = (1024, 512, 512)

# Numbers of Z-Image that no tensor's shape shows; paths under [parts] override them.
_SCHEDULER = {"shift": 3.0}
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
_FLUX_VAE = {"scaling_factor": 0.3611, "shift_factor": 0.1159}


def open_single_file(path: Path, parts: Mapping[str, Path]) -> Checkpoint:
    """Opens a single file; missing parts are read from `parts`.

    Raises:
        CheckpointError: it is not a Z-Image checkpoint, or a part is missing.
        TensorError: a tensor's number format, scale or quantisation metadata is not supported.
    """
    kind = "single-file"
    if is_gguf(path):
        kind = "gguf"
        tensors = transformer_names(path, *open_gguf(path))
    else:
        _check_names(path, tensor_names(path))
        tensors = open_safetensors(path)
    transformer = _transformer(path, tensors)
    return Checkpoint(
        kind,
        path,
        transformer,
        _text_encoder(path, tensors, parts),
        _vae(path, tensors, parts),
        _tiny_vae(parts),
        _scheduler(parts),
        _require(parts, "tokenizer", path),
    )


def _require(parts: Mapping[str, Path], name: str, path: Path) -> Path:
    if name not in parts:
        raise CheckpointError(f"{path} has no {name}; give the path of one as `{name}` under [parts]")
    if not parts[name].exists():
        raise CheckpointError(f"{parts[name]}: no such folder or file (part `{name}`)")
    return parts[name]


def _scheduler(parts: Mapping[str, Path]) -> Mapping[str, Any]:
    if "scheduler" not in parts:
        return _SCHEDULER
    part = parts["scheduler"]
    return read_json(part / "scheduler_config.json" if part.is_dir() else part)


def _under(tensors: Tensors, prefix: str) -> Tensors:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _count(tensors: Tensors, prefix: str) -> int:
    """Number of numbered modules under a prefix."""
    found = {int(match[1]) for name in tensors if (match := re.match(re.escape(prefix) + r"\.(\d+)\.", name))}
    return max(found, default=-1) + 1


def describe(tensors: Collection[str]) -> str:
    """Describes another model's file by its tensor names, for an error message."""
    signs = (
        ("double_blocks.0.img_attn.qkv.weight", "a Flux transformer"),
        ("joint_blocks.0.context_block.attn.qkv.weight", "a Stable Diffusion 3 transformer"),
        ("input_blocks.0.0.weight", "a Stable Diffusion U-Net"),
        ("transformer_blocks.0.attn.add_q_proj.weight", "a Qwen-Image or diffusers Flux model"),
        ("lora_", "a LoRA"),
        ("control_layers.0.", "a ControlNet for Z-Image"),
        ("decoder.conv_in.weight", "only a VAE"),
        ("embed_tokens.weight", "only a text encoder"),
    )
    for sign, what in signs:
        if any(sign in name for name in tensors):
            return what
    return f"a file of {len(tensors)} tensors, the first is {next(iter(sorted(tensors)), 'none')!r}"


# Part of the original's files, but unused; one published file has NaN in it.
_UNUSED = ("norm_final.weight",)
_NEEDED = ("all_x_embedder.2-1.weight", "cap_embedder.1.weight", "layers.0.attention.to_q.weight")


def _own_names(tensors: Collection[str]) -> dict[str, str]:
    """Maps diffusers' names of the transformer's tensors, with qkv fused, to the file's names."""
    prefix = next((p for p in _PREFIXES if any(name.startswith(p) for name in tensors)), "")
    names = {}
    for full in tensors:
        if full.startswith(prefix):
            name = full.removeprefix(prefix)
            for pattern, replacement in _TRANSFORMER_NAMES:
                name = re.sub(pattern, replacement, name)
            names[name] = full
    return names


def _check_names(path: Path, tensors: Collection[str]) -> None:
    """Raises CheckpointError: the file is another model's. Only names are read."""
    own = _own_names(tensors)
    for name in _NEEDED:
        if name not in own and name.replace("to_q", "qkv") not in own:
            raise CheckpointError(
                f"{path} is not a Z-Image checkpoint: it looks like {describe(tensors)} (no {name!r})"
            )


def _transformer(path: Path, tensors: Tensors) -> Component:
    _check_names(path, tensors)
    renamed: Tensors = {}
    for name, full in _own_names(tensors).items():
        tensor = tensors[full]
        if name.endswith(".attention.qkv.weight"):
            size = tensor.shape[0] // 3
            for i, part in enumerate(("to_q", "to_k", "to_v")):
                renamed[name.replace("qkv", part)] = tensor.rows(i * size, size)
        elif name not in _UNUSED:
            renamed[name] = tensor
    dim = renamed["all_x_embedder.2-1.weight"].shape[0]
    config = {
        "_class_name": "ZImageTransformer2DModel",
        "all_f_patch_size": [1],
        "all_patch_size": [2],
        "axes_dims": list(_AXES_DIMS),
        "axes_lens": list(_AXES_LENS.get(dim, _DEFAULT_AXES_LENS)),
        "cap_feat_dim": renamed["cap_embedder.1.weight"].shape[1],
        "dim": dim,
        "in_channels": renamed["all_x_embedder.2-1.weight"].shape[1] // 4,
        "n_heads": dim // sum(_AXES_DIMS),
        "n_kv_heads": dim // sum(_AXES_DIMS),
        "n_layers": _count(renamed, "layers"),
        "n_refiner_layers": _count(renamed, "noise_refiner"),
        "norm_eps": 1e-5,
        "qk_norm": "layers.0.attention.norm_q.weight" in renamed,
        "rope_theta": 256.0,
        "siglip_feat_dim": None,
        "t_scale": 1000.0,
    }
    return Component("transformer", config, renamed, (path,))


def _text_encoder(path: Path, tensors: Tensors, parts: Mapping[str, Path]) -> Component:
    files, stated = (path,), dict[str, Any]()
    found = [
        match[0] for name in tensors if (match := re.match(r"text_encoders\.[^.]+\.transformer\.(model\.)?", name))
    ]
    if found and "text_encoder" not in parts:
        own = _under(tensors, max(found, key=len))
    else:
        part = _require(parts, "text_encoder", path)
        if part.is_dir():
            return read_component(part, "text_encoder")
        files = (part,)
        if is_gguf(part):
            own, stated = encoder_names(part, *open_gguf(part))
        else:
            own = {name.removeprefix("model."): tensor for name, tensor in open_safetensors(part).items()}
    if "layers.0.self_attn.q_norm.weight" not in own:
        raise CheckpointError(f"{files[0]}: its text encoder is not a Qwen3 (it has no q_norm)")
    vocabulary, hidden = own["embed_tokens.weight"].shape
    head_dim = own["layers.0.self_attn.q_norm.weight"].shape[0]
    config = {
        "model_type": "qwen3",
        "vocab_size": vocabulary,
        "hidden_size": hidden,
        "intermediate_size": own["layers.0.mlp.gate_proj.weight"].shape[0],
        "num_hidden_layers": _count(own, "layers"),
        "num_attention_heads": own["layers.0.self_attn.q_proj.weight"].shape[0] // head_dim,
        "num_key_value_heads": own["layers.0.self_attn.k_proj.weight"].shape[0] // head_dim,
        "head_dim": head_dim,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},  # Qwen3-4B's
        **stated,
    }
    return Component("text_encoder", config, own, files)


def _tiny_vae(parts: Mapping[str, Path]) -> Component | None:
    return read_component(parts["tiny_vae"], "tiny_vae") if "tiny_vae" in parts else None


def _vae(path: Path, tensors: Tensors, parts: Mapping[str, Path]) -> Component | None:
    files, own = (path,), _under(tensors, "vae.")
    if "vae" in parts:
        part = _require(parts, "vae", path)
        if part.is_dir():
            return read_component(part, "vae")
        files, own = (part,), open_safetensors(part)
    if not own:
        return None
    if "decoder.mid_block.resnets.0.norm1.weight" in own:
        own = {_ldm_name(name, _count(own, "decoder.up_blocks")): tensor for name, tensor in own.items()}
    if "decoder.mid.block_1.norm1.weight" not in own:
        raise CheckpointError(f"{files[0]}: its VAE is not an AutoencoderKL in ldm's names or diffusers'")
    levels = _count(own, "decoder.up")
    renamed = {_vae_name(name, levels): _vae_tensor(name, tensor) for name, tensor in own.items()}
    widths = [own[f"decoder.up.{i}.block.0.conv2.weight"].shape[0] for i in range(levels)]
    config = {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": widths,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "in_channels": own["encoder.conv_in.weight"].shape[1],
        "out_channels": own["decoder.conv_out.weight"].shape[0],
        "latent_channels": own["decoder.conv_in.weight"].shape[1],
        "layers_per_block": _count(own, "encoder.down.0.block"),
        "mid_block_add_attention": "decoder.mid.attn_1.q.weight" in own,
        # Tensors do not show the number of groups. Flux has 32; a VAE with fewer needs a config.json.
        "norm_num_groups": 32,
        "use_quant_conv": "quant_conv.weight" in own,
        "use_post_quant_conv": "post_quant_conv.weight" in own,
        **_FLUX_VAE,
    }
    return Component("vae", config, renamed, files)


# (ldm's, diffusers') parts of names; those of the attention apply only to it.
_VAE_PARTS = (
    (".upsample.", ".upsamplers.0."),
    (".downsample.", ".downsamplers.0."),
    (".nin_shortcut.", ".conv_shortcut."),
    ("coder.norm_out.", "coder.conv_norm_out."),
)
_VAE_ATTENTION = (
    (".norm.", ".group_norm."),
    (".q.", ".to_q."),
    (".k.", ".to_k."),
    (".v.", ".to_v."),
    (".proj_out.", ".to_out.0."),
)
# diffusers' names before 0.17.
_OLD_ATTENTION = ((".query.", ".to_q."), (".key.", ".to_k."), (".value.", ".to_v."), (".proj_attn.", ".to_out.0."))


def _ldm_name(name: str, levels: int) -> str:
    """Converts diffusers' name of a tensor to ldm's, the inverse of `_vae_name`."""
    name = re.sub(r"decoder\.up_blocks\.(\d+)\.", lambda m: f"decoder.up.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.", r"encoder.down.\1.", name)
    name = re.sub(r"\.mid_block\.resnets\.(\d)\.", lambda m: f".mid.block_{int(m[1]) + 1}.", name)
    name = re.sub(r"\.resnets\.(\d+)\.", r".block.\1.", name)
    if ".mid_block.attentions.0." in name:
        name = name.replace(".mid_block.attentions.0.", ".mid.attn_1.")
        for old, new in _OLD_ATTENTION:
            name = name.replace(old, new)
        for ldm, diffusers in _VAE_ATTENTION:
            name = name.replace(diffusers, ldm)
    for ldm, diffusers in _VAE_PARTS:
        name = name.replace(diffusers, ldm)
    return name


def _vae_name(name: str, levels: int) -> str:
    """Converts ldm's name of a tensor to diffusers', whose decoder counts levels from the other end."""
    name = re.sub(r"decoder\.up\.(\d+)\.", lambda m: f"decoder.up_blocks.{levels - 1 - int(m[1])}.", name)
    name = re.sub(r"encoder\.down\.(\d+)\.", r"encoder.down_blocks.\1.", name)
    name = re.sub(r"\.block\.(\d+)\.", r".resnets.\1.", name)
    name = re.sub(r"\.mid\.block_(\d)\.", lambda m: f".mid_block.resnets.{int(m[1]) - 1}.", name)
    name = name.replace(".mid.attn_1.", ".mid_block.attentions.0.")
    for ldm, diffusers in _VAE_PARTS:
        name = name.replace(ldm, diffusers)
    if ".attentions.0." in name:
        for ldm, diffusers in _VAE_ATTENTION:
            name = name.replace(ldm, diffusers)
    return name


def _vae_tensor(name: str, tensor: CheckpointTensor) -> CheckpointTensor:
    """Converts ldm's attention projections, which are 1 x 1 convolutions, to diffusers' matrices."""
    if ".attn_1." in name and len(tensor.shape) == 4:
        return tensor.reshape(tensor.shape[:2])
    return tensor
