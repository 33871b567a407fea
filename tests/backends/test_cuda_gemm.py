"""Matrix products, alone and with what follows them inside, against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_reference import TOLERANCE, cast, relative_error, require_kernels, to_float

from zimage_rt.backends.cuda_libraries import find_library

pytestmark = pytest.mark.gpu
cuda_kernels = require_kernels()

HALVES = ("float16", "bfloat16")
CLUSTERS = ("2x1", "1x2")
# Whole tiles, one over and one under them; odd and even numbers of tiles along both sides.
SHAPES = [(1, 64, 128), (127, 64, 256), (129, 200, 640), (256, 384, 1152), (300, 3840, 512), (385, 128, 768)]


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


def operands(rng, dtype, m, k, n, transposed=False):
    """a, weight ([k, n], or [n, k] if it is transposed), and their product in float64, whose deviation is one."""
    a, weight = cast(f32(rng, m, k), dtype), cast(f32(rng, k, n, scale=k**-0.5), dtype)
    return a, np.ascontiguousarray(weight.T) if transposed else weight, to_float(a) @ to_float(weight)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 64), (33, 256, 512), (200, 2560, 384), (1000, 384, 2048)])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("transposed", [True, False])
def test_gemm(kernels, rng, dtype, m, k, n, biased, transposed):
    a, weight, product = operands(rng, dtype, m, k, n, transposed)
    bias = f32(rng, n) if biased else None
    out_type = "float32" if biased else dtype
    out = kernels.gemm(find_library("cublasLt"), a, weight, bias, 2.0**-7, out_type, transposed)
    reference = product * 2.0**-7 + (bias if biased else 0)
    assert relative_error(out, reference) < (1e-5 if biased else TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("m", "k", "n"), SHAPES)
@pytest.mark.parametrize("transposed", [True, False])
@pytest.mark.parametrize("cluster", ["any", *CLUSTERS])
def test_gemm_swiglu(fused, rng, dtype, m, k, n, transposed, cluster):
    a, weight, product = operands(rng, dtype, m, k, n, transposed)
    gate, up = np.split(product * 1.0, 2, axis=1)
    reference = gate / (1 + np.exp(-gate)) * up * 2.0**-4
    assert relative_error(fused.gemm_swiglu(a, weight, 2.0**-4, transposed, cluster), reference) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("m", "k", "heads", "kv_heads"), [(1, 64, 1, 1), (129, 200, 3, 3), (300, 384, 4, 2), (385, 128, 2, 1)]
)
@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("transposed", "cluster"), [(True, "any"), (False, "any"), (True, "2x1"), (True, "1x2")])
def test_gemm_qk_norm_rope(fused, rng, dtype, m, k, heads, kv_heads, normed, transposed, cluster):
    a, weight, product = operands(rng, dtype, m, k, (heads + 2 * kv_heads) * 128, transposed)
    angles = rng.uniform(0, 7, (m, 64))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    q_weight, k_weight = (f32(rng, 128), f32(rng, 128)) if normed else (None, None)
    out = fused.gemm_qk_norm_rope(a, weight, q_weight, k_weight, cos, sin, heads, kv_heads, 1e-5, transposed, cluster)
    reference = product.reshape(m, -1, 128).copy()
    for head in range(heads + kv_heads):
        x = reference[:, head]
        if normed:
            x = x / np.sqrt(np.mean(x * x, axis=1, keepdims=True) + 1e-5) * (q_weight if head < heads else k_weight)
        low, high = x[:, :64], x[:, 64:]
        reference[:, head] = np.concatenate([low * cos - high * sin, high * cos + low * sin], axis=1)
    assert relative_error(out, reference.reshape(m, -1)) < TOLERANCE[dtype]


@pytest.mark.parametrize("cluster", CLUSTERS)
def test_fused_products_are_the_same_every_time(fused, rng, cluster):
    a, weight, _ = operands(rng, "bfloat16", 1000, 768, 2048)
    first = fused.gemm_swiglu(a, weight, 1.0, cluster=cluster)
    for _ in range(3):
        assert (fused.gemm_swiglu(a, weight, 1.0, cluster=cluster) == first).all()


def test_fused_products_refuse_odd_sizes(fused, rng):
    a, weight = cast(f32(rng, 4, 60), "float16"), cast(f32(rng, 60, 256), "float16")
    with pytest.raises(ValueError, match="a multiple of 8 as k"):
        fused.gemm_swiglu(a, weight, 1.0)
