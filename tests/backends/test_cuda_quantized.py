"""8-bit rows and their matrix products against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_reference import TOLERANCE, cast, relative_error, require_kernels, to_float, to_float8

from zimage_rt.backends.cuda_libraries import find_library

pytestmark = pytest.mark.gpu
cuda_kernels = require_kernels()

HALVES = ("float16", "bfloat16")
FORMATS = ("int8", "float8")
LARGEST = {"int8": 127.0, "float8": 448.0}
ROTATIONS = ("none", "hadamard", "convrot")
CLUSTERS = ("2x1", "1x2")
# Sums of float8 on tensor cores have fewer bits than fp32.
SUMS = {"int8": 0.0, "float8": 5e-3}
# Of one product whose operands were rounded to 8 bits from Gaussian numbers.
ROUNDED = {"int8": 0.015, "float8": 0.040}


@pytest.fixture(scope="module")
def kernels():
    return cuda_kernels


@pytest.fixture
def fused(kernels):
    if not kernels.fused_gemm_runs_here():
        pytest.skip("our own matrix products run on compute capability 9.0 alone")
    return kernels


@pytest.fixture
def rng():
    return np.random.default_rng()


def f32(rng, *shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def rms(x, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


def rotation_matrix(name):
    """The [256, 256] matrix of a rotation, by its definition."""
    if name == "hadamard":
        factor, count = np.array([[1, 1], [1, -1]]), 8
    else:
        factor, count = np.array([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]), 4
    matrix = np.ones((1, 1))
    for _ in range(count):
        matrix = np.kron(matrix, factor)
    return matrix / 16


def rotated(x, rotation):
    """Every 256 columns of x [rows, columns] times the rotation's matrix."""
    if rotation == "none":
        return x
    return (x.reshape(-1, 256) @ rotation_matrix(rotation)).reshape(x.shape)


def check_rows(codes, scales, reference, dtype):
    """Scales are the rows' largest magnitudes over the format's; every number is the nearest of the format."""
    magnitude = np.abs(reference).max(axis=1)
    np.testing.assert_allclose(scales, magnitude / LARGEST[dtype], rtol=1e-5)
    step = scales[:, None].astype(np.float64)
    nearest = step / 2 if dtype == "int8" else np.maximum(np.abs(reference) / 16, step * 2.0**-10)
    assert (np.abs(to_float(codes) * step - reference) <= nearest * (1 + 1e-4) + 1e-5 * magnitude[:, None]).all()
    assert (np.abs(to_float(codes)).max(axis=1) == np.where(magnitude > 0, LARGEST[dtype], 0)).all()


ROWS = [(1, 256), (3, 3840), (65, 2560), (5, 9728), (33, 10240), (2, 16384)]


