"""Input images of every mode and dtype: values are scaled by their range; images without one are refused."""

from __future__ import annotations

import io
import struct
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from zimage_rt.errors import RequestError
from zimage_rt.image.convert import flatten, read_image, read_mask


def rgb(value: Any, background: str = "white") -> list[int]:
    """The first pixel's colour, as a request takes it."""
    return np.asarray(flatten(read_image(value, "image"), background))[0, 0].tolist()


def reopened(image: Image.Image, kind: str, **settings: Any) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, **settings)
    return Image.open(file)


def palette(alpha: bool) -> Image.Image:
    image = Image.new("P", (2, 2), 1)
    entries = [0, 0, 0, 0, 10, 20, 30, 128] if alpha else [0, 0, 0, 10, 20, 30]
    image.putpalette(entries, "RGBA" if alpha else "RGB")
    return image


def transparent(image: Image.Image, value: Any) -> Image.Image:
    image.info["transparency"] = value
    return image


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (Image.new("1", (2, 2), 1), [255, 255, 255]),
        (Image.new("1", (2, 2), 0), [0, 0, 0]),
        (Image.new("L", (2, 2), 77), [77, 77, 77]),
        (transparent(Image.new("L", (2, 2), 77), 77), [255, 255, 255]),
        (transparent(Image.new("L", (2, 2), 77), 78), [77, 77, 77]),
        (Image.new("LA", (2, 2), (100, 128)), [177, 177, 177]),  # 100 * 128/255 + 255 * 127/255 = 177.2
        (Image.new("La", (2, 2), (50, 128)), [177, 177, 177]),  # multiplied already: 50 + 127 = 177
        (Image.new("RGB", (2, 2), (1, 2, 3)), [1, 2, 3]),
        (transparent(Image.new("RGB", (2, 2), (1, 2, 3)), (1, 2, 3)), [255, 255, 255]),
        (Image.new("RGBA", (2, 2), (100, 0, 200, 128)), [177, 127, 227]),
        (Image.new("RGBa", (2, 2), (50, 0, 100, 128)), [177, 127, 226]),
        (Image.new("RGBX", (2, 2), (1, 2, 3, 4)), [1, 2, 3]),
        (palette(alpha=False), [10, 20, 30]),
        (transparent(palette(alpha=False), 1), [255, 255, 255]),
        (transparent(palette(alpha=False), b"\xff\x80"), [132, 137, 142]),  # 10 * 128/255 + 127 = 132.0
        (palette(alpha=True), [132, 137, 142]),
        (Image.new("CMYK", (2, 2), (255, 128, 0, 0)), [0, 127, 255]),
        (Image.new("YCbCr", (2, 2), (76, 85, 255)), [254, 0, 0]),  # JFIF's formulas: red
        (Image.new("HSV", (2, 2), (85, 255, 200)), [0, 200, 0]),  # 85/256 of a turn is green
        (Image.new("I;16", (2, 2), 65535), [255, 255, 255]),
        (Image.new("I;16", (2, 2), 257 * 99 + 128), [99, 99, 99]),
        (Image.new("I;16", (2, 2), 257 * 99 + 129), [100, 100, 100]),
        (Image.frombytes("I;16B", (1, 1), struct.pack(">H", 257 * 99)), [99, 99, 99]),
        (Image.frombytes("I;16L", (1, 1), struct.pack("<H", 257 * 99)), [99, 99, 99]),
    ],
    ids=lambda value: value.mode if isinstance(value, Image.Image) else str(value),
)
def test_every_mode_has_its_right_value(image: Image.Image, expected: list[int]) -> None:
    np.testing.assert_allclose(rgb(image), expected, atol=1)
    if "A" not in image.mode.upper():
        assert rgb(image) == expected  # no mixing that could round otherwise


def test_lab_is_read_by_its_own_colours() -> None:
    """L 50.2, a 20, b -20 of CIE 1976 with white D50, by the formulas of sRGB: (139.9, 107.7, 153.8)."""
    image = Image.frombytes("LAB", (1, 1), bytes([128, 20, 256 - 20]))
    np.testing.assert_allclose(rgb(image), [140, 108, 154], atol=2)


