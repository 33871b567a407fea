"""Outlier channels for random checkpoints: a few channels of every quantised product's input are 300 times larger.

They come from the weights before the product: norms before qkv, w1 and w3, rows of v before the output projection, rows
of w3 before w2; likewise in the text encoder. The residual streams have none, so outputs hide no error behind them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor
from zimage_rt.export.checkpoint import Checkpoint, CheckpointTensor, Component

SHARE = 0.001  # of the channels, at least one
FACTOR = 300.0

# Component → prefixes of its blocks' names, and endings of the weights whose outputs get outliers.
_PLACES: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "transformer": (
        ("layers.", "noise_refiner."),
        ("attention_norm1.weight", "attention.to_v.weight", "ffn_norm1.weight", "feed_forward.w3.weight"),
    ),
    "text_encoder": (
        ("layers.",),
        ("input_layernorm.weight", "v_proj.weight", "post_attention_layernorm.weight", "up_proj.weight"),
    ),
}


def channels(count: int) -> Tensor:
    """The outliers among `count` channels: evenly spaced, none at an edge."""
    outliers = max(1, round(count * SHARE))
    return (torch.arange(outliers) * 2 + 1) * count // (2 * outliers)


def _raised(tensor: CheckpointTensor) -> CheckpointTensor:
    def load() -> Tensor:
        values = tensor.load().clone()
        values[channels(values.shape[0])] *= FACTOR
        return values

    return CheckpointTensor.plain(tensor.shape, load)


def _with_outliers(component: Component) -> Component:
    prefixes, endings = _PLACES[component.name]
    tensors = {
        name: _raised(tensor) if name.startswith(prefixes) and name.endswith(endings) else tensor
        for name, tensor in component.tensors.items()
    }
    return dataclasses.replace(component, tensors=tensors)


def with_outliers(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with outlier channels before every product that 8-bit precisions quantise."""
    return dataclasses.replace(
        checkpoint,
        transformer=_with_outliers(checkpoint.transformer),
        text_encoder=_with_outliers(checkpoint.text_encoder),
    )
