"""Guesses, for messages, about files that are no LoRA for a bundle."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path

# Unsupported adapters, by patterns of their keys.
_OTHER_ADAPTERS = (
    (re.compile(r"\.b?oft_"), "OFT"),
    (re.compile(r"\.lora_mid\.|\.hada_t[12]$"), "a convolution's Tucker core"),
    (re.compile(r"\.lora_embedding_"), "a LoRA of an embedding"),
    (re.compile(r"\.(a1|a2|b1|b2)\.weight$"), "GLoRA"),
    (re.compile(r"\.on_input$|\.ia3_"), "(IA)³"),
    (re.compile(r"\.vera_"), "VeRA"),
    (re.compile(r"(\.weight_scale|\.scale_weight|\.input_scale|\.comfy_quant|(^|\.)scaled_fp8)$"), "a quantised layer"),
)

# Checkpoints, by keys that only they have.
_CHECKPOINTS = (
    (re.compile(r"(^|\.)control_layers\.|control_all_x_embedder"), "a ControlNet's checkpoint"),
    (re.compile(r"layers\.\d+\.attention\.(qkv|to_q)\.weight$"), "a checkpoint of Z-Image's transformer"),
    (re.compile(r"(double_blocks|single_transformer_blocks|single_blocks)\.\d+\."), "a checkpoint of Flux"),
    (re.compile(r"layers\.\d+\.self_attn\.q_proj\.weight$"), "a language model's checkpoint, such as a text encoder"),
    (re.compile(r"^(vae\.|first_stage_model\.)?(encoder|decoder)\.(conv_in|layers|mid)"), "a VAE's checkpoint"),
    (re.compile(r"(input_blocks|output_blocks|down_blocks|up_blocks)\.\d+\."), "a checkpoint of Stable Diffusion"),
)

# LoRAs of other models, by names of their layers.
_MODELS = (
    (re.compile(r"(double_blocks|single_blocks|single_transformer_blocks)[._]\d+"), "Flux"),
    (re.compile(r"transformer_blocks[._]\d+[._](attn[._]add_|img_mlp|txt_mlp|img_mod|txt_mod)"), "Qwen-Image"),
    (re.compile(r"(^|[._])blocks[._]\d+[._](self_attn|cross_attn|ffn)"), "Wan"),
    (
        re.compile(r"(input_blocks|output_blocks|down_blocks|up_blocks|mid_block)[._]|text_model[._]"),
        "Stable Diffusion",
    ),
    (re.compile(r"(joint_blocks|joint_transformer_blocks)[._]"), "Stable Diffusion 3"),
)

# First bytes of files that are no safetensors files.
_MAGIC = (
    (b"GGUF", "a GGUF file, which holds a whole model"),
    (b"PK\x03\x04", "a pickle or an archive (.pt, .ckpt, .zip)"),
    (b"\x80", "a pickle (.pt, .bin)"),
    (b"<", "a web page, perhaps of a download that needs an account"),
    (b"version https://git-lfs", "a Git LFS pointer; the file itself was not fetched"),
)


# Advice about such files; the first word here that occurs in the kind decides.
_REMEDIES = (
    ("pickle", "convert it to safetensors; a pickle is not read, because reading one runs what is in it"),
    ("GGUF", "GGUF is only read by zimage-export, as a transformer or a text encoder"),
)


def other_adapter(key: str) -> str | None:
    """The unsupported adapter that a key belongs to; None for other keys."""
    return next((kind for pattern, kind in _OTHER_ADAPTERS if pattern.search(key)), None)


def seems_to_be(keys: Collection[str], has_layers: bool) -> str | None:
    """A guess about a file whose keys match no layer of a bundle; None if there is none.

    `has_layers` is whether some of its keys are a LoRA's.
    """
    for pattern, kind in _MODELS if has_layers else _CHECKPOINTS:
        if any(pattern.search(key) for key in keys):
            return f"a LoRA of {kind}" if has_layers else kind
    if not has_layers and any(key in ("emb_params", "clip_l", "clip_g", "string_to_param") for key in keys):
        return "a textual inversion's embedding"
    if not has_layers and keys and all(key.endswith((".weight", ".bias")) for key in keys):
        return "a checkpoint"
    return None


def file_kind(path: Path) -> str | None:
    """A guess about a file that is not safetensors, by its first bytes; None if there is none."""
    try:
        with path.open("rb") as file:
            start = file.read(24)
    except OSError:
        return None
    return next((kind for magic, kind in _MAGIC if start.startswith(magic)), None)


def remedy(kind: str | None) -> str:
    """Advice about a file that is not safetensors; `kind` is from `file_kind`."""
    return next((what for word, what in _REMEDIES if word in (kind or "")), "fetch it again")
