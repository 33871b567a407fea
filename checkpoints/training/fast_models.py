"""Training twins of the transformer and the text encoder.

Same parameters under the same names as ``diffusers.ZImageTransformer2DModel`` and
``transformers.Qwen3Model`` (so a ``state_dict`` fits both), but batched tensors of one
shape instead of lists, real instead of complex RoPE, fused projections and no masks. A batch has
images of one canvas and captions of one padded length, and a causal encoder does not attend to
padding on its right. ``check_parity.py`` compares the twins with the originals.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import architecture
import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 128
PATCH = 2
ROW_MULTIPLE = 32  # image rows are padded to a multiple of it; attention includes the pad rows
TOKEN = 16  # side of a token in pixels
CAPTION_LENGTHS = (32, 64)  # captions are padded to one of these


class RMSNorm(nn.RMSNorm):
    """RMSNorm computed in fp32 that returns its input's dtype, unlike under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.float()).to(x.dtype)


class Attention(nn.Module):
    """diffusers' ``Attention`` with q and k norms: parameters only."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(dim, dim, bias=False)
        self.to_v = nn.Linear(dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim, bias=False)])
        self.norm_q = RMSNorm(HEAD_DIM, eps=1e-5)
        self.norm_k = RMSNorm(HEAD_DIM, eps=1e-5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        weight = torch.cat([self.to_q.weight, self.to_k.weight, self.to_v.weight])
        q, k, v = F.linear(x, weight).unflatten(-1, (3, -1, HEAD_DIM)).unbind(2)
        q, k = rotate(self.norm_q(q), cos, sin), rotate(self.norm_k(k), cos, sin)
        q, k, v = (t.to(v.dtype).transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v)
        return self.to_out[0](x.transpose(1, 2).flatten(2))


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate adjacent pairs. x [batch, tokens, heads, 128]; cos, sin [tokens, 1, 64]."""
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


class FeedForward(nn.Module):
    """SwiGLU with the original's names."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        hidden = int(dim / 3 * 8)
        self.w1 = nn.Linear(dim, hidden, bias=False)
        self.w2 = nn.Linear(hidden, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = F.linear(x, torch.cat([self.w1.weight, self.w3.weight])).chunk(2, dim=-1)
        return self.w2(F.silu(gate) * value)


class Block(nn.Module):
    """One Z-Image block, modulated by the timestep or not."""

    def __init__(self, dim: int, modulated: bool) -> None:
        super().__init__()
        self.attention = Attention(dim)
        self.feed_forward = FeedForward(dim)
        for name in ("attention_norm1", "ffn_norm1", "attention_norm2", "ffn_norm2"):
            setattr(self, name, RMSNorm(dim, eps=1e-5))
        if modulated:
            self.adaLN_modulation = nn.Sequential(nn.Linear(min(dim, 256), 4 * dim))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, t: Tensor | None = None) -> Tensor:
        if t is None:
            x = x + self.attention_norm2(self.attention(self.attention_norm1(x), cos, sin))
            return x + self.ffn_norm2(self.feed_forward(self.ffn_norm1(x)))
        scale_a, gate_a, scale_f, gate_f = self.adaLN_modulation(t).unsqueeze(1).chunk(4, dim=2)
        attended = self.attention(self.attention_norm1(x) * (1 + scale_a), cos, sin)
        x = x + gate_a.tanh() * self.attention_norm2(attended)
        fed = self.feed_forward(self.ffn_norm1(x) * (1 + scale_f))
        return x + gate_f.tanh() * self.ffn_norm2(fed)


class FinalLayer(nn.Module):
    """LayerNorm without weights, scaled by the timestep, then the projection to patches."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(min(dim, 256), dim))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        scale = 1 + self.adaLN_modulation(t).unsqueeze(1)
        return self.linear(F.layer_norm(x, x.shape[-1:], eps=1e-6) * scale)


_compiled: dict[type[nn.Module], Callable[..., Tensor]] = {}


