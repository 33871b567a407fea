"""Decoder and encoder modules of both VAEs, between the transformer's latents and pixels in [-1, 1].

Follows `AutoencoderTiny` and `AutoencoderKL` of diffusers 0.42.1. `scaling_factor` and `shift_factor` are applied here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..precision import Precision
from .layers import Linear


@dataclasses.dataclass(frozen=True)
class LatentSpace:
    """Scale and shift between latents: the VAE's = the transformer's / scaling_factor + shift_factor."""

    scaling_factor: float
    shift_factor: float

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> LatentSpace:
        """From the dictionary in config.json."""
        return cls(config.get("scaling_factor") or 1.0, config.get("shift_factor") or 0.0)

    def to_own(self, latents: Tensor) -> Tensor:
        """The transformer's latents -> the VAE's."""
        if self.scaling_factor != 1.0:
            latents = latents * (1.0 / self.scaling_factor)
        return latents + self.shift_factor if self.shift_factor else latents

    def from_own(self, latents: Tensor) -> Tensor:
        """The VAE's latents -> the transformer's."""
        latents = latents - self.shift_factor if self.shift_factor else latents
        return latents * self.scaling_factor if self.scaling_factor != 1.0 else latents


class Conv(nn.Module):
    """A convolution, stored and computed in the module's precision."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        precision: Precision,
        *,
        kernel: int = 3,
        stride: int = 1,
        padding: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.compute, self.stride = precision.compute, stride
        self.padding = kernel // 2 if padding is None else padding
        self.weight = nn.Parameter(
            torch.empty(outputs, inputs, kernel, kernel, dtype=precision.storage),
            requires_grad=False,
        )
        self.bias: nn.Parameter | None = None
        if bias:
            # In the product's precision, unlike the bias of Linear: a convolution adds it in its accumulator.
            self.bias = nn.Parameter(torch.empty(outputs, dtype=precision.storage), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] -> [batch, outputs, height / stride, width / stride]."""
        bias = None if self.bias is None else self.bias.to(self.compute)
        weight = self.weight.to(self.compute)
        return F.conv2d(x.to(self.compute), weight, bias, self.stride, self.padding)


def double(x: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by two."""
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class TinyBlock(nn.Module):
    """Three convolutions with a skip connection."""

    def __init__(self, inputs: int, outputs: int, precision: Precision) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            Conv(inputs, outputs, precision),
            nn.ReLU(),
            Conv(outputs, outputs, precision),
            nn.ReLU(),
            Conv(outputs, outputs, precision),
        )
        self.skip = nn.Identity() if inputs == outputs else Conv(inputs, outputs, precision, kernel=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] -> [batch, outputs, height, width]."""
        return torch.relu(self.conv(x) + self.skip(x))


class Double(nn.Module):
    """`double` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> twice as high and wide."""
        return double(x)


class TinyVAEDecoder(nn.Module):
    """latents fp32 [batch, 16, latent_height, latent_width] -> image fp32 [batch, 3, height, width]."""

    def __init__(self, config: Mapping[str, Any], precision: Precision) -> None:
        super().__init__()
        self.space = LatentSpace.from_dict(config)
        widths, blocks = config["decoder_block_out_channels"], config["num_decoder_blocks"]
        layers: list[nn.Module] = [Conv(config["latent_channels"], widths[0], precision), nn.ReLU()]
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            last = i == len(blocks) - 1
            layers += [TinyBlock(width, width, precision) for _ in range(count)]
            layers += [] if last else [Double()]
            layers += [Conv(width, config["out_channels"] if last else width, precision, bias=last)]
        self.decoder: Any = nn.Module()
        self.decoder.layers = nn.Sequential(*layers)

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        x = torch.tanh(self.space.to_own(latents) / 3) * 3
        return self.decoder.layers(x).float() * 2 - 1


class TinyVAEEncoder(nn.Module):
    """image fp32 [batch, 3, height, width] in [-1, 1] -> latents fp32 [batch, 16, latent_height, latent_width]."""

    def __init__(self, config: Mapping[str, Any], precision: Precision) -> None:
        super().__init__()
        self.space = LatentSpace.from_dict(config)
        widths, blocks = config["encoder_block_out_channels"], config["num_encoder_blocks"]
        layers: list[nn.Module] = []
        for i, (width, count) in enumerate(zip(widths, blocks, strict=True)):
            if i == 0:
                layers += [Conv(config["in_channels"], width, precision)]
            else:
                layers += [Conv(width, width, precision, stride=2, bias=False)]
            layers += [TinyBlock(width, width, precision) for _ in range(count)]
        layers += [Conv(widths[-1], config["latent_channels"], precision)]
        self.encoder: Any = nn.Module()
        self.encoder.layers = nn.Sequential(*layers)

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        return self.space.from_own(self.encoder.layers((image + 1) / 2).float())


class GroupNorm(nn.Module):
    """Group norm in fp32."""

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        self.groups = groups
        self.weight = nn.Parameter(torch.empty(channels), requires_grad=False)
        self.bias = nn.Parameter(torch.empty(channels), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, ...] -> the same, fp32."""
        return F.group_norm(x.float(), self.groups, self.weight, self.bias, eps=1e-6)


