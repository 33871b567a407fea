"""Z-Image's transformer as two export modules: the context refiner runs per prompt, the transformer per evaluation.

Follows `ZImageTransformer2DModel` of diffusers 0.42.1 in its basic mode (one image per sample).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import Precision
from .layers import (
    Constants,
    Linear,
    Part,
    RMSNorm,
    attention,
    half_split,
    rotate,
    signed_halves,
    swiglu,
)
from .quantized import linear

SEQUENCE_MULTIPLE = 32  # SEQ_MULTI_OF in diffusers: rows of a sequence are padded to a multiple of it
ADALN_DIM = 256  # ADALN_EMBED_DIM
FREQUENCY_DIM = 256  # TimestepEmbedder.frequency_embedding_size
QK_NORM_EPS = 1e-5


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Sizes of the transformer, under the names of diffusers' config.json."""

    in_channels: int
    dim: int
    n_layers: int
    n_refiner_layers: int
    n_heads: int
    norm_eps: float
    qk_norm: bool
    cap_feat_dim: int
    rope_theta: float
    t_scale: float
    axes_dims: tuple[int, ...]
    axes_lens: tuple[int, ...]
    patch_size: int = 2

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TransformerConfig:
        """From the dictionary in config.json."""
        return cls(
            in_channels=config.get("in_channels", 16),
            dim=config["dim"],
            n_layers=config["n_layers"],
            n_refiner_layers=config["n_refiner_layers"],
            n_heads=config["n_heads"],
            norm_eps=config.get("norm_eps", 1e-5),
            qk_norm=config.get("qk_norm", True),
            cap_feat_dim=config["cap_feat_dim"],
            rope_theta=config.get("rope_theta", 256.0),
            t_scale=config.get("t_scale", 1000.0),
            axes_dims=tuple(config.get("axes_dims", (32, 48, 48))),
            axes_lens=tuple(config.get("axes_lens", (1024, 512, 512))),
            patch_size=config.get("all_patch_size", (2,))[0],
        )

    @property
    def head_dim(self) -> int:
        """Width of an attention head."""
        return self.dim // self.n_heads

    @property
    def hidden_dim(self) -> int:
        """Width of the feed-forward's hidden layer."""
        return int(self.dim / 3 * 8)

    @property
    def patch_name(self) -> str:
        """Key of the embedder and the final layer in their dictionaries: `{patch_size}-{f_patch_size}`."""
        return f"{self.patch_size}-1"


class Attention(nn.Module):
    """Joint attention with RMSNorm on queries and keys."""

    def __init__(self, config: TransformerConfig, precision: Precision) -> None:
        super().__init__()
        dim, head_dim = config.dim, config.head_dim
        self.heads, self.head_dim, self.precision = config.n_heads, head_dim, precision
        self.qkv = linear(
            dim,
            (Part("to_q", dim, head_dim), Part("to_k", dim, head_dim), Part("to_v", dim)),
            precision,
        )
        reorder = functools.partial(half_split, head_dim=head_dim)
        self.norm_q = RMSNorm(head_dim, QK_NORM_EPS, reorder=reorder) if config.qk_norm else None
        self.norm_k = RMSNorm(head_dim, QK_NORM_EPS, reorder=reorder) if config.qk_norm else None
        self.to_out = nn.ModuleList([linear(dim, dim, precision)])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, queries: int | None = None) -> Tensor:
        """[batch, tokens, dim] -> [batch, queries or tokens, dim], times `precision.attention_scale`."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)
        if queries is not None:
            q = q[:, :queries]
        q = self.norm_q(q) if self.norm_q is not None else q.float()
        k = self.norm_k(k) if self.norm_k is not None else k.float()
        q = rotate(q, cos if queries is None else cos[:queries], sin if queries is None else sin[:queries])
        k = rotate(k, cos, sin)
        # [batch, heads, tokens, head_dim]
        out = attention(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), self.precision)
        out = out.transpose(1, 2).flatten(2)
        if self.precision.attention_scale != 1.0:
            out = out * self.precision.attention_scale
        return self.to_out[0](out)


class FeedForward(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TransformerConfig, precision: Precision) -> None:
        super().__init__()
        hidden = config.hidden_dim
        self.precision = precision
        self.w13 = linear(config.dim, (Part("w1", hidden), Part("w3", hidden)), precision)
        self.w2 = linear(hidden, config.dim, precision)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, dim] -> the same, times `precision.ffn_scale`."""
        gate, up = self.w13(x).chunk(2, dim=-1)
        return self.w2(swiglu(gate, up, self.precision))