def test_sixteen_bit_files_keep_their_greys() -> None:
    ramp = np.linspace(0, 65535, 256).astype(np.uint16).reshape(16, 16)
    expected = np.arange(256).reshape(16, 16)
    for kind in ("PNG", "TIFF"):
        image = reopened(Image.fromarray(ramp), kind)
        np.testing.assert_array_equal(np.asarray(read_image(image, "image")), expected)
        whole = image.convert("I")  # what older versions of Pillow open
        whole.format = "PNG"
        np.testing.assert_array_equal(np.asarray(read_image(whole, "image")), expected)
    see_through = reopened(Image.new("I;16", (2, 2), 30000), "PNG", transparency=30000)
    assert rgb(see_through) == [255, 255, 255]
    inverted = reopened(Image.fromarray(ramp), "TIFF", tiffinfo={262: 0})
    np.testing.assert_array_equal(np.asarray(read_image(inverted, "image")), expected[::-1, ::-1])


def test_a_sixteen_bit_mask_is_split_in_the_middle() -> None:
    ramp = np.array([[0, 1, 255, 32000, 33500, 65535]] * 6, np.uint16)
    mask = read_mask(read_image(Image.fromarray(ramp), "mask"), (6, 6), 6, 6, "crop", 0.0)
    assert mask[0].tolist() == [0, 0, 0, 0, 255, 255]


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.full((2, 2), 7, np.uint8), 7),
        (np.full((2, 2), 257 * 40 + 129, np.uint16), 41),
        (np.full((2, 2, 1), 65535, np.uint16), 255),
        (np.full((2, 2, 3), 0.5, np.float32), 128),
        (np.full((2, 2), 0.2, np.float64), 51),
        (np.full((2, 2), 1.0, np.float16), 255),
        (np.ones((2, 2), bool), 255),
        (np.zeros((2, 2), bool), 0),
    ],
)
def test_arrays_are_read_by_their_type(array: np.ndarray, expected: int) -> None:
    assert rgb(array) == [expected] * 3


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 2), np.int32), "expected uint8, uint16, bool, or floats from 0 to 1"),
        (np.zeros((2, 2), np.complex64), r"got complex64 \[2, 2\]"),
        (np.zeros((2, 2, 2), np.uint8), r"got uint8 \[2, 2, 2\]"),
        (np.zeros((0, 2, 3), np.uint8), r"got uint8 \[0, 2, 3\]"),
        (np.array([["a"]]), "got <U1"),
        (np.array(3, np.uint8), r"got uint8 \[\]"),
        (np.full((2, 2), 1.5, np.float32), "expected floats from 0 to 1, got 1.5 to 1.5; give uint8 for 0 to 255"),
        (np.full((2, 2), -1.0, np.float64), "got -1 to -1"),
        (np.array([[0.0, np.nan]]), "expected floats from 0 to 1, got nan"),
        (np.array([[0.0, np.inf]]), "got 0 to inf"),
        (Image.new("I", (2, 2), 7), "mask: expected an image with a known range, got mode I.*give uint16"),
        (Image.new("F", (2, 2), 0.5), "mask: expected an image with a known range, got mode F.*floats from 0 to 1"),
        (reopened(Image.new("I", (2, 2), 7), "TIFF"), r"at most 16 bits without a sign, got \[32\] bits in mode I"),
    ],
)
def test_what_has_no_known_range_is_refused(value: Any, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_image(value, "mask")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sixteen_bit_images_are_turned_as_their_exif_says(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    grey = np.arange(6, dtype=np.uint8).reshape(2, 3) * 40
    eight = reopened(Image.fromarray(grey), "PNG", exif=exif)
    sixteen = reopened(Image.fromarray(grey.astype(np.uint16) * 257), "PNG", exif=exif)
    expected = np.asarray(ImageOps.exif_transpose(eight))
    np.testing.assert_array_equal(np.asarray(read_image(eight, "image")), expected)
    np.testing.assert_array_equal(np.asarray(read_image(sixteen, "image")), expected)
    assert read_image(eight, "image").size == ((3, 2) if orientation < 5 else (2, 3))
