"""The transformer with a ControlNet beside it, as one module that runs at every step of a request with a control image.

Follows `ZImageControlNetModel` and `ZImageControlNetPipeline` of diffusers 0.42.1 (the Fun-Union ControlNets 1, 2.0 and
2.1). A second stream c, which begins as the control image, runs through blocks of its own beside the transformer's
stream x; after the layers in `control_layers_places` a projection of it, the hint, is added to x:

    c = before_proj(embedded control image, context) + (refined image, context)
    after layer places[i]:  c = control_layers[i](c);  x = x + control_scale * after_proj[i](c)

Why one module and not a ControlNet that hands its hints to the transformer: the hints of all layers at once would be
a gigabyte at 1024² (15 layers, 4224 tokens, 3840 wide, fp32), carried between two graphs at every evaluation; side by
side each is made where it is added and forgotten. And what both begin with, the embedded and refined image, is made
once. The plain transformer stays a module of its own that knows nothing of this.
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

Rope = tuple[Tensor, Tensor]  # cosines and signed sines, as `rotate` takes them

# What `add_control_noise_refiner` of the config may be, and which ControlNet has it.
REFINERS = {
    None: "1: plain blocks refine the control image alone",
    "control_layers": "2.0: the control layers run a first time over the image alone",
    "control_noise_refiner": "2.1: control blocks of their own do",
}


@dataclasses.dataclass(frozen=True)
class ControlNetConfig:
    """What a ControlNet has beside the transformer's own numbers; the names are those of diffusers' config.json.

    Attributes:
        control_in_dim: channels of the control image's latents: 16, or 33 where 17 for inpainting follow (mask and
            kept image), zeros without.
        control_layers_places: after which of the transformer's layers each control layer's hint is added.
        control_refiner_layers_places: the same for its noise refiner, whose hints only the ControlNet's view of the
            image gets.
        control_refiner_layers: how many blocks refine the control image (`n_refiner_layers` of its config).
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
    """A block of the control stream; `after_proj` of what it gives is the hint, `before_proj` of the first one begins.

    Both take the stream as it is, not normed, so fp16 scales them as it does what feeds a post-norm.
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
    """(latents, timestep, context, control_latents, control_scale) -> noise_pred, as `Transformer` gives it.

    control_latents [batch, control_in_dim, h, w] are the control image's, like `latents`; control_scale [batch] is what
    the hints are multiplied by. The transformer's tensors keep their names, so they are read from its own weight file;
    those of the ControlNet begin with `control_`.
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
        # The ControlNet sees an image refined with hints of its own, which the transformer's does not get.
        hints, c = self._refine_control(c, x, scale, image_rope, adaln_input)
        seen = self._refine(x, hints, image_rope, adaln_input)
        x = self._refine(x, {}, image_rope, adaln_input) if hints else seen

        x, seen, c = (torch.cat((part, context), dim=1) for part in (x, seen, c))
        control_layers = dict(zip(self.control.control_layers_places, _control(self.control_layers), strict=True))
        c = control_layers[0].before_proj(c) + seen
        for i, block in enumerate(self.layers):
            # Of the last block only the image's own rows are ever read.
            queries = rows if i == last else None
            x = block(x, *rope, adaln_input, queries=queries)
            if i in control_layers:
                c = control_layers[i](c, *rope, adaln_input, queries=queries)
                x = x + scale * control_layers[i].after_proj(c)
        return self.predict(x, adaln_input, latents)

    def _refine(self, x: Tensor, hints: Mapping[int, Tensor], rope: Rope, adaln_input: Tensor) -> Tensor:
        """The transformer's noise refiner; `hints` are added after some of its blocks."""
        for i, block in enumerate(self.noise_refiner):
            x = block(x, *rope, adaln_input)
            if i in hints:
                x = x + hints[i]
        return x

    def _refine_control(
        self, c: Tensor, x: Tensor, scale: Tensor, rope: Rope, adaln_input: Tensor
    ) -> tuple[dict[int, Tensor], Tensor]:
        """The embedded control image c refined, x being the embedded image; and hints for the noise refiner."""
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
    """A list that is known to hold control blocks."""
    return cast(list[ControlBlock], list(blocks or ()))
