"""Z-Image's transformer in torch, fused by hand, compiled, and replayed as a CUDA graph per evaluation.

Differences from diffusers: one product for queries, keys and values, and one for w1 and w3; real RoPE over halves; the
context refiner runs once per prompt; all modulations in one product, multiplied into the norms' weights; a block is
compiled with the next block's first norm, so that a residual is read and written twice per block; cuDNN attention. In
fp16 the inputs of post-norms are scaled as in `export.precision`, the output projection's within the product.

In fp8 the matrices of all modulated blocks are quantised per row, and each product's input by the kernel before it
(`torch_best_fp8`). Embedders, adaLN, context refiner and final layer stay in bf16.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from zimage_rt.benchmarks.systems.reference_models import THREADS
from zimage_rt.benchmarks.systems.torch_best_fp8 import Matrix, like_matrix, linear, quantized_rows
from zimage_rt.export.checkpoint import Component
from zimage_rt.export.modeling.layers import half_split
from zimage_rt.export.modeling.transformer import (
    FREQUENCY_DIM,
    QK_NORM_EPS,
    SEQUENCE_MULTIPLE,
    TransformerConfig,
    caption_rope,
    image_rope,
    rope_tables,
)
from zimage_rt.export.precision import PRECISIONS, Precision

FINAL_NORM_EPS = 1e-6
# Modes of torch.compile for blocks; `none` runs eager.
COMPILE_MODES = ("none", "default", "max-autotune-no-cudagraphs")
FORMATS = ("fp32", "bf16", "fp16", "fp8")


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """RMSNorm in fp32; `weight` may include a modulation [batch, 1, dim]."""
    y = x.float()
    y = y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps)
    return (y * weight).to(x.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE over halves: x [batch, tokens, heads, head_dim]; cos and sin [tokens, 1, head_dim / 2], fp32."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


@torch.library.custom_op("zimage_rt_benchmarks::scaled_linear", mutates_args=())
def scaled_linear(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    """x [batch, tokens, in], weight [out, in] -> scale * x weightᵀ, scaled in fp32 before rounding.

    cuBLAS multiplies its fp32 sums by alpha. The op is opaque to the compiler, whose autotuning fails on it
    (torch 2.13).
    """
    result = x.new_empty(*x.shape[:-1], weight.shape[0])
    result.view(-1, weight.shape[0]).addmm_(x.flatten(0, -2), weight.t(), beta=0, alpha=scale)
    return result


@scaled_linear.register_fake
def _(x: Tensor, weight: Tensor, scale: float) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@dataclasses.dataclass(frozen=True)
class Settings:
    """Settings of all blocks."""

    heads: int
    head_dim: int
    eps: float
    precision: Precision


# qkv [3 dim, dim], norm_q and norm_k [head_dim], out [dim, dim], w13 [2 hidden, dim], w2 [dim, hidden]
Weights = tuple[Matrix, Tensor, Tensor, Matrix, Matrix, Matrix]
# attention_norm2 times its gate, ffn_norm1 times its scale, ffn_norm2 times its gate, the next block's attention_norm1
# times its scale; each [batch or 1, 1, dim], fp32
Vectors = tuple[Tensor, Tensor, Tensor, Tensor]


def attention(x: Matrix, weights: Weights, cos: Tensor, sin: Tensor, settings: Settings) -> Tensor:
    """[batch, tokens, dim] -> the same in 16 bits, times `precision.attention_scale`."""
    qkv, norm_q, norm_k, out, _, _ = weights
    q, k, v = linear(x, qkv).unflatten(-1, (3, settings.heads, settings.head_dim)).unbind(2)
    q = rotate(rms(q, norm_q, QK_NORM_EPS), cos, sin).transpose(1, 2)
    k = rotate(rms(k, norm_k, QK_NORM_EPS), cos, sin).transpose(1, 2)
    if q.is_cuda:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            h = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))
    else:
        h = F.scaled_dot_product_attention(q, k, v.transpose(1, 2))
    h = h.transpose(1, 2).flatten(2)
    scale = settings.precision.attention_scale
    if scale == 1.0 or isinstance(out, tuple):
        return linear(like_matrix(h, out), out)
    return scaled_linear(h, out, scale)


def block(
    x: Tensor, normed: Matrix, weights: Weights, vectors: Vectors, cos: Tensor, sin: Tensor, settings: Settings
) -> tuple[Tensor, Matrix]:
    """Residual and its normed copy, [batch, tokens, dim] each -> both for the next block."""
    precision, eps = settings.precision, settings.eps
    attention_gate, ffn_scale, ffn_gate, next_scale = vectors
    qkv, _, _, _, w13, w2 = weights
    h = attention(normed, weights, cos, sin, settings)
    x = x + rms(h, attention_gate, eps * precision.attention_scale**2)
    gate, up = linear(like_matrix(rms(x, ffn_scale, eps), w13), w13).chunk(2, dim=-1)
    product = F.silu(gate.float()) * precision.gate_scale * (up.float() * precision.up_scale)
    h = linear(like_matrix(product.to(x.dtype), w2), w2)
    x = x + rms(h, ffn_gate, eps * precision.ffn_scale**2)
    return x, like_matrix(rms(x, next_scale, eps), qkv)


def begin_blocks(x: Tensor, context: Tensor | None, scale: Tensor, eps: float, qkv: Matrix) -> tuple[Tensor, Matrix]:
    """Appends the context to the rows, if there is one; returns them and their normed copy for the first block."""
    if context is not None:
        x = torch.cat((x, context), dim=1)
    return x, like_matrix(rms(x, scale, eps), qkv)


class _Reader:
    """Reads a component's tensors to a device: matrices in `dtype`, vectors in fp32."""

    def __init__(self, component: Component, dtype: torch.dtype, device: str) -> None:
        self._component, self._dtype, self._device = component, dtype, device

    def __call__(self, name: str) -> Tensor:
        tensor = self._component.tensors[name].load().to(self._device)
        return tensor.to(self._dtype if tensor.ndim > 1 and not name.endswith("pad_token") else torch.float32)

    def block(self, name: str, config: TransformerConfig, quantize: bool = False) -> Weights:
        """A block's weights, concatenated; queries and keys in the order of `rotate`."""
        head_dim = config.head_dim
        stored: Callable[[Tensor], Matrix] = quantized_rows if quantize else lambda matrix: matrix
        q, k, v = (self(f"{name}.attention.to_{part}.weight") for part in "qkv")
        return (
            stored(torch.cat((half_split(q, head_dim), half_split(k, head_dim), v))),
            half_split(self(f"{name}.attention.norm_q.weight"), head_dim),
            half_split(self(f"{name}.attention.norm_k.weight"), head_dim),
            stored(self(f"{name}.attention.to_out.0.weight")),
            stored(torch.cat((self(f"{name}.feed_forward.w1.weight"), self(f"{name}.feed_forward.w3.weight")))),
            stored(self(f"{name}.feed_forward.w2.weight")),
        )

    def norms(self, name: str) -> Tensor:
        """Norm weights [4, dim] in the order of adaLN: attention_norm1, attention_norm2, ffn_norm1, ffn_norm2."""
        return torch.stack([self(f"{name}.{norm}.weight") for norm in _NORMS])


