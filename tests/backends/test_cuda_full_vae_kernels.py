"""The full VAE's kernels on the GPU: convolutions, group norm, softmax and inputs, against float64 references."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from cuda_reference import TOLERANCE, cast, relative_error, require_kernels, to_float

from zimage_rt.image.convert import to_uint8

pytestmark = pytest.mark.gpu
cuda_kernels = require_kernels()

DTYPES = ["float16", "bfloat16"]
KINDS = ["1x1", "3x3", "down", "up"]
# Height and width: a single tile and less, several of them with odd rests, and one column of tiles.
SIZES = [(2, 2), (7, 19), (16, 16), (33, 50), (70, 5)]
# Of inputs and outputs: less than a step along k, more than a tile, the widths of the real model's ends, odd rests.
CHANNELS = [(16, 64), (32, 72), (64, 128), (128, 256), (200, 136)]


@pytest.fixture(params=["mma", "hopper"])
def hopper(request: pytest.FixtureRequest) -> bool:
    """Which of both kernels computes."""
    if request.param == "hopper" and not cuda_kernels.fused_gemm_runs_here():
        pytest.skip("the Hopper kernels do not run here")
    return request.param == "hopper"


def reference(x: np.ndarray, weight: np.ndarray, bias: np.ndarray, kind: str) -> np.ndarray:
    """x [H, W, I], weight [O, I, k, k], bias [O] -> [H', W', O], in the arguments' floating-point type."""
    if kind == "up":
        x = x.repeat(2, axis=0).repeat(2, axis=1)
    before = 1 if kind in ("3x3", "up") else 0
    after = 0 if kind == "1x1" else 1
    x = np.pad(x, ((before, after), (before, after), (0, 0)))
    size, stride = weight.shape[2], 2 if kind == "down" else 1
    height, width = (x.shape[0] - size) // stride + 1, (x.shape[1] - size) // stride + 1
    out = np.zeros((height, width, len(weight)), x.dtype)
    for dy, dx in np.ndindex(size, size):
        seen = x[dy : dy + stride * (height - 1) + 1 : stride, dx : dx + stride * (width - 1) + 1 : stride]
        out += seen @ weight[:, :, dy, dx].T
    return out + bias


def integers(rng: np.random.Generator, shape: tuple[int, ...], most: int) -> np.ndarray:
    """Small whole numbers: their sums are exact in fp32, so a result is right to the bit or wrong."""
    return rng.integers(-most, most + 1, shape).astype(np.float64)


