"""Small upscale models with weights that need no file."""

from __future__ import annotations

import re

import numpy as np
import torch

Shapes = dict[str, tuple[int, ...]]
State = dict[str, torch.Tensor]


def rrdb(doublings: int, *, features: int = 16, growth: int = 32, inputs: int = 3, plus: bool = False) -> Shapes:
    """The weights of an RRDBNet of two blocks, by ESRGAN's names."""
    found: Shapes = {}

    def conv(name: str, channels: int, outputs: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, channels, 3, 3), (outputs,)

    conv("model.0", inputs, features)
    for block in range(2):
        for dense in (1, 2, 3):
            name = f"model.1.sub.{block}.RDB{dense}"
            for number in range(1, 6):
                channels = features + (number - 1) * growth
                conv(f"{name}.conv{number}.0", channels, growth if number < 5 else features)
            if plus:
                found[f"{name}.conv1x1.weight"] = (growth, features, 1, 1)
    conv("model.1.sub.2", features, features)
    for doubling in range(1, doublings + 1):
        conv(f"model.{3 * doubling}", features, features)
    conv(f"model.{3 * doublings + 2}", features, features)
    conv(f"model.{3 * doublings + 4}", features, 3)
    return found


def compact(scale: int, features: int = 8) -> Shapes:
    """The weights of an SRVGGNetCompact of three convolutions."""
    found: Shapes = {}
    for layer, (channels, outputs) in enumerate([(3, features), (features, features), (features, 3 * scale**2)]):
        found[f"body.{2 * layer}.weight"], found[f"body.{2 * layer}.bias"] = (outputs, channels, 3, 3), (outputs,)
        if layer < 2:
            found[f"body.{2 * layer + 1}.weight"] = (features,)
    return found


def noise(count: int, seed: int) -> np.ndarray:
    """Numbers from -1 to 1 by a formula, float64: no library's generator is needed to have them again."""
    return np.modf(np.sin(np.arange(1, count + 1) * 12.9898 + seed) * 43758.5453)[0]


def state_of(shapes: Shapes) -> State:
    """Weights of these shapes; the last bias puts most of a result between black and white."""
    found = {}
    for seed, (name, shape) in enumerate(shapes.items()):
        size = 1.1 / np.sqrt(np.prod(shape[1:])) if len(shape) > 1 else 0.1
        values = noise(int(np.prod(shape)), seed) * size
        found[name] = torch.from_numpy(values.astype(np.float32).reshape(shape))
    found[name] += 0.4
    return found


def image_of(height: int, width: int) -> np.ndarray:
    """An image, float32 `[1, 3, height, width]`."""
    return np.abs(noise(3 * height * width, 1000)).astype(np.float32).reshape(1, 3, height, width)


def renamed(state: State, layout: str) -> State:
    """Weights of `rrdb` by the names of `basicsr` or `bsrgan`."""
    blocks, dense, after, up, high = {
        "basicsr": ("body", "rdb", "conv_body", "conv_up", "conv_hr"),
        "bsrgan": ("RRDB_trunk", "RDB", "trunk_conv", "upconv", "HRconv"),
    }[layout]
    last = max(int(name.split(".")[1]) for name in state)
    names = {"model.0": "conv_first", "model.1.sub.2": after, f"model.{last - 2}": high, f"model.{last}": "conv_last"}
    names |= {f"model.{number}": f"{up}{number // 3}" for number in range(3, last - 2, 3)}
    found = {}
    for name, tensor in state.items():
        module, _, kind = name.rpartition(".")
        new = re.sub(
            r"model\.1\.sub\.(\d)\.RDB(\d)\.conv(\d)\.0", rf"{blocks}.\1.{dense}\2.conv\3", names.get(module, module)
        )
        found[f"{new}.{kind}"] = tensor
    return found


# Spandrel's results for them are in tests/data/comfyui/upscale.npz.
CASES: dict[str, Shapes] = {
    "rrdb_x1": rrdb(0),
    "rrdb_x2": rrdb(1),
    "rrdb_x4": rrdb(2),
    "rrdb_x8": rrdb(3),
    "rrdb_unshuffle_x2": rrdb(2, inputs=12),
    "rrdb_unshuffle_x1": rrdb(2, inputs=48),
    "rrdb_plus_x4": rrdb(2, plus=True),
    "compact_x1": compact(1),
    "compact_x3": compact(3),
    "compact_x4": compact(4),
}


def with_seams(tile: np.ndarray) -> np.ndarray:
    """A tile at twice its size, darker to the right and brighter downwards, so that tiles differ where they meet."""
    found = tile.repeat(2, axis=2).repeat(2, axis=3)
    rows, columns = (np.linspace(0, 0.5, size, dtype=np.float32) for size in found.shape[2:])
    return found * np.float32(0.5) + rows[:, None] - columns * np.float32(0.7)
