"""Qwen3 without its last layer, as Z-Image uses it. Follows `Qwen3Model` of transformers 5."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..precision import Precision
from .layers import Constants, Part, RMSNorm, attention, rotate, signed_halves, swiglu
from .quantized import linear


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Sizes of the text encoder, under the names of Qwen3's config.json."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> TextEncoderConfig:
        """From the dictionary in config.json (`rope_theta` moved into `rope_parameters` in transformers 5)."""
        rope = config.get("rope_parameters") or {}
        heads = config["num_attention_heads"]
        return cls(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_hidden_layers=config["num_hidden_layers"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads", heads),
            head_dim=config.get("head_dim", config["hidden_size"] // heads),
            rms_norm_eps=config.get("rms_norm_eps", 1e-6),
            rope_theta=config.get("rope_theta") or rope.get("rope_theta", 1e6),
        )


class SelfAttention(nn.Module):
    """Causal grouped-query attention with RMSNorm on queries and keys."""

    def __init__(self, config: TextEncoderConfig, precision: Precision) -> None:
        super().__init__()
        self.precision, self.head_dim = precision, config.head_dim
        self.kv_heads = config.num_key_value_heads
        self.groups = config.num_attention_heads // config.num_key_value_heads
        q, kv = config.num_attention_heads * config.head_dim, self.kv_heads * config.head_dim
        self.sizes = (q, kv, kv)
        parts = tuple(map(Part, ("q_proj", "k_proj", "v_proj"), self.sizes))
        self.qkv_proj = linear(config.hidden_size, parts, precision)
        self.o_proj = linear(q, config.hidden_size, precision)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def _each_head(self, x: Tensor) -> Tensor:
        """[batch, tokens, kv_heads, head_dim] -> [batch, heads, tokens, head_dim], one copy per query head.

        A broadcast over a fifth dimension would need no copy, but TensorRT would not fuse the attention.
        """
        if self.groups > 1:  # before the transpose: torch 2.11 refuses a free length after it
            x = x.unsqueeze(3).expand(-1, -1, -1, self.groups, -1).flatten(2, 3)
        return x.transpose(1, 2)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> the same, times `precision.attention_scale`."""
        q, k, v = self.qkv_proj(x).split(self.sizes, dim=-1)
        q = rotate(self.q_norm(q.unflatten(-1, (-1, self.head_dim))), cos, sin)
        k = rotate(self.k_norm(k.unflatten(-1, (-1, self.head_dim))), cos, sin)
        v = v.unflatten(-1, (-1, self.head_dim))
        # [batch, heads, tokens, head_dim]
        q, k, v = q.transpose(1, 2), self._each_head(k), self._each_head(v)
        out = attention(q, k, v, self.precision, mask)
        out = out.transpose(1, 2).flatten(2)
        if self.precision.attention_scale != 1.0:
            out = out * self.precision.attention_scale
        return self.o_proj(out)


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, config: TextEncoderConfig, precision: Precision) -> None:
        super().__init__()
        hidden = config.intermediate_size
        self.precision = precision
        parts = (Part("gate_proj", hidden), Part("up_proj", hidden))
        self.gate_up_proj = linear(config.hidden_size, parts, precision)
        self.down_proj = linear(hidden, config.hidden_size, precision)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, hidden] -> the same, times `precision.ffn_scale`."""
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(swiglu(gate, up, self.precision))


class Layer(nn.Module):
    """A decoder layer. No norm follows its branches, so their fp16 scale is undone in fp32 before the residual add."""

    def __init__(self, config: TextEncoderConfig, precision: Precision) -> None:
        super().__init__()
        self.precision = precision
        self.self_attn = SelfAttention(config, precision)
        self.mlp = MLP(config, precision)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> Tensor:
        """[batch, tokens, hidden] fp32 -> the same."""
        h = self.self_attn(self.input_layernorm(x), cos, sin, mask).float()
        if self.precision.attention_scale != 1.0:
            h = h * (1.0 / self.precision.attention_scale)
        x = x + h
        h = self.mlp(self.post_attention_layernorm(x)).float()
        if self.precision.ffn_scale != 1.0:
            h = h * (1.0 / self.precision.ffn_scale)
        return x + h


class TextEncoder(nn.Module):
    """input_ids int64 [batch, prompt_tokens] -> prompt_embeds fp32 [batch, prompt_tokens, hidden].

    Computes `hidden_states[-2]`: the last layer, the final norm and the head are left out. Attention is causal, so a
    prompt runs at its true length without a padding mask.
    """

    def __init__(self, config: TextEncoderConfig, precision: Precision) -> None:
        super().__init__()
        self.embed_tokens: Any = nn.Module()
        self.embed_tokens.weight = nn.Parameter(
            torch.empty(config.vocab_size, config.hidden_size, dtype=precision.storage),
            requires_grad=False,
        )
        self.layers = nn.ModuleList(Layer(config, precision) for _ in range(config.num_hidden_layers - 1))
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device="cpu")
        exponents = steps / config.head_dim
        self.rope = Constants(inv_freq=1.0 / (config.rope_theta**exponents))

    def forward(self, input_ids: Tensor) -> Tensor:
        """See the class."""
        x = torch.nn.functional.embedding(input_ids, self.embed_tokens.weight).float()
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        angles = positions.float().unsqueeze(1) * self.rope.inv_freq  # [tokens, head_dim / 2]
        cos, sin = signed_halves(torch.cos(angles), torch.sin(angles))
        hidden = positions.unsqueeze(0) > positions.unsqueeze(1)  # [queries, keys]
        mask = hidden.float() * torch.finfo(torch.float32).min
        for layer in self.layers:
            x = layer(x, cos, sin, mask)
        return x