@pytest.mark.parametrize("source", HALVES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    ("rows", "columns", "rotation"),
    [(*shape, rotation) for shape in ROWS for rotation in ROTATIONS]
    + [(1, 16, "none"), (33, 208, "none"), (7, 4112, "none"), (4, 8208, "none")],
)
def test_quantize_rows(kernels, rng, source, dtype, rows, columns, rotation):
    x = cast(f32(rng, rows, columns, scale=3.0), source)
    check_rows(*kernels.quantize_rows(x, dtype, rotation), rotated(to_float(x), rotation), dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rows_of_zeros_are_zeros(kernels, rng, dtype, rotation):
    x = f32(rng, 4, 512)
    x[1] = 0
    x[2] = -0.0
    x = cast(x, "bfloat16")
    codes, scales = kernels.quantize_rows(x, dtype, rotation)
    assert (to_float(codes)[1:3] == 0).all()
    assert (scales[1:3] == 0).all()
    check_rows(codes, scales, rotated(to_float(x), rotation), dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("rotation", ROTATIONS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_says_so(kernels, rng, dtype, rotation, value):
    x = f32(rng, 3, 512)
    x[1, 300] = value
    _, scales = kernels.quantize_rows(cast(x, "float16"), dtype, rotation)
    assert np.isfinite(scales).tolist() == [True, False, True]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    ("rows", "columns", "rotation"), [(3, 384, "none"), (65, 3840, "convrot"), (2, 10240, "convrot")]
)
@pytest.mark.parametrize("rank", [0, 1, 33])
def test_a_change_of_8bit_rows(kernels, rng, dtype, rows, columns, rotation, rank):
    codes, scales = kernels.quantize_rows(cast(f32(rng, rows, columns), "float16"), dtype, rotation)
    # A dense change without a rank: [in, rows].
    down = f32(rng, rank, columns, scale=0.3) if rank else None
    up = f32(rng, rank, rows, scale=0.3) if rank else f32(rng, columns, rows, scale=0.3)
    change = up.T.astype(np.float64) @ down if rank else up.T.astype(np.float64)
    after, after_scales, overflow = kernels.patch_8bit(codes, scales, down, up, rotation)
    assert not overflow
    check_rows(after, after_scales, to_float(codes) * scales[:, None] + rotated(change, rotation), dtype)


def test_a_change_that_is_not_finite_says_so(kernels, rng):
    codes, scales = kernels.quantize_rows(cast(f32(rng, 2, 256), "float16"), "int8", "convrot")
    up = np.full((256, 2), np.inf, np.float32)
    assert kernels.patch_8bit(codes, scales, None, up, "convrot")[2]


def test_rows_of_odd_widths_are_refused(kernels, rng):
    with pytest.raises(ValueError, match="a multiple of 16 columns"):
        kernels.quantize_rows(cast(f32(rng, 2, 24), "float16"), "int8", "none")
    with pytest.raises(ValueError, match="of 256 with a rotation"):
        kernels.quantize_rows(cast(f32(rng, 2, 384), "float16"), "int8", "convrot")
    with pytest.raises(ValueError, match="at most 16384 columns"):
        kernels.quantize_rows(cast(f32(rng, 2, 16640), "float16"), "int8", "convrot")


@pytest.mark.parametrize("source", HALVES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    ("rows", "hidden", "rotation"), [(3, 256, "hadamard"), (33, 10240, "convrot"), (5, 592, "none")]
)
def test_swiglu_quantized(kernels, rng, source, dtype, rows, hidden, rotation):
    gate_up = cast(f32(rng, rows, 2 * hidden, scale=4.0), source)
    gate, up = np.split(to_float(gate_up), 2, axis=1)
    reference = rotated(gate / (1 + np.exp(-gate)) * up * 2.0**-7, rotation)
    check_rows(*kernels.swiglu_quantized(gate_up, 2.0**-3, 2.0**-4, dtype, rotation), reference, dtype)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("rows", "dim"), [(1, 256), (33, 2560), (257, 3840), (5, 4096)])
@pytest.mark.parametrize("rotation", ROTATIONS)
def test_rms_norm_quantized(kernels, rng, dtype, rows, dim, rotation):
    x, weight = f32(rng, rows, dim, scale=3.0), f32(rng, dim)
    reference = rotated(rms(x.astype(np.float64), 1e-5) * weight, rotation)
    check_rows(*kernels.rms_norm_quantized(x, weight, 1e-5, dtype, rotation), reference, dtype)


@pytest.mark.parametrize("source", HALVES)
@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    ("rows", "dim", "rotation"), [(1, 256, "hadamard"), (65, 3840, "convrot"), (33, 384, "none"), (7, 2576, "none")]
)
@pytest.mark.parametrize("with_post", [True, False])
def test_residual_norm_quantized(kernels, rng, source, dtype, rows, dim, rotation, with_post):
    x, branch = f32(rng, rows, dim), cast(f32(rng, rows, dim, scale=20.0), source)
    post, pre = f32(rng, dim) if with_post else None, f32(rng, dim)
    scale = 2.0**-7
    arguments = (x, branch, post, 1e-5 * scale**2, 1 / scale, pre, 1e-5)
    new_x, *rows_8bit = kernels.residual_norm_quantized(*arguments, dtype, rotation)
    assert relative_error(new_x, kernels.residual_norm(*arguments)[0]) < TOLERANCE["float32"]
    check_rows(*rows_8bit, rotated(rms(new_x.astype(np.float64), 1e-5) * pre, rotation), dtype)