class ResnetBlock(nn.Module):
    """Two convolutions after group norms, with a skip connection."""

    def __init__(self, inputs: int, outputs: int, groups: int, precision: Precision) -> None:
        super().__init__()
        self.norm1, self.conv1 = GroupNorm(inputs, groups), Conv(inputs, outputs, precision)
        self.norm2, self.conv2 = GroupNorm(outputs, groups), Conv(outputs, outputs, precision)
        self.conv_shortcut = None if inputs == outputs else Conv(inputs, outputs, precision, kernel=1)

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] -> [batch, outputs, height, width]."""
        h = self.conv2(F.silu(self.norm2(self.conv1(F.silu(self.norm1(x))))))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class MidAttention(nn.Module):
    """Self-attention of one head over all positions."""

    def __init__(self, channels: int, groups: int, precision: Precision) -> None:
        super().__init__()
        self.group_norm = GroupNorm(channels, groups)
        self.to_q = Linear(channels, channels, precision, bias=True)
        self.to_k = Linear(channels, channels, precision, bias=True)
        self.to_v = Linear(channels, channels, precision, bias=True)
        self.to_out = nn.ModuleList([Linear(channels, channels, precision, bias=True)])

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> the same."""
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [batch, positions, channels]
        q, k, v = self.to_q(h), self.to_k(h), self.to_v(h)
        scores = torch.matmul(q * (1.0 / math.sqrt(q.shape[-1])), k.transpose(1, 2))
        h = self.to_out[0](torch.matmul(torch.softmax(scores, dim=-1), v))
        return x + h.transpose(1, 2).unflatten(2, (x.shape[2], x.shape[3]))


