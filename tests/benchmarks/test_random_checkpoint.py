"""Random checkpoints for measuring at full size: the right tensors, the same at every reading, loud but finite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

from shared import CHECKPOINT  # noqa: E402
from zimage_rt.benchmarks.random_checkpoint import (  # noqa: E402
    Z_IMAGE,
    loud,
    random_checkpoint,
    read_configs,
    tensor_shapes,
    write_checkpoint,
)
from zimage_rt.export.checkpoint import Checkpoint, open_checkpoint  # noqa: E402
from zimage_rt.export.parity.reference import load_reference, reference_function  # noqa: E402

COMPONENTS = ("transformer", "text_encoder", "vae", "tiny_vae")


@pytest.fixture(scope="module")
def nano_sized() -> Checkpoint:
    return random_checkpoint(CHECKPOINT / "tokenizer", read_configs(CHECKPOINT), rule=loud)


def test_tensors_are_those_of_a_real_checkpoint(nano_sized: Checkpoint):
    real = open_checkpoint(CHECKPOINT)
    for name in COMPONENTS:
        shapes = {key: tensor.shape for key, tensor in getattr(real, name).tensors.items()}
        assert {key: tensor.shape for key, tensor in getattr(nano_sized, name).tensors.items()} == shapes


def test_full_size_is_z_images():
    def count(name: str) -> int:
        return sum(math.prod(shape) for shape in tensor_shapes(name, Z_IMAGE[name]).values())

    assert count("transformer") == pytest.approx(6.155e9, rel=1e-3)
    assert count("text_encoder") == pytest.approx(4.022e9, rel=1e-3)
    assert count("vae") == pytest.approx(83.8e6, rel=1e-2)


def test_written_and_read_back(nano_sized: Checkpoint, tmp_path: Path):
    written = write_checkpoint(nano_sized, tmp_path / "checkpoint", shard_bytes=4_000_000)
    again = open_checkpoint(tmp_path / "checkpoint")
    assert len(again.transformer.files) > 2
    total = 0
    for name in COMPONENTS:
        component = getattr(again, name)
        for key, tensor in getattr(nano_sized, name).tensors.items():
            value = component.tensors[key].load()
            assert value.dtype == torch.bfloat16
            assert torch.equal(value, tensor.load()), key
            total += value.nbytes
    assert written == total


def test_loud_weights_overflow_fp16_and_nothing_else(nano_sized: Checkpoint):
    model = load_reference(nano_sized.transformer)
    peaks: dict[str, float] = {}

    def hook(name: str) -> Any:
        return lambda _, inputs: peaks.update({name: float(inputs[0].abs().max())})

    for name, module in model.named_modules():
        if name.endswith(("attention_norm2", "ffn_norm2")):
            module.register_forward_pre_hook(hook(name))
    torch.manual_seed(0)
    with torch.no_grad():
        out = reference_function("transformer", model)(
            torch.randn(1, 16, 32, 32), torch.tensor([0.5]), torch.randn(1, 32, 384)
        )
    assert torch.isfinite(out).all()
    assert min(peaks.values()) > 1e5, peaks
    for name, tensor in nano_sized.transformer.tensors.items():
        assert tensor.load().abs().max() < 65504, name
