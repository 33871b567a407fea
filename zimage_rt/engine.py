"""The engine: load a bundle, then encode_prompt → prepare_latents → the sampler loop → decode."""

from __future__ import annotations

import dataclasses
import functools
import threading
import warnings
from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from . import checks, limits
from .backends.base import Backend, Conditioning, Control, Guidance, Inpaint, OnStep, ReadLatents, SampleJob
from .backends.registry import load_backend
from .bundle.manifest import Manifest, read_manifest
from .bundle.tokenizer import PromptTokenizer, check_prompt
from .bundle.verify import BundleFiles
from .errors import Cancelled, NotFinite, OutOfMemory, RequestError, RequestWarning
from .gate import Gate
from .image.convert import latent_mask, paste, resize_images, resize_latents
from .image.tiled_decode import decode_tiled
from .lora.manager import ActiveLora, LoraSet
from .metadata.record import make_provenance, make_records, recorded_fields
from .not_finite import with_causes
from .request.codec import make_request
from .request.resolve import ResolvedRequest, ResolvedSecondPass, check_latents, resolve, resolve_tile, resolve_vae
from .request.types import Callback, GenerateRequest, StepInfo
from .result import GenerateResult
from .rwlock import FairRWLock
from .sampling.guidance import guidance_scales
from .sampling.noise import prepare_noise
from .sampling.samplers import sampler_table, step_noise
from .sampling.schedules import add_noise
from .stages import OnStage, Stages, timed

# Encoded prompts kept for reuse; a context is a few hundred kilobytes at full size.
CONTEXT_CACHE_SIZE = 64
# What is loaded with the engine; a VAE is on first use.
EAGER_MODULES = ("text_encoder", "context_refiner", "transformer")
# Enough to keep a processor or a GPU busy while some requests wait for their callers.
MAX_CONCURRENCY = 4