def codes_of(rng, dtype, *shape):
    """Random numbers of a format, all of int8's and those of a Gaussian in float8."""
    if dtype == "int8":
        return rng.integers(-127, 128, shape).astype(np.int8)
    return to_float8(rng.standard_normal(shape) * 100)


def operands(rng, dtype, m, k, n):
    """a, its scales, a weight [n, k], its scales, and the product in float64, whose deviation is about one."""
    a, weight = codes_of(rng, dtype, m, k), codes_of(rng, dtype, n, k)
    a_scales = rng.uniform(0.5, 1.5, m).astype(np.float32)
    weight_scales = (rng.uniform(0.5, 1.5, n) * k**-0.5 / (5400 if dtype == "int8" else 1e4)).astype(np.float32)
    product = to_float(a) @ to_float(weight).T
    return a, a_scales, weight, weight_scales, product * a_scales[:, None].astype(np.float64) * weight_scales


# Whole tiles, one over and one under them; fewer rows than a tile; widths of 64 and sums of part of a stage.
SHAPES = [
    (1, 128, 64),
    (127, 256, 512),
    (128, 144, 576),
    (129, 2064, 1088),
    (1000, 3840, 2048),
    (2049, 1280, 320),
    (4224, 3840, 1280),
]


@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("cluster", ["any", *CLUSTERS, "mma"])
def test_int8_products_are_exact(kernels, rng, m, k, n, cluster):
    a, weight = codes_of(rng, "int8", m, k), codes_of(rng, "int8", n, k)
    ones = np.ones(m, np.float32), np.ones(n, np.float32)
    if cluster == "mma":
        out = kernels.mma_gemm_8bit(a, ones[0], weight, ones[1], 1.0, "float32")
    elif not kernels.fused_gemm_runs_here():
        pytest.skip("our own matrix products run on compute capability 9.0 alone")
    else:
        out = kernels.gemm_8bit(a, ones[0], weight, ones[1], 1.0, "float32", cluster)
    product = to_float(a) @ to_float(weight).T
    assert np.abs(product).max() < 2**24  # where fp32 holds every integer
    assert (out == product).all()


def test_int8_sums_beyond_fp32_are_exact_before_they_are_scaled(fused):
    """The largest sums at the largest k of the model, cut along k: one float32 rounding and no more."""
    a, weight = np.full((300, 10240), 127, np.int8), np.full((512, 10240), -127, np.int8)
    a[:, 1] = 126
    ones = np.ones(300, np.float32), np.ones(512, np.float32)
    exact = -(127 * 127 * 10239 + 126 * 127)
    for out in (
        fused.gemm_8bit(a, ones[0], weight, ones[1], 1.0, "float32"),
        fused.mma_gemm_8bit(a, ones[0], weight, ones[1], 1.0, "float32"),
    ):
        assert (out == np.float32(exact)).all()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("out_type", ["float32", *HALVES])