def compile_blocks(dynamic: bool) -> None:
    """Compile the forward pass of all blocks.

    Canvases, captions and batches differ in length; with ``dynamic`` one graph serves all of them.
    Equal sizes (256 tokens and 256 features of the timestep) must not be unified, and a norm's
    epsilon must not become dynamic: both would compile graphs twice.
    """
    import torch._dynamo
    import torch.fx.experimental._config

    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.specialize_float = True
    torch.fx.experimental._config.use_duck_shape = False
    for kind in (Block, TextLayer):
        _compiled[kind] = torch.compile(kind.forward, dynamic=dynamic)


def compiling() -> bool:
    return bool(_compiled)


def stop_compiling() -> None:
    """Use eager blocks again."""
    _compiled.clear()


@contextlib.contextmanager
def eager() -> Iterator[None]:
    """Context manager for eager blocks: a few images are not worth a compilation."""
    kept = dict(_compiled)
    _compiled.clear()
    try:
        yield
    finally:
        _compiled.update(kept)


def run_block(block: nn.Module, *arguments: Tensor | None) -> Tensor:
    """Call a block, compiled if ``compile_blocks`` was called."""
    function = _compiled.get(type(block))
    return function(block, *arguments) if function else block(*arguments)


class TimestepEmbedder(nn.Module):
    """Sinusoids, then two layers."""

    def __init__(self, out: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, 1024), nn.SiLU(), nn.Linear(1024, out))

    def forward(self, t: Tensor) -> Tensor:
        steps = torch.arange(128, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * steps / 128)
        return self.mlp(torch.cat([angles.cos(), angles.sin()], dim=-1))


