"""Loaders: files of models stand for bundles."""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

from ..inputs import Choice, File
from ..registry import node
from ..run import Run
from ..values import Clip, Model, Vae
from .sockets import ClipIn, ModelIn, Weight

WEIGHT_TYPES = ("default", "fp8_e4m3fn", "fp8_e4m3fn_fast", "fp8_e5m2")
# Names of the VAEs that decode Z-Image's latents with the tiny one.
TINY_VAES = ("taef1", "pixel_space")


@node("UNETLoader", "MODEL", category="advanced/loaders")
def load_model(
    run: Run,
    unet_name: Annotated[str, File("diffusion_models")],
    weight_dtype: Annotated[str, Choice(WEIGHT_TYPES)] = "default",
) -> tuple[Any, ...]:
    """A transformer. Its number format is the bundle's, whatever `weight_dtype` says."""
    del weight_dtype
    return (_model(run, run.files.bundle("diffusion_models", unet_name)),)


@node("CheckpointLoaderSimple", "MODEL", "CLIP", "VAE", category="loaders")
def load_checkpoint(run: Run, ckpt_name: Annotated[str, File("checkpoints")]) -> tuple[Any, ...]:
    """A transformer, text encoder and VAE of one bundle."""
    bundle = run.files.bundle("checkpoints", ckpt_name)
    return _model(run, bundle), Clip(bundle), _vae(run, bundle, "")


@node("CLIPLoader", "CLIP", category="advanced/loaders")
def load_clip(
    run: Run,
    clip_name: Annotated[str, File("text_encoders")],
    type: Annotated[str, Choice(("lumina2", "z_image", "stable_diffusion"))] = "lumina2",
    device: Annotated[str, Choice(("default", "cpu"))] = "default",
) -> tuple[Any, ...]:
    """A text encoder."""
    del type, device
    return (Clip(run.files.bundle("text_encoders", clip_name)),)


@node("VAELoader", "VAE", category="loaders")
def load_vae(run: Run, vae_name: Annotated[str, File("vae")]) -> tuple[Any, ...]:
    """A VAE: the full one, or the tiny one by TAEF1's name or if the bundle has no other."""
    return (_vae(run, run.files.bundle("vae", vae_name), vae_name),)


@node("LoraLoaderModelOnly", "MODEL", category="loaders")
def load_lora_of_model(
    run: Run, model: ModelIn, lora_name: Annotated[str, File("loras")], strength_model: Weight = 1.0
) -> tuple[Any, ...]:
    """A model with a LoRA."""
    return (_with_lora(run, model, lora_name, strength_model),)


@node("LoraLoader", "MODEL", "CLIP", category="loaders")
def load_lora(
    run: Run,
    model: ModelIn,
    clip: ClipIn,
    lora_name: Annotated[str, File("loras")],
    strength_model: Weight = 1.0,
    strength_clip: Weight = 1.0,
) -> tuple[Any, ...]:
    """A model with a LoRA. LoRAs of Z-Image have no weights for the text encoder."""
    del strength_clip
    return _with_lora(run, model, lora_name, strength_model), clip


def _model(run: Run, bundle: str) -> Model:
    return Model(bundle, run.engine(bundle).manifest.pipeline.shift)


def _vae(run: Run, bundle: str, name: str) -> Vae:
    has_full = "full_vae_decoder" in run.engine(bundle).manifest.modules
    return Vae(bundle, "full" if has_full and not name.lower().startswith(TINY_VAES) else "tiny")


def _with_lora(run: Run, model: Model, name: str, weight: float) -> Model:
    run.files.lora(name)  # so that it is missed here
    weights = {**model.loras, name: model.loras.get(name, 0.0) + weight}
    return dataclasses.replace(model, loras=weights)