def test_gemm_8bit(fused, rng, dtype, m, k, n, out_type):
    *given, product = operands(rng, dtype, m, k, n)
    out = fused.gemm_8bit(*given, 2.0**-7, out_type)
    assert relative_error(out, product * 2.0**-7) < TOLERANCE[out_type] + SUMS[dtype]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [*SHAPES, (5, 48, 8), (70, 400, 136), (300, 2560, 6144), (64, 9728, 2560), (33, 4096, 2560), (200, 1040, 264)],
)
@pytest.mark.parametrize("out_type", ["float32", *HALVES])
@pytest.mark.parametrize("split", [True, False])
def test_mma_gemm_8bit(kernels, rng, dtype, m, k, n, out_type, split):
    if not kernels.mma_gemm_8bit_runs_here(dtype):
        pytest.skip("float8 needs compute capability 8.9")
    *given, product = operands(rng, dtype, m, k, n)
    out = kernels.mma_gemm_8bit(*given, 2.0**-7, out_type, split)
    assert relative_error(out, product * 2.0**-7) < TOLERANCE[out_type] + SUMS[dtype]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("out_type", HALVES)
@pytest.mark.parametrize(("m", "k", "n"), [shape for shape in SHAPES if shape[2] % 128 == 0])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_gemm_8bit_swiglu(fused, rng, dtype, out_type, m, k, n, cluster):
    *given, product = operands(rng, dtype, m, k, n)
    gate, up = np.split(product, 2, axis=1)
    reference = gate / (1 + np.exp(-gate)) * up * 2.0**-4
    out = fused.gemm_8bit_swiglu(*given, 2.0**-4, out_type, cluster)
    assert relative_error(out, reference) < TOLERANCE[out_type] + 2 * SUMS[dtype]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("out_type", HALVES)
@pytest.mark.parametrize(
    ("m", "k", "heads", "kv_heads"), [(1, 128, 1, 1), (129, 208, 3, 3), (300, 384, 4, 2), (2049, 1280, 2, 1)]
)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_gemm_8bit_qk_norm_rope(fused, rng, dtype, out_type, m, k, heads, kv_heads, normed, cluster):
    *given, product = operands(rng, dtype, m, k, (heads + 2 * kv_heads) * 128)
    angles = rng.uniform(0, 7, (m, 64))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    q_weight, k_weight = (f32(rng, 128), f32(rng, 128)) if normed else (None, None)
    out = fused.gemm_8bit_qk_norm_rope(*given, q_weight, k_weight, cos, sin, heads, kv_heads, 1e-5, out_type, cluster)
    reference = product.reshape(m, -1, 128).copy()
    for head in range(heads + kv_heads):
        x = reference[:, head]
        if normed:
            x = rms(x, 1e-5) * (q_weight if head < heads else k_weight)
        low, high = x[:, :64], x[:, 64:]
        reference[:, head] = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=1)
    assert relative_error(out, reference.reshape(m, -1)) < TOLERANCE[out_type] + SUMS[dtype]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("cluster", CLUSTERS)
def test_8bit_products_are_the_same_every_time(fused, rng, dtype, cluster):
    *given, _ = operands(rng, dtype, 1000, 768, 2048)
    first = fused.gemm_8bit_swiglu(*given, 1.0, "bfloat16", cluster)
    for _ in range(3):
        assert (fused.gemm_8bit_swiglu(*given, 1.0, "bfloat16", cluster) == first).all()


# Tiles of 32, 64 and 128 rows, full and not; k split among 1 to 8 blocks, with stages of part of k.
FEW_ROWS = [
    (1, 16, 8),
    (32, 144, 136),
    (33, 4096, 2560),
    (64, 9728, 2560),
    (64, 2560, 19456),
    (65, 1040, 264),
    (128, 3840, 3840),
    (129, 1536, 640),
    (256, 2064, 1088),
]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize(("m", "k", "n"), FEW_ROWS)
@pytest.mark.parametrize("out_type", ["float32", *HALVES])
def test_products_of_few_rows(fused, rng, dtype, m, k, n, out_type):
    *given, product = operands(rng, dtype, m, k, n)
    out = fused.few_rows_gemm_8bit(*given, 2.0**-7, out_type)
    assert relative_error(out, product * 2.0**-7) < TOLERANCE[out_type] + SUMS[dtype]