class MidBlock(nn.Module):
    """Resnet block, attention, resnet block."""

    def __init__(self, channels: int, groups: int, attention: bool, precision: Precision) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResnetBlock(channels, channels, groups, precision) for _ in range(2))
        self.attentions = nn.ModuleList([MidAttention(channels, groups, precision)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> the same."""
        x = self.resnets[0](x)
        for attention in self.attentions:
            x = attention(x)
        return self.resnets[1](x)


class Sampler(nn.Module):
    """A convolution with stride 2, or one after upsampling by 2; the checkpoint calls it `….0.conv`."""

    def __init__(self, channels: int, down: bool, precision: Precision) -> None:
        super().__init__()
        self.down = down
        self.conv = (
            Conv(channels, channels, precision, stride=2, padding=0) if down else Conv(channels, channels, precision)
        )

    def forward(self, x: Tensor) -> Tensor:
        """[batch, channels, height, width] -> half or twice as high and wide."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.down else double(x))


class Stage(nn.Module):
    """Resnet blocks of one resolution, then a `Sampler` except in the last stage."""

    def __init__(
        self, widths: tuple[int, int], count: int, groups: int, sampler: str | None, precision: Precision
    ) -> None:
        super().__init__()
        inputs, outputs = widths
        self.resnets = nn.ModuleList(
            ResnetBlock(inputs if i == 0 else outputs, outputs, groups, precision) for i in range(count)
        )
        self.sampler = sampler
        if sampler:
            down = sampler == "downsamplers"
            self.add_module(sampler, nn.ModuleList([Sampler(outputs, down, precision)]))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, inputs, height, width] -> [batch, outputs, height', width']."""
        for resnet in self.resnets:
            x = resnet(x)
        return self.get_submodule(self.sampler)[0](x) if self.sampler else x  # type: ignore[index]


class _Half(nn.Module):
    """Decoder or encoder of the full VAE: conv_in, stages, mid block, conv_out."""

    def __init__(self, config: Mapping[str, Any], decoder: bool, precision: Precision) -> None:
        super().__init__()
        self.is_decoder = decoder
        groups, count = config["norm_num_groups"], config["layers_per_block"]
        widths = list(config["block_out_channels"])
        latent = config["latent_channels"]
        widths = widths[::-1] if decoder else widths
        self.conv_in = Conv(latent if decoder else config["in_channels"], widths[0], precision)
        sampler = "upsamplers" if decoder else "downsamplers"
        stages = [
            Stage(
                (widths[max(i - 1, 0)], width),
                count + 1 if decoder else count,
                groups,
                sampler if i < len(widths) - 1 else None,
                precision,
            )
            for i, width in enumerate(widths)
        ]
        self.stages_name = "up_blocks" if decoder else "down_blocks"
        self.add_module(self.stages_name, nn.ModuleList(stages))
        attention = config.get("mid_block_add_attention", True)
        middle = widths[0] if decoder else widths[-1]
        self.mid_block = MidBlock(middle, groups, attention, precision)
        self.conv_norm_out = GroupNorm(widths[-1], groups)
        outputs = config["out_channels"] if decoder else 2 * latent
        self.conv_out = Conv(widths[-1], outputs, precision)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        if self.is_decoder:
            x = self.mid_block(x)
        for stage in self.get_submodule(self.stages_name).children():
            x = stage(x)
        if not self.is_decoder:
            x = self.mid_block(x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class FullVAEDecoder(nn.Module):
    """latents fp32 [batch, 16, latent_height, latent_width] -> image fp32 [batch, 3, height, width]."""

    def __init__(self, config: Mapping[str, Any], precision: Precision) -> None:
        super().__init__()
        self.space = LatentSpace.from_dict(config)
        channels = config["latent_channels"]
        self.post_quant_conv = (
            Conv(channels, channels, precision, kernel=1) if config.get("use_post_quant_conv", True) else None
        )
        self.decoder = _Half(config, True, precision)

    def forward(self, latents: Tensor) -> Tensor:
        """See the class."""
        x = self.space.to_own(latents)
        x = x if self.post_quant_conv is None else self.post_quant_conv(x)
        return self.decoder(x).float()


class FullVAEEncoder(nn.Module):
    """image fp32 [batch, 3, height, width] in [-1, 1] -> latents fp32, the mean of the posterior."""

    def __init__(self, config: Mapping[str, Any], precision: Precision) -> None:
        super().__init__()
        self.space = LatentSpace.from_dict(config)
        self.channels = config["latent_channels"]
        self.quant_conv = (
            Conv(2 * self.channels, 2 * self.channels, precision, kernel=1)
            if config.get("use_quant_conv", True)
            else None
        )
        self.encoder = _Half(config, False, precision)

    def forward(self, image: Tensor) -> Tensor:
        """See the class."""
        x = self.encoder(image)
        x = x if self.quant_conv is None else self.quant_conv(x)
        return self.space.from_own(x[:, : self.channels].float())