class Block(nn.Module):
    """A transformer block; `modulation` adds adaLN scales and gates from the timestep."""

    def __init__(self, config: TransformerConfig, precision: Precision, modulation: bool) -> None:
        super().__init__()
        dim, eps = config.dim, config.norm_eps
        self.attention = Attention(config, precision)
        self.feed_forward = FeedForward(config, precision)
        self.attention_norm1 = RMSNorm(dim, eps)
        self.ffn_norm1 = RMSNorm(dim, eps)
        self.attention_norm2 = RMSNorm(dim, eps, precision.attention_scale)
        self.ffn_norm2 = RMSNorm(dim, eps, precision.ffn_scale)
        self.adaLN_modulation: nn.ModuleList | None = None
        if modulation:
            width = min(dim, ADALN_DIM)
            self.adaLN_modulation = nn.ModuleList([Linear(width, 4 * dim, precision, bias=True, fp32=True)])

    def forward(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        adaln_input: Tensor | None = None,
        queries: int | None = None,
    ) -> Tensor:
        """[batch, tokens, dim] fp32 -> the same shape, or only its first `queries` rows."""
        h = self.attention_norm1(x)
        if self.adaLN_modulation is not None:
            modulation = self.adaLN_modulation[0](adaln_input).unsqueeze(1)  # [batch, 1, 4 dim]
            scale_msa, gate_msa, scale_mlp, gate_mlp = modulation.chunk(4, dim=2)
            h = h * (1.0 + scale_msa)
        if queries is None:
            h = self.attention(h, cos, sin)
        else:
            h, x = self.attention(h, cos, sin, queries), x[:, :queries]
        h = self.attention_norm2(h)
        if self.adaLN_modulation is None:
            x = x + h
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        x = x + torch.tanh(gate_msa) * h
        h = self.feed_forward(self.ffn_norm1(x) * (1.0 + scale_mlp))
        return x + torch.tanh(gate_mlp) * self.ffn_norm2(h)


def _arange(end: int, step: int = 1) -> Tensor:
    return torch.arange(0, end, step, dtype=torch.float64, device="cpu")


def rope_tables(config: TransformerConfig, axes: int = 3) -> Constants:
    """Tables of cosines and sines by position for the first `axes` axes, in float64 as in `precompute_freqs_cis`."""
    tables = {}
    sizes = list(zip(config.axes_dims, config.axes_lens, strict=True))[:axes]
    for axis, (dim, length) in enumerate(sizes):
        inverse = 1.0 / (config.rope_theta ** (_arange(dim, 2) / dim))
        angles = torch.outer(_arange(length), inverse).float()
        tables[f"cos{axis}"], tables[f"sin{axis}"] = torch.cos(angles), torch.sin(angles)
    return Constants(**tables)