class FastTransformer(nn.Module):
    """``ZImageTransformer2DModel`` for images of one canvas and captions of one padded length."""

    def __init__(self) -> None:
        super().__init__()
        c = architecture.TRANSFORMER
        dim = c["dim"]
        self.axes, self.theta, self.t_scale = c["axes_dims"], c["rope_theta"], c["t_scale"]
        patch = PATCH * PATCH * c["in_channels"]
        self.all_x_embedder = nn.ModuleDict({"2-1": nn.Linear(patch, dim)})
        self.all_final_layer = nn.ModuleDict({"2-1": FinalLayer(dim, patch)})
        refiners = range(c["n_refiner_layers"])
        self.noise_refiner = nn.ModuleList([Block(dim, True) for _ in refiners])
        self.context_refiner = nn.ModuleList([Block(dim, False) for _ in refiners])
        self.t_embedder = TimestepEmbedder(min(dim, 256))
        self.cap_embedder = nn.Sequential(RMSNorm(c["cap_feat_dim"], eps=1e-5), nn.Linear(c["cap_feat_dim"], dim))
        self.x_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.cap_pad_token = nn.Parameter(torch.zeros(1, dim))
        self.layers = nn.ModuleList([Block(dim, True) for _ in range(c["n_layers"])])
        self._tables: dict[tuple[int, int, int, torch.device], tuple[tuple[Tensor, Tensor], ...]] = {}

    def initialise(self) -> None:
        """Initialise near the identity: small gates, and an output of zero."""
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2 and "pad_token" not in name:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
            if "adaLN_modulation" in name:
                nn.init.zeros_(parameter)
        for block in [*self.noise_refiner, *self.layers]:
            bias = block.adaLN_modulation[0].bias.data.view(4, -1)
            bias[1], bias[3] = 0.3, 0.3
        # The output contains minus the noise, most of the input, so the input passes through from the start.
        nn.init.orthogonal_(self.all_x_embedder["2-1"].weight)
        nn.init.zeros_(self.all_x_embedder["2-1"].bias)
        final = self.all_final_layer["2-1"].linear
        final.weight.data = -0.4 * self.all_x_embedder["2-1"].weight.data.T.clone()
        nn.init.zeros_(final.bias)
        nn.init.normal_(self.cap_pad_token, std=0.5)
        nn.init.normal_(self.x_pad_token, std=0.5)

    def _rope(self, rows: int, columns: int, caption: int, device: torch.device) -> tuple[tuple[Tensor, Tensor], ...]:
        """Return cos and sin [image + pad + caption, 1, 64], then those of image and pad, then the caption's."""
        key = (rows, columns, caption, device)
        if key not in self._tables:
            y, x = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            first = torch.full((rows * columns,), caption + 1)
            image = torch.stack([first, y.flatten(), x.flatten()], dim=1)
            pad = torch.zeros(-rows * columns % ROW_MULTIPLE, 3, dtype=torch.long)
            text = torch.zeros(caption, 3, dtype=torch.long)
            text[:, 0] = torch.arange(1, caption + 1)
            ids = torch.cat([image, pad, text]).double()
            angles = [
                ids[:, i, None] / self.theta ** (torch.arange(0, d, 2, dtype=torch.double) / d)
                for i, d in enumerate(self.axes)
            ]
            table = torch.cat(angles, dim=1).unsqueeze(1)
            cos, sin = (x.float().to(device) for x in (table.cos(), table.sin()))
            seen = len(image) + len(pad)
            # Copies, because a view would compile another graph.
            parts = [(cos[a:b].clone(), sin[a:b].clone()) for a, b in ((0, seen), (seen, len(ids)))]
            self._tables[key] = ((cos, sin), *parts)
        return self._tables[key]

    def forward(
        self,
        patches: Tensor,
        t: Tensor,
        features: Tensor,
        lengths: Tensor,
        canvas: tuple[int, int],
        keep: Tensor | None = None,
    ) -> Tensor:
        """Return the model's output (data minus noise), the shape of ``patches``.

        patches [batch, tokens, 64] of ``patchify``; t [batch] = 1 − sigma; features [batch, padded
        length, width]; lengths [batch], the captions' true lengths; canvas, width and height in
        pixels; keep [batch, tokens], at which of the canvas's places the patches stand (all of them
        in order if None).
        """
        batch, caption = len(patches), features.shape[1]
        columns, rows = canvas[0] // TOKEN, canvas[1] // TOKEN
        pads = -rows * columns % ROW_MULTIPLE
        seen = rows * columns + pads
        (cos, sin), image, text = self._rope(rows, columns, caption, patches.device)
        if keep is not None:
            places = torch.arange(seen - pads, seen, device=keep.device).expand(batch, -1)
            keep = torch.cat([keep, places], dim=1)
            image = (image[0][keep], image[1][keep])  # [batch, tokens, 1, 64]
            cos, sin = (torch.cat([i, c.expand(batch, -1, -1, -1)], dim=1) for i, c in zip(image, text, strict=True))
        t = self.t_embedder(t * self.t_scale)
        x = self.all_x_embedder["2-1"](patches)
        if pads:
            x = torch.cat([x, self.x_pad_token.to(x.dtype).expand(batch, pads, -1)], dim=1)
        elif compiling():
            x = x.clone()  # what a linear layer returns is a view, which would be another graph
        for block in self.noise_refiner:
            x = run_block(block, x, *image, t)
        context = self.cap_embedder(features)
        real = torch.arange(caption, device=x.device) < lengths[:, None]
        context = torch.where(real.unsqueeze(-1), context, self.cap_pad_token.to(context.dtype))
        for block in self.context_refiner:
            context = run_block(block, context, *text)
        x = torch.cat([x, context], dim=1)
        for block in self.layers:
            x = run_block(block, x, cos, sin, t)
        return self.all_final_layer["2-1"](x[:, : patches.shape[1]], t)


