"""Changes of a model: its schedule, its guidance, and the image that a ControlNet follows."""

from __future__ import annotations

import dataclasses
import warnings
from typing import Annotated, Any

import numpy as np

from ...backends.base import Control
from ...bundle.modules import denoiser
from ...errors import RequestWarning
from ..graph import WorkflowError
from ..inputs import File, Flag, Number, Socket
from ..registry import node
from ..resize import resize, resize_images
from ..run import Run
from ..sampling import check_size
from ..values import Followed, Latent, Model, ModelPatch, Vae
from .latents import CHANNELS, FACTOR, centre, encode
from .sockets import ImageIn, ModelIn, VaeIn

MIN_SHIFT = 0.01
# What ModelSamplingSD3 multiplies timesteps by, whatever the model was trained with.
SD3_MULTIPLIER = 1000.0
# Channels of a ControlNet's input: the control image's latents, or with a mask and the kept image's latents.
PLAIN, INPAINTING = CHANNELS, 2 * CHANNELS + 1

PatchIn = Annotated[ModelPatch, Socket("MODEL_PATCH")]
MaybeImage = Annotated[np.ndarray | None, Socket("IMAGE")]
MaybeMask = Annotated[np.ndarray | None, Socket("MASK")]
Strength = Annotated[float, Number(-10.0, 10.0)]


@node("ModelSamplingAuraFlow", "MODEL", category="advanced/model")
def model_sampling(run: Run, model: ModelIn, shift: Annotated[float, Number(0.0, 100.0)] = 1.73) -> tuple[Any, ...]:
    """A model with another timestep shift."""
    del run
    _check_shift(shift)
    return (dataclasses.replace(model, shift=shift, timestep_multiplier=1.0),)


@node("ModelSamplingSD3", "MODEL", category="advanced/model")
def model_sampling_sd3(run: Run, model: ModelIn, shift: Annotated[float, Number(0.0, 100.0)] = 3.0) -> tuple[Any, ...]:
    """A model with another timestep shift, which gets timesteps as Stable Diffusion 3 does. Z-Image draws noise then.

    Warns:
        RequestWarning: always.
    """
    del run
    _check_shift(shift)
    warnings.warn(
        "ModelSamplingSD3 gives Z-Image timesteps that are 1000 times too large, here as in ComfyUI: images are "
        "ruined; use ModelSamplingAuraFlow",
        RequestWarning,
        stacklevel=2,
    )
    return (dataclasses.replace(model, shift=shift, timestep_multiplier=SD3_MULTIPLIER),)


@node("CFGNorm", "MODEL", category="advanced/guidance")
def cfg_norm(
    run: Run,
    model: ModelIn,
    strength: Annotated[float, Number(0.0, 100.0)] = 1.0,
    pre_cfg: Annotated[bool, Flag()] = False,
) -> tuple[Any, ...]:
    """A model whose guided predictions are scaled to the norm of the positive prompt's; see `CfgNorm`."""
    del run
    norm = model.cfg_norm
    if pre_cfg:
        norm = dataclasses.replace(norm, before=strength)  # ComfyUI, too, keeps the last of these alone
    else:
        norm = dataclasses.replace(norm, after=(*norm.after, strength))
    return (dataclasses.replace(model, cfg_norm=norm),)


@node("ModelPatchLoader", "MODEL_PATCH", category="advanced/loaders")
def load_model_patch(run: Run, name: Annotated[str, File("model_patches")]) -> tuple[Any, ...]:
    """The ControlNet of a bundle."""
    bundle = run.files.bundle("model_patches", name)
    if denoiser(control=True) not in run.engine(bundle).manifest.modules:
        raise WorkflowError(
            f"name: the bundle {bundle}, which {name} stands for, has no ControlNet; export it again with one: "
            "zimage-export … --controlnet PATH, or `controlnet` under [parts] of the recipe"
        )
    return (ModelPatch(bundle),)


@node("QwenImageDiffsynthControlnet", "MODEL", category="advanced/loaders/qwen")
def follow(
    run: Run,
    model: ModelIn,
    model_patch: PatchIn,
    vae: VaeIn,
    image: ImageIn,
    strength: Strength = 1.0,
    mask: MaybeMask = None,
) -> tuple[Any, ...]:
    """A model that follows a control image; `mask` is for ControlNets that inpaint."""
    return fun_controlnet(run, model, model_patch, vae, strength, image, None, mask)


