"""One request from prompts to images: encode → latents → one or two passes of the sampler loop → decode."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np

from .backends.base import Conditioning, Control, Guidance, Inpaint, Pipeline, SampleJob
from .bundle.manifest import Manifest
from .bundle.modules import denoiser, runs
from .decoding import decode, on_step_of
from .errors import Cancelled, NotFinite
from .image.convert import latent_mask, paste, resize_images, resize_latents
from .not_finite import with_causes
from .prompts import PromptEncoder
from .request.types import Callback, ResolvedRequest, ResolvedSecondPass
from .sampling.guidance import guidance_scales
from .sampling.noise import prepare_noise
from .sampling.samplers import sampler_table, step_noise
from .sampling.schedules import add_noise
from .stages import Stages, timed


@dataclasses.dataclass(frozen=True, eq=False)
class Pass:
    """One run of the sampler loop.

    Attributes:
        latents: float32 `[batch, channels, latent_height, latent_width]`; changed in place.
        sigmas: float32 `[steps + 1]`, falling.
        conditioning: the prompts and the control image.
        inpaint: the image of which parts are kept, or None.
        number: 0, or 1 for the second pass of a request.
    """

    latents: np.ndarray
    sigmas: np.ndarray
    conditioning: Conditioning
    inpaint: Inpaint | None = None
    number: int = 0


class Generation:
    """The generation of one checked request. Make one per request; `run` is called once.

    Args:
        request: the checked request.
        manifest, pipeline, prompts: the engine's.
        callback: see `Engine.generate`.
        stages: receives the progress.

    Attributes:
        timings: seconds by stage.
    """

    def __init__(
        self,
        request: ResolvedRequest,
        manifest: Manifest,
        pipeline: Pipeline,
        prompts: PromptEncoder,
        callback: Callback | None,
        stages: Stages,
    ) -> None:
        self._request, self._manifest, self._pipeline, self._prompts = request, manifest, pipeline, prompts
        self._callback, self._stages = callback, stages
        self.timings: dict[str, float] = {}

    def run(self) -> tuple[np.ndarray, np.ndarray]:
        """Generate: the images, uint8 `[batch, height, width, 3]`, and the latents that they were decoded from."""
        request, again = self._request, self._request.second_pass
        with timed(self.timings, "total"):
            conditioning = self._encode_prompts()
            latents, inpaint = self._first_latents()
            conditioning = self._with_control(conditioning, request.control_image)
            first = Pass(latents, request.sigmas, conditioning, inpaint)
            if again is None:
                images = self._draw(first)
            else:
                images = self._draw(first) if again.method == "pixel" else self._denoise(first)
                with timed(self.timings, "upscale", self._stages):
                    latents = self._second_latents(again, images, latents)
                conditioning = self._with_control(conditioning, again.control_image)
                images = self._draw(Pass(latents, again.sigmas, conditioning, number=1))
            if request.image is not None and request.mask is not None:
                images = paste(images, request.image, request.mask)
        return images, latents

    def _encode_prompts(self) -> Conditioning:
        request, stages = self._request, self._stages
        count = len(request.prompts)
        with timed(self.timings, "encode_prompt"):
            texts = [*request.prompts, *(request.negative_prompts if request.guidance_scale > 0 else ())]
            contexts: list[np.ndarray] = []
            for text in texts:
                stages.tell("encode_prompt", len(contexts), len(texts))
                contexts.append(self._prompts.encode(text, request.truncate_prompt, request.literal_prompt))
            stages.tell("encode_prompt", len(texts), len(texts))
        return Conditioning(contexts[:count], contexts[count:])

    def _first_latents(self) -> tuple[np.ndarray, Inpaint | None]:
        """The first pass's latents, float32 `[batch, channels, latent_height, latent_width]`, and its inpainting.

        The latents are the seeds' noise, mixed with the image's latents at the first sigma if there is an image.
        """
        request, factor = self._request, self._manifest.pipeline.vae_scale_factor
        if request.latents is not None:
            return np.array(request.latents, dtype=np.float32, order="C"), None
        noise = self._noise(request.height // factor, request.width // factor)
        if request.image is None and request.image_latents is None:
            return noise, None
        with timed(self.timings, "encode_image", self._stages):
            if request.image_latents is not None:
                image = request.image_latents
            else:
                assert request.image is not None
                encoded = self._pipeline.encode_image(request.image[None], request.vae)
                image = np.repeat(encoded, len(noise), axis=0)
            latents = add_noise(image, noise, request.sigmas[0])
            if request.mask is None:
                return latents, None
            mask = np.repeat(latent_mask(request.mask, factor)[None, None], len(noise), axis=0)
        return latents, Inpaint(mask, image, noise)

    def _second_latents(self, again: ResolvedSecondPass, images: np.ndarray, latents: np.ndarray) -> np.ndarray:
        """The second pass's latents: the first pass's result at the new size, mixed with the seeds' noise."""
        factor = self._manifest.pipeline.vae_scale_factor
        size = (again.height // factor, again.width // factor)
        if again.method == "latent":
            larger = resize_latents(latents, *size)
        else:
            larger = self._pipeline.encode_image(resize_images(images, again.height, again.width), self._request.vae)
        return add_noise(larger, self._noise(*size), again.sigmas[0])

    def _with_control(self, conditioning: Conditioning, image: np.ndarray | None) -> Conditioning:
        """The conditioning with a control image's latents, unless there is none or its scale is 0."""
        if image is None or self._request.control_scale == 0:
            return dataclasses.replace(conditioning, control=None)
        with timed(self.timings, "encode_control", self._stages):
            encoded = self._pipeline.encode_image(image[None], self._request.vae)
            channels = self._manifest.module(denoiser(control=True)).config["control_in_dim"]
            latents = np.zeros((len(self._request.seeds), channels, *encoded.shape[2:]), np.float32)
            latents[:, : encoded.shape[1]] = encoded
        return dataclasses.replace(conditioning, control=Control(latents, self._request.control_scale))

    def _noise(self, latent_height: int, latent_width: int) -> np.ndarray:
        shape = (self._manifest.pipeline.latent_channels, latent_height, latent_width)
        return prepare_noise(self._request.seeds, shape, joint=self._request.batch_noise == "comfyui")

    def _draw(self, which: Pass) -> np.ndarray:
        """Run the loop and decode: uint8 `[batch, height, width, 3]`."""
        request = self._request
        if request.vae_tile is not None:
            self._denoise(which)
            with timed(self.timings, "decode"):
                return decode(
                    self._pipeline, self._manifest, which.latents, request.vae, request.vae_tile, self._stages
                )
        result = self._pipeline.generate(self._job(which, decoded=len(which.latents)), request.vae)
        if result is None:
            raise _cancelled()
        images, seconds = result
        for name, value in seconds.items():
            self.timings[name] = self.timings.get(name, 0.0) + value
        self._stages.tell("decode", len(images), len(images))
        return images

    def _denoise(self, which: Pass) -> np.ndarray:
        """Run the loop alone, which changes `which.latents` in place; returns an empty array of images."""
        with timed(self.timings, "denoise"):
            if not self._pipeline.sample(self._job(which, decoded=0)):
                raise _cancelled()
        return np.empty((0, 0, 0, 3), np.uint8)

    def _job(self, which: Pass, decoded: int) -> SampleJob:
        """The backend's job for a pass; `decoded` is the number of images decoded after the last step."""
        request = self._request
        steps = sampler_table(request.sampler, which.sigmas, request.shift)
        noise = step_noise(
            request.sampler,
            which.sigmas,
            request.shift,
            request.seeds,
            which.latents.shape[1:],
            joint=request.batch_noise == "comfyui",
        )
        # Dynamic guidance alone depends on a prompt's length.
        lengths = self._prompts.lengths(request) if request.dynamic_cfg else [0] * len(request.prompts)
        scales = guidance_scales(
            steps[:, 0], request.guidance_scale, request.cfg_truncation, request.dynamic_cfg, lengths
        )
        on_step = on_step_of(self._callback, self._pipeline, self._manifest, which.number)
        self._stages.tell("denoise", 0, len(which.sigmas) - 1)
        return SampleJob(
            latents=which.latents,
            conditioning=which.conditioning,
            steps=steps,
            guidance=Guidance(scales, request.cfg_normalization),
            step_noise=noise,
            inpaint=which.inpaint,
            on_step=self._stages.with_steps(on_step, decoded),
        )


@contextmanager
def explain_not_finite(manifest: Manifest, loras: Mapping[str, float], guidance_scale: float = 0.0) -> Iterator[None]:
    """Add the possible causes to a NotFinite: the precision, the active LoRAs, the guidance."""
    try:
        yield
    except NotFinite as error:
        precision = manifest.module(error.module).precision
        # Guidance acts on predictions only: it is no cause for encoders and decoders.
        scale = guidance_scale if runs(error.module) == "evaluation" else 0.0
        raise with_causes(error, precision, loras, scale) from error


def _cancelled() -> Cancelled:
    return Cancelled("the callback asked to stop; no image was made")