def caption_rope(tables: Constants, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [tokens, width] of caption rows, whose ids are (1 …, 0, 0); width = head_dim / 2."""
    ids = torch.arange(1, tokens + 1, device=tables.cos0.device)
    cos, sin = tables.cos0.index_select(0, ids), tables.sin0.index_select(0, ids)
    rest = width - cos.shape[1]
    return (
        torch.cat((cos, cos.new_ones(tokens, rest)), -1),
        torch.cat((sin, sin.new_zeros(tokens, rest)), -1),
    )


def image_rope(tables: Constants, first: int, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines [rows * columns, head_dim / 2] of image rows, whose ids are (first, row, column)."""
    device = tables.cos0.device
    ids = (
        torch.arange(first, first + 1, device=device),
        torch.arange(rows, device=device),
        torch.arange(columns, device=device),
    )

    def grid(table0: Tensor, table1: Tensor, table2: Tensor) -> Tensor:
        axes = (
            table0.index_select(0, ids[0]).unsqueeze(1).expand(rows, columns, -1),
            table1.index_select(0, ids[1]).unsqueeze(1).expand(rows, columns, -1),
            table2.index_select(0, ids[2]).unsqueeze(0).expand(rows, columns, -1),
        )
        return torch.cat(axes, -1).flatten(0, 1)

    return (
        grid(tables.cos0, tables.cos1, tables.cos2),
        grid(tables.sin0, tables.sin1, tables.sin2),
    )


def padded_rows(rows: int, device: torch.device) -> Tensor:
    """Source index of each padded row: 0, 1, …, rows - 1, then `rows` up to a multiple of 32."""
    count = (rows + SEQUENCE_MULTIPLE - 1) // SEQUENCE_MULTIPLE * SEQUENCE_MULTIPLE
    return torch.arange(count, device=device).clamp(max=rows)


def pad_rows(x: Tensor, pad: Tensor) -> Tensor:
    """Appends `pad` [1, width] to x [..., rows, width] until its rows are a multiple of 32.

    Gathers by index instead of slicing, so that one graph holds for every length, also for lengths without padding.
    """
    rows = x.shape[-2]
    x = torch.cat((x, pad.float().expand(*x.shape[:-2], 1, -1)), dim=-2)
    return x.index_select(-2, padded_rows(rows, x.device))


class ContextRefiner(nn.Module):
    """prompt_embeds [batch, prompt_tokens, cap_feat_dim] -> context [batch, context_tokens, dim], fp32.

    Runs once per prompt, because nothing in it depends on the timestep.
    """

    def __init__(self, config: TransformerConfig, precision: Precision) -> None:
        super().__init__()
        self.cap_embedder = nn.ModuleList(
            [
                RMSNorm(config.cap_feat_dim, config.norm_eps),
                Linear(config.cap_feat_dim, config.dim, precision, bias=True),
            ]
        )
        self.cap_pad_token = nn.Parameter(torch.empty(1, config.dim), requires_grad=False)
        self.context_refiner = nn.ModuleList(
            Block(config, precision, modulation=False) for _ in range(config.n_refiner_layers)
        )
        self.rope = rope_tables(config, axes=1)
        self.rope_width = config.head_dim // 2

    def forward(self, prompt_embeds: Tensor) -> Tensor:
        """See the class."""
        x = self.cap_embedder[1](self.cap_embedder[0](prompt_embeds))
        x = pad_rows(x, self.cap_pad_token)
        cos, sin = signed_halves(*caption_rope(self.rope, x.shape[1], self.rope_width))
        for block in self.context_refiner:
            x = block(x, cos, sin)
        return x


class TimestepEmbedder(nn.Module):
    """Sinusoidal features of the timestep and a two-layer MLP, fp32."""

    def __init__(self, config: TransformerConfig, precision: Precision) -> None:
        super().__init__()
        half = FREQUENCY_DIM // 2
        frequencies = torch.exp(-math.log(10000) * _arange(half).float() / half)
        self.constants = Constants(frequencies=frequencies)
        out, middle = min(config.dim, ADALN_DIM), 1024
        self.mlp = nn.ModuleList(
            [
                Linear(FREQUENCY_DIM, middle, precision, bias=True, fp32=True),
                nn.SiLU(),
                Linear(middle, out, precision, bias=True, fp32=True),
            ]
        )

    def forward(self, t: Tensor) -> Tensor:
        """[batch] -> [batch, min(dim, 256)]."""
        angles = t.unsqueeze(1) * self.constants.frequencies
        x = torch.cat((torch.cos(angles), torch.sin(angles)), dim=-1)
        for layer in self.mlp:
            x = layer(x)
        return x


class FinalLayer(nn.Module):
    """LayerNorm, adaLN scale from the timestep, projection to patches."""

    def __init__(self, config: TransformerConfig, precision: Precision) -> None:
        super().__init__()
        dim, width = config.dim, min(config.dim, ADALN_DIM)
        patch = config.patch_size**2 * config.in_channels
        self.dim = dim
        self.linear = Linear(dim, patch, precision, bias=True)
        self.adaLN_modulation = nn.ModuleList([nn.SiLU(), Linear(width, dim, precision, bias=True, fp32=True)])

    def forward(self, x: Tensor, adaln_input: Tensor) -> Tensor:
        """[batch, tokens, dim] -> [batch, tokens, patch]."""
        scale = 1.0 + self.adaLN_modulation[1](self.adaLN_modulation[0](adaln_input))
        x = torch.nn.functional.layer_norm(x, (self.dim,), eps=1e-6)
        return self.linear(x * scale.unsqueeze(1))


class Transformer(nn.Module):
    """(latents [batch, 16, h, w], timestep [batch], context [batch, context_tokens, dim]) -> noise_pred like latents.

    All tensors are fp32, `timestep` is 1 - sigma. The sign is already flipped:
    `latents += (sigma_next - sigma) * noise_pred`.
    """

    def __init__(self, config: TransformerConfig, precision: Precision) -> None:
        super().__init__()
        self.config = config
        patch = config.patch_size**2 * config.in_channels
        self.all_x_embedder = nn.ModuleDict({config.patch_name: Linear(patch, config.dim, precision, bias=True)})
        self.all_final_layer = nn.ModuleDict({config.patch_name: FinalLayer(config, precision)})
        self.t_embedder = TimestepEmbedder(config, precision)
        self.x_pad_token = nn.Parameter(torch.empty(1, config.dim), requires_grad=False)
        self.noise_refiner = nn.ModuleList(
            Block(config, precision, modulation=True) for _ in range(config.n_refiner_layers)
        )
        self.layers = nn.ModuleList(Block(config, precision, modulation=True) for _ in range(config.n_layers))
        self.rope = rope_tables(config)

    def forward(self, latents: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        """See the class."""
        adaln_input = self.t_embedder(timestep * self.config.t_scale)
        image_rope, rope = self.ropes(latents, context)
        x = self.embed(latents)
        for block in self.noise_refiner:
            x = block(x, *image_rope, adaln_input)
        x = torch.cat((x, context), dim=1)
        for block in self.layers[:-1]:
            x = block(x, *rope, adaln_input)
        # Only the image rows of the last block are read.
        x = self.layers[-1](x, *rope, adaln_input, queries=self.image_rows(latents))
        return self.predict(x, adaln_input, latents)

    def image_rows(self, latents: Tensor) -> int:
        """Number of patches of the latents."""
        return (latents.shape[2] // self.config.patch_size) * (latents.shape[3] // self.config.patch_size)

    def patches(self, latents: Tensor) -> Tensor:
        """[batch, channels, h, w] -> [batch, image_rows, features], features in the order (row, column, channel)."""
        p = self.config.patch_size
        batch, channels, height, width = latents.shape
        rows, columns = height // p, width // p
        x = latents.reshape(batch, channels, rows, p, columns, p).permute(0, 2, 4, 3, 5, 1)
        return x.reshape(batch, rows * columns, p * p * channels)

    def embed(self, latents: Tensor) -> Tensor:
        """[batch, channels, h, w] -> [batch, image tokens, dim], with pad rows."""
        return pad_rows(self.all_x_embedder[self.config.patch_name](self.patches(latents)), self.x_pad_token)

    def ropes(self, latents: Tensor, context: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Cosines and signed sines for `rotate`: of the image's tokens, and of the image's and the context's tokens."""
        p, tokens = self.config.patch_size, context.shape[1]
        cos, sin = image_rope(self.rope, tokens + 1, latents.shape[2] // p, latents.shape[3] // p)
        # Pad rows have the ids (0, 0, 0), so their angle is zero.
        cos, sin = pad_rows(cos, torch.ones_like(cos[:1])), pad_rows(sin, torch.zeros_like(sin[:1]))
        caption_cos, caption_sin = caption_rope(self.rope, tokens, self.config.head_dim // 2)
        return signed_halves(cos, sin), signed_halves(torch.cat((cos, caption_cos)), torch.cat((sin, caption_sin)))

    def predict(self, x: Tensor, adaln_input: Tensor, latents: Tensor) -> Tensor:
        """Image rows of the last block [batch, image_rows, dim] -> noise_pred in the shape of latents."""
        p = self.config.patch_size
        batch, channels, height, width = latents.shape
        x = -self.all_final_layer[self.config.patch_name](x, adaln_input)
        x = x.reshape(batch, height // p, width // p, p, p, channels).permute(0, 5, 1, 3, 2, 4)
        return x.reshape(batch, channels, height, width)
