"""All nodes: importing this package registers them."""

from . import conditioning, images, latents, loaders, masks, model_patches, primitives, samplers, upscale

__all__ = [
    "conditioning",
    "images",
    "latents",
    "loaders",
    "masks",
    "model_patches",
    "primitives",
    "samplers",
    "upscale",
]