@pytest.mark.parametrize(("m", "k", "n"), FEW_ROWS)
def test_int8_products_of_few_rows_are_exact(fused, rng, m, k, n):
    a, weight = codes_of(rng, "int8", m, k), codes_of(rng, "int8", n, k)
    ones = np.ones(m, np.float32), np.ones(n, np.float32)
    product = to_float(a) @ to_float(weight).T
    assert np.abs(product).max() < 2**24  # where fp32 holds every integer
    assert (fused.few_rows_gemm_8bit(a, ones[0], weight, ones[1], 1.0, "float32") == product).all()
    assert (fused.mma_gemm_8bit(a, ones[0], weight, ones[1], 1.0, "float32") == product).all()


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("product", ["few_rows", "mma"])
def test_products_of_few_rows_are_the_same_every_time(kernels, rng, dtype, product):
    """Blocks that share a tile along k add their sums in the same order, and leave the workspace as they found it."""
    if product == "mma" and not kernels.mma_gemm_8bit_runs_here(dtype):
        pytest.skip("float8 needs compute capability 8.9")
    if product == "few_rows" and not kernels.fused_gemm_runs_here():
        pytest.skip("our own matrix products run on compute capability 9.0 alone")
    gemm = kernels.few_rows_gemm_8bit if product == "few_rows" else kernels.mma_gemm_8bit
    given = {shape: operands(rng, dtype, *shape)[:4] for shape in ((64, 4096, 2560), (130, 1536, 640))}
    first = {shape: gemm(*arrays, 1.0, "bfloat16") for shape, arrays in given.items()}
    for _ in range(5):
        for shape, arrays in given.items():
            assert (gemm(*arrays, 1.0, "bfloat16") == first[shape]).all()


def test_few_rows_are_at_most_256(fused, rng):
    a, a_scales, weight, weight_scales, _ = operands(rng, "int8", 257, 256, 256)
    with pytest.raises(ValueError, match="at most 256 rows"):
        fused.few_rows_gemm_8bit(a, a_scales, weight, weight_scales, 1.0, "float32")


def test_products_take_turns_with_one_workspace(fused, rng):
    """Sums of stream-K tiles are the bits of integers after int8, of floats after float8 and bf16."""
    a, weight = cast(f32(rng, 300, 768), "bfloat16"), cast(f32(rng, 512, 768, scale=768**-0.5), "bfloat16")
    plain = fused.gemm_swiglu(a, weight, 1.0, transposed=True)
    for _ in range(3):
        for dtype in FORMATS:
            *given, product = operands(rng, dtype, 300, 768, 512)
            assert relative_error(fused.gemm_8bit(*given, 1.0, "float32"), product) < 2e-6 + SUMS[dtype]
        assert (fused.gemm_swiglu(a, weight, 1.0, transposed=True) == plain).all()


@pytest.mark.parametrize("dtype", FORMATS)
def test_rows_and_columns_of_zeros(fused, rng, dtype):
    a, a_scales, weight, weight_scales, product = operands(rng, dtype, 130, 256, 256)
    a[3], a_scales[3] = 0, 0
    weight[5], weight_scales[5] = 0, 0
    product[3], product[:, 5] = 0, 0
    for out in (
        fused.gemm_8bit(a, a_scales, weight, weight_scales, 1.0, "float32"),
        fused.mma_gemm_8bit(a, a_scales, weight, weight_scales, 1.0, "float32"),
    ):
        assert (out[3] == 0).all()
        assert (out[:, 5] == 0).all()
        assert relative_error(out, product) < 2e-6 + SUMS[dtype]


