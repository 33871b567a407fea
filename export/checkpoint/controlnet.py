"""Reads ControlNets for Z-Image: folders of diffusers, and single files of the Fun-Union ControlNets."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, TensorError
from ..modeling.controlnet import REFINERS, ControlNetConfig
from ..modeling.transformer import TransformerConfig
from .component import Component
from .folder import read_component
from .safetensors_file import open_safetensors
from .single_file import describe
from .tensor import CheckpointTensor

_EMBEDDER = "control_all_x_embedder.2-1.weight"

# Keys of diffusers' config.json whose values must equal the transformer's.
_SHARED = ("dim", "n_heads", "norm_eps", "qk_norm")


def open_controlnet(path: Path, transformer: Component) -> Component:
    """Opens a ControlNet under diffusers' names.

    Args:
        path: a folder of `ZImageControlNetModel.save_pretrained`, or a single file.
        transformer: the model to control; it gives the numbers that a single file's tensors do not show.

    Raises:
        CheckpointError: it is missing, or not a ControlNet for Z-Image.
    """
    if path.is_dir():
        return read_component(path, "controlnet")
    if not path.is_file():
        raise CheckpointError(f"{path}: no such folder or file (part `controlnet`)")
    tensors = open_safetensors(path)
    if _EMBEDDER not in tensors:
        raise CheckpointError(
            f"{path} is not a ControlNet for Z-Image: it looks like {describe(tensors)} (no {_EMBEDDER!r})"
        )
    config = _config(tensors, TransformerConfig.from_dict(transformer.config))
    if config["add_control_noise_refiner"] == "control_layers":
        # The file of 2.0 contains an untrained noise refiner, which never runs.
        tensors = {name: tensor for name, tensor in tensors.items() if not name.startswith("control_noise_refiner.")}
    return Component("controlnet", config, tensors, (path,))


def _config(tensors: dict[str, CheckpointTensor], transformer: TransformerConfig) -> dict[str, Any]:
    """Derives the config.json of a single file from its tensors.

    Control layers are spaced evenly (6 of 30: 0, 5, 10, …). Version 1 only has the control image's channels.
    Version 2.0 has no noise refiner of control blocks, or one of zeros, by which diffusers tells it from 2.1.
    """
    dim, features = tensors[_EMBEDDER].shape
    channels = features // transformer.patch_size**2
    layers, refiners = (_count(tensors, name) for name in ("control_layers", "control_noise_refiner"))
    kind = None
    if channels != transformer.in_channels:
        before = tensors.get("control_noise_refiner.0.before_proj.weight")
        kind = "control_layers" if before is None or not before.load().any() else "control_noise_refiner"
    norm = tensors.get("control_layers.0.attention.norm_q.weight")
    refined = transformer.n_refiner_layers if kind == "control_layers" else refiners
    return {
        "_class_name": "ZImageControlNetModel",
        "add_control_noise_refiner": kind,
        "control_in_dim": channels,
        "control_layers_places": [i * max(1, transformer.n_layers // max(1, layers)) for i in range(layers)],
        "control_refiner_layers_places": None if kind is None else list(range(refined)),
        "dim": dim,
        "n_heads": transformer.n_heads if norm is None else dim // norm.shape[0],
        "n_refiner_layers": refined,
        "norm_eps": transformer.norm_eps,
        "qk_norm": norm is not None,
    }


def _count(tensors: dict[str, CheckpointTensor], prefix: str) -> int:
    return len({match[1] for name in tensors if (match := re.match(rf"{prefix}\.(\d+)\.", name))})


def control_config(component: Component, transformer: TransformerConfig) -> ControlNetConfig:
    """The ControlNet's config. Raises CheckpointError: it does not belong to the transformer."""
    config = component.config
    try:
        own = ControlNetConfig.from_dict(config)
        shared = {name: config[name] for name in _SHARED if name in config}
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"controlnet: its config lacks {error} or has a wrong type; expected diffusers' config.json"
        ) from error
    for name, value in shared.items():
        wanted = getattr(transformer, name)
        if value != wanted:
            raise CheckpointError(
                f"controlnet: {name}: expected {wanted}, the transformer's, got {value}; it is for another model"
            )
    kind = own.add_control_noise_refiner
    if kind not in REFINERS:
        known = ", ".join(map(repr, REFINERS))
        raise CheckpointError(f"controlnet: add_control_noise_refiner: expected one of {known}, got {kind!r}")
    _check_places("control_layers_places", own.control_layers_places, transformer.n_layers)
    if own.control_layers_places[0] != 0:
        raise CheckpointError(
            f"controlnet: control_layers_places: expected 0 first, the layer at which the control stream begins, "
            f"got {list(own.control_layers_places)}"
        )
    if kind is not None:
        _check_places("control_refiner_layers_places", own.control_refiner_layers_places, transformer.n_refiner_layers)
    if own.control_in_dim < transformer.in_channels:
        raise CheckpointError(
            f"controlnet: control_in_dim: expected {transformer.in_channels} channels or more, got {own.control_in_dim}"
        )
    return own


def _check_places(name: str, places: tuple[Any, ...], layers: int) -> None:
    whole = bool(places) and all(isinstance(place, int) for place in places)
    if not whole or list(places) != sorted(set(places) & set(range(layers))):
        raise CheckpointError(f"controlnet: {name}: expected rising numbers below {layers}, got {list(places)}")


def check_keys(component: Component, wanted: Collection[str], transformer: Component) -> None:
    """Raises TensorError: the file has tensors that are not read, such as those of another version.

    Tensors of the transformer are allowed, because diffusers saves them as well with a whole pipeline.
    """
    unknown = sorted(set(component.tensors) - set(wanted) - set(transformer.tensors))
    if unknown:
        more = f" and {len(unknown) - 5} more" if len(unknown) > 5 else ""
        raise TensorError(
            f"controlnet: its config has no place for {', '.join(map(repr, unknown[:5]))}{more} in "
            f"{', '.join(map(str, component.files))}; config and weights do not belong together"
        )
