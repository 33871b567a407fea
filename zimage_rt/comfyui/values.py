"""The values that flow between the nodes of a workflow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ..denoise import CfgNorm, Prompt

# From the VAE's space, in which ComfyUI has latents, to the transformer's: `(latent - SHIFT) * SCALE`.
SCALE, SHIFT = 0.3611, 0.1159


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer: MODEL.

    Attributes:
        bundle: the name of its bundle.
        shift: the schedule's timestep shift.
        loras: weights by the names of their files.
        cfg_norm, timestep_multiplier: see `DenoiseRequest`.
        control: what its ControlNet follows, or None.
    """

    bundle: str
    shift: float
    loras: Mapping[str, float] = dataclasses.field(default_factory=dict)
    cfg_norm: CfgNorm = dataclasses.field(default_factory=CfgNorm)
    timestep_multiplier: float = 1.0
    control: Followed | None = None


@dataclasses.dataclass(frozen=True)
class Clip:
    """A text encoder: CLIP."""

    bundle: str


@dataclasses.dataclass(frozen=True)
class Vae:
    """A VAE: VAE. `name` is `full` or `tiny`."""

    bundle: str
    name: str


@dataclasses.dataclass(frozen=True)
class ModelPatch:
    """A ControlNet: MODEL_PATCH."""

    bundle: str


@dataclasses.dataclass(frozen=True, eq=False)
class Followed:
    """What a ControlNet follows. It is encoded when it is used, because its size is that of the latents.

    Attributes:
        vae: encodes the images.
        image: the control image as IMAGE, or None.
        inpaint_image: the image of which parts are kept as IMAGE, or None.
        mask: 1 to draw, 0 to keep as MASK, or None.
        strength: the factor of the ControlNet's outputs.
    """

    vae: Vae
    image: np.ndarray | None
    inpaint_image: np.ndarray | None
    mask: np.ndarray | None
    strength: float


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """Prompts, of whose predictions the mean counts: CONDITIONING.

    They are encoded when they are used, because a LoRA of the model changes their contexts.
    """

    prompts: tuple[Prompt, ...]
    clip: Clip


@dataclasses.dataclass(frozen=True, eq=False)
class Latent:
    """LATENT.

    Attributes:
        samples: float32 `[batch, 16, latent_height, latent_width]` as the transformer takes them. ComfyUI's own are
            `samples / 0.3611 + 0.1159`, but for those of an empty latent, which are zeros in both.
        mask: float32 `[1 or batch, height, width]`, of any size: 1 to draw, 0 to keep; None draws everything.
        batch_index: the place of every sample in the batch whose noise it gets; None counts from 0.
    """

    samples: np.ndarray
    mask: np.ndarray | None = None
    batch_index: tuple[int, ...] | None = None


def in_vae_space(samples: np.ndarray) -> np.ndarray:
    """float64 samples of a latent as ComfyUI has them."""
    return samples / SCALE + SHIFT if samples.any() else samples.astype(np.float64)


def with_vae_samples(latent: Latent, samples: np.ndarray) -> Latent:
    """A latent with other samples, which are in the VAE's space."""
    found = (samples - SHIFT) * SCALE if samples.any() else samples
    return dataclasses.replace(latent, samples=np.ascontiguousarray(found, np.float32))


def repeated(array: np.ndarray, count: int) -> np.ndarray:
    """The first `count` of a batch, begun again if it has fewer."""
    return array if len(array) == count else array[np.arange(count) % len(array)]


@dataclasses.dataclass(frozen=True)
class Noise:
    """NOISE: that of a seed, or none if `seed` is None."""

    seed: int | None


@dataclasses.dataclass(frozen=True)
class Guider:
    """GUIDER: a model with its prompts; `negative` is None without guidance."""

    model: Model
    positive: Conditioning
    negative: Conditioning | None
    cfg: float


# IMAGE: float32 `[batch, height, width, 3]` from 0 to 1. MASK: float32 `[batch, height, width]`.
# SIGMAS: float32, falling. SAMPLER: a name of `samplers.SAMPLERS`.
