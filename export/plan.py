"""The modules a bundle can have: how each is built from the checkpoint and what its border looks like."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from zimage_rt.bundle.manifest import TensorSpec

from .checkpoint import Checkpoint, Component
from .checkpoint.controlnet import check_keys, control_config
from .errors import RecipeError
from .modeling.controlnet import ControlledTransformer
from .modeling.layers import weight_sources
from .modeling.text_encoder import TextEncoder, TextEncoderConfig
from .modeling.transformer import (
    SEQUENCE_MULTIPLE,
    ContextRefiner,
    Transformer,
    TransformerConfig,
)
from .modeling.vae import FullVAEDecoder, FullVAEEncoder, TinyVAEDecoder, TinyVAEEncoder
from .precision import FP32, Precision


@dataclasses.dataclass(frozen=True)
class Blocks:
    """What lies between the blocks `layers.0`, `layers.1`, … of a module, where it may be cut into several engines.

    Attributes:
        count: how many blocks there are.
        width: from each to the next goes fp32 [batch, tokens, width].
        tokens: how many tokens, from the free sizes of the module's inputs.
    """

    count: int
    width: int
    tokens: Callable[[Mapping[str, int]], int]


@dataclasses.dataclass(frozen=True)
class ModulePlan:
    """One module to export.

    Attributes:
        name: as in the manifest.
        component: where its weights come from.
        precision: may differ from the recipe's (the full VAE stays fp32 in an fp16 bundle).
        build: makes the torch module on the current default device.
        inputs, outputs: its border.
        multiples: what its free sizes must be multiples of.
        config: architecture numbers for the manifest.
        blocks: where it may be cut; None where it may not.
        base: the module whose tensors it reads too, under the same names, from that module's own weight file.
    """

    name: str
    component: Component
    precision: Precision
    build: Callable[[], nn.Module]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    multiples: Mapping[str, int]
    config: Mapping[str, Any]
    blocks: Blocks | None = None
    base: ModulePlan | None = None

    @property
    def elements(self) -> int:
        """How many weights the components have that it is made of."""
        return self.component.elements + (0 if self.base is None else self.base.elements)

    def meta_module(self) -> nn.Module:
        """The module without values: shapes and dtypes only."""
        with torch.device("meta"):
            return self.build()

    def graph_key(self) -> str:
        """All that the module's graph depends on: architecture and precision of what it is made of, and its border."""
        parts = (self,) if self.base is None else (self, self.base)
        made_of = [
            (part.name, part.precision, sorted(part.config.items()), sorted(part.component.config.items()))
            for part in parts
        ]
        shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in self.meta_module().state_dict().items()]
        return repr((made_of, self.inputs, self.outputs, sorted(self.multiples.items()), shapes))

    def shared(self) -> frozenset[str]:
        """The tensors that lie in the base's weight file, not in its own."""
        return frozenset() if self.base is None else frozenset(self.base.meta_module().state_dict())


def layout_config(precision: Precision) -> dict[str, Any]:
    """How weights are laid out and scaled: what a backend that runs no ONNX graph must know."""
    return {
        "weight_layout": "in_out",
        "compute": str(precision.compute).removeprefix("torch."),
        "attention_scale": precision.attention_scale,
        "gate_scale": precision.gate_scale,
        "up_scale": precision.up_scale,
    }


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Architecture numbers alone: no `_class_name` and the like."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


