"""The transformer and a ControlNet as one module, which runs per evaluation of a request with a control image.

Follows `ZImageControlNetModel` and `ZImageControlNetPipeline` of diffusers 0.42.1 (the Fun-Union ControlNets 1, 2.0 and
2.1). A second stream c starts from the control image and runs through blocks of its own, parallel to the
transformer's stream x. After the layers in `control_layers_places` a projection of c, the hint, is added to x:

    c = before_proj(embedded control image, context) + (refined image, context)
    after layer places[i]:  c = control_layers[i](c);  x = x + control_scale * after_proj[i](c)

One module is cheaper than a ControlNet that passes its hints to the transformer. The hints of all layers would be a
gigabyte at 1024² (15 layers, 4224 tokens, 3840 wide, fp32), copied between two graphs per evaluation. Here each hint is
added as soon as it is computed, and the embedded and refined image, which both streams need, is computed once. The
transformer without a ControlNet stays a separate module.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..precision import Precision
from .layers import Linear
from .transformer import Block, Transformer, TransformerConfig, pad_rows

Rope = tuple[Tensor, Tensor]  # cosines and signed sines for `rotate`

# Values of `add_control_noise_refiner` in the config, and the version of the ControlNet that has each.
REFINERS = {
    None: "1: plain blocks refine the control image",
    "control_layers": "2.0: the control layers also run over the image before the context joins",
    "control_noise_refiner": "2.1: separate control blocks refine the image",
}


@dataclasses.dataclass(frozen=True)
class ControlNetConfig:
    """Numbers of a ControlNet that the transformer's config lacks, under the names of diffusers' config.json.

    Attributes:
        control_in_dim: channels of the control input: 16 of the control image's latents, or 33 with 17 for inpainting
            (mask and kept image), which are zeros here.
        control_layers_places: index of the transformer's layer after which each control layer's hint is added.
        control_refiner_layers_places: the same in the noise refiner; only the ControlNet's copy of the image stream
            gets these hints.
        control_refiner_layers: number of blocks that refine the control image (`n_refiner_layers` of its config).
        add_control_noise_refiner: one of `REFINERS`.
    """

    control_in_dim: int
    control_layers_places: tuple[int, ...]
    control_refiner_layers_places: tuple[int, ...]
    control_refiner_layers: int
    add_control_noise_refiner: str | None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> ControlNetConfig:
        """From the dictionary in config.json."""
        return cls(
            control_in_dim=int(config["control_in_dim"]),
            control_layers_places=tuple(config["control_layers_places"]),
            control_refiner_layers_places=tuple(config.get("control_refiner_layers_places") or ()),
            control_refiner_layers=config.get("n_refiner_layers", 2),
            add_control_noise_refiner=config.get("add_control_noise_refiner"),
        )


class ControlBlock(Block):
    """A block of the control stream: `after_proj` of its output is the hint; the first block also has `before_proj`.

    Both projections take the stream without a norm, so fp16 scales their input like that of a post-norm.
    """

    def __init__(self, config: TransformerConfig, precision: Precision, first: bool) -> None:
        super().__init__(config, precision, modulation=True)
        dim, scale = config.dim, precision.attention_scale
        if first:
            self.before_proj = Linear(dim, dim, precision, bias=True, scale=scale)
        self.after_proj = Linear(dim, dim, precision, bias=True, scale=scale)


def _control_blocks(config: TransformerConfig, precision: Precision, count: int) -> nn.ModuleList:
    return nn.ModuleList(ControlBlock(config, precision, first=i == 0) for i in range(count))


class ControlledTransformer(Transformer):
    """(latents, timestep, context, control_latents, control_scale) -> noise_pred, as from `Transformer`.

    control_latents [batch, control_in_dim, h, w] encode the control image; control_scale [batch] multiplies the hints.
    The transformer's tensors keep their names, so they are read from its weight file. Names of the ControlNet's tensors
    begin with `control_`.
    """

    def __init__(self, config: TransformerConfig, control: ControlNetConfig, precision: Precision) -> None:
        super().__init__(config, precision)
        self.control = control
        patch = config.patch_size**2 * control.control_in_dim
        self.control_all_x_embedder = nn.ModuleDict(
            {config.patch_name: Linear(patch, config.dim, precision, bias=True)}
        )
        self.control_layers = _control_blocks(config, precision, len(control.control_layers_places))
        self.control_noise_refiner: nn.ModuleList | None = None
        if control.add_control_noise_refiner is None:
            self.control_noise_refiner = nn.ModuleList(
                Block(config, precision, modulation=True) for _ in range(control.control_refiner_layers)
            )
        elif control.add_control_noise_refiner == "control_noise_refiner":
            self.control_noise_refiner = _control_blocks(config, precision, control.control_refiner_layers)

    def forward(  # type: ignore[override]
        self, latents: Tensor, timestep: Tensor, context: Tensor, control_latents: Tensor, control_scale: Tensor
    ) -> Tensor:
        """See the class."""
        adaln_input = self.t_embedder(timestep * self.config.t_scale)
        image_rope, rope = self.ropes(latents, context)
        scale = control_scale.unsqueeze(-1).unsqueeze(-1)  # [batch, 1, 1]
        rows, last = self.image_rows(latents), len(self.layers) - 1

        x = self.embed(latents)
        c = self.control_all_x_embedder[self.config.patch_name](self.patches(control_latents))
        c = pad_rows(c, self.x_pad_token)
        # The ControlNet's copy of the image stream is refined with hints that the transformer's does not get.
        hints, c = self._refine_control(c, x, scale, image_rope, adaln_input)
        seen = self._refine(x, hints, image_rope, adaln_input)
        x = self._refine(x, {}, image_rope, adaln_input) if hints else seen

        x, seen, c = (torch.cat((part, context), dim=1) for part in (x, seen, c))
        control_layers = dict(zip(self.control.control_layers_places, _control(self.control_layers), strict=True))
        c = control_layers[0].before_proj(c) + seen
        for i, block in enumerate(self.layers):
            # Only the image rows of the last block are read.
            queries = rows if i == last else None
            x = block(x, *rope, adaln_input, queries=queries)
            if i in control_layers:
                c = control_layers[i](c, *rope, adaln_input, queries=queries)
                x = x + scale * control_layers[i].after_proj(c)
        return self.predict(x, adaln_input, latents)

    def _refine(self, x: Tensor, hints: Mapping[int, Tensor], rope: Rope, adaln_input: Tensor) -> Tensor:
        """Runs the transformer's noise refiner and adds `hints` after some of its blocks."""
        for i, block in enumerate(self.noise_refiner):
            x = block(x, *rope, adaln_input)
            if i in hints:
                x = x + hints[i]
        return x

    def _refine_control(
        self, c: Tensor, x: Tensor, scale: Tensor, rope: Rope, adaln_input: Tensor
    ) -> tuple[dict[int, Tensor], Tensor]:
        """Refines the embedded control image c, given the embedded image x; returns the noise refiner's hints and c."""
        hints: dict[int, Tensor] = {}
        if self.control.add_control_noise_refiner is None:
            for block in self.control_noise_refiner or ():
                c = block(c, *rope, adaln_input)
            return hints, c
        own = self.control.add_control_noise_refiner == "control_noise_refiner"
        blocks = _control(self.control_noise_refiner if own else self.control_layers)
        c = blocks[0].before_proj(c) + x
        places = self.control.control_refiner_layers_places
        for i, control_block in enumerate(blocks):
            c = control_block(c, *rope, adaln_input)
            if i < len(places):
                hints[places[i]] = scale * control_block.after_proj(c)
        return hints, c


def _control(blocks: nn.ModuleList | None) -> list[ControlBlock]:
    """Blocks as a typed list of control blocks."""
    return cast(list[ControlBlock], list(blocks or ()))