def patchify(latents: Tensor) -> Tensor:
    """Convert [batch, 16, rows, columns] to [batch, tokens, 64] as the reference does."""
    x = latents.unflatten(3, (-1, PATCH)).unflatten(2, (-1, PATCH))
    return x.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def unpatchify(patches: Tensor, canvas: tuple[int, int]) -> Tensor:
    """Undo ``patchify``; canvas is width and height in pixels."""
    x = patches.unflatten(1, (canvas[1] // TOKEN, canvas[0] // TOKEN)).unflatten(3, (PATCH, PATCH, -1))
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


class TextAttention(nn.Module):
    """Qwen3's grouped-query attention."""

    def __init__(self) -> None:
        super().__init__()
        c = architecture.TEXT_ENCODER
        self.heads, self.kv = c["num_attention_heads"], c["num_key_value_heads"]
        self.d = c["head_dim"]
        self.q_proj = nn.Linear(c["hidden_size"], self.heads * self.d, bias=False)
        self.k_proj = nn.Linear(c["hidden_size"], self.kv * self.d, bias=False)
        self.v_proj = nn.Linear(c["hidden_size"], self.kv * self.d, bias=False)
        self.o_proj = nn.Linear(self.heads * self.d, c["hidden_size"], bias=False)
        self.q_norm = RMSNorm(self.d, eps=c["rms_norm_eps"])
        self.k_norm = RMSNorm(self.d, eps=c["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q = self.q_norm(self.q_proj(x).unflatten(-1, (self.heads, self.d)))
        k = self.k_norm(self.k_proj(x).unflatten(-1, (self.kv, self.d)))
        v = self.v_proj(x).unflatten(-1, (self.kv, self.d))
        q, k = half_rotate(q, cos, sin).to(v.dtype), half_rotate(k, cos, sin).to(v.dtype)
        k, v = (t.repeat_interleave(self.heads // self.kv, dim=2) for t in (k, v))
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(x.transpose(1, 2).flatten(2))


def half_rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first half against the second, as Qwen does. cos, sin [tokens, 1, d/2]."""
    first, second = x.float().chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class TextMLP(nn.Module):
    """Qwen3's SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        c = architecture.TEXT_ENCODER
        self.gate_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.up_proj = nn.Linear(c["hidden_size"], c["intermediate_size"], bias=False)
        self.down_proj = nn.Linear(c["intermediate_size"], c["hidden_size"], bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class TextLayer(nn.Module):
    """One Qwen3 layer."""

    def __init__(self) -> None:
        super().__init__()
        c = architecture.TEXT_ENCODER
        self.self_attn = TextAttention()
        self.mlp = TextMLP()
        self.input_layernorm = RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        self.post_attention_layernorm = RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class FastTextEncoder(nn.Module):
    """``Qwen3Model`` up to ``hidden_states[-2]``. The last layer and norm exist but never run."""

    def __init__(self) -> None:
        super().__init__()
        c = architecture.TEXT_ENCODER
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList([TextLayer() for _ in range(c["num_hidden_layers"])])
        self.norm = RMSNorm(c["hidden_size"], eps=c["rms_norm_eps"])
        powers = torch.arange(0, c["head_dim"], 2, dtype=torch.double) / c["head_dim"]
        angles = torch.arange(max(CAPTION_LENGTHS))[:, None] / c["rope_theta"] ** powers
        self.register_buffer("cos", angles.cos().float().unsqueeze(1), persistent=False)
        self.register_buffer("sin", angles.sin().float().unsqueeze(1), persistent=False)

    def initialise(self) -> None:
        """Draw the weights with variance one over the fan-in; a wider embedding."""
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=parameter.shape[1] ** -0.5)
        nn.init.normal_(self.embed_tokens.weight, std=0.3)
        self.layers[-1].requires_grad_(False)
        self.norm.requires_grad_(False)

    def forward(self, ids: Tensor) -> Tensor:
        """Return features [batch, tokens, width] of right-padded ids [batch, tokens]."""
        cos, sin = self.cos[: ids.shape[1]], self.sin[: ids.shape[1]]
        x = self.embed_tokens(ids)
        for layer in self.layers[:-1]:
            x = run_block(layer, x, cos, sin)
        return x
