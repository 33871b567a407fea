"""The prompt node of Z-Image's Omni and Edit models."""

from __future__ import annotations

from typing import Annotated, Any

from ..graph import WorkflowError
from ..inputs import Socket
from ..registry import node
from ..run import Run
from ..values import Vae
from .conditioning import encode_text
from .images import MaybeImage
from .sockets import ClipIn, Prompt, YesNo

MaybeVae = Annotated[Vae | None, Socket("VAE")]
MaybeVision = Annotated[Any, Socket("CLIP_VISION")]


@node("TextEncodeZImageOmni", "CONDITIONING", category="advanced/conditioning")
def encode(
    run: Run,
    clip: ClipIn,
    prompt: Prompt,
    auto_resize_images: YesNo = True,
    image_encoder: MaybeVision = None,
    vae: MaybeVae = None,
    image1: MaybeImage = None,
    image2: MaybeImage = None,
    image3: MaybeImage = None,
) -> tuple[Any, ...]:
    """A prompt, which without images is that of CLIPTextEncode."""
    del auto_resize_images, image_encoder, vae  # they are for the images
    for name, image in (("image1", image1), ("image2", image2), ("image3", image3)):
        if image is not None:
            raise WorkflowError(f"{name}: expected none, got an image; models that edit images are not served")
    return encode_text(run, prompt, clip)
