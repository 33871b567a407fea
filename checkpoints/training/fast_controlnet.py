"""Training twin of ``diffusers.ZImageControlNetModel`` in the version of Fun-Union 2.0.

It is the smallest of the three versions: the control layers also run over the image alone, and there are no separate
refiner blocks. ``check_parity.py`` compares the twin with the original.
"""

from __future__ import annotations

from typing import Any

import architecture
import torch
from diffusers import ZImageControlNetModel
from fast_models import PATCH, ROW_MULTIPLE, TOKEN, Block, FastTransformer, run_block
from torch import Tensor, nn

CHANNELS = 33  # 16 of the control image, 17 for inpainting, which are zeros here
PLACES = (0,)  # the transformer's layers after which a hint is added


def config(places: tuple[int, ...] = PLACES) -> dict[str, Any]:
    """Return diffusers' config of the ControlNet."""
    names = ("dim", "n_refiner_layers", "n_heads", "n_kv_heads", "norm_eps", "qk_norm")
    return {
        **{n: architecture.TRANSFORMER[n] for n in names},
        "control_in_dim": CHANNELS,
        "control_layers_places": list(places),
        "control_refiner_layers_places": [0],
        "add_control_noise_refiner": "control_layers",
    }


class ControlBlock(Block):
    """A block of the control stream, and the projections around it."""

    def __init__(self, dim: int, first: bool) -> None:
        super().__init__(dim, modulated=True)
        if first:
            self.before_proj = nn.Linear(dim, dim)
        self.after_proj = nn.Linear(dim, dim)


class FastControlNet(nn.Module):
    """The ControlNet for images of one canvas and captions of one padded length."""

    def __init__(self, places: tuple[int, ...] = PLACES) -> None:
        super().__init__()
        dim = architecture.TRANSFORMER["dim"]
        self.places = places
        self.control_all_x_embedder = nn.ModuleDict({"2-1": nn.Linear(PATCH * PATCH * CHANNELS, dim)})
        self.control_layers = nn.ModuleList([ControlBlock(dim, first=p == 0) for p in places])

    def begin_from(self, base: FastTransformer) -> None:
        """Initialise as the Fun-Union nets: layers copied from the transformer, projections of zero."""
        for place, block in zip(self.places, self.control_layers, strict=True):
            block.load_state_dict(base.layers[place].state_dict(), strict=False)
            for name, parameter in block.named_parameters():
                if name.startswith(("before_proj", "after_proj")):
                    nn.init.zeros_(parameter)
        own, theirs = self.control_all_x_embedder["2-1"], base.all_x_embedder["2-1"]
        seen = theirs.weight.shape[1] // PATCH**2
        nn.init.zeros_(own.weight)
        with torch.no_grad():
            own.weight.unflatten(1, (-1, CHANNELS))[..., :seen] = theirs.weight.unflatten(1, (-1, seen))
            own.bias.copy_(theirs.bias)

    def forward(
        self,
        base: FastTransformer,
        patches: Tensor,
        control: Tensor,
        t: Tensor,
        features: Tensor,
        lengths: Tensor,
        canvas: tuple[int, int],
        scale: float = 1.0,
    ) -> Tensor:
        """Return the output of ``base`` with the control image ``control`` (patches of CHANNELS)."""
        batch, caption = len(patches), features.shape[1]
        columns, rows = canvas[0] // TOKEN, canvas[1] // TOKEN
        pads = -rows * columns % ROW_MULTIPLE
        (cos, sin), image, text = base._rope(rows, columns, caption, patches.device)
        t = base.t_embedder(t * base.t_scale)
        x, c = base.all_x_embedder["2-1"](patches), self.control_all_x_embedder["2-1"](control)
        if pads:
            pad = base.x_pad_token.to(x.dtype).expand(batch, pads, -1)
            x, c = torch.cat([x, pad], dim=1), torch.cat([c, pad], dim=1)
        # The ControlNet's copy of the image stream is refined with a hint that the transformer's does not get.
        first = self.control_layers[0]
        c = first.before_proj(c) + x
        hints = []
        for block in self.control_layers:
            c = run_block(block, c, *image, t)
            hints.append(scale * block.after_proj(c))
        view = x
        for i, block in enumerate(base.noise_refiner):
            x, view = run_block(block, x, *image, t), run_block(block, view, *image, t)
            view = view + hints[0] if i == 0 else view
        context = base.cap_embedder(features)
        real = torch.arange(caption, device=x.device) < lengths[:, None]
        context = torch.where(real.unsqueeze(-1), context, base.cap_pad_token.to(context.dtype))
        for block in base.context_refiner:
            context = run_block(block, context, *text)
        x, view, c = (torch.cat([part, context], dim=1) for part in (x, view, c))
        c = first.before_proj(c) + view
        for i, block in enumerate(base.layers):
            x = run_block(block, x, cos, sin, t)
            if i in self.places:
                own = self.control_layers[self.places.index(i)]
                c = run_block(own, c, cos, sin, t)
                x = x + scale * own.after_proj(c)
        return base.all_final_layer["2-1"](x[:, : patches.shape[1]], t)

    def original(self) -> ZImageControlNetModel:
        """Return diffusers' model with these weights."""
        net = ZImageControlNetModel(**config(self.places))
        net.load_state_dict(self.state_dict())
        return net
