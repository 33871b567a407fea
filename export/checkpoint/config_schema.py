"""Schemas of the components' configs: names, types and ranges, checked when a checkpoint is opened.

The fields are those of diffusers' and transformers' config.json that the exporter reads; others are kept unchecked.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any

from zimage_rt.bundle.json_codec import from_json

from ..errors import CheckpointError

# Widths, counts and lengths; Z-Image's largest is a vocabulary of 151,936.
MAX_SIZE = 1 << 20
MAX_LAYERS = 1000
# Entries of a list: stages of a VAE, RoPE axes, layers of a ControlNet.
MAX_ENTRIES = 64

Sizes = tuple[int, ...]
# A field that may be missing, but not null; its default is in `modeling/`.
ABSENT: Any = None


@dataclasses.dataclass(frozen=True)
class Transformer:
    """ZImageTransformer2DModel."""

    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    cap_feat_dim: int
    in_channels: int = ABSENT
    norm_eps: float = ABSENT
    qk_norm: bool = ABSENT
    rope_theta: float = ABSENT
    t_scale: float = ABSENT
    axes_dims: Sizes = ABSENT
    axes_lens: Sizes = ABSENT
    all_patch_size: Sizes = ABSENT


@dataclasses.dataclass(frozen=True)
class TextEncoder:
    """Qwen3Model."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float = ABSENT
    rope_theta: float | None = None
    rope_parameters: Mapping[str, Any] | None = None


@dataclasses.dataclass(frozen=True)
class FullVae:
    """AutoencoderKL."""

    block_out_channels: Sizes
    layers_per_block: int
    norm_num_groups: int
    latent_channels: int
    in_channels: int
    out_channels: int
    scaling_factor: float | None = None
    shift_factor: float | None = None
    mid_block_add_attention: bool = ABSENT
    use_quant_conv: bool = ABSENT
    use_post_quant_conv: bool = ABSENT


@dataclasses.dataclass(frozen=True)
class TinyVae:
    """AutoencoderTiny."""

    encoder_block_out_channels: Sizes
    decoder_block_out_channels: Sizes
    num_encoder_blocks: Sizes
    num_decoder_blocks: Sizes
    block_out_channels: Sizes
    latent_channels: int
    in_channels: int
    out_channels: int
    scaling_factor: float | None = None
    shift_factor: float | None = None


@dataclasses.dataclass(frozen=True)
class ControlNet:
    """ZImageControlNetModel."""

    control_in_dim: int
    control_layers_places: Sizes
    control_refiner_layers_places: Sizes | None = None
    n_refiner_layers: int = ABSENT
    add_control_noise_refiner: str | None = None


@dataclasses.dataclass(frozen=True)
class Scheduler:
    """FlowMatchEulerDiscreteScheduler."""

    shift: float = ABSENT


SCHEMAS: Mapping[str, type[Any]] = {
    "transformer": Transformer,
    "text_encoder": TextEncoder,
    "vae": FullVae,
    "tiny_vae": TinyVae,
    "controlnet": ControlNet,
    "scheduler": Scheduler,
}


def check_config(name: str, config: Mapping[str, Any], where: str) -> None:
    """Checks a component's config. Raises CheckpointError, which names `where` and the field."""
    schema = SCHEMAS[name]
    known = {field.name for field in dataclasses.fields(schema)}
    read = from_json(schema, {key: config[key] for key in config if key in known}, where, CheckpointError)
    for problem in _problems(read):
        raise CheckpointError(f"{where}: {problem}")
    if isinstance(read, TextEncoder):
        theta = (read.rope_parameters or {}).get("rope_theta", 1.0)
        if isinstance(theta, bool) or not isinstance(theta, (int, float)) or not 0 < theta < math.inf:
            raise CheckpointError(f"{where}: rope_parameters.rope_theta: expected a number above 0, got {theta!r:.60}")


def _problems(read: Any) -> Iterator[str]:
    for field in dataclasses.fields(read):
        value = getattr(read, field.name)
        most = MAX_LAYERS if "layers" in field.name and "places" not in field.name else MAX_SIZE
        least = 0 if "places" in field.name or "n_refiner" in field.name or "blocks" in field.name else 1
        if isinstance(value, bool) or value is None:
            continue
        if isinstance(value, int) and not least <= value <= most:
            yield f"{field.name}: expected {least} to {most}, got {value if abs(value) < 1 << 63 else 'much more'}"
        elif isinstance(value, float) and not (math.isfinite(value) and (value > 0 or field.name == "shift_factor")):
            yield f"{field.name}: expected a number above 0, got {value}"
        elif isinstance(value, tuple):
            if not value and "places" not in field.name:
                yield f"{field.name}: expected at least one number, got none"
            if len(value) > MAX_ENTRIES or any(not least <= item <= MAX_SIZE for item in value):
                yield f"{field.name}: expected at most {MAX_ENTRIES} numbers of {least} to {MAX_SIZE}"