def plan_modules(checkpoint: Checkpoint, precision: Precision, vaes: tuple[str, ...]) -> list[ModulePlan]:
    """What to export, in the order that an image is made.

    Raises:
        RecipeError: `vaes` names one that the checkpoint does not have.
        CheckpointError: the ControlNet does not belong to the transformer.
    """
    transformer = TransformerConfig.from_dict(checkpoint.transformer.config)
    encoder = TextEncoderConfig.from_dict(checkpoint.text_encoder.config)
    latents = TensorSpec(
        "latents",
        "float32",
        ("batch", transformer.in_channels, "latent_height", "latent_width"),
    )
    image = TensorSpec("image", "float32", ("batch", 3, "height", "width"))
    embeds = TensorSpec("prompt_embeds", "float32", ("batch", "prompt_tokens", transformer.cap_feat_dim))
    context = TensorSpec("context", "float32", ("batch", "context_tokens", transformer.dim))
    layout = layout_config(precision)
    text = {**dataclasses.asdict(encoder), **layout}
    image_model = {
        **dataclasses.asdict(transformer),
        "hidden_dim": transformer.hidden_dim,
        "rope_layout": "half_split",
        **layout,
    }

    def sequence(sizes: Mapping[str, int]) -> int:
        rows = (sizes["latent_height"] // transformer.patch_size) * (sizes["latent_width"] // transformer.patch_size)
        return -(-rows // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE + sizes["context_tokens"]

    plans = [
        ModulePlan(
            "text_encoder",
            checkpoint.text_encoder,
            precision,
            lambda: TextEncoder(encoder, precision),
            (TensorSpec("input_ids", "int64", ("batch", "prompt_tokens")),),
            (embeds,),
            {},
            text,
            Blocks(encoder.num_hidden_layers - 1, encoder.hidden_size, lambda sizes: sizes["prompt_tokens"]),
        ),
        ModulePlan(
            "context_refiner",
            checkpoint.transformer,
            precision,
            lambda: ContextRefiner(transformer, precision),
            (embeds,),
            (context,),
            {},
            image_model,
        ),
        ModulePlan(
            "transformer",
            checkpoint.transformer,
            precision,
            lambda: Transformer(transformer, precision),
            (latents, TensorSpec("timestep", "float32", ("batch",)), context),
            (TensorSpec("noise_pred", "float32", latents.dims),),
            {
                "latent_height": transformer.patch_size,
                "latent_width": transformer.patch_size,
                "context_tokens": SEQUENCE_MULTIPLE,
            },
            image_model,
            Blocks(transformer.n_layers, transformer.dim, sequence),
        ),
    ]
    if checkpoint.controlnet is not None:
        plans.append(_plan_controlnet(checkpoint.controlnet, transformer, plans[-1]))
    for kind in vaes:
        component = checkpoint.tiny_vae if kind == "tiny" else checkpoint.vae
        if component is None:
            raise RecipeError(
                f"the recipe asks for the {kind} VAE, but {checkpoint.path} has none; "
                f"take it out of `vae`, or name a folder for {'tiny_vae' if kind == 'tiny' else 'vae'}"
            )
        plans += _plan_vae(kind, component, precision, latents, image)
    return plans


def _plan_controlnet(component: Component, config: TransformerConfig, transformer: ModulePlan) -> ModulePlan:
    """The transformer with the ControlNet beside it; a request without a control image runs the plain one."""
    control = control_config(component, config)
    latents = transformer.inputs[0]
    plan = ModulePlan(
        "controlnet",
        component,
        transformer.precision,
        lambda: ControlledTransformer(config, control, transformer.precision),
        (
            *transformer.inputs,
            TensorSpec("control_latents", "float32", ("batch", control.control_in_dim, *latents.dims[2:])),
            TensorSpec("control_scale", "float32", ("batch",)),
        ),
        transformer.outputs,
        transformer.multiples,
        {**transformer.config, **dataclasses.asdict(control)},
        base=transformer,
    )
    read = {name for _, _, source in weight_sources(plan.meta_module()) for name in source.names}
    check_keys(component, read, transformer.component)
    return plan


def _plan_vae(
    kind: str, component: Component, precision: Precision, latents: TensorSpec, image: TensorSpec
) -> list[ModulePlan]:
    if kind == "full" and precision.name == "fp16":
        # The full VAE's activations overflow fp16 (FACTS: white or black frames); it runs once an image.
        precision = FP32
    decoder, encoder = (TinyVAEDecoder, TinyVAEEncoder) if kind == "tiny" else (FullVAEDecoder, FullVAEEncoder)
    config = component.config
    settings = {**_plain(config), **layout_config(precision)}
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    return [
        ModulePlan(
            f"{kind}_vae_decoder",
            component,
            precision,
            lambda: decoder(config, precision),
            (latents,),
            (image,),
            {},
            settings,
        ),
        ModulePlan(
            f"{kind}_vae_encoder",
            component,
            precision,
            lambda: encoder(config, precision),
            (image,),
            (latents,),
            {"height": factor, "width": factor},
            settings,
        ),
    ]
