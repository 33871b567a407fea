"""Architecture of the checkpoint: configs, untrained models, and writing of the folders.

The proportions are the original's (head_dim 128, RoPE axes 32/48/48, grouped-query Qwen3, Flux-kind
16-channel VAE); only widths and depths are small.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tokenizer as tokenizer_module
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    FlowMatchEulerDiscreteScheduler,
    ZImageTransformer2DModel,
)
from transformers import Qwen3Config, Qwen3Model

TEXT_WIDTH = 256
TRANSFORMER = {
    "all_patch_size": [2],
    "all_f_patch_size": [1],
    "in_channels": 16,
    "dim": 384,
    "n_layers": 5,
    "n_refiner_layers": 1,
    "n_heads": 3,
    "n_kv_heads": 3,
    "norm_eps": 1e-5,
    "qk_norm": True,
    "cap_feat_dim": TEXT_WIDTH,
    "siglip_feat_dim": None,
    "rope_theta": 256.0,
    "t_scale": 1000.0,
    "axes_dims": [32, 48, 48],
    "axes_lens": [1024, 512, 512],
}
TEXT_ENCODER = {
    "vocab_size": tokenizer_module.VOCAB_SIZE,
    "hidden_size": TEXT_WIDTH,
    "intermediate_size": 576,
    "num_hidden_layers": 5,  # the pipeline reads hidden_states[-2]: the last layer is never used
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "tie_word_embeddings": True,
    "use_cache": True,
    "initializer_range": 0.02,
}
VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "block_out_channels": [32, 64, 128, 128],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 16,
    "norm_num_groups": 16,
    "sample_size": 256,
    "force_upcast": True,
    "use_quant_conv": False,
    "use_post_quant_conv": False,
    "mid_block_add_attention": True,
}
# TAEF1's: four stages of 64 channels, 16 latent channels, lives in model-space latents.
TINY_VAE = {
    "in_channels": 3,
    "out_channels": 3,
    "encoder_block_out_channels": [64, 64, 64, 64],
    "decoder_block_out_channels": [64, 64, 64, 64],
    "act_fn": "relu",
    "latent_channels": 16,
    "upsampling_scaling_factor": 2,
    "num_encoder_blocks": [1, 3, 3, 3],
    "num_decoder_blocks": [3, 3, 3, 1],
    "latent_magnitude": 3,
    "latent_shift": 0.5,
    "force_upcast": False,
    "scaling_factor": 1.0,
    "shift_factor": 0.0,
}
SCHEDULER = {"num_train_timesteps": 1000, "shift": 3.0, "use_dynamic_shifting": False}


@dataclass
class Parts:
    """The models of one checkpoint."""

    transformer: ZImageTransformer2DModel
    text_encoder: Qwen3Model
    vae: AutoencoderKL
    tiny_vae: AutoencoderTiny


def text_config() -> Qwen3Config:
    """Return the text encoder's configuration."""
    values = dict(TEXT_ENCODER)
    theta = values.pop("rope_theta")
    return Qwen3Config(**values, rope_parameters={"rope_type": "default", "rope_theta": theta})


def fresh(seed: int = 0) -> Parts:
    """Build untrained models."""
    torch.manual_seed(seed)
    return Parts(
        transformer=ZImageTransformer2DModel(**TRANSFORMER),
        text_encoder=Qwen3Model(text_config()),
        vae=AutoencoderKL(**VAE, scaling_factor=1.0, shift_factor=0.0),
        tiny_vae=AutoencoderTiny(**TINY_VAE),
    )


def save(parts: Parts, out: Path) -> None:
    """Write the folder that ``diffusers.ZImagePipeline.from_pretrained`` loads."""
    out.mkdir(parents=True, exist_ok=True)
    parts.transformer.to(torch.bfloat16).save_pretrained(out / "transformer")
    parts.text_encoder.to(torch.bfloat16).save_pretrained(out / "text_encoder")
    parts.vae.to(torch.float16).save_pretrained(out / "vae")
    parts.tiny_vae.to(torch.float16).save_pretrained(out / "tiny_vae")
    FlowMatchEulerDiscreteScheduler(**SCHEDULER).save_pretrained(out / "scheduler")
    tokenizer_module.save(tokenizer_module.train(), out / "tokenizer")
    write_index(out)


def save_sibling(transformer: ZImageTransformer2DModel, out: Path, first: Path) -> None:
    """Write a folder with another transformer; its other parts are links into ``first``."""
    out.mkdir(parents=True, exist_ok=True)
    transformer.to(torch.bfloat16).save_pretrained(out / "transformer")
    for name in ("text_encoder", "vae", "tiny_vae", "scheduler", "tokenizer"):
        link = out / name
        link.unlink(missing_ok=True)
        link.symlink_to(Path("..") / first.name / name, target_is_directory=True)
    write_index(out)


def write_index(out: Path) -> None:
    """Write model_index.json."""
    index = {
        "_class_name": "ZImagePipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "Qwen2Tokenizer"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", "utf-8")