def numbers(rng, kind, rows, columns):
    """Inputs of a product, as it meets them."""
    x = rng.standard_normal((rows, columns))
    if kind == "outliers":
        x[:, rng.permutation(columns)[: max(1, columns // 1000)]] *= 300
    elif kind == "swiglu":
        x = x / (1 + np.exp(-x)) * rng.standard_normal((rows, columns))
    return x.astype(np.float32)


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", ["gaussian", "outliers", "swiglu"])
@pytest.mark.parametrize("rotation", ["hadamard", "convrot"])
@pytest.mark.parametrize("fused_product", [True, False])
def test_a_whole_rotated_product(kernels, rng, dtype, kind, rotation, fused_product):
    """Rotation and rounding of both operands, the product, the scales: near the product of the 16-bit operands."""
    m, k, n = 300, 3840, 512
    if not fused_product and not kernels.mma_gemm_8bit_runs_here(dtype):
        pytest.skip("float8 needs compute capability 8.9")
    x, weight = cast(numbers(rng, kind, m, k), "bfloat16"), cast(f32(rng, n, k, scale=k**-0.5), "bfloat16")
    left, left_scales = kernels.quantize_rows(x, dtype, rotation)
    right, right_scales = kernels.quantize_rows(weight, dtype, rotation)
    layer = kernels.LinearLayer(
        find_library("cublasLt"),
        "linear",
        left,
        right,
        left_scales,
        right_scales,
        "float32",
        rotation,
        rotation,
        fused_product,
    )
    assert relative_error(layer.run(), to_float(x) @ to_float(weight).T) < ROUNDED[dtype]


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("kind", ["linear", "swiglu", "qk_norm_rope"])
@pytest.mark.parametrize("m", [40, 300])
@pytest.mark.parametrize("fused_product", [True, False])
def test_linear_layers_of_8bit_weights(kernels, rng, dtype, kind, m, fused_product):
    if not kernels.mma_gemm_8bit_runs_here(dtype):
        pytest.skip("float8 needs compute capability 8.9")
    a, a_scales, weight, weight_scales, product = operands(rng, dtype, m, 400, 768)
    layer = kernels.LinearLayer(
        find_library("cublasLt"), kind, a, weight, a_scales, weight_scales, "bfloat16", fused=fused_product
    )
    if kind == "swiglu":
        gate, up = np.split(product, 2, axis=1)
        product = gate / (1 + np.exp(-gate)) * up
    # Without the fused product what follows it starts from 16 bits.
    assert relative_error(layer.run(), product) < 2 * TOLERANCE["bfloat16"] + 2 * SUMS[dtype]


def test_operands_that_do_not_fit_are_refused(kernels, rng):
    library = find_library("cublasLt")
    a, a_scales, weight, weight_scales, _ = operands(rng, "int8", 40, 256, 256)
    layer = kernels.LinearLayer(library, "linear", a, weight, a_scales, weight_scales, rotation="convrot")
    with pytest.raises(ValueError, match="dtype and rotation of its weight"):
        layer.run()
    layer = kernels.LinearLayer(library, "linear", codes_of(rng, "float8", 40, 256), weight, a_scales, weight_scales)
    with pytest.raises(ValueError, match="dtype and rotation of its weight"):
        layer.run()
    layer = kernels.LinearLayer(library, "linear", a, weight, a_scales)
    with pytest.raises(RuntimeError, match="8-bit weights with scales"):
        layer.run()
    with pytest.raises(ValueError, match="a multiple of 16 as k and of 8 as n"):
        kernels.mma_gemm_8bit(a[:, :24], a_scales, weight[:, :24], weight_scales, 1.0, "float32")


def test_fused_8bit_products_refuse_odd_sizes(fused, rng):
    a, a_scales, weight, weight_scales, _ = operands(rng, "int8", 4, 48, 256)
    with pytest.raises(ValueError, match="a multiple of 16 as k and of 64 as n"):
        fused.gemm_8bit(a[:, :24], a_scales, weight[:, :24], weight_scales, 1.0, "float32")
    with pytest.raises(ValueError, match="a multiple of 16 as k and of 64 as n"):
        fused.gemm_8bit(a, a_scales, weight[:72], weight_scales[:72], 1.0, "float32")