@node("ZImageFunControlnet", "MODEL", category="advanced/loaders/zimage")
def fun_controlnet(
    run: Run,
    model: ModelIn,
    model_patch: PatchIn,
    vae: VaeIn,
    strength: Strength = 1.0,
    image: MaybeImage = None,
    inpaint_image: MaybeImage = None,
    mask: MaybeMask = None,
) -> tuple[Any, ...]:
    """A model that follows a control image, and sees an image of which `mask` marks the parts to draw."""
    model = dataclasses.replace(model, bundle=run.together("controlnet", model.bundle, model_patch.bundle))
    if model.control is not None:
        raise WorkflowError("model: it follows a ControlNet already; a model follows one at a time here")
    inpaints = _channels(run, model) == INPAINTING
    if image is None and (inpaint_image is None or not inpaints):
        wanted = "image or inpaint_image" if inpaints else "image: this ControlNet does not inpaint"
        raise WorkflowError(f"image: expected a link to {wanted}, got none")
    return (dataclasses.replace(model, control=Followed(vae, image, inpaint_image, mask, strength)),)


def control_of(run: Run, model: Model, latent: Latent) -> Control | None:
    """The input of a model's ControlNet for latents; None if the model follows none.

    Images are those of ComfyUI: resized by area and cut in their middle if they have another size, grey where there is
    none. Raises WorkflowError.
    """
    followed = model.control
    if followed is None or followed.strength == 0:
        return None
    check_size(run.model_engine(model), latent)
    batch, _, rows, columns = latent.samples.shape
    size = (rows * FACTOR, columns * FACTOR)
    grey = np.full((1, *size, 3), 0.5, np.float32)
    parts = [_encoded(run, followed.vae, _fitted(followed.image, grey, size), "image", batch)]
    if _channels(run, model) == INPAINTING:
        seen, known = _fitted(followed.inpaint_image, grey, size), np.zeros((1, 1, rows, columns), np.float32)
        if followed.mask is not None:
            kept = (np.float32(1) - followed.mask)[:, None]
            hard = np.rint(resize(_centred(kept, size), *size, "bilinear"))
            seen = (seen - np.float32(0.5)) * np.moveaxis(hard, 1, -1) + np.float32(0.5)
            known = _nearest(_centred(kept, (rows, columns)), rows, columns)
        parts += [_repeated(known, "mask", batch), _encoded(run, followed.vae, seen, "inpaint_image", batch)]
    return Control(np.ascontiguousarray(np.concatenate(parts, axis=1), np.float32), followed.strength)


def _check_shift(shift: float) -> None:
    if shift < MIN_SHIFT:
        raise WorkflowError(f"shift: expected {MIN_SHIFT} or more, got {shift:g}")


def _channels(run: Run, model: Model) -> int:
    """The channels of a ControlNet's input: PLAIN or INPAINTING."""
    channels = int(run.engine(model.bundle).manifest.module(denoiser(control=True)).config["control_in_dim"])
    if channels not in (PLAIN, INPAINTING):
        raise WorkflowError(f"model_patch: expected a ControlNet of {PLAIN} or {INPAINTING} channels, got {channels}")
    return channels


def _fitted(image: np.ndarray | None, grey: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Images `[batch, height, width, 3]` of a size; grey if there are none."""
    if image is None:
        return grey
    if image.shape[1:3] != size:
        vertical, horizontal = centre(image.shape[1], image.shape[2], *size)
        image = resize_images(image[:, vertical, horizontal, :3], *size, "area")
    return image[..., :3]


def _centred(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """The middle of masks `[batch, 1, height, width]` that has the aspect ratio of a size."""
    vertical, horizontal = centre(mask.shape[2], mask.shape[3], *size)
    return mask[:, :, vertical, horizontal]


def _nearest(mask: np.ndarray, rows: int, columns: int) -> np.ndarray:
    """Masks of another size by torch's `nearest`, which takes the first of the pixels where `nearest-exact` centres."""
    vertical, horizontal = (
        np.arange(size) * before // size for size, before in zip((rows, columns), mask.shape[2:], strict=True)
    )
    return mask[:, :, vertical[:, None], horizontal]


def _encoded(run: Run, vae: Vae, images: np.ndarray, name: str, batch: int) -> np.ndarray:
    return _repeated(encode(run, vae, images), name, batch)


def _repeated(array: np.ndarray, name: str, batch: int) -> np.ndarray:
    """An array of one entry or a batch's, for the batch."""
    if len(array) not in (1, batch):
        raise WorkflowError(f"{name}: expected 1, or one for each of the {batch} latents, got {len(array)}")
    return np.broadcast_to(array, (batch, *array.shape[1:]))