class Engine:
    """Serves one bundle. Make one with `Engine.load`; `generate` may be called from many threads."""

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
        self.backend_options = dict(backend_options or {})  # as they were asked for: images are recorded with them
        self._provenance = make_provenance(manifest, self.backend, self.backend_options)
        self._files = BundleFiles(bundle, manifest, verify, EAGER_MODULES, progress)
        self._contexts: OrderedDict[tuple[str, bool, bool], np.ndarray] = OrderedDict()
        self._lock = threading.Lock()
        self._files.check(manifest.tokenizer)
        self._tokenizer = PromptTokenizer(bundle, manifest)
        self.pipeline = backend.open(bundle, manifest, self._files.check_module)
        self._gate = Gate(max_concurrency)
        self._weights_lock = FairRWLock()  # no request sees the weights change
        self._loras = LoraSet(manifest, self.pipeline, self._weights_lock, self._weights_changed, bundle)

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
            backend: which library runs it.
            verify: hash every file before it is used; without, only sizes are checked.
            backend_options: the backend's own settings, e.g. `{"num_threads": 2}`.
            max_concurrency: how many requests compute at once, each in memory of its own; the others wait in the order
                in which they came.
            progress: called with a stage, how much of it is done, and of how much: `hash` in bytes, after each file,
                and `load` in modules. What it raises ends the load.

        Raises:
            RequestError: an argument or a backend's option has a wrong type or value.
            ManifestError: the manifest is missing, damaged or newer than this package.
            BundleMismatch: a file is missing, truncated or changed.
            BackendUnavailable: the backend's library is not here; says what to install.
        """
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
        return engine

    def generate(
        self,
        prompt: str | Sequence[str],
        negative_prompt: str | Sequence[str] = "",
        *,
        callback: Callback | None = None,
        on_stage: OnStage | None = None,
        **fields: Any,
    ) -> GenerateResult:
        """Draw pictures; the fields are those of `GenerateRequest`.

        Args:
            prompt: what to draw; a list for a batch.
            negative_prompt: what to steer away from, with `guidance_scale` > 0.
            callback: called after every step with a StepInfo; return False to cancel. The next step may have begun by
                then, so that progress costs no time: it is dropped.
            on_stage: called with a stage, how much of it is done, and of how much, when it begins and after each part:
                `encode_prompt` in prompts, `encode_image`, `encode_control`, `denoise` in steps, `upscale`, `decode` in
                images, or in tiles with `vae_tile`. With a second pass some come twice. What it raises ends the
                request.
            **fields: height, width, num_inference_steps, guidance_scale, seed, num_images, vae, …

        Raises:
            RequestError: a field is impossible; nothing was computed.
            Cancelled: the callback returned False.
            OutOfMemory: it does not fit; the engine keeps working.

        Warns:
            RequestWarning: a field has no effect; the records' `warnings` say so, too.
        """
        request = make_request(prompt=prompt, negative_prompt=negative_prompt, **fields)
        return self._run(request, callback, on_stage)

    def run(
        self, request: GenerateRequest, *, callback: Callback | None = None, on_stage: OnStage | None = None
    ) -> GenerateResult:
        """Draw a `GenerateRequest`; see `generate`."""
        return self._run(request, callback, on_stage)

    def _run(self, request: GenerateRequest, callback: Callback | None, on_stage: OnStage | None) -> GenerateResult:
        checks.function(callback, "callback")
        checks.function(on_stage, "on_stage")
        with self._gate.place(), _out_of_memory_typed():  # also for `resolve`, which decodes images
            resolved = self._tokenized(resolve(request, self.manifest))
            for text in resolved.warnings:
                warnings.warn(text, RequestWarning, stacklevel=3)  # at whoever called `generate` or `run`
            with self._weights_lock.read():
                return self._run_resolved(request, resolved, callback, Stages(on_stage))

    def _run_resolved(
        self, request: GenerateRequest, resolved: ResolvedRequest, callback: Callback | None, stages: Stages
    ) -> GenerateResult:
        # What pictures begin with is hashed while they are drawn. A thread a request: a kept one dies in a fork.
        with ThreadPoolExecutor(1, "zimage-record") as recorder:
            fields = recorder.submit(recorded_fields, request, resolved, self.manifest)
            with self._causes_named(resolved.guidance_scale):
                images, latents, timings = self._pictures(resolved, callback, stages)
        loras = [lora.to_json() for lora in self._loras.active]
        records = make_records(self._provenance, loras, fields.result(), resolved, timings)
        return GenerateResult(images, resolved.seeds, timings, self.bundle_id, latents, records)

    def _pictures(
        self, resolved: ResolvedRequest, callback: Callback | None, stages: Stages
    ) -> tuple[np.ndarray, np.ndarray, dict[str, float]]:
        """What a request draws, the latents, and the seconds of each stage."""
        timings: dict[str, float] = {}
        with timed(timings, "total"):
            with timed(timings, "encode_prompt"):
                texts = [*resolved.prompts, *(resolved.negative_prompts if resolved.guidance_scale > 0 else ())]
                encoded: list[np.ndarray] = []
                for text in texts:
                    stages.tell("encode_prompt", len(encoded), len(texts))
                    encoded.append(self._encode_prompt(text, resolved.truncate_prompt, resolved.literal_prompt))
                stages.tell("encode_prompt", len(texts), len(texts))
                contexts, negatives = encoded[: len(resolved.prompts)], encoded[len(resolved.prompts) :]
            draw = functools.partial(self._draw, resolved, contexts, negatives, callback, stages, timings)
            if resolved.image is None and resolved.image_latents is None:
                latents, inpaint = self.prepare_latents(resolved)
            else:
                with timed(timings, "encode_image", stages):
                    latents, inpaint = self.prepare_latents(resolved)
            control = self._control(resolved, resolved.control_image, timings, stages)
            again = resolved.second_pass
            if again is not None:
                first = draw(latents, resolved.sigmas, inpaint, control, 0, decode=again.method == "pixel")
                with timed(timings, "upscale", stages):
                    latents = self._begin_again(again, resolved, first, latents)
                control = self._control(resolved, again.control_image, timings, stages)
                images = draw(latents, again.sigmas, None, control, 1)
            else:
                images = draw(latents, resolved.sigmas, inpaint, control, 0)
            if resolved.image is not None and resolved.mask is not None:
                images = paste(images, resolved.image, resolved.mask)
        return images, latents, timings

    def _draw(
        self,
        request: ResolvedRequest,
        contexts: list[np.ndarray],
        negatives: list[np.ndarray],
        callback: Callback | None,
        stages: Stages,
        timings: dict[str, float],
        latents: np.ndarray,
        sigmas: np.ndarray,
        inpaint: Inpaint | None,
        control: Control | None,
        stage: int,
        *,
        decode: bool = True,
    ) -> np.ndarray:
        """One pass of the loop over `latents`, in place; the pictures, or none of them without `decode`.

        Adds what it took to `timings`.
        """
        steps = sampler_table(request.sampler, sigmas, request.shift)
        noise = step_noise(
            request.sampler,
            sigmas,
            request.shift,
            request.seeds,
            latents.shape[1:],
            joint=request.batch_noise == "comfyui",
        )
        whole = decode and request.vae_tile is None
        on_step = None if callback is None else self._on_step(callback, stage)
        stages.tell("denoise", 0, len(sigmas) - 1)
        job = SampleJob(
            latents=latents,
            conditioning=Conditioning(contexts, negatives, control),
            steps=steps,
            guidance=Guidance(
                guidance_scales(
                    steps[:, 0],
                    request.guidance_scale,
                    request.cfg_truncation,
                    request.dynamic_cfg,
                    # Only dynamic guidance looks at how long a prompt is.
                    [
                        self._tokenizer(prompt, truncate=request.truncate_prompt, literal=request.literal_prompt).shape[
                            1
                        ]
                        if request.dynamic_cfg
                        else 0
                        for prompt in request.prompts
                    ],
                ),
                request.cfg_normalization,
            ),
            inpaint=inpaint,
            step_noise=noise,
            on_step=stages.with_steps(on_step, len(latents) if whole else 0),
        )
        cancelled = Cancelled("the callback asked to stop; no image was made")
        if whole:
            result = self.pipeline.generate(job, request.vae)
            if result is None:
                raise cancelled
            images, seconds = result
            for name, value in seconds.items():
                timings[name] = timings.get(name, 0.0) + value
            stages.tell("decode", len(images), len(images))
            return images
        with timed(timings, "denoise"):
            if not self.pipeline.sample(job):
                raise cancelled
        if not decode:
            return np.empty((0, 0, 0, 3), np.uint8)
        with timed(timings, "decode"):
            return self._decode(latents, request.vae, request.vae_tile, stages)

    def _control(
        self, request: ResolvedRequest, picture: np.ndarray | None, timings: dict[str, float], stages: Stages
    ) -> Control | None:
        """What the ControlNet follows: a picture's latents; None where there is none, or nothing would follow it."""
        if picture is None or request.control_scale == 0:
            return None
        with timed(timings, "encode_control", stages):
            encoded = self.pipeline.encode_image(picture[None], request.vae)
            channels = self.manifest.module("controlnet").config["control_in_dim"]
            latents = np.zeros((len(request.seeds), channels, *encoded.shape[2:]), np.float32)
            latents[:, : encoded.shape[1]] = encoded
        return Control(latents, request.control_scale)

    def _begin_again(
        self, again: ResolvedSecondPass, request: ResolvedRequest, images: np.ndarray, latents: np.ndarray
    ) -> np.ndarray:
        """The second pass's latents: the first one's result at its size, under the seeds' noise."""
        pipeline = self.manifest.pipeline
        size = (again.height // pipeline.vae_scale_factor, again.width // pipeline.vae_scale_factor)
        if again.method == "latent":
            larger = resize_latents(latents, *size)
        else:
            larger = self.pipeline.encode_image(resize_images(images, again.height, again.width), request.vae)
        noise = self._noise(request, (pipeline.latent_channels, *size))
        return add_noise(larger, noise, again.sigmas[0])

    @staticmethod
    def _noise(request: ResolvedRequest, sample_shape: tuple[int, ...]) -> np.ndarray:
        return prepare_noise(request.seeds, sample_shape, joint=request.batch_noise == "comfyui")

    def _tokenized(self, request: ResolvedRequest) -> ResolvedRequest:
        """The request, checked for the length of its prompts; its warnings say which of them are cut."""
        cut: list[str] = []
        for name, texts in (
            ("prompt", request.prompts),
            ("negative_prompt", request.negative_prompts if request.guidance_scale > 0 else ()),
        ):
            for text in dict.fromkeys(texts):
                kept, tokens = self._tokenizer.count(
                    text, name, truncate=request.truncate_prompt, literal=request.literal_prompt
                )
                if kept < tokens:
                    cut.append(f"{name}: was cut to {kept} of {tokens} tokens, as truncate_prompt asks")
        return dataclasses.replace(request, warnings=(*request.warnings, *cut))

    def encode_prompt(self, prompt: str, *, truncate: bool = False, literal: bool = False) -> np.ndarray:
        """Text encoder and context refiner: a prompt to its context `[1, context_tokens, dim]`.

        It does not depend on the timestep, so it runs once a prompt and is kept for the next request. With `truncate`
        a prompt that is too long is cut, with `literal` markers of the chat template in it are text.
        """
        prompt = check_prompt(prompt, "prompt", self.manifest.shapes.prompt_tokens.max)
        truncate, literal = checks.flag(truncate, "truncate"), checks.flag(literal, "literal")
        return self._encode_prompt(prompt, truncate, literal)

    def _encode_prompt(self, prompt: str, truncate: bool, literal: bool) -> np.ndarray:
        key = (prompt, truncate, literal)
        with self._gate.place(), self._weights_lock.read():
            with self._lock:
                if key in self._contexts:
                    self._contexts.move_to_end(key)
                    return self._contexts[key]
            with self._causes_named():
                context = self.pipeline.context(self._tokenizer(prompt, truncate=truncate, literal=literal))
            context.flags.writeable = False
            with self._lock:
                self._contexts[key] = context
                while len(self._contexts) > CONTEXT_CACHE_SIZE:
                    self._contexts.popitem(last=False)
            return context

    def prepare_latents(self, request: ResolvedRequest) -> tuple[np.ndarray, Inpaint | None]:
        """What the loop begins with, float32 `[batch, 16, latent_height, latent_width]`, and what it keeps.

        Noise of the seeds; of an image-to-image request, mixed with the image's latents as far as the first sigma says.
        """
        if request.latents is not None:
            return np.array(request.latents, dtype=np.float32, order="C"), None
        pipeline = self.manifest.pipeline
        factor = pipeline.vae_scale_factor
        shape = (pipeline.latent_channels, request.height // factor, request.width // factor)
        noise = self._noise(request, shape)
        if request.image_latents is not None:
            image = request.image_latents
        elif request.image is not None:
            encoded = self.pipeline.encode_image(request.image[None], request.vae)
            image = np.repeat(encoded, len(noise), axis=0)
        else:
            return noise, None
        latents = add_noise(image, noise, request.sigmas[0])
        if request.mask is None:
            return latents, None
        mask = np.repeat(latent_mask(request.mask, factor)[None, None], len(noise), axis=0)
        return latents, Inpaint(mask, image, noise)

    def decode(self, latents: np.ndarray, vae: str, tile: int | None = None) -> np.ndarray:
        """Latents `[batch, 16, h, w]` to uint8 pictures `[batch, height, width, 3]`, whole or in tiles of `tile` px.

        Raises RequestError for latents of another shape or type.
        """
        check_latents(latents, self.manifest)
        vae, tile = resolve_vae(vae, self.manifest), resolve_tile(tile, self.manifest)
        with self._gate.place(), self._weights_lock.read(), _out_of_memory_typed():
            return self._decode(latents, vae, tile, Stages())

    def _decode(self, latents: np.ndarray, vae: str, tile: int | None, stages: Stages) -> np.ndarray:
        with self._causes_named():
            if tile is None:
                return self.pipeline.decode(latents, vae)
            factor = self.manifest.pipeline.vae_scale_factor
            told = functools.partial(stages.tell, "decode")
            return decode_tiled(lambda part: self.pipeline.decode(part, vae), latents, tile, factor, told)

    @property
    def loras(self) -> dict[str, float]:
        """The weights of the LoRAs that are loaded, by name; 0 is off."""
        return self._loras.weights

    @property
    def active_loras(self) -> list[ActiveLora]:
        """The LoRAs that change images now; images are recorded with them."""
        return self._loras.active

    def load_lora(self, path: str | Path, weight: float = 1.0, name: str | None = None, *, strict: bool = True) -> str:
        """Put a LoRA on, beside those that are; requests that run now end first, later ones are drawn with it.

        Args:
            path: a .safetensors file in a layout of docs/formats.md, or a folder as PEFT or diffusers writes it.
            weight: how much of it; 1 is what it was trained for. It scales the change, also DoRA's.
            name: for `set_loras` and `unload_lora`; the file's name without its ending where none is given.
            strict: whether all of it must fit; without, what fits is used, and a LoraWarning lists the rest.

        Returns:
            The name.

        Raises:
            LoraError: the file does not fit this bundle; its `keys` are those that have no place. Nothing was changed.
            RequestError: the name is taken, or this backend cannot take LoRAs.

        Warns:
            LoraWarning: some layers never run, the scale is not certain, or, without `strict`, something was left out.
        """
        file = checks.path(path, "path")
        if name is not None and not isinstance(name, str):
            raise RequestError(f"name: expected text, got {checks.shown(name)}")
        return self._loras.load(file, checks.weight(weight, "weight"), name, checks.flag(strict, "strict"))

    def set_loras(self, weights: Mapping[str, float]) -> None:
        """Give loaded LoRAs new weights, all at once; those not named are off, but stay loaded.

        Raises RequestError for a name that is not loaded.
        """
        named = checks.named(weights, "weights")
        self._loras.set({name: checks.weight(weight, f"LoRA {name!r}") for name, weight in named.items()})

    def unload_lora(self, name: str) -> None:
        """Take a LoRA off and forget it. Without any, the weights are the bundle's to the byte."""
        if not isinstance(name, str):
            raise RequestError(f"name: expected text, got {checks.shown(name)}")
        self._loras.unload(name)

    def _weights_changed(self, modules: Collection[str]) -> None:
        if "text_encoder" in modules or "context_refiner" in modules:
            with self._lock:
                self._contexts.clear()

    @contextmanager
    def _causes_named(self, guidance_scale: float = 0.0) -> Iterator[None]:
        """Say in a NotFinite what can be its cause here."""
        try:
            yield
        except NotFinite as error:
            loras = {lora.name: lora.weight for lora in self.active_loras}
            precision = self.manifest.module(error.module).precision
            # Guidance is added to predictions; what encodes and decodes does not see it but in the latents.
            scale = guidance_scale if error.module in ("transformer", "controlnet") else 0.0
            raise with_causes(error, precision, loras, scale) from error

    def _on_step(self, callback: Callback, stage: int) -> OnStep:
        def on_step(step: int, count: int, sigma: float, sigma_next: float, read: ReadLatents) -> bool:
            latents = functools.cache(read)  # copied from the device once, and only if the callback asks
            info = StepInfo(step, count, sigma, sigma_next, latents, lambda: self.decode(latents(), "tiny"), stage)
            return callback(info) is not False

        return on_step


@contextmanager
def _out_of_memory_typed() -> Iterator[None]:
    """An OutOfMemory for what Python and numpy raise: noise for many steps, an image that does not fit."""
    try:
        yield
    except OutOfMemory:
        raise
    except MemoryError as error:
        raise OutOfMemory(
            f"{error or 'no memory is left'}; ask for a smaller image or batch, or fewer steps"
        ) from error