def convolve(
    x: np.ndarray, weight: np.ndarray, bias: np.ndarray, kind: str, dtype: str, **options: Any
) -> tuple[np.ndarray, np.ndarray, bool]:
    """The kernel's output, the totals of its sums over all parts, float64 [out, 2], and its flag."""
    residual = options.pop("residual", None)
    out, sums, flag = cuda_kernels.conv2d(
        cast(x, dtype),
        cast(weight, dtype),
        cast(bias, "float32"),
        kind,
        residual=None if residual is None else cast(residual, dtype),
        **options,
    )
    return out, sums.astype(np.float64).sum(axis=0), flag


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_convolutions_of_whole_numbers_are_exact(hopper, channels, kind, dtype):
    rng = np.random.default_rng(channels[0])
    for height, width in SIZES:
        x = integers(rng, (height, width, channels[0]), 3)
        weight = integers(rng, (channels[1], channels[0], *(2 * (1 if kind == "1x1" else 3,))), 2)
        bias = integers(rng, (channels[1],), 40)
        value = reference(x, weight, bias, kind)
        out, sums, _ = convolve(x, weight, bias, kind, dtype, hopper=hopper)
        np.testing.assert_array_equal(to_float(out), to_float(cast(value, dtype)), err_msg=f"{height} x {width}")
        np.testing.assert_allclose(sums[:, 0], value.sum(axis=(0, 1)), rtol=1e-5, atol=1e-2 * value.size**0.5)
        np.testing.assert_allclose(sums[:, 1], np.square(value).sum(axis=(0, 1)), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_scales_and_residuals(hopper, kind, in_place, dtype):
    rng = np.random.default_rng(1)
    x, bias = integers(rng, (35, 21, 96), 3), integers(rng, (104,), 40)
    weight = integers(rng, (104, 96, *(2 * (1 if kind == "1x1" else 3,))), 2)
    plain = reference(x, weight, np.zeros(104), kind)
    more = integers(rng, plain.shape, 100)
    expected = plain / 2 + bias / 4 + 3 + more
    options = {"sum_scale": 0.5, "bias_scale": 0.25, "shift": 3.0, "residual": more, "in_place": in_place}
    out, sums, _ = convolve(x, weight, bias, kind, dtype, hopper=hopper, **options)
    np.testing.assert_array_equal(to_float(out), to_float(cast(expected, dtype)))
    np.testing.assert_allclose(sums[:, 1], np.square(expected).sum(axis=(0, 1)), rtol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", KINDS)
def test_convolutions_of_normal_numbers(hopper, kind, dtype):
    """A large one, whose tiles are shared out along k, and the same bytes in every run."""
    rng = np.random.default_rng(2)
    size = 1 if kind == "1x1" else 3
    x, bias = rng.standard_normal((72, 90, 256)), rng.standard_normal(320)
    weight = rng.standard_normal((320, 256, size, size)) / (16 * size)
    seen = [to_float(cast(x, dtype)), to_float(cast(weight, dtype)), bias.astype(np.float32).astype(np.float64)]
    out, sums, _ = convolve(x, weight, bias, kind, dtype, hopper=hopper)
    # The four forms of `up` have sums of weights, which are rounded once more.
    assert relative_error(out, reference(*seen, kind)) < TOLERANCE[dtype] * (1.5 if kind == "up" else 1.0)
    for _ in range(3):
        again, sums_again, _ = convolve(x, weight, bias, kind, dtype, hopper=hopper)
        assert again.tobytes() == out.tobytes() and sums_again.tobytes() == sums.tobytes()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [3, 16])
def test_planes_and_bytes(hopper, channels, dtype):
    rng = np.random.default_rng(3)
    x, bias = integers(rng, (37, 53, 128), 3), integers(rng, (channels,), 4)
    weight = integers(rng, (channels, 128, 3, 3), 1)
    value = reference(x, weight, bias, "3x3") / 64
    scales = {"sum_scale": 1 / 64, "bias_scale": 1 / 64, "hopper": hopper}
    out, _, _ = convolve(x, weight, bias, "3x3", dtype, output="float", **scales)
    np.testing.assert_array_equal(out, value.transpose(2, 0, 1).astype(np.float32))
    out, _, flag = convolve(x, weight, bias, "3x3", dtype, output="uint8", **scales)
    np.testing.assert_array_equal(out, to_uint8(value.transpose(2, 0, 1)[None].astype(np.float32))[0])
    assert not flag
    x[20, 30, 5] = np.nan
    assert convolve(x, weight, bias, "3x3", dtype, output="uint8", **scales)[2]


def test_fewer_channels_than_in_memory_count_as_zeros(hopper):
    rng = np.random.default_rng(4)
    x, weight = integers(rng, (20, 30, 3), 3), integers(rng, (64, 3, 3, 3), 3)
    padded = np.concatenate([x, np.zeros((20, 30, 13))], axis=2)
    out, _, _ = convolve(padded, weight, np.zeros(64), "3x3", "bfloat16", hopper=hopper)
    expected = reference(x, weight, np.zeros(64), "3x3")
    np.testing.assert_array_equal(to_float(out), to_float(cast(expected, "bfloat16")))


@pytest.mark.parametrize(
    ("shapes", "options", "message"),
    [
        (((8, 8, 12), (64, 12, 3, 3)), {}, "no kernel for 8 x 8 pixels, 12 -> 64"),
        (((8, 8, 16), (60, 16, 3, 3)), {}, "16 -> 60 channels"),
        (((8, 8, 16), (3, 16, 3, 3)), {"output": "uint8", "kind": "up"}, "as planes or bytes"),
        (((1, 1, 16), (64, 16, 3, 3)), {"kind": "down"}, "no kernel for 1 x 1"),
    ],
)
def test_what_no_kernel_computes_is_refused(hopper, shapes, options, message):
    x, weight = (np.zeros(shape) for shape in shapes)
    options = {"kind": "3x3", **options}
    with pytest.raises(ValueError, match=message):
        convolve(x, weight, np.zeros(len(weight)), dtype="float16", hopper=hopper, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("pixels", "channels", "groups"), [(1, 8, 4), (97, 32, 16), (5000, 512, 32), (333, 72, 9)])
def test_group_norm(pixels, channels, groups, silu, dtype):
    rng = np.random.default_rng(5)
    # A mean much larger than the deviation, which fp32 squares would lose.
    x = to_float(cast(rng.standard_normal((pixels, channels)) + 8 * rng.standard_normal(channels), dtype))
    weight, bias = rng.standard_normal(channels), rng.standard_normal(channels)
    parts = np.array_split(x, min(pixels, 7))
    sums = np.stack([np.stack([part.sum(axis=0), np.square(part).sum(axis=0)], axis=-1) for part in parts])
    grouped = x.reshape(pixels, groups, -1)
    mean, variance = grouped.mean(axis=(0, 2), keepdims=True), grouped.var(axis=(0, 2), keepdims=True)
    normed = ((grouped - mean) / np.sqrt(variance + 1e-6)).reshape(x.shape) * weight + bias
    expected = normed / (1 + np.exp(-normed)) if silu else normed
    vectors = [array.astype(np.float32) for array in (sums, weight, bias)]
    for in_place in (False, True):
        out = cuda_kernels.group_norm(cast(x, dtype), *vectors, groups=groups, eps=1e-6, silu=silu, in_place=in_place)
        assert relative_error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "stride"), [(1, 1, 8), (3, 15, 16), (5, 4096, 4096), (2, 16384, 16400)])
def test_softmax(rows, columns, stride, dtype):
    x = np.random.default_rng(6).standard_normal((rows, stride)) * 10
    x[:, columns:] = np.nan  # not read
    power = np.exp2(x[:, :columns] - x[:, :columns].max(axis=1, keepdims=True))
    out = cuda_kernels.softmax_rows(x.astype(np.float32), columns, dtype, 4096.0)
    assert relative_error(out[:, :columns], 4096 * power / power.sum(axis=1, keepdims=True)) < TOLERANCE[dtype]
    assert not to_float(out[:, columns:]).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs(dtype):
    rng = np.random.default_rng(7)
    planes, image = rng.standard_normal((5, 9, 7)), rng.integers(0, 256, (9, 7, 3), np.uint8)
    out = cuda_kernels.scale_to_nhwc(planes.astype(np.float32), 2.5, -0.25, dtype)
    assert relative_error(out[..., :5], planes.transpose(1, 2, 0) * 2.5 - 0.25) < TOLERANCE[dtype]
    assert not to_float(out[..., 5:]).any()
    out = cuda_kernels.uint8_to_signed_nhwc(image, dtype)
    assert relative_error(out[..., :3], image / 127.5 - 1) < TOLERANCE[dtype]
    assert not to_float(out[..., 3:]).any()
