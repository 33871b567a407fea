"""The engine: a loaded bundle that generates images. `generation.py` has the stages of a request."""

from __future__ import annotations

import logging
import time
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from . import checks, limits
from .backends.base import Backend, Pipeline
from .backends.registry import load_backend
from .bundle.manifest import Manifest, read_manifest
from .bundle.modules import EAGER_MODULES, MODULES
from .bundle.tokenizer import PromptTokenizer, check_prompt
from .bundle.verify import BundleFiles
from .decoding import decode, decode_floats, encode_floats, on_step_of
from .denoise import DenoiseRequest, denoise
from .errors import EngineClosed, OutOfMemory, RequestError, RequestWarning
from .gate import Gate
from .generation import Generation, explain_not_finite
from .lora.manager import ActiveLora, LoraSet
from .metadata.record import make_provenance, make_records, recorded_fields
from .prompts import PromptEncoder
from .request.codec import make_request
from .request.resolve import check_latents, resolve, resolve_tile, resolve_vae
from .request.types import Callback, GenerateRequest, ResolvedRequest
from .result import GenerateResult
from .rwlock import FairRWLock
from .stages import OnStage, Stages

log = logging.getLogger(__name__)

# Enough to keep a CPU or a GPU busy while some requests run their callers' functions.
MAX_CONCURRENCY = 4


