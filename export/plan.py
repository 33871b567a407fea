"""Plans of a bundle's modules: how each is built from the checkpoint, and its inputs and outputs."""

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
    """Blocks `layers.0`, `layers.1`, … of a module, between which it may be split into several engines.

    Attributes:
        count: number of blocks.
        width: last size of the residual stream between blocks, fp32 [batch, tokens, width].
        tokens: gives the number of tokens for the free sizes of the module's inputs.
    """

    count: int
    width: int
    tokens: Callable[[Mapping[str, int]], int]


@dataclasses.dataclass(frozen=True)
class ModulePlan:
    """One module to export.

    Attributes:
        name: its name in the manifest.
        component: the part of the checkpoint that holds its weights.
        precision: may differ from the recipe's (the full VAE stays fp32 in an fp16 bundle).
        build: makes the torch module on the current default device.
        inputs, outputs: its tensors' names, dtypes and sizes.
        multiples: divisor of each free size that needs one.
        config: architecture numbers for the manifest.
        blocks: the blocks between which it may be split; None if it may not be.
        base: a module whose weight file it reads as well; tensors of both have the same names.
        calibrated: whether its convolutions become 8 bits, with ranges measured on drawn latents.
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
    calibrated: bool = False

    @property
    def elements(self) -> int:
        """Number of weights in its component and its base's."""
        return self.component.elements + (0 if self.base is None else self.base.elements)

    def meta_module(self) -> nn.Module:
        """Builds the module on the meta device: shapes and dtypes without values."""
        with torch.device("meta"):
            return self.build()

    def graph_key(self) -> str:
        """Text that determines the module's graph: architecture, precision, inputs, outputs and weight shapes."""
        parts = (self,) if self.base is None else (self, self.base)
        architecture = [
            (part.name, part.precision, sorted(part.config.items()), sorted(part.component.config.items()))
            for part in parts
        ]
        shapes = [(name, tensor.shape, tensor.dtype) for name, tensor in self.meta_module().state_dict().items()]
        return repr((architecture, self.inputs, self.outputs, sorted(self.multiples.items()), shapes))

    def shared(self) -> frozenset[str]:
        """Names of the tensors that are stored in the base's weight file alone."""
        return frozenset() if self.base is None else frozenset(self.base.meta_module().state_dict())


def layout_config(precision: Precision) -> dict[str, Any]:
    """Weight layout and scales, for backends that run no ONNX graph."""
    return {
        "weight_layout": "in_out",
        "compute": str(precision.compute).removeprefix("torch."),
        "attention_scale": precision.attention_scale,
        "gate_scale": precision.gate_scale,
        "up_scale": precision.up_scale,
    }


