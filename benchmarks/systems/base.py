"""Interface of benchmarked systems, which generate images from prompts."""

from __future__ import annotations

import importlib
from typing import Protocol

import numpy as np

# Name → module and class, imported on demand because each needs libraries of its own.
SYSTEMS: dict[str, tuple[str, str]] = {
    "diffusers": ("zimage_rt.benchmarks.systems.diffusers", "DiffusersSystem"),
    "torch_best": ("zimage_rt.benchmarks.systems.torch_best", "TorchBestSystem"),
    "zimage_rt": ("zimage_rt.benchmarks.systems.zimage_rt", "ZImageRtSystem"),
}


class System(Protocol):
    """A system that runs a Z-Image checkpoint.

    The noise of seed ``s`` is ``torch.randn(1, 16, height / 8, width / 8)`` in fp32 from
    ``torch.Generator("cpu").manual_seed(s)``, on every device.
    """

    name: str

    def generate(
        self,
        prompts: list[str],
        seeds: list[int],
        *,
        height: int = 256,
        width: int = 256,
        num_inference_steps: int = 8,
        guidance_scale: float = 0.0,
        vae: str = "tiny",
        negative_prompt: str = "",
    ) -> list[np.ndarray]:
        """Return a uint8 [height, width, 3] image per prompt."""
        ...


def load_system(name: str, **options: str | None) -> System:
    """Build the system called ``name``; options that are None are not passed on.

    Raises:
        ValueError: no system has that name.
    """
    if name not in SYSTEMS:
        raise ValueError(f"no system is called {name!r}; there are: {', '.join(SYSTEMS)}")
    module, attribute = SYSTEMS[name]
    given = {key: value for key, value in options.items() if value is not None}
    return getattr(importlib.import_module(module), attribute)(**given)