class Engine:
    """A loaded bundle. Make one with `Engine.load`; `generate` may be called from many threads.

    An engine holds memory until it is closed, by `close` or at the end of a `with` block.

    Attributes:
        bundle: the folder of the bundle.
        manifest: the bundle's manifest.
        bundle_id: sixteen hex digits that identify the bundle's content.
        backend, backend_options: the backend's name and options, which images' records hold.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        backend: Backend,
        *,
        verify: bool = True,
        backend_options: Mapping[str, Any] | None = None,
        max_concurrency: int = MAX_CONCURRENCY,
        progress: OnStage | None = None,
    ) -> None:
        self.bundle = bundle
        self.manifest = manifest
        self.bundle_id = manifest.bundle_id
        self.backend = backend.name
        self.backend_options = dict(backend_options or {})
        self._provenance = make_provenance(manifest, self.backend, self.backend_options)
        self._files = BundleFiles(bundle, manifest, verify, EAGER_MODULES, progress)
        self._files.check(manifest.tokenizer)
        tokenizer = PromptTokenizer(bundle, manifest)
        self._pipeline: Pipeline | None = backend.open(bundle, manifest, self._files.check_module)
        prompt_dim = int(manifest.module("context_refiner").config["cap_feat_dim"])
        self._prompts = PromptEncoder(tokenizer, self._pipeline, prompt_dim)
        self._gate = Gate(max_concurrency)
        self._weights_lock = FairRWLock()  # the weights change only while no request runs
        self._loras = LoraSet(manifest, self._pipeline, self._weights_lock, self._weights_changed, bundle)

    @classmethod
    def load(
        cls,
        bundle: str | Path,
        *,
        backend: str = "onnxruntime",
        verify: bool = True,
        backend_options: Mapping[str, Any] | None = None,
        max_concurrency: int = MAX_CONCURRENCY,
        progress: OnStage | None = None,
    ) -> Engine:
        """Load a bundle that `zimage-export` wrote.

        Args:
            bundle: the folder with manifest.json.
            backend: the name of the backend that runs it.
            verify: hash every file before its first use; if False, only sizes are checked.
            backend_options: the backend's own options, e.g. `{"num_threads": 2}`.
            max_concurrency: the number of requests that compute concurrently, each in memory of its own; the others
                wait in the order of arrival.
            progress: called with (stage, done, total): `hash` in bytes, after each file, and `load` in modules. Its
                exceptions end the load.

        Raises:
            RequestError: an argument or a backend's option has a wrong type or value.
            ManifestError: the manifest is missing, damaged or newer than this package.
            BundleMismatch: a file is missing, truncated or changed.
            BackendUnavailable: the backend's library is missing; the message says what to install.
        """
        start = time.perf_counter()
        path = checks.path(bundle, "bundle")
        checks.function(progress, "progress")
        options = {} if backend_options is None else checks.named(backend_options, "backend_options")
        verify = checks.flag(verify, "verify")
        places = checks.integer(max_concurrency, "max_concurrency", 1, limits.MAX_CONCURRENCY)
        engine = cls(
            path,
            read_manifest(path),
            load_backend(backend, options),
            verify=verify,
            backend_options=options,
            max_concurrency=places,
            progress=progress,
        )
        loading, count = Stages(progress), len(EAGER_MODULES)
        for done, name in enumerate(EAGER_MODULES):
            loading.tell("load", done, count)
            engine.pipeline.load((name,))
        loading.tell("load", count, count)
        engine._files.loaded()
        seconds = time.perf_counter() - start
        name = f"{engine.manifest.name} ({engine.bundle_id})"
        log.info("bundle %s loaded from %s by %s in %.2f s", name, path, backend, seconds)
        return engine

    def close(self) -> None:
        """Wait for the running requests, then free the engine's memory on the host and on devices.

        Later calls raise EngineClosed; closing again does nothing. Raises RequestError inside a request's callback.
        """
        with self._weights_lock.write("close"):
            pipeline, self._pipeline = self._pipeline, None
            if pipeline is not None:
                self._loras.close()
                self._prompts.clear()
                pipeline.close()
                log.info("bundle %s (%s) closed", self.manifest.name, self.bundle_id)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def prompt_cache_counts(self) -> tuple[int, int]:
        """How many prompts were found in the cache of encoded ones, and how many were not."""
        return self._prompts.hits, self._prompts.misses

    @property
    def pipeline(self) -> Pipeline:
        """The backend's modules of this bundle. Raises EngineClosed."""
        if self._pipeline is None:
            raise EngineClosed(f"the engine of bundle {self.manifest.name} was closed; load the bundle again")
        return self._pipeline

    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        *,
        callback: Callback | None = None,
        on_stage: OnStage | None = None,
        **fields: Any,
    ) -> GenerateResult:
        """Generate images; the fields are those of `GenerateRequest`.

        Args:
            prompt: the prompt, or a list of prompts for a batch.
            negative_prompt: what to steer away from, with `guidance_scale` > 0.
            callback: called after every step with a StepInfo; returning False cancels the request. The next step may
                already run by then, so that progress costs no time; its result is dropped.
            on_stage: called with (stage, done, total) at a stage's beginning and after each part of it:
                `encode_prompt` in prompts, `encode_image`, `encode_control`, `denoise` in steps, `upscale`, `decode` in
                images, or in tiles with `vae_tile`. With a second pass some stages run twice. Its exceptions end the
                request.
            **fields: height, width, num_inference_steps, guidance_scale, seed, num_images, vae, …

        Raises:
            RequestError: a field is invalid; nothing was computed.
            Cancelled: the callback returned False.
            OutOfMemory: the request does not fit; the engine keeps working.

        Warns:
            RequestWarning: a field has no effect; the records' `warnings` hold the message too.
        """
        request = make_request(prompt=prompt, negative_prompt=negative_prompt, **fields)
        return self._run(request, callback, on_stage)

    def run(
        self, request: GenerateRequest, *, callback: Callback | None = None, on_stage: OnStage | None = None
    ) -> GenerateResult:
        """Generate the images of a `GenerateRequest`; see `generate`."""
        return self._run(request, callback, on_stage)

    def _run(self, request: GenerateRequest, callback: Callback | None, on_stage: OnStage | None) -> GenerateResult:
        checks.function(callback, "callback")
        checks.function(on_stage, "on_stage")
        with self._gate.place(), _typed_memory_errors():  # also for `resolve`, which decodes images
            resolved = self._prompts.checked(resolve(request, self.manifest))
            for text in resolved.warnings:
                warnings.warn(text, RequestWarning, stacklevel=3)  # at the caller of `generate` or `run`
            with self._loras.use(resolved.loras) as loras:
                return self._draw(request, resolved, loras, callback, Stages(on_stage))

    def _draw(
        self,
        request: GenerateRequest,
        resolved: ResolvedRequest,
        loras: Sequence[ActiveLora],
        callback: Callback | None,
        stages: Stages,
    ) -> GenerateResult:
        generation = Generation(resolved, self.manifest, self.pipeline, self._prompts, callback, stages)
        # Input images are hashed in parallel. One thread per request: a thread of a longer life is lost in a fork.
        with ThreadPoolExecutor(1, "zimage-record") as recorder:
            fields = recorder.submit(recorded_fields, request, resolved, self.manifest)
            with explain_not_finite(self.manifest, {lora.name: lora.weight for lora in loras}, resolved.guidance_scale):
                images, latents = generation.run()
        timings = generation.timings
        records = make_records(self._provenance, [lora.to_json() for lora in loras], fields.result(), resolved, timings)
        log.debug("%d images of %dx%d: %s", len(images), resolved.width, resolved.height, timings)
        return GenerateResult(images, resolved.seeds, timings, self.bundle_id, latents, records)

    def encode_prompt(self, prompt: str, *, truncate: bool = False, literal: bool = False) -> np.ndarray:
        """Encode a prompt with the text encoder and the context refiner: its context `[1, context_tokens, dim]`.

        A context does not depend on the timestep, so it is computed once per prompt and cached. `truncate` cuts a
        prompt that is too long; `literal` reads markers of the chat template in it as text.
        """
        prompt = check_prompt(prompt, "prompt", self.manifest.shapes.prompt_tokens.max)
        truncate, literal = checks.flag(truncate, "truncate"), checks.flag(literal, "literal")
        with self._computing():
            return self._prompts.encode(prompt, truncate, literal)

    def denoise(self, request: DenoiseRequest, *, callback: Callback | None = None) -> np.ndarray:
        """Run the sampler loop over given latents, as a workflow's sampler node does: the new latents.

        `callback` is that of `generate`.

        Raises:
            RequestError: a LoRA is not loaded. Cancelled: the callback returned False.
        """
        with self._gate.place(), _typed_memory_errors(), self._loras.use(request.loras) as loras:
            weights = {lora.name: lora.weight for lora in loras}
            with explain_not_finite(self.manifest, weights, request.guidance_scale):
                return denoise(
                    request, self._prompts, self.pipeline, on_step_of(callback, self.pipeline, self.manifest)
                )

    def encode_image(self, images: np.ndarray, vae: str) -> np.ndarray:
        """Encode images to latents float32 `[batch, 16, height / 8, width / 8]`.

        Images are uint8 `[batch, height, width, 3]`, or float32 from 0 to 1.
        """
        vae = resolve_vae(vae, self.manifest)
        with self._computing():
            if images.dtype == np.uint8:
                return self.pipeline.encode_image(images, vae)
            return encode_floats(self.pipeline, images, vae)

    def decode(self, latents: np.ndarray, vae: str, tile: int | None = None) -> np.ndarray:
        """Decode latents `[batch, 16, h, w]` to uint8 images `[batch, height, width, 3]`, in tiles of `tile` pixels.

        Without `tile` they are decoded whole. Raises RequestError for latents of another shape or dtype.
        """
        check_latents(latents, self.manifest)
        vae, tile = resolve_vae(vae, self.manifest), resolve_tile(tile, self.manifest)
        with self._computing():
            return decode(self.pipeline, self.manifest, latents, vae, tile)

    def decode_floats(self, latents: np.ndarray, vae: str) -> np.ndarray:
        """Decode latents `[batch, 16, h, w]` to images float32 `[batch, height, width, 3]` from 0 to 1.

        Raises RequestError for latents of another shape or dtype.
        """
        check_latents(latents, self.manifest)
        vae = resolve_vae(vae, self.manifest)
        with self._computing():
            return decode_floats(self.pipeline, latents, vae)

    @contextmanager
    def _computing(self) -> Iterator[None]:
        """Hold a place at the gate with the engine's LoRAs applied; errors are typed as in `generate`."""
        with self._gate.place(), self._loras.use() as loras, _typed_memory_errors():
            self.pipeline  # noqa: B018  (raises EngineClosed)
            with explain_not_finite(self.manifest, {lora.name: lora.weight for lora in loras}):
                yield

    @property
    def loras(self) -> dict[str, float]:
        """The weights of the loaded LoRAs, by name; 0 means inactive."""
        return self._loras.weights

    @property
    def active_loras(self) -> list[ActiveLora]:
        """The loaded LoRAs whose weight is not 0, as images' records hold them."""
        return self._loras.active

    def load_lora(self, path: str | Path, weight: float = 1.0, name: str | None = None, *, strict: bool = True) -> str:
        """Load a LoRA beside those that are loaded. Running requests end first; later ones use it.

        Args:
            path: a .safetensors file in a layout of docs/formats.md, or a folder as PEFT or diffusers writes it.
            weight: the factor of its change of the weights, DoRA's included; it was trained for 1.
            name: its name for `set_loras` and `unload_lora`; the file's stem if None.
            strict: whether all layers must fit; if False, those that fit are used and a LoraWarning lists the others.

        Returns:
            The name.

        Raises:
            LoraError: the file does not fit this bundle; `keys` are those that match no layer. Nothing was changed.
            RequestError: the name is taken, or the backend does not support LoRAs.

        Warns:
            LoraWarning: some layers never run, the scale is not certain, or, without `strict`, layers were left out.
        """
        file = checks.path(path, "path")
        if name is not None and not isinstance(name, str):
            raise RequestError(f"name: expected text, got {checks.shown(name)}")
        return self._loras.load(file, checks.weight(weight, "weight"), name, checks.flag(strict, "strict"))

    def set_loras(self, weights: Mapping[str, float]) -> None:
        """Set the weights of loaded LoRAs together; those not named get weight 0 but stay loaded.

        Raises RequestError for a name that is not loaded.
        """
        named = checks.named(weights, "weights")
        self._loras.set({name: checks.weight(weight, f"LoRA {name!r}") for name, weight in named.items()})

    def unload_lora(self, name: str) -> None:
        """Unload a LoRA. Without LoRAs the weights are the bundle's to the byte."""
        if not isinstance(name, str):
            raise RequestError(f"name: expected text, got {checks.shown(name)}")
        self._loras.unload(name)

    def _weights_changed(self, modules: Collection[str]) -> None:
        if any(MODULES[name].runs == "prompt" for name in modules):
            self._prompts.clear()


@contextmanager
def _typed_memory_errors() -> Iterator[None]:
    """Raise OutOfMemory in place of the MemoryError of Python or numpy."""
    try:
        yield
    except OutOfMemory:
        raise
    except MemoryError as error:
        raise OutOfMemory(
            f"{error or 'no memory is left'}; ask for a smaller image or batch, or fewer steps"
        ) from error
