"""Loads reference models from diffusers and transformers, and derives from them the output expected of a module."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import Checkpoint, Component
from ..errors import ParityError
from ..plan import ModulePlan
from . import reference_weights

Reference = Callable[..., Tensor]


def _model_class(component: Component) -> Any:
    if component.name == "text_encoder":
        from transformers import Qwen3Model

        return Qwen3Model
    import diffusers

    # diffusers warns of tiny VAEs' `block_out_channels`, which it wrote itself.
    diffusers.logging.set_verbosity_error()
    return {
        "transformer": diffusers.ZImageTransformer2DModel,
        "vae": diffusers.AutoencoderKL,
        "tiny_vae": diffusers.AutoencoderTiny,
        "controlnet": diffusers.ZImageControlNetModel,
    }[component.name]


def load_reference(component: Component) -> Any:
    """Loads a component into its reference implementation, fp32 on the CPU.

    The weights are read independently of the exporter: a folder by the library's own loader, a single file by
    `reference_weights`. Only weights made in memory are shared with the exporter.

    Raises:
        ParityError: the library cannot load it, or a tensor is missing.
    """
    config = {key: value for key, value in component.config.items() if not key.startswith("_")}
    if component.folder is not None:
        model, missing = _from_folder(component, component.folder, config)
    else:
        model, missing = _from_tensors(component, config)
    for name in missing:
        raise ParityError(f"{component.name}: the reference implementation needs {name!r} too")
    return model.eval()


def _from_folder(component: Component, folder: Path, config: Mapping[str, Any]) -> tuple[Any, Iterable[str]]:
    kind = _model_class(component)
    options: dict[str, Any] = {"output_loading_info": True, "local_files_only": True, "use_safetensors": True}
    if component.name == "text_encoder":
        from transformers import Qwen3Config

        quantization = config.get("quantization_config")
        if isinstance(quantization, Mapping) and quantization.get("quant_method") == "fp8":
            # On a GPU with fp8, transformers dequantises only on request.
            config = {**config, "quantization_config": {**quantization, "dequantize": True}}
        options |= {"config": Qwen3Config(**config), "dtype": torch.float32}
    else:
        # Numbers of the recipe's [config] and of a shortened model override the folder's.
        options |= {**config, "torch_dtype": torch.float32}
    try:
        with _quiet():
            model, info = kind.from_pretrained(folder, **options)
    except (OSError, ValueError, RuntimeError, ImportError, KeyError) as error:
        raise ParityError(
            f"{component.name}: its reference implementation cannot load {folder}: {error}; "
            "use --skip-parity if you know that the bundle is right"
        ) from error
    return model, info["missing_keys"]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silences progress bars and warnings of the libraries' loaders."""
    import diffusers
    import transformers

    levels = transformers.logging.get_verbosity(), diffusers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    transformers.logging.set_verbosity_error()
    diffusers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(levels[0])
        diffusers.logging.set_verbosity(levels[1])
        if bars:
            transformers.logging.enable_progress_bar()


def _from_tensors(component: Component, config: Mapping[str, Any]) -> tuple[Any, Iterable[str]]:
    kind = _model_class(component)
    with torch.device("meta"):
        if component.name == "text_encoder":
            from transformers import Qwen3Config

            model: Any = kind(Qwen3Config(**config))
        else:
            model = kind.from_config(config)
    if component.files:
        tensors = reference_weights.read(component.name, component.files[0], config)
    else:
        tensors = {name: tensor.load().float() for name, tensor in component.tensors.items()}
    for name, wanted in model.state_dict().items():
        if name in tensors and tensors[name].ndim == wanted.ndim == 2:
            rows, columns = wanted.shape
            tensors[name] = tensors[name][:rows, :columns]  # without the padding of block formats
    try:
        missing, _ = model.load_state_dict(tensors, strict=False, assign=True)
    except RuntimeError as error:
        raise ParityError(f"{component.name}: its reference implementation cannot take the weights: {error}") from error
    if component.name == "text_encoder":
        from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

        model.rotary_emb = Qwen3RotaryEmbedding(model.config)  # the file does not contain its buffers
    return model, missing


