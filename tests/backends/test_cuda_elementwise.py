"""The element-wise kernels and norms against float64 numpy."""

from __future__ import annotations

import numpy as np
import pytest
from cuda_reference import TOLERANCE, cast, patches_of, relative_error, require_kernels, to_float
from sampler_reference import apply_guidance, blend_kept

from zimage_rt.sampling.samplers import sampler_table
from zimage_rt.sampling.schedules import flow_match_sigmas

pytestmark = pytest.mark.gpu
cuda_kernels = require_kernels()

HALVES = ("float16", "bfloat16")


@pytest.fixture(scope="module")
def kernels():
    return cuda_kernels


@pytest.fixture
def rng():
    return np.random.default_rng()


def f32(rng, *shape, scale=1.0):
    return (rng.standard_normal(shape) * scale).astype(np.float32)


def rms(x, eps):
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize(("rows", "dim"), [(1, 8), (3, 384), (33, 2560), (257, 3840), (5, 4096)])
def test_rms_norm(kernels, rng, dtype, rows, dim):
    x, weight = f32(rng, rows, dim, scale=3.0), f32(rng, dim)
    out = kernels.rms_norm(x, weight, 1e-5, dtype)
    assert relative_error(out, rms(x.astype(np.float64), 1e-5) * weight) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 8), (33, 384), (65, 3840), (7, 2568)])
@pytest.mark.parametrize("with_post", [True, False])
@pytest.mark.parametrize("with_pre", [True, False])
def test_residual_norm(kernels, rng, dtype, rows, dim, with_post, with_pre):
    x, branch = f32(rng, rows, dim), cast(f32(rng, rows, dim, scale=20.0), dtype)
    post = f32(rng, dim) if with_post else None
    pre = f32(rng, dim) if with_pre else None
    scale = 2.0**-7
    new_x, out = kernels.residual_norm(x, branch, post, 1e-5 * scale**2, 1 / scale, pre, 1e-5)
    added = to_float(branch)
    added = rms(added, 1e-5 * scale**2) * post if with_post else added / scale
    reference = x + added
    assert relative_error(new_x, reference) < TOLERANCE["float32"]
    if with_pre:
        assert relative_error(out, rms(reference, 1e-5) * pre) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "dim"), [(1, 8), (33, 384), (257, 3840)])
def test_scaled_copy(kernels, rng, dtype, rows, dim):
    x = f32(rng, rows, dim, scale=1e6)  # beyond fp16 without the scale
    out = kernels.scaled_copy(x, 2.0**-7, dtype)
    assert to_float(out).tobytes() == to_float(cast(x * np.float32(2.0**-7), dtype)).tobytes()


@pytest.mark.parametrize("scale", [None, 0.75, 0.0])
@pytest.mark.parametrize(("rows", "dim"), [(1, 8), (33, 384), (257, 3840)])
def test_scaled_add(kernels, rng, rows, dim, scale):
    x, added = f32(rng, rows, dim), f32(rng, rows, dim, scale=20.0)
    out = kernels.scaled_add(x, added, None if scale is None else np.full(1, scale, np.float32))
    factor = 1.0 if scale is None else scale
    assert relative_error(out, x + factor * added.astype(np.float64)) < TOLERANCE["float32"]
    if scale == 0.0:
        assert out.tobytes() == x.tobytes()


@pytest.mark.parametrize("dtype", HALVES)
def test_layer_norm(kernels, rng, dtype):
    x, scale = f32(rng, 37, 3840) + 5, f32(rng, 3840)
    centred = x.astype(np.float64) - x.mean(-1, keepdims=True, dtype=np.float64)
    reference = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale
    assert relative_error(kernels.layer_norm(x, scale, 1e-6, dtype), reference) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"), [(30, 30, 128), (32, 8, 128), (4, 2, 64), (3, 3, 128), (1, 1, 64)]
)
@pytest.mark.parametrize("normed", [True, False])
def test_qk_norm_rope(kernels, rng, dtype, heads, kv_heads, head_dim, normed):
    rows, half = 19, head_dim // 2
    qkv = cast(f32(rng, rows, (heads + 2 * kv_heads) * head_dim), dtype)
    angles = rng.uniform(0, 7, (rows, half))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    q_weight, k_weight = (f32(rng, head_dim), f32(rng, head_dim)) if normed else (None, None)
    out = kernels.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, heads, kv_heads, head_dim, 1e-6)
    values = to_float(qkv).reshape(rows, -1, head_dim)
    reference = values.copy()
    for head in range(heads + kv_heads):
        x = values[:, head]
        if normed:
            x = rms(x, 1e-6) * (q_weight if head < heads else k_weight)
        a, b = x[:, :half], x[:, half:]
        reference[:, head] = np.concatenate([a * cos - b * sin, b * cos + a * sin], -1)
    assert relative_error(out, reference.reshape(rows, -1)) < TOLERANCE[dtype]
    # Values are not touched.
    assert (out[:, (heads + kv_heads) * head_dim :] == qkv[:, (heads + kv_heads) * head_dim :]).all()


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("rows", "hidden"), [(1, 8), (33, 576), (70, 10240)])
def test_swiglu(kernels, rng, dtype, rows, hidden):
    gate_up = cast(f32(rng, rows, 2 * hidden, scale=4.0), dtype)
    gate, up = np.split(to_float(gate_up), 2, axis=1)
    reference = gate / (1 + np.exp(-gate)) * up * 2.0**-7
    assert relative_error(kernels.swiglu(gate_up, 2.0**-3, 2.0**-4), reference) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", ["float32", *HALVES])
