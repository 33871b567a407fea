"""Latents added, mixed, cut, rotated and put together.

ComfyUI does it in the VAE's space, where a model's latent `x` is `x / SCALE + SHIFT`. Sums and products there are
others than the model's, so latents are taken there and back. A latent of zeros is zeros in both; see `values.Latent`.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any

import numpy as np

from ..graph import WorkflowError
from ..inputs import Choice, Number, Whole
from ..registry import node
from ..resize import check_numbers
from ..run import Run
from ..values import Latent, in_vae_space, repeated, with_vae_samples
from .compose import FLIPS, ROTATIONS, composite, sized
from .dynamic import MAX_BATCHES, filled, growing_node
from .latents import FACTOR
from .masks import MaybeMask
from .sockets import MAX_SIZE, LatentIn, Pixels, Share, YesNo

LatentSide = Annotated[int, Whole(64, MAX_SIZE)]


@node("LatentAdd", "LATENT", category="latent/advanced")
def add(run: Run, samples1: LatentIn, samples2: LatentIn) -> tuple[Any, ...]:
    """The sum of two latents."""
    del run
    one, other = _alike(samples1, samples2)
    return (with_vae_samples(samples1, one + other),)


@node("LatentSubtract", "LATENT", category="latent/advanced")
def subtract(run: Run, samples1: LatentIn, samples2: LatentIn) -> tuple[Any, ...]:
    """The difference of two latents."""
    del run
    one, other = _alike(samples1, samples2)
    return (with_vae_samples(samples1, one - other),)


@node("LatentMultiply", "LATENT", category="latent/advanced")
def multiply(run: Run, samples: LatentIn, multiplier: Annotated[float, Number(-10.0, 10.0)] = 1.0) -> tuple[Any, ...]:
    """A latent times a number."""
    del run
    return (with_vae_samples(samples, in_vae_space(samples.samples) * multiplier),)


@node("LatentInterpolate", "LATENT", category="latent/advanced")
def interpolate(run: Run, samples1: LatentIn, samples2: LatentIn, ratio: Share = 1.0) -> tuple[Any, ...]:
    """A latent between two: the direction of every place's channels and their length are mixed apart."""
    del run
    one, other = _alike(samples1, samples2)
    lengths = [np.linalg.norm(each, axis=1, keepdims=True) for each in (one, other)]
    mixed = _directions(one) * ratio + _directions(other) * (1 - ratio)
    return (with_vae_samples(samples1, _directions(mixed) * (lengths[0] * ratio + lengths[1] * (1 - ratio))),)


@node("LatentBlend", "LATENT", category="_for_testing")
def blend(run: Run, samples1: LatentIn, samples2: LatentIn, blend_factor: Share = 0.5) -> tuple[Any, ...]:
    """A mixture of two latents: `blend_factor` of the first."""
    del run
    one, other = (in_vae_space(each.samples) for each in (samples1, samples2))
    if len(other) not in (1, len(one)):
        raise WorkflowError(f"samples2: expected 1 or {len(one)} latents, got {len(other)}")
    other = sized(other, 2, one.shape[2], one.shape[3], "bicubic")
    return (with_vae_samples(samples1, one * blend_factor + other * (1 - blend_factor)),)


