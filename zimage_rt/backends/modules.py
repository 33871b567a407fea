"""The pipeline of backends that run a bundle's modules one by one."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from .._core import sample as sample_on_host
from ..errors import RequestError
from ..image.convert import to_signed, to_uint8
from ..not_finite import check_finite
from .base import Change, CheckModule, Conditioning, Module, SampleJob

# Loads a module by name with changed weights.
LoadPatched = Callable[[str, Sequence[Change]], Module]


class ModulePipeline:
    """Runs modules that a backend loads by name, with the sampler loop in C++ around them.

    Args:
        load_module: loads a module by name.
        check: see `CheckModule`.
        load_patched: loads it with changed weights; None where the backend cannot.
        bases: of modules that read another's weights too, that other's name: its changes are theirs.
    """

    def __init__(
        self,
        load_module: Callable[[str], Module],
        check: CheckModule,
        load_patched: LoadPatched | None = None,
        bases: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._load_module, self._load_patched = load_module, load_patched
        self._check, self._bases = check, bases
        self._modules: dict[str, Module] = {}
        self._changes: dict[str, Sequence[Change]] = {}
        self._lock = threading.Lock()

    def module(self, name: str) -> Module:
        """A module, checked and loaded on first use."""
        with self._lock:
            if name not in self._modules:
                self._check(name)
                changes = self._changes.get(self._bases.get(name, name))
                if changes and self._load_patched is not None:
                    self._modules[name] = self._load_patched(name, changes)
                else:
                    self._modules[name] = self._load_module(name)
            return self._modules[name]

    def load(self, modules: Sequence[str]) -> None:
        """See `Pipeline`."""
        for name in modules:
            self.module(name)

    def patch(self, changes: Mapping[str, Sequence[Change]]) -> None:
        """See `Pipeline`: the modules concerned are loaded anew, and take the old ones' places together.

        Others that read their weights go, and are loaded anew when they are next used.
        """
        if self._load_patched is None:
            if any(changes.values()):
                raise RequestError(
                    "this backend's compiled plans cannot take LoRAs; load the bundle with backend='onnxruntime' or "
                    "'cuda', or merge the LoRA into the checkpoint and export that"
                )
            return
        for name in changes:
            if name not in self._modules:
                self._check(name)
        loaded = {name: self._load_patched(name, found) for name, found in changes.items()}
        with self._lock:
            self._modules.update(loaded)
            self._changes.update(changes)
            for name, base in self._bases.items():
                if base in changes:
                    self._modules.pop(name, None)

    def context(self, input_ids: np.ndarray) -> np.ndarray:
        """See `Pipeline`."""
        embeds = self._run_finite("text_encoder", {"input_ids": input_ids}, "prompt_embeds")
        return self._run_finite("context_refiner", {"prompt_embeds": embeds}, "context")

    def sample(self, job: SampleJob) -> bool:
        """See `Pipeline`; the loop is `csrc/cpu/sampler.cc`."""
        name = "transformer" if job.conditioning.control is None else "controlnet"
        denoiser = ModuleDenoiser(name, self.module(name), job.conditioning)
        finished = sample_on_host(denoiser, job)
        check_finite(job.latents, name)  # guidance may overflow where no prediction does
        return finished

    def encode_image(self, images: np.ndarray, vae: str) -> np.ndarray:
        """See `Pipeline`."""
        name = f"{vae}_vae_encoder"
        return _one_by_one(lambda image: self._run_finite(name, {"image": to_signed(image)}, "latents"), images)

    def decode(self, latents: np.ndarray, vae: str) -> np.ndarray:
        """See `Pipeline`."""
        name = f"{vae}_vae_decoder"

        def decode_one(one: np.ndarray) -> np.ndarray:
            return to_uint8(self._run_finite(name, {"latents": np.ascontiguousarray(one)}, "image"))

        return _one_by_one(decode_one, latents)

    def _run_finite(self, name: str, inputs: Mapping[str, np.ndarray], output: str) -> np.ndarray:
        """One output of a module. Raises NotFinite."""
        values = self.module(name)(inputs)[output]
        check_finite(values, name)
        return values

    def generate(self, job: SampleJob, vae: str) -> tuple[np.ndarray, dict[str, float]] | None:
        """See `Pipeline`."""
        start = time.perf_counter()
        if not self.sample(job):
            return None
        denoised = time.perf_counter()
        images = self.decode(job.latents, vae)
        return images, {"denoise": denoised - start, "decode": time.perf_counter() - denoised}

    def close(self) -> None:
        """See `Pipeline`: the modules go, and with them the sessions and plans of their library."""
        with self._lock:
            self._modules.clear()
            self._changes.clear()


class ModuleDenoiser:
    """The transformer module as the C++ loop's predict, or with a `control` the module with the ControlNet beside it.

    Samples whose contexts have the same length run as one batch: an image token's position
    depends on its context's length, and equal lengths need no mask, so an image is the same in a
    batch as alone.
    """

    def __init__(
        self,
        name: str,
        transformer: Module,
        conditioning: Conditioning,
    ) -> None:
        self._name, self._transformer, self._control = name, transformer, conditioning.control
        self._batch = len(conditioning.contexts)
        self._groups = {
            False: _group_by_length(conditioning.contexts),
            True: _group_by_length([*conditioning.contexts, *conditioning.negatives]),
        }

    def __call__(self, latents: np.ndarray, timestep: float, guided: bool, noise_pred: np.ndarray) -> None:
        """One function evaluation; see `Denoiser` in csrc/cpu/sampler.h."""
        for rows, context in self._groups[guided]:
            samples = [row % self._batch for row in rows]
            inputs = {
                "latents": latents[samples],
                "timestep": np.full(len(rows), timestep, np.float32),
                "context": context,
            }
            if self._control is not None:
                inputs["control_latents"] = self._control.latents[samples]
                inputs["control_scale"] = np.full(len(rows), self._control.scale, np.float32)
            output = self._transformer(inputs)["noise_pred"]
            check_finite(output, self._name)
            noise_pred[rows] = output


def _one_by_one(run: Callable[[np.ndarray], np.ndarray], batch: np.ndarray) -> np.ndarray:
    """A VAE's half over a batch: together they would only multiply the activations' memory."""
    return np.concatenate([run(batch[i : i + 1]) for i in range(len(batch))])


def _group_by_length(contexts: Sequence[np.ndarray]) -> list[tuple[list[int], np.ndarray]]:
    groups: dict[int, list[int]] = {}
    for row, context in enumerate(contexts):
        groups.setdefault(context.shape[1], []).append(row)
    return [(rows, np.concatenate([contexts[row] for row in rows])) for rows in groups.values()]
