"""The sockets and widgets that several nodes have."""

from __future__ import annotations

from typing import Annotated

import numpy as np

from ...sampling.noise import MAX_SEED
from ..bislerp import BISLERP
from ..inputs import Choice, Flag, Number, Socket, Text, Whole
from ..resize import METHODS
from ..sampling import SAMPLER_NAMES, SCHEDULE_NAMES
from ..values import Clip, Conditioning, Guider, Latent, Model, Noise, Vae

# ComfyUI's largest size of anything, in pixels.
MAX_SIZE = 16384

ModelIn = Annotated[Model, Socket("MODEL")]
ClipIn = Annotated[Clip, Socket("CLIP")]
VaeIn = Annotated[Vae, Socket("VAE")]
ConditioningIn = Annotated[Conditioning, Socket("CONDITIONING")]
LatentIn = Annotated[Latent, Socket("LATENT")]
ImageIn = Annotated[np.ndarray, Socket("IMAGE")]
MaskIn = Annotated[np.ndarray, Socket("MASK")]
NoiseIn = Annotated[Noise, Socket("NOISE")]
SamplerIn = Annotated[str, Socket("SAMPLER")]
SigmasIn = Annotated[np.ndarray, Socket("SIGMAS")]
GuiderIn = Annotated[Guider, Socket("GUIDER")]

Seed = Annotated[int, Whole(0, MAX_SEED)]
Steps = Annotated[int, Whole(1, 10_000, default=20)]
Cfg = Annotated[float, Number(0.0, 100.0, default=8.0, step=0.1)]
Share = Annotated[float, Number(0.0, 1.0, default=1.0)]
Weight = Annotated[float, Number(-100.0, 100.0)]
Pixels = Annotated[int, Whole(0, MAX_SIZE)]
Batch = Annotated[int, Whole(1, 4096)]
Factor = Annotated[float, Number(0.01, 8.0)]
Prompt = Annotated[str, Text(is_long=True)]
YesNo = Annotated[bool, Flag(default=True)]
Method = Annotated[str, Choice((*METHODS, "lanczos"))]
LatentMethod = Annotated[str, Choice((*METHODS, BISLERP))]
Crop = Annotated[str, Choice(("disabled", "center"))]
SamplerName = Annotated[str, Choice(SAMPLER_NAMES)]
SchedulerName = Annotated[str, Choice(SCHEDULE_NAMES)]