_NORMS = ("attention_norm1", "attention_norm2", "ffn_norm1", "ffn_norm2")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Rotary tables of an image size and context length: cosines and sines, [tokens, 1, head_dim / 2] each."""

    image_tokens: int
    image: tuple[Tensor, Tensor]
    joint: tuple[Tensor, Tensor]


class TorchBestTransformer:
    """The transformer and its context refiner.

    Args:
        component: the checkpoint's transformer.
        precision: `bf16`, `fp16` or `fp8` (`fp32` to check it).
        device: `cuda`, or `cpu` to test the code.
        mode: one of COMPILE_MODES, for the main layers.
        graphs: replay an evaluation as one CUDA graph.
    """

    def __init__(
        self, component: Component, precision: str, device: str, mode: str = COMPILE_MODES[-1], graphs: bool = True
    ) -> None:
        if precision not in FORMATS:
            raise ValueError(f"precision: expected one of {', '.join(FORMATS)}, got {precision!r}")
        config = self.config = TransformerConfig.from_dict(component.config)
        self.device, self.precision = device, PRECISIONS[precision]
        self.dtype = self.precision.storage
        self._settings = Settings(config.n_heads, config.head_dim, config.norm_eps, self.precision)
        # Partial sums in fp16 would overflow.
        torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False
        self._load(_Reader(component, self.dtype, device))
        self._rope = rope_tables(config)
        self._rope.load_state_dict({name: source.assemble(()) for name, source in self._rope.sources.items()})
        self._rope.to(device)
        self._shapes: dict[tuple[int, ...], Shape] = {}
        self._graphs: dict[tuple[int, ...], _Graph] | None = {} if graphs and device != "cpu" else None
        compiled = functools.partial(torch.compile, dynamic=False)
        self._layer: Callable[..., Any] = block
        self._refiner, self._before, self._after, self._first = block, self._begin, self._finish, begin_blocks
        if mode != "none":
            # torch counts recompiles per function: a wrapper each, so that no shape falls back to eager.
            torch._dynamo.config.recompile_limit = 64
            self._layer = compiled(block, mode=mode)
            plain = (_copy(block), self._begin, self._finish, begin_blocks)
            self._refiner, self._before, self._after, self._first = map(compiled, plain)

    def _load(self, read: _Reader) -> None:
        config = self.config
        names = [f"noise_refiner.{i}" for i in range(config.n_refiner_layers)]
        names += [f"layers.{i}" for i in range(config.n_layers)]
        with ThreadPoolExecutor(THREADS) as pool:
            quantize = self.precision.quantization is not None
            self._blocks = list(pool.map(lambda name: read.block(name, config, quantize), names))
        self._norms = torch.stack([read.norms(name) for name in names])  # [blocks, 4, dim]
        # adaLN of all blocks: [blocks * 4 * dim, 256].
        self._adaln = torch.cat([read(f"{name}.adaLN_modulation.0.weight") for name in names])
        self._adaln_bias = torch.cat([read(f"{name}.adaLN_modulation.0.bias") for name in names]).to(self.dtype)
        refiners = [f"context_refiner.{i}" for i in range(config.n_refiner_layers)]
        self._context_blocks = [read.block(name, config) for name in refiners]
        self._context_norms = [read.norms(name) for name in refiners]
        self._caption = [read(f"cap_embedder.{name}") for name in ("0.weight", "1.weight", "1.bias")]
        self._caption_pad, self._image_pad = read("cap_pad_token"), read("x_pad_token")
        patch = config.patch_name
        self._embed = [read(f"all_x_embedder.{patch}.{name}") for name in ("weight", "bias")]
        final = f"all_final_layer.{patch}"
        self._final = [read(f"{final}.linear.{name}") for name in ("weight", "bias")]
        self._final_adaln = [read(f"{final}.adaLN_modulation.1.{name}") for name in ("weight", "bias")]
        parts = ("0.weight", "0.bias", "2.weight", "2.bias")
        self._timestep = [read(f"t_embedder.mlp.{name}").float() for name in parts]

    @torch.no_grad()
    def context(self, prompt_embeds: Tensor) -> Tensor:
        """[batch, prompt_tokens, cap_feat_dim] -> [batch, context_tokens, dim]; eager, as it runs once per prompt."""
        norm, weight, bias = self._caption
        x = F.linear(rms(prompt_embeds.to(self.dtype), norm, self.config.norm_eps), weight, bias.to(self.dtype))
        x = _padded(x, self._caption_pad)
        cos, sin = (table.unsqueeze(1) for table in caption_rope(self._rope, x.shape[1], self.config.head_dim // 2))
        for weights, norms in zip(self._context_blocks, self._context_norms, strict=True):
            first, gate, ffn, ffn_gate = norms[:, None, None]
            h = rms(x, first, self.config.norm_eps)
            x, _ = block(x, h, weights, (gate, ffn, ffn_gate, first), cos, sin, self._settings)
        return x

    def shape(self, rows: int, columns: int, context_tokens: int) -> Shape:
        """Rotary tables of an image of rows x columns patches, cached."""
        key = (rows, columns, context_tokens)
        if key not in self._shapes:
            image = image_rope(self._rope, context_tokens + 1, rows, columns)
            # Pad rows have the ids (0, 0, 0), so their angle is zero.
            image = (
                _padded(image[0], torch.ones_like(image[0][:1])),
                _padded(image[1], torch.zeros_like(image[1][:1])),
            )
            caption = caption_rope(self._rope, context_tokens, self.config.head_dim // 2)
            joint = [torch.cat(pair).unsqueeze(1) for pair in zip(image, caption, strict=True)]
            cos, sin = (table.unsqueeze(1) for table in image)
            self._shapes[key] = Shape(rows * columns, (cos, sin), (joint[0], joint[1]))
        return self._shapes[key]

    @torch.no_grad()
    def __call__(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """latents [batch, channels, h, w], timestep [batch], both fp32 -> noise_pred fp32, sign flipped.

        With graphs, the next call of the same shape overwrites the result.
        """
        if self._graphs is None:
            return self._run(latents, timestep, context)
        key = (*latents.shape, context.shape[1])
        if key not in self._graphs:
            self._graphs[key] = _Graph(self._run, (latents, timestep, context))
        return self._graphs[key](latents, timestep, context)

    def _run(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        patch = self.config.patch_size
        shape = self.shape(latents.shape[2] // patch, latents.shape[3] // patch, context.shape[1])
        x, vectors, adaln_input = self._before(latents, timestep)
        refiners = len(self._context_blocks)
        for i, weights in enumerate(self._blocks):
            if i in (0, refiners):
                joined = context if i == refiners else None
                x, normed = self._first(x, joined, vectors[i][0], self.config.norm_eps, weights[0])
            run, rope = (self._refiner, shape.image) if i < refiners else (self._layer, shape.joint)
            _, gate, ffn, ffn_gate = vectors[i]
            following = vectors[min(i + 1, len(vectors) - 1)][0]
            x, normed = run(x, normed, weights, (gate, ffn, ffn_gate, following), *rope, self._settings)
        return self._after(x[:, : shape.image_tokens], adaln_input, latents)

    def _begin(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, list[list[Tensor]], Tensor]:
        """Image rows, the norms of each block times its modulation, and the timestep's features."""
        config, p = self.config, self.config.patch_size
        half = FREQUENCY_DIM // 2
        steps = torch.arange(half, device=latents.device, dtype=torch.float32)
        angles = (timestep * config.t_scale).unsqueeze(1) * torch.exp(-math.log(10000) / half * steps)
        features = torch.cat((torch.cos(angles), torch.sin(angles)), dim=-1)
        w0, b0, w2, b2 = self._timestep
        adaln_input = F.linear(F.silu(F.linear(features, w0, b0)), w2, b2).to(self.dtype)

        batch = latents.shape[0]
        modulation = F.linear(adaln_input, self._adaln, self._adaln_bias).float()
        scale, gate, scale_ffn, gate_ffn = modulation.view(batch, len(self._blocks), 4, config.dim).unbind(2)
        factors = torch.stack((1 + scale, torch.tanh(gate), 1 + scale_ffn, torch.tanh(gate_ffn)), dim=2)
        norms = (factors * self._norms).permute(1, 2, 0, 3).unsqueeze(3).contiguous()  # [blocks, 4, batch, 1, dim]

        rows, columns = latents.shape[2] // p, latents.shape[3] // p
        x = latents.unflatten(3, (columns, p)).unflatten(2, (rows, p)).permute(0, 2, 4, 3, 5, 1)
        weight, bias = self._embed
        x = F.linear(x.reshape(batch, rows * columns, -1).to(self.dtype), weight, bias.to(self.dtype))
        return _padded(x, self._image_pad), [list(one.unbind(0)) for one in norms.unbind(0)], adaln_input

    def _finish(self, x: Tensor, adaln_input: Tensor, latents: Tensor) -> Tensor:
        """[batch, image_tokens, dim] -> noise_pred in the shape of latents."""
        p = self.config.patch_size
        batch, channels, height, width = latents.shape
        weight, bias = self._final_adaln
        scale = 1 + F.linear(F.silu(adaln_input), weight, bias.to(self.dtype)).float()
        x = F.layer_norm(x.float(), (self.config.dim,), eps=FINAL_NORM_EPS) * scale.unsqueeze(1)
        weight, bias = self._final
        x = -F.linear(x.to(self.dtype), weight, bias.to(self.dtype)).float()
        x = x.view(batch, height // p, width // p, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(latents.shape)


def _padded(x: Tensor, pad: Tensor) -> Tensor:
    """Appends `pad` [1, width] until the rows of x [..., rows, width] are a multiple of 32."""
    missing = -x.shape[-2] % SEQUENCE_MULTIPLE
    return torch.cat((x, pad.to(x.dtype).expand(*x.shape[:-2], missing, -1)), dim=-2) if missing else x


def _copy(function: Callable[..., Any]) -> Callable[..., Any]:
    def copied(*arguments: Any) -> Any:
        return function(*arguments)

    return copied


class _Graph:
    """A function captured as a CUDA graph; inputs are copied in, and every call returns the same output tensor."""

    def __init__(self, function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> None:
        self._inputs = [tensor.clone() for tensor in inputs]
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):  # compiles, and lets the libraries pick kernels
                function(*self._inputs)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._output = function(*self._inputs)

    def __call__(self, *inputs: Tensor) -> Tensor:
        for own, given in zip(self._inputs, inputs, strict=True):
            own.copy_(given, non_blocking=True)
        self._graph.replay()
        return self._output
