"""All nodes: importing this package registers them."""

from . import conditioning, images, latents, loaders, masks, primitives, samplers

__all__ = ["conditioning", "images", "latents", "loaders", "masks", "primitives", "samplers"]