def _context(model: Any, prompt_embeds: Tensor) -> Tensor:
    """The part of ZImageTransformer2DModel.forward that the module `context_refiner` computes."""
    out = []
    for sample in prompt_embeds:
        padded, ids, mask, _, _ = model._pad_with_ids(
            sample, (-(-len(sample) // 32) * 32, 1, 1), (1, 0, 0), sample.device
        )
        x, freqs, mask, _, _ = model._prepare_sequence(
            [model.cap_embedder(padded)], [ids], [mask], model.cap_pad_token, None, sample.device
        )
        for layer in model.context_refiner:
            x = layer(x, mask, freqs)
        out.append(x)
    return torch.cat(out)


class _Identity(nn.Module):
    """Replaces the caption embedder; returns the context unchanged."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


@contextlib.contextmanager
def _context_given(*models: Any) -> Iterator[None]:
    """Lets diffusers' transformers take the context instead of prompt_embeds."""
    kept = [(model, model.cap_embedder, model.context_refiner) for model in models]
    for model in models:
        model.cap_embedder, model.context_refiner = _Identity(), nn.ModuleList()
    try:
        yield
    finally:
        for model, embedder, refiner in kept:
            model.cap_embedder, model.context_refiner = embedder, refiner


def reference_function(name: str, model: Any, transformer: Any = None) -> Reference:
    """The function that a module must compute, from its reference model; `controlnet` also needs the transformer."""
    if name == "text_encoder":
        return lambda ids: model(input_ids=ids, output_hidden_states=True).hidden_states[-2]
    if name == "context_refiner":
        return lambda embeds: _context(model, embeds)
    if name == "transformer":

        def noise_pred(latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
            with _context_given(model):
                out = model(list(latents.unsqueeze(2)), timestep, list(context)).sample
            return -torch.stack(list(out)).squeeze(2)

        return noise_pred
    if name == "controlnet":
        controlnet = model.from_transformer(model, transformer)

        def controlled(latents: Tensor, timestep: Tensor, context: Tensor, control: Tensor, scale: Tensor) -> Tensor:
            x = list(latents.unsqueeze(2))
            with _context_given(controlnet, transformer):
                # diffusers expects a number as the scale; a column with a number per sample broadcasts as well.
                hints = controlnet(x, timestep, list(context), list(control.unsqueeze(2)), scale[:, None, None])
                out = transformer(x, timestep, list(context), controlnet_block_samples=hints).sample
            return -torch.stack(list(out)).squeeze(2)

        return controlled
    scaling = model.config.get("scaling_factor") or 1.0
    shift = model.config.get("shift_factor") or 0.0
    if name.endswith("decoder"):
        return lambda latents: model.decode(latents / scaling + shift).sample
    if name.startswith("full"):
        return lambda image: (model.encode(image).latent_dist.mean - shift) * scaling
    return lambda image: (model.encode(image).latents - shift) * scaling


def _first_layers(component: Component, key: str, count: int) -> Component:
    config = {**component.config}
    if key == "control_layers_places":  # consecutive: the shortened transformer lacks later layers
        config[key] = list(range(min(count, len(config[key]))))
    else:
        config[key] = min(count, config[key])
    if "layer_types" in config:
        config["layer_types"] = config["layer_types"][:count]
    tensors = {
        name: tensor
        for name, tensor in component.tensors.items()
        if not (match := re.match(r"(?:control_)?layers\.(\d+)\.", name)) or int(match[1]) < count
    }
    return dataclasses.replace(component, config=config, tensors=tensors)


@dataclasses.dataclass
class ReferenceCache:
    """Keeps the last reference model; modules of a component are measured one after the other."""

    component: Component | None = None
    short: Checkpoint | None = None
    model: Any = None

    def clear(self) -> None:
        """Frees the model."""
        self.model = None
        gc.collect()

    def shortened(self, checkpoint: Checkpoint) -> Checkpoint:
        """The checkpoint with only the first layers of the transformer, the text encoder and the ControlNet."""
        if self.short is None:
            controlnet = checkpoint.controlnet
            self.short = dataclasses.replace(
                checkpoint,
                controlnet=None if controlnet is None else _first_layers(controlnet, "control_layers_places", 2),
                transformer=_first_layers(checkpoint.transformer, "n_layers", 2),
                text_encoder=_first_layers(checkpoint.text_encoder, "num_hidden_layers", 3),
            )
        return self.short

    def get(self, plan: ModulePlan) -> tuple[Reference, str]:
        """A module's reference function, and the reference's name with its version."""
        if self.model is None or self.component is not plan.component:
            self.clear()
            self.model, self.component = load_reference(plan.component), plan.component
        library = "transformers" if plan.component.name == "text_encoder" else "diffusers"
        version = __import__(library).__version__
        name = f"{library} {version} {type(self.model).__name__}, fp32"
        base = None if plan.base is None else load_reference(plan.base.component)
        return reference_function(plan.name, self.model, base), name
