"""A mask is aligned with its image at any size, with every fit, and with every EXIF orientation."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from manifests import small_manifest
from PIL import Image

from zimage_rt.errors import RequestError
from zimage_rt.request.resolve import resolve
from zimage_rt.request.types import GenerateRequest, ResolvedRequest


def resolved(image: Any, mask: Any, **fields: Any) -> ResolvedRequest:
    base = small_manifest()
    module = base.modules["t"]
    names = ("transformer", "tiny_vae_decoder", "tiny_vae_encoder")
    manifest = dataclasses.replace(base, modules=dict.fromkeys(names, module))
    return resolve(GenerateRequest("a cat", image=image, mask=mask, **fields), manifest)


def marked(width: int, height: int, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    """An image with a white spot on black, and the mask of that spot at another size."""
    image = np.zeros((height, width, 3), np.uint8)
    image[height // 4 : height // 2, width // 2 : width * 3 // 4] = 255
    mask = Image.fromarray(image[..., 0])
    if scale != 1:
        mask = mask.resize((round(width * scale), round(height * scale)), Image.Resampling.NEAREST)
    return image, np.asarray(mask)


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize("scale", [1.0, 0.5, 0.25, 2.0, 1 / 3])
@pytest.mark.parametrize("size", [(300, 100), (128, 256), (201, 333)])
def test_a_mask_stays_on_its_image(fit: str, scale: float, size: tuple[int, int]) -> None:
    """Where the mask says to draw, the fitted image has its spot."""
    image, mask = marked(*size, scale)
    result = resolved(image, mask, height=192, width=192, fit=fit)
    assert result.image is not None and result.mask is not None
    spot = result.image[..., 0] >= 128
    assert spot.any()
    # Edges may move by a pixel of the smaller of the two.
    wrong = (spot != (result.mask == 255)).sum()
    coarse = max(1.0, 1 / scale) * 192 / min(size)
    assert wrong <= 2 * coarse * (spot.any(0).sum() + spot.any(1).sum())
    if scale == 1:
        assert wrong == 0


def test_a_mask_of_another_shape_is_refused_with_both_sizes() -> None:
    image, _ = marked(300, 100)
    for shape in ((192, 192), (300, 100), (100, 290), (100, 310)):
        with pytest.raises(RequestError, match=f"mask: .* 300x100 .width x height.*, got {shape[1]}x{shape[0]}; draw"):
            resolved(image, np.full(shape, 255, np.uint8), height=192, width=192)


@pytest.mark.parametrize(
    ("size", "same"),
    [
        ((1023, 767), True),  # a 1024x768 that was scaled and rounded down
        ((341, 256), True),
        ((342, 256), True),
        ((512, 384), True),
        ((128, 96), True),
        ((2048, 1536), True),
        ((768, 1024), False),
        ((512, 512), False),
        ((512, 387), False),
    ],
)
def test_shapes_are_the_same_up_to_rounding(size: tuple[int, int], same: bool) -> None:
    from zimage_rt.image.convert import _same_shape

    assert _same_shape(size, (1024, 768)) == same
    assert _same_shape((1024, 768), size) == same


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_mask_is_drawn_over_the_image_as_it_is_seen(orientation: int, tmp_path: Path) -> None:
    image, mask = marked(192, 128)
    undo = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / "turned.png"
    Image.fromarray(image).transpose(undo[orientation]).save(path, exif=exif)  # as a camera that was held so
    result = resolved(path, mask)
    assert result.image is not None and result.mask is not None
    assert (result.height, result.width) == (128, 192)
    np.testing.assert_array_equal(result.image, image)
    np.testing.assert_array_equal(result.mask, mask)
    if orientation != 3:
        with pytest.raises(RequestError, match="mask: expected the shape of its image, 192x128"):
            resolved(path, mask.T)
    # A mask with the same EXIF data is turned, too.
    turned = Image.fromarray(mask).transpose(undo[orientation])
    turned.save(tmp_path / "mask.png", exif=exif)
    again = resolved(path, tmp_path / "mask.png").mask
    assert again is not None
    np.testing.assert_array_equal(again, mask)