@pytest.mark.parametrize(("rows", "columns", "first", "width", "rank"), [(1, 1, 0, 1, 1), (65, 130, 31, 70, 17)])
def test_low_rank_update(kernels, rng, dtype, rows, columns, first, width, rank):
    matrix = cast(f32(rng, rows, columns), dtype)
    down, up = f32(rng, rank, rows), f32(rng, rank, width)
    out, overflow = kernels.low_rank_update(matrix, down, up, first)
    reference = to_float(matrix)
    reference[:, first : first + width] += down.T.astype(np.float64) @ up
    assert relative_error(out, reference) < TOLERANCE[dtype]
    rest = np.r_[:first, first + width : columns]
    assert (out[:, rest] == matrix[:, rest]).all()
    assert not overflow


def test_low_rank_update_tells_of_overflow(kernels):
    matrix, factor = np.ones((3, 70), np.float16), np.full((1, 70), 300, np.float32)
    assert kernels.low_rank_update(matrix, factor[:, :3], factor, 0)[1]
    assert not kernels.low_rank_update(matrix, factor[:, :3] / 300, factor, 0)[1]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 130), (384, 1152), (65, 63), (1000, 258)])
def test_transpose(kernels, rng, dtype, shape):
    matrix = cast(f32(rng, *shape), dtype)
    assert (kernels.transpose(matrix) == matrix.T).all()


@pytest.mark.parametrize("dtype", HALVES)
def test_patchify_pads_and_repeats(kernels, rng, dtype):
    latents = f32(rng, 2, 16, 6, 10)
    out = to_float(kernels.patchify(latents, 2, 4, 32, dtype))
    reference = to_float(cast(patches_of(latents), dtype))
    for sample in range(4):
        assert (out[sample, :15] == reference[sample % 2]).all()
        assert (out[sample, 15:] == 0).all()


def test_unpatchify_flips_the_sign(kernels, rng):
    latents = f32(rng, 3, 16, 26, 140)
    out = kernels.unpatchify(np.ascontiguousarray(patches_of(latents)), 16, 26, 140, 2)
    assert (out == -latents).all()


@pytest.mark.parametrize(("scale", "normalization"), [(0.0, 0.0), (4.0, 0.0), (4.0, 0.5), (4.0, 100.0)])
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "dpmpp_3m_sde", "uni_pc"])
@pytest.mark.parametrize("masked", [False, True])
def test_sampler_update_is_the_loop_of_the_cpu(kernels, rng, scale, normalization, sampler, masked):
    latents, positive, negative, image, noise, drawn = (f32(rng, 2, 16, 8, 6) for _ in range(6))
    kept = f32(rng, 3, 2, 16, 8, 6)
    mask = rng.random((2, 1, 8, 6)).astype(np.float32)
    steps = sampler_table(sampler, flow_match_sigmas(5, 3.0), 3.0)
    pred = positive.astype(np.float64)
    if scale > 0:
        pred = apply_guidance(positive, negative, scale, normalization)
    predictions = np.concatenate([positive, negative]) if scale > 0 else positive
    patches = np.ascontiguousarray(patches_of(-predictions))
    for row, (_, sigma_next, x, v, *history, noisy, keep_x, keep_v, slot, ends) in enumerate(steps):
        inpaint = [mask, image, noise] if masked else []
        out, out_kept = kernels.sampler_update(
            patches, latents, kept, 2, steps, row, scale > 0, scale, normalization, drawn, inpaint
        )
        expected = x * latents + v * pred + np.tensordot(history, kept, 1) + noisy * drawn
        if masked and ends:
            expected = blend_kept(expected, mask, image, noise, sigma_next)
        assert relative_error(out, expected) < TOLERANCE["float32"]
        for i in range(3):
            if (keep_x or keep_v) and i == slot:
                assert relative_error(out_kept[i], keep_x * latents + keep_v * pred) < TOLERANCE["float32"]
            else:
                assert (out_kept[i] == kept[i]).all()


@pytest.mark.parametrize(
    ("grid_rows", "grid_columns", "image_rows", "context_rows"), [(4, 6, 32, 32), (13, 70, 928, 64)]
)
def test_rope_table(kernels, rng, grid_rows, grid_columns, image_rows, context_rows):
    sizes, lengths = (16, 24, 24), (128, 80, 80)
    cos = [f32(rng, length, size) for length, size in zip(lengths, sizes, strict=True)]
    sin = [f32(rng, length, size) for length, size in zip(lengths, sizes, strict=True)]
    out_cos, out_sin = kernels.rope_table(cos, sin, grid_rows, grid_columns, image_rows, context_rows)
    ids = [(context_rows + 1, r, c) for r in range(grid_rows) for c in range(grid_columns)]
    pads = image_rows - len(ids)
    ids += [None] * pads + [(i + 1, 0, 0) for i in range(context_rows)]
    for tables, out, still in ((cos, out_cos, 1.0), (sin, out_sin, 0.0)):
        reference = [
            np.full(64, still)
            if position is None
            else np.concatenate([t[i] for t, i in zip(tables, position, strict=True)])
            for position in ids
        ]
        assert (out == np.asarray(reference, np.float32)).all()


@pytest.mark.parametrize("row", [0, 1, 6])
def test_copy_rows(kernels, rng, row):
    """Rows that begin at any number, of widths that four numbers at once divide and do not, larger than the grid."""
    tables = [f32(rng, 7, width) for width in (8, 3, 1, 32 * 4 * 3840 * 2, 3841)]
    copies = kernels.copy_rows(tables, row)
    assert [copy.tobytes() for copy in copies] == [table[row].tobytes() for table in tables]
