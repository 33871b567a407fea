"""The protocols between the engine and its backends, and their data."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ..bundle.manifest import Manifest

# The largest index of a GPU.
MAX_DEVICE = 1023

# Checks the files of the named module before they are read; raises BundleMismatch.
CheckModule = Callable[[str], None]

# Reads the latents after a step: float32, read-only. To be called inside `on_step`, and only if they are needed: the
# copy from a device takes time.
ReadLatents = Callable[[], np.ndarray]

# (step, count, sigma, sigma_next, read_latents) after each step; False stops the loop.
OnStep = Callable[[int, int, float, float, ReadLatents], bool]


@dataclasses.dataclass(frozen=True)
class Device:
    """A GPU, as described by its driver.

    Attributes:
        name: the vendor's name.
        compute_capability: major and minor number, e.g. `(9, 0)`.
        memory: total memory in bytes.
    """

    name: str
    compute_capability: tuple[int, int]
    memory: int


@dataclasses.dataclass(frozen=True)
class Probe:
    """A backend's availability on this machine, for `zimage doctor`.

    A backend's module defines `probe() -> Sequence[Probe]`, with one entry per provider. It loads no bundle, holds no
    device memory afterwards, and does not raise if something is missing.

    Attributes:
        name: the backend's name, or `backend/provider`.
        problem: why it cannot run here, and what to do; None if it can.
        versions: versions of the libraries that were found, by name.
        devices: the devices that it can run on; empty for the CPU.
        fastest: the precision that was measured to be the fastest on such a machine, or None.
    """

    name: str
    problem: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    devices: Sequence[Device] = ()
    fastest: str | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Inpaint:
    """The latents of an inpainting's image and its mask.

    Attributes:
        mask: float32 `[batch, 1, latent_height, latent_width]`: 1 to draw, 0 to preserve.
        image: float32 `[batch, channels, latent_height, latent_width]`, the image's latents.
        noise: like `image`; the noise that the loop's first latents were made with.
    """

    mask: np.ndarray
    image: np.ndarray
    noise: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Control:
    """The input of a ControlNet.

    Attributes:
        latents: float32 `[batch, control_in_dim, latent_height, latent_width]`: the control image's, then zeros.
        scale: the factor of the ControlNet's outputs; more than 0.
    """

    latents: np.ndarray
    scale: float


@dataclasses.dataclass(frozen=True, eq=False)
class Conditioning:
    """The transformer's inputs besides latents and timestep; entry i is for sample i.

    Attributes:
        contexts: float32 `[1, context_tokens, dim]` each, from `Pipeline.context`.
        negatives: the contexts of the negative prompts, for guided evaluations; empty without guidance.
        control: the input of the ControlNet, or None; both predictions of a guided evaluation use it.
    """

    contexts: Sequence[np.ndarray]
    negatives: Sequence[np.ndarray] = ()
    control: Control | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Guidance:
    """Classifier-free guidance over the evaluations of a loop.

    Attributes:
        scales: float32 `[evaluations, batch]`, from `sampling/guidance.py`; 0 means no guidance.
        normalization: > 0 limits a guided prediction's norm to that multiple of the positive one's.
    """

    scales: np.ndarray
    normalization: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class SampleJob:
    """One run of the sampler loop.

    Attributes:
        latents: float32 `[batch, channels, latent_height, latent_width]`, the caller's; changed in place.
        conditioning: the prompts and the control image of every sample.
        steps: float32 `[evaluations, 12]`, a table of `sampling/samplers.py`.
        guidance: the scale of every evaluation and sample.
        step_noise: float32 `[draws, *latents.shape]`, from `sampling/samplers.py`, for the rows with noise; None if no
            row has any.
        inpaint: the image and mask of an inpainting, or None.
        on_step: called after each step of the schedule. The next step may run already; returning False does not stop
            that one.
    """

    latents: np.ndarray
    conditioning: Conditioning
    steps: np.ndarray
    guidance: Guidance
    step_noise: np.ndarray | None = None
    inpaint: Inpaint | None = None
    on_step: OnStep | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class LowRank:
    """A change of some columns of a stored matrix: `matrix[:, first_column:][:, :columns] += down.T @ up`.

    Attributes:
        tensor: the matrix's name in the module's weight file, `[in_features, …]`.
        first_column: the first changed column.
        down: float32 `[rank, in_features]`.
        up: float32 `[rank, columns]`.
    """

    tensor: str
    first_column: int
    down: np.ndarray
    up: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """A change of some columns of a stored tensor by a full matrix.

    `tensor[:, first_column:][:, :columns] += make()`; a vector counts as a matrix of one row.

    Attributes:
        tensor: its name in the module's weight file, `[rows, …]`, or `[…]` for a vector.
        first_column: the first changed column.
        make: computes the change, float32 `[rows, columns]`. It is called on demand and its result is not stored: the
            changes of a model with 6 billion weights take 24 GB.
    """

    tensor: str
    first_column: int
    make: Callable[[], np.ndarray]


# A LoRA's change of a stored tensor.
Change = LowRank | Dense


class Module(Protocol):
    """A loaded module. Thread-safe."""

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on inputs by name, which match the manifest's TensorSpecs; returns the outputs by name."""
        ...


class Pipeline(Protocol):
    """The modules of a bundle, and the sampler loop over them. Thread-safe."""

    def load(self, modules: Sequence[str]) -> None:
        """Load modules now instead of on first use."""
        ...

    def module(self, name: str) -> Module:
        """A single module, loaded on first use."""
        ...

    def patch(self, changes: Mapping[str, Sequence[Change]]) -> None:
        """Replace the weights of modules by the bundle's weights plus these changes; no changes restore the bundle's.

        Called while nothing else runs. No tensor has two changes of the same columns. Raises RequestError on a backend
        without LoRAs, LoraError if a sum does not fit the weights' format, or OutOfMemory; the caller then patches
        again with the previous changes.
        """
        ...

    def context(self, input_ids: np.ndarray) -> np.ndarray:
        """Run the text encoder and the context refiner: ids int64 `[1, prompt_tokens]` → `[1, context_tokens, dim]`."""
        ...

    def sample(self, job: SampleJob) -> bool:
        """Run the sampler loop; False if `on_step` stopped it."""
        ...

    def encode_image(self, images: np.ndarray, vae: str) -> np.ndarray:
        """Encode images uint8 `[batch, height, width, 3]` to latents."""
        ...

    def decode(self, latents: np.ndarray, vae: str) -> np.ndarray:
        """Decode latents to uint8 images `[batch, height, width, 3]`."""
        ...

    def generate(self, job: SampleJob, vae: str) -> tuple[np.ndarray, dict[str, float]] | None:
        """Run `sample`, then `decode`: the images, and the seconds of `denoise` and `decode`; None if stopped."""
        ...

    def close(self) -> None:
        """Free all memory. Called while nothing else runs; no other call follows."""
        ...


class Backend(Protocol):
    """A library that runs bundles. `name` is its name in options; constructing it loads the library."""

    name: str

    def open(self, bundle: Path, manifest: Manifest, check: CheckModule) -> Pipeline:
        """Open a bundle: its pipeline. Raises BundleMismatch or OutOfMemory."""
        ...
