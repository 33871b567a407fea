"""The values that flow between the nodes of a workflow."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import numpy as np

from ..denoise import Prompt


@dataclasses.dataclass(frozen=True)
class Model:
    """A transformer: MODEL.

    Attributes:
        bundle: the name of its bundle.
        shift: the schedule's timestep shift.
        loras: weights by the names of their files.
    """

    bundle: str
    shift: float
    loras: Mapping[str, float] = dataclasses.field(default_factory=dict)


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
class Conditioning:
    """A prompt: CONDITIONING. It is encoded when it is used, because a LoRA of the model changes its context."""

    prompt: Prompt
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
