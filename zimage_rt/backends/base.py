"""What a backend is to the engine."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from ..bundle.manifest import Manifest

# The highest number of a GPU that is looked for.
MAX_DEVICE = 1023

# Checks the files of a module by name before they are read; raises BundleMismatch.
CheckModule = Callable[[str], None]

# Reads the latents after a step: float32, read-only. Called inside `on_step` only, by whom needs them: the copy from a
# device costs time.
ReadLatents = Callable[[], np.ndarray]

# (step, count, sigma, sigma_next, read_latents) after each step; False stops the loop.
OnStep = Callable[[int, int, float, float, ReadLatents], bool]


@dataclasses.dataclass(frozen=True)
class Device:
    """One accelerator: what the driver says of it.

    Attributes:
        name: the vendor's name.
        compute_capability: `9.0` as `(9, 0)`.
        memory: bytes in all.
    """

    name: str
    compute_capability: tuple[int, int]
    memory: int


@dataclasses.dataclass(frozen=True)
class Probe:
    """What a backend says of itself on this machine, for `zimage doctor`.

    A backend's module defines `probe() -> Sequence[Probe]`, one entry for each way it can run. It loads no bundle,
    takes no lasting device memory, and does not raise for what may be missing.

    Attributes:
        name: the backend's, or `backend/part` for one of several ways.
        problem: why it cannot run here, and what to do; None where it can.
        versions: of the libraries it found, by name.
        devices: what it would run on; empty for the CPU.
    """

    name: str
    problem: str | None = None
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    devices: Sequence[Device] = ()


@dataclasses.dataclass(frozen=True, eq=False)
class Inpaint:
    """The image of which parts are kept, as latents.

    Attributes:
        mask: float32 `[batch, 1, latent_height, latent_width]`: 1 to draw, 0 to keep.
        image: float32 `[batch, channels, latent_height, latent_width]`, the image's latents.
        noise: like `image`; the loop's first latents.
    """

    mask: np.ndarray
    image: np.ndarray
    noise: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Control:
    """The input of a ControlNet.

    Attributes:
        latents: float32 `[batch, control_in_dim, latent_height, latent_width]`: the control image's, zeros behind them.
        scale: the factor of the ControlNet's hints; more than 0.
    """

    latents: np.ndarray
    scale: float


@dataclasses.dataclass(frozen=True, eq=False)
class Conditioning:
    """Everything the transformer reads beside the latents and the timestep; entry i belongs to sample i.

    Attributes:
        contexts: float32 `[1, context_tokens, dim]` each, from `Pipeline.context`.
        negatives: the same for the negative prompts; read at guided evaluations, empty without guidance.
        control: the input of the ControlNet, or None; guided predictions use it on both sides.
    """

    contexts: Sequence[np.ndarray]
    negatives: Sequence[np.ndarray] = ()
    control: Control | None = None


@dataclasses.dataclass(frozen=True, eq=False)
class Guidance:
    """Classifier-free guidance over the evaluations of a loop.

    Attributes:
        scales: float32 `[evaluations, batch]`, from `sampling/guidance.py`; 0 is none.
        normalization: > 0 limits a guided prediction's norm to that multiple of the positive one's.
    """

    scales: np.ndarray
    normalization: float = 0.0


@dataclasses.dataclass(frozen=True, eq=False)
class SampleJob:
    """One request to the sampler loop.

    Attributes:
        latents: float32 `[batch, channels, latent_height, latent_width]`, the caller's; changed in place.
        conditioning: the prompts and the control image of every sample.
        steps: float32 `[evaluations, 12]`, a table of `sampling/samplers.py`.
        guidance: its scale for every evaluation and sample.
        step_noise: float32 `[draws, *latents.shape]`, from `sampling/samplers.py`, for the rows that take
            some; None without.
        inpaint: the image of which parts are kept, or None.
        on_step: called after each step of the schedule. A backend may have begun the next step by then, which a False
            does not take back.
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
        first_column: where the changed columns begin.
        down: float32 `[rank, in_features]`.
        up: float32 `[rank, columns]`.
    """

    tensor: str
    first_column: int
    down: np.ndarray
    up: np.ndarray


@dataclasses.dataclass(frozen=True, eq=False)
class Dense:
    """A change of some columns of a stored tensor that is no product of two thin matrices.

    `tensor[:, first_column:][:, :columns] += make()`; a vector counts as a matrix of one row.

    Attributes:
        tensor: its name in the module's weight file, `[rows, …]`, or `[…]` for a vector.
        first_column: where the changed columns begin.
        make: makes the change, float32 `[rows, columns]`. Called when it is needed and not kept: the changes of a
            model with 6 billion weights take 24 GB.
    """

    tensor: str
    first_column: int
    make: Callable[[], np.ndarray]


# What a LoRA does to a stored tensor.
Change = LowRank | Dense


class Module(Protocol):
    """One loaded module. Safe to call from several threads."""

    def __call__(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run on arrays by name, as the manifest's TensorSpecs have them; returns the outputs by name."""
        ...


class Pipeline(Protocol):
    """A bundle's modules put together. Safe to call from several threads."""

    def load(self, modules: Sequence[str]) -> None:
        """Load modules now that would otherwise be loaded on first use."""
        ...

    def module(self, name: str) -> Module:
        """One module by itself, loaded on first use."""
        ...

    def patch(self, changes: Mapping[str, Sequence[Change]]) -> None:
        """Give modules the bundle's weights plus these changes, instead of what they had; none gives back the bundle's.

        Called while nothing else runs. No tensor has two changes of the same columns. Raises RequestError on a backend
        that cannot, LoraError where a sum does not fit the format, OutOfMemory; the caller then patches again with the
        changes that were there before.
        """
        ...

    def context(self, input_ids: np.ndarray) -> np.ndarray:
        """Text encoder and context refiner: ids int64 `[1, prompt_tokens]` → `[1, context_tokens, dim]`."""
        ...

    def sample(self, job: SampleJob) -> bool:
        """The sampler loop; False where `on_step` stopped it."""
        ...

    def encode_image(self, images: np.ndarray, vae: str) -> np.ndarray:
        """Pictures uint8 `[batch, height, width, 3]` to latents."""
        ...

    def decode(self, latents: np.ndarray, vae: str) -> np.ndarray:
        """Latents to uint8 pictures `[batch, height, width, 3]`."""
        ...

    def generate(self, job: SampleJob, vae: str) -> tuple[np.ndarray, dict[str, float]] | None:
        """`sample`, then `decode`: images, and the seconds of `denoise` and `decode`; None if stopped."""
        ...

    def close(self) -> None:
        """Give back all memory. Called while nothing else runs; nothing is called afterwards."""
        ...


class Backend(Protocol):
    """One way to run bundles. `name` is what people write; constructing it loads its library."""

    name: str

    def open(self, bundle: Path, manifest: Manifest, check: CheckModule) -> Pipeline:
        """A pipeline over a bundle. Raises BundleMismatch or OutOfMemory."""
        ...