@node("LatentComposite", "LATENT", category="latent")
def compose(
    run: Run, samples_to: LatentIn, samples_from: LatentIn, x: Pixels = 0, y: Pixels = 0, feather: Pixels = 0
) -> tuple[Any, ...]:
    """A latent drawn over another at a place in pixels, with edges that fade where they are inside."""
    del run
    under, over = (in_vae_space(each.samples) for each in (samples_to, samples_from))
    if len(over) not in (1, len(under)):
        raise WorkflowError(f"samples_from: expected 1 or {len(under)} latents, got {len(over)}")
    corner = (y // FACTOR, x // FACTOR)
    over = over[..., : max(0, under.shape[2] - corner[0]), : max(0, under.shape[3] - corner[1])]
    down, across = (
        _faded(size, feather // FACTOR, before=start > 0, after=start + size < whole)
        for size, start, whole in zip(over.shape[2:], corner, under.shape[2:], strict=True)
    )
    share = down[:, None] * across
    top, left = corner
    found = under.copy()
    window = found[:, :, top : top + over.shape[2], left : left + over.shape[3]]
    window[:] = over * share + window * (1 - share)
    return (with_vae_samples(samples_to, found),)


@node("LatentCompositeMasked", "LATENT", category="latent")
def compose_masked(
    run: Run,
    destination: LatentIn,
    source: LatentIn,
    x: Pixels = 0,
    y: Pixels = 0,
    resize_source: YesNo = False,
    mask: MaybeMask = None,
) -> tuple[Any, ...]:
    """A latent drawn over another at a place in pixels, where the mask is 1."""
    del run
    under, over = (in_vae_space(each.samples) for each in (destination, source))
    return (with_vae_samples(destination, composite(under, over, (y // FACTOR, x // FACTOR), mask, resize_source)),)


@node("LatentCrop", "LATENT", category="latent/transform")
def crop(
    run: Run, samples: LatentIn, width: LatentSide = 512, height: LatentSide = 512, x: Pixels = 0, y: Pixels = 0
) -> tuple[Any, ...]:
    """A part of a latent, its size in pixels; it begins at least 64 pixels before the end."""
    del run
    rows, columns = samples.samples.shape[2:]
    top, left = (max(0, min(at // FACTOR, size - 8)) for at, size in ((y, rows), (x, columns)))
    part = samples.samples[:, :, top : top + height // FACTOR, left : left + width // FACTOR]
    return (dataclasses.replace(samples, samples=np.ascontiguousarray(part)),)


@node("LatentFlip", "LATENT", category="latent/transform")
def flip(run: Run, samples: LatentIn, flip_method: Annotated[str, Choice(FLIPS)]) -> tuple[Any, ...]:
    """A latent upside down or mirrored."""
    del run
    found = np.flip(samples.samples, 2 + FLIPS.index(flip_method))
    return (dataclasses.replace(samples, samples=np.ascontiguousarray(found)),)


@node("LatentRotate", "LATENT", category="latent/transform")
def rotate(run: Run, samples: LatentIn, rotation: Annotated[str, Choice(ROTATIONS)]) -> tuple[Any, ...]:
    """A latent rotated clockwise."""
    del run
    found = np.rot90(samples.samples, ROTATIONS.index(rotation), (3, 2))
    return (dataclasses.replace(samples, samples=np.ascontiguousarray(found)),)


@node("LatentBatch", "LATENT", category="latent/batch")
def batch(run: Run, samples1: LatentIn, samples2: LatentIn) -> tuple[Any, ...]:
    """Two batches as one. Each keeps its places in the noise, so that both begin with that of the seed."""
    del run
    return (_batched([samples1, samples2]),)


@growing_node("BatchLatentsNode", "LATENT", category="latent/batch", names=[f"latent{at}" for at in range(MAX_BATCHES)])
def batch_all(run: Run, **latents: LatentIn) -> tuple[Any, ...]:
    """Batches as one; see LatentBatch."""
    del run
    return (_batched(list(filled(latents).values())),)


@node("LatentBatchSeedBehavior", "LATENT", category="latent/advanced")
def seed_behavior(
    run: Run, samples: LatentIn, seed_behavior: Annotated[str, Choice(("random", "fixed"))] = "fixed"
) -> tuple[Any, ...]:
    """A batch whose latents get the same noise, or each its own."""
    del run
    if seed_behavior == "random":
        return (dataclasses.replace(samples, batch_index=None),)
    first = (samples.batch_index or (0,))[0]
    return (dataclasses.replace(samples, batch_index=(first,) * len(samples.samples)),)


def _alike(first: Latent, second: Latent) -> tuple[np.ndarray, np.ndarray]:
    """The samples of two latents in the VAE's space, the second's of the first's size and number."""
    one, other = (in_vae_space(each.samples) for each in (first, second))
    return one, repeated(sized(other, 2, one.shape[2], one.shape[3], "bilinear"), len(one))


def _batched(latents: list[Latent]) -> Latent:
    height, width = latents[0].samples.shape[2:]
    counts = [len(each.samples) for each in latents]
    check_numbers("latents", sum(counts), *latents[0].samples.shape[1:])
    samples = [sized(in_vae_space(each.samples), 2, height, width, "bilinear") for each in latents]
    places = [place for each, count in zip(latents, counts, strict=True) for place in each.batch_index or range(count)]
    return dataclasses.replace(with_vae_samples(latents[0], np.concatenate(samples)), batch_index=tuple(places))


def _directions(samples: np.ndarray) -> np.ndarray:
    """Channels of length 1; those of length 0 stay."""
    lengths = np.linalg.norm(samples, axis=1, keepdims=True)
    return np.divide(samples, lengths, out=np.zeros_like(samples), where=lengths > 0)


def _faded(size: int, feather: int, *, before: bool, after: bool) -> np.ndarray:
    """Ones that fall off towards the ends that are asked for."""
    share = np.ones(size)
    for step in range(feather):
        # As in ComfyUI also where a fade is longer than the latent: its second end then begins anew.
        if before:
            share[step : step + 1] *= (step + 1) / feather
        if after:
            share[size - 1 - step : size - step] *= (step + 1) / feather
    return share
