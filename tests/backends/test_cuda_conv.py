"""The 3x3 convolution on the GPU, and the kernels that feed it, against float64 references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_reference import TOLERANCE, cast, relative_error, require_kernels, to_float

from zimage_rt.image.convert import to_signed, to_uint8

pytestmark = pytest.mark.gpu
cuda_kernels = require_kernels()

DTYPES = ["float16", "bfloat16"]
# Half a unit in the last place, and room for fp32 sums of 576 terms, whose size here is one: tensor cores cut off where
# a processor rounds.
UNIT = {"float16": 2.0**-11, "bfloat16": 2.0**-8}
SUM_ERROR = 1e-4
SIZES = [(1, 1), (1, 40), (17, 33), (64, 64)]


@pytest.fixture(scope="module")
def kernels() -> Any:
    return cuda_kernels


def reference(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray | None = None, *, upsample: bool = False, stride: int = 1
) -> np.ndarray:
    """x [B, H, W, I], weight [O, I, 3, 3], bias [O] -> [B, H', W', O], in the arguments' floating-point type."""
    if upsample:
        x = x.repeat(2, axis=1).repeat(2, axis=2)
    x = np.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
    height, width = x.shape[1] - 2, x.shape[2] - 2
    out = np.zeros((x.shape[0], (height - 1) // stride + 1, (width - 1) // stride + 1, len(weight)), x.dtype)
    for dy, dx in np.ndindex(3, 3):
        seen = x[:, dy : dy + height : stride, dx : dx + width : stride]
        out += (seen.reshape(-1, x.shape[3]) @ weight[:, :, dy, dx].T).reshape(out.shape)
    return out if bias is None else out + bias


def integers(shape: tuple[int, ...], most: int) -> np.ndarray:
    """Small whole numbers: their sums are exact in fp32, so a result is right to the bit or wrong."""
    return np.random.default_rng().integers(-most, most + 1, shape).astype(np.float32)


def normal(shape: tuple[int, ...], dtype: str, scale: float = 1.0) -> np.ndarray:
    return cast(np.random.default_rng().standard_normal(shape) * scale, dtype)


def pad16(x: np.ndarray) -> np.ndarray:
    """Channels padded with zeros to 16."""
    return np.pad(x, ((0, 0), (0, 0), (0, 0), (0, 16 - x.shape[3])))


def run_integers(
    kernels: Any,
    dtype: str,
    shape: tuple[int, int, int],
    *,
    inputs: int = 64,
    bias: bool = True,
    residual: bool = False,
    relu: bool = False,
    **options: Any,
) -> None:
    """A convolution to 64 channels of whole numbers, equal to the rounded reference in every element."""
    x, weight = integers((*shape, inputs), 3), integers((64, inputs, 3, 3), 3)
    b = integers((64,), 40) if bias else None
    where = {key: options[key] for key in ("upsample", "stride") if key in options}
    expected = reference(x, weight, b, **where)
    skip = integers(expected.shape, 200) if residual else None
    expected = expected if skip is None else expected + skip
    expected = np.maximum(expected, 0) if relu else expected
    out = kernels.conv3x3(
        cast(x if inputs == 64 else pad16(x), dtype),
        cast(weight, dtype),
        bias=None if b is None else cast(b, dtype),
        residual=None if skip is None else cast(skip, dtype),
        relu=relu,
        **options,
    )
    assert out.shape == expected.shape
    np.testing.assert_array_equal(to_float(out), to_float(cast(expected, dtype)))


@pytest.mark.parametrize("options", range(8))
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_options(kernels: Any, dtype: str, size: tuple[int, int], batch: int, options: int) -> None:
    run_integers(
        kernels, dtype, (batch, *size), bias=bool(options & 1), relu=bool(options & 2), residual=bool(options & 4)
    )


# Enough tiles that the large ones are chosen, that blocks take more than one, and that the last ones are cut off:
# (height, width) of the output for large tiles, then of narrow images that keep the small ones.
LARGE = [(208, 384), (203, 377), (512, 130), (784, 48), (797, 35)]


@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize("size", LARGE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_many_tiles(kernels: Any, dtype: str, size: tuple[int, int], residual: bool) -> None:
    run_integers(kernels, dtype, (1, *size), residual=residual, relu=True)


@pytest.mark.parametrize("dtype", DTYPES)
def test_batch_of_large(kernels: Any, dtype: str) -> None:
    run_integers(kernels, dtype, (2, 150, 290), residual=True, relu=True)


@pytest.mark.parametrize("size", [*SIZES, (101, 189), (400, 24)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_upsample(kernels: Any, dtype: str, batch: int, size: tuple[int, int]) -> None:
    run_integers(kernels, dtype, (batch, *size), upsample=True, bias=False)


@pytest.mark.parametrize("size", [*SIZES, (16, 32), (15, 31), (200, 330)])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_stride(kernels: Any, dtype: str, batch: int, size: tuple[int, int]) -> None:
    run_integers(kernels, dtype, (batch, *size), stride=2, bias=False)
    run_integers(kernels, dtype, (batch, *size), stride=2, relu=True, residual=True)


@pytest.mark.parametrize("size", [*SIZES, (300, 600)])
@pytest.mark.parametrize("inputs", [3, 16])
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_inputs(kernels: Any, dtype: str, inputs: int, size: tuple[int, int]) -> None:
    run_integers(kernels, dtype, (2, *size), inputs=inputs, relu=True)


@pytest.mark.parametrize("size", [(17, 33), (208, 384)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place(kernels: Any, dtype: str, size: tuple[int, int]) -> None:
    run_integers(kernels, dtype, (1, *size), residual=True, relu=True, in_place=True, early_start=True)


@pytest.mark.parametrize("outputs", [3, 8, 16])
@pytest.mark.parametrize("size", [*SIZES, (203, 377)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_float_planes(kernels: Any, dtype: str, size: tuple[int, int], outputs: int) -> None:
    x, weight, bias = integers((2, *size, 64), 3), integers((outputs, 64, 3, 3), 3), integers((outputs,), 40)
    expected = reference(x, weight, bias).transpose(0, 3, 1, 2) * 2 - 1
    out = kernels.conv3x3(
        cast(x, dtype), cast(weight, dtype), bias=cast(bias, dtype), output="float", scale=2.0, shift=-1.0
    )
    assert out.dtype == np.float32
    np.testing.assert_array_equal(out, expected)


@pytest.mark.parametrize("size", [*SIZES, (203, 377)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_uint8(kernels: Any, dtype: str, size: tuple[int, int]) -> None:
    x, weight = normal((2, *size, 64), dtype), normal((3, 64, 3, 3), dtype, 0.02)
    bias = cast(np.full(3, 0.5), dtype)
    pixels = kernels.conv3x3(x, weight, bias=bias, output="uint8")
    assert pixels.dtype == np.uint8 and pixels.shape == (2, *size, 3)
    value = reference(to_float(x), to_float(weight), to_float(bias))
    assert np.abs(pixels - np.clip(value, 0, 1) * 255).max() <= 0.5 + 255 * SUM_ERROR
    image = kernels.conv3x3(x, weight, bias=bias, output="float", scale=2.0, shift=-1.0)
    np.testing.assert_array_equal(pixels, to_uint8(image))


@pytest.mark.parametrize("size", [(17, 33), (208, 384)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rounding(kernels: Any, dtype: str, size: tuple[int, int]) -> None:
    x, weight = normal((1, *size, 64), dtype), normal((64, 64, 3, 3), dtype, 1 / 24)
    bias, residual = normal((64,), dtype), normal((1, *size, 64), dtype)
    expected = np.maximum(reference(to_float(x), to_float(weight), to_float(bias)) + to_float(residual), 0)
    out = kernels.conv3x3(x, weight, bias=bias, residual=residual, relu=True)
    assert relative_error(out, expected) <= TOLERANCE[dtype]
    assert (np.abs(to_float(out) - expected) <= UNIT[dtype] * expected + SUM_ERROR).all()
    again = kernels.conv3x3(x, weight, bias=bias, residual=residual, relu=True)
    assert out.tobytes() == again.tobytes()


def test_nan_is_kept(kernels: Any) -> None:
    x, weight = np.zeros((1, 9, 9, 64), np.float16), np.ones((64, 64, 3, 3), np.float16)
    x[0, 4, 4, 7] = np.nan
    broken = np.isnan(kernels.conv3x3(x, weight, relu=True)).all(axis=3)[0]
    assert broken[3:6, 3:6].all() and broken.sum() == 9


@pytest.mark.parametrize(
    ("inputs", "outputs", "options", "message"),
    [
        (64, 32, {}, "64 -> 32 channels"),
        (32, 64, {}, "32 -> 64 channels"),
        (64, 64, {"stride": 3}, "stride 3"),
        (64, 64, {"stride": 2, "upsample": True}, "stride 2"),
        (64, 64, {"output": "float"}, "64 -> 64 channels"),
        (64, 16, {"output": "uint8"}, "64 -> 16 channels"),
    ],
)
def test_what_it_refuses(kernels: Any, inputs: int, outputs: int, options: dict[str, Any], message: str) -> None:
    x, weight = np.zeros((1, 4, 4, inputs), np.float16), np.zeros((outputs, inputs, 3, 3), np.float16)
    with pytest.raises(ValueError, match=message):
        kernels.conv3x3(x, weight, **options)


@pytest.mark.parametrize("channels", [4, 16])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_latents_to_pixels(kernels: Any, dtype: str, size: tuple[int, int], channels: int) -> None:
    latents = np.random.default_rng().standard_normal((2, channels, *size)).astype(np.float32) * 4
    out = to_float(kernels.unscale_latents_to_nhwc(latents, 0.3611, 0.1159, dtype))
    expected = pad16((np.tanh((latents.astype(np.float64) / 0.3611 + 0.1159) / 3) * 3).transpose(0, 2, 3, 1))
    assert out.shape == (2, *size, 16) and not out[..., channels:].any()
    assert relative_error(out, expected) <= TOLERANCE[dtype]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_image_to_pixels(kernels: Any, dtype: str, size: tuple[int, int]) -> None:
    image = np.random.default_rng().uniform(-1, 1, (2, 3, *size)).astype(np.float32)
    out = kernels.image_to_nhwc(image, dtype)
    expected = (image + np.float32(1)) / 2
    np.testing.assert_array_equal(to_float(out), to_float(cast(pad16(expected.transpose(0, 2, 3, 1)), dtype)))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bytes_to_pixels_is_image_to_pixels(kernels: Any, dtype: str, size: tuple[int, int]) -> None:
    images = np.random.default_rng().integers(0, 256, (2, *size, 3), np.uint8)
    out, expected = kernels.uint8_to_nhwc(images, dtype), kernels.image_to_nhwc(to_signed(images), dtype)
    assert out.tobytes() == expected.tobytes()