def quantization_config(precision: Precision) -> dict[str, Any]:
    """The format of matrices with 8 bits, for backends that run no ONNX graph; nothing without them."""
    found = precision.quantization
    return {} if found is None else {"quantization": found.name, "rotates": found.rotates}


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config without its private keys, such as `_class_name`."""
    return {key: value for key, value in config.items() if not key.startswith("_")}


@dataclasses.dataclass(frozen=True)
class _Tensors:
    """Tensors that pass between modules."""

    embeds: TensorSpec
    context: TensorSpec
    latents: TensorSpec
    image: TensorSpec


def _tensors(config: TransformerConfig) -> _Tensors:
    return _Tensors(
        TensorSpec("prompt_embeds", "float32", ("batch", "prompt_tokens", config.cap_feat_dim)),
        TensorSpec("context", "float32", ("batch", "context_tokens", config.dim)),
        TensorSpec("latents", "float32", ("batch", config.in_channels, "latent_height", "latent_width")),
        TensorSpec("image", "float32", ("batch", 3, "height", "width")),
    )


def plan_modules(checkpoint: Checkpoint, precision: Precision, vaes: tuple[str, ...]) -> list[ModulePlan]:
    """Plans of all modules, in the order in which a request runs them.

    Raises:
        RecipeError: `vaes` names one that the checkpoint does not have.
        CheckpointError: the ControlNet does not belong to the transformer.
    """
    config = TransformerConfig.from_dict(checkpoint.transformer.config)
    tensors = _tensors(config)
    plans = [
        _plan_text_encoder(checkpoint.text_encoder, precision, tensors),
        *_plan_transformer(checkpoint.transformer, config, precision, tensors),
    ]
    if checkpoint.controlnet is not None:
        plans.append(_plan_controlnet(checkpoint.controlnet, config, plans[-1]))
    for kind in vaes:
        component = checkpoint.tiny_vae if kind == "tiny" else checkpoint.vae
        if component is None:
            raise RecipeError(
                f"the recipe asks for the {kind} VAE, but {checkpoint.path} has none; "
                f"take it out of `vae`, or name a folder for {'tiny_vae' if kind == 'tiny' else 'vae'}"
            )
        plans += _plan_vae(kind, component, precision, tensors)
    return plans


def _plan_text_encoder(component: Component, precision: Precision, tensors: _Tensors) -> ModulePlan:
    config = TextEncoderConfig.from_dict(component.config)
    if precision.quantization is not None and not precision.quantization.text_encoder:
        precision = dataclasses.replace(precision, quantization=None)
    return ModulePlan(
        "text_encoder",
        component,
        precision,
        build=lambda: TextEncoder(config, precision),
        inputs=(TensorSpec("input_ids", "int64", ("batch", "prompt_tokens")),),
        outputs=(tensors.embeds,),
        multiples={},
        config={**dataclasses.asdict(config), **layout_config(precision), **quantization_config(precision)},
        blocks=Blocks(config.num_hidden_layers - 1, config.hidden_size, lambda sizes: sizes["prompt_tokens"]),
    )


def _plan_transformer(
    component: Component, config: TransformerConfig, precision: Precision, tensors: _Tensors
) -> list[ModulePlan]:
    """The context refiner, which runs per prompt, and the transformer, which runs per evaluation."""
    numbers = {
        **dataclasses.asdict(config),
        "hidden_dim": config.hidden_dim,
        "rope_layout": "half_split",
        **layout_config(precision),
    }
    # It runs once per prompt, so that 8 bits would save nothing.
    refiner = dataclasses.replace(precision, quantization=None)
    patch = config.patch_size

    def sequence(sizes: Mapping[str, int]) -> int:
        rows = (sizes["latent_height"] // patch) * (sizes["latent_width"] // patch)
        return -(-rows // SEQUENCE_MULTIPLE) * SEQUENCE_MULTIPLE + sizes["context_tokens"]

    return [
        ModulePlan(
            "context_refiner",
            component,
            refiner,
            build=lambda: ContextRefiner(config, refiner),
            inputs=(tensors.embeds,),
            outputs=(tensors.context,),
            multiples={},
            config=numbers,
        ),
        ModulePlan(
            "transformer",
            component,
            precision,
            build=lambda: Transformer(config, precision),
            inputs=(tensors.latents, TensorSpec("timestep", "float32", ("batch",)), tensors.context),
            outputs=(TensorSpec("noise_pred", "float32", tensors.latents.dims),),
            multiples={"latent_height": patch, "latent_width": patch, "context_tokens": SEQUENCE_MULTIPLE},
            config={**numbers, **quantization_config(precision)},
            blocks=Blocks(config.n_layers, config.dim, sequence),
        ),
    ]


def _plan_controlnet(component: Component, config: TransformerConfig, transformer: ModulePlan) -> ModulePlan:
    """The transformer and the ControlNet as one module; requests without a control image run the transformer's."""
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


def _plan_vae(kind: str, component: Component, precision: Precision, tensors: _Tensors) -> list[ModulePlan]:
    """A VAE's decoder and its encoder."""
    if kind == "full" and precision.name == "fp16":
        # The full VAE's activations overflow fp16 (the image is white or black); it runs once per image.
        precision = FP32
    decoder, encoder = (TinyVAEDecoder, TinyVAEEncoder) if kind == "tiny" else (FullVAEDecoder, FullVAEEncoder)
    config = component.config
    settings = {**_plain(config), **layout_config(precision)}
    quantized = kind == "tiny" and precision.quantization is not None and precision.quantization.convolutions
    factor = 2 ** (len(config["block_out_channels"]) - 1)
    return [
        ModulePlan(
            f"{kind}_vae_decoder",
            component,
            precision,
            build=lambda: decoder(config, precision),
            inputs=(tensors.latents,),
            outputs=(tensors.image,),
            multiples={},
            config=settings,
            calibrated=quantized,
        ),
        ModulePlan(
            f"{kind}_vae_encoder",
            component,
            precision,
            build=lambda: encoder(config, precision),
            inputs=(tensors.image,),
            outputs=(tensors.latents,),
            multiples={"height": factor, "width": factor},
            config=settings,
        ),
    ]
