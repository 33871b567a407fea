"""Small random checkpoints for tests of `zimage-export`, and changes to them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import onnx_ir as ir
import torch
import transformers
from safetensors.torch import load_file, save_file
from zimage_rt.export.checkpoint import open_checkpoint
from zimage_rt.export.graph import cache as graph_cache
from zimage_rt.export.plan import plan_modules
from zimage_rt.export.precision import FP32
from zimage_rt.export.recipe import ExportRecipe

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_checkpoint(folder: Path) -> Path:
    """Writes a diffusers folder with every component as small as its class allows."""
    torch.manual_seed(0)
    transformer = diffusers.ZImageTransformer2DModel(
        dim=256, n_heads=2, n_kv_heads=2, n_layers=2, n_refiner_layers=1, cap_feat_dim=64
    )
    for name, parameter in transformer.named_parameters():
        if "pad_token" in name or name.endswith(("norm1.weight", "norm2.weight", "bias")):
            parameter.data.normal_(0.2, 0.3)
    transformer.save_pretrained(folder / "transformer")
    encoder = transformers.Qwen3Model(
        transformers.Qwen3Config(
            vocab_size=128,
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=32,
            rope_parameters={"rope_theta": 10000.0, "rope_type": "default"},
        )
    )
    encoder.save_pretrained(folder / "text_encoder")
    diffusers.AutoencoderKL(
        block_out_channels=(16, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=0.3611,
        shift_factor=0.1159,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).save_pretrained(folder / "vae")
    diffusers.AutoencoderTiny(
        latent_channels=16,
        encoder_block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).save_pretrained(folder / "tiny_vae")
    diffusers.FlowMatchEulerDiscreteScheduler(shift=2.5).save_pretrained(folder / "scheduler")
    tokenizer = folder / "tokenizer"
    tokenizer.mkdir()
    (tokenizer / "tokenizer.json").write_text('{"version": "1.0"}')
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    (folder / "model_index.json").write_text('{"_class_name": "ZImagePipeline"}')
    return folder


def recipe(checkpoint: Path, out: Path, **changes: Any) -> ExportRecipe:
    """A recipe at its defaults, except for `changes`."""
    return dataclasses.replace(ExportRecipe(checkpoint, out, "test"), **changes)


@contextlib.contextmanager
def graphs_of(bundle: Path, checkpoint: Path) -> Iterator[None]:
    """Lets exports in this process reuse the fp32 graphs of a bundle that was exported from `checkpoint`.

    Tracing them again takes most of a minute. Nothing is written to the user's cache, which must not get graphs of an
    older exporter.
    """
    plans = plan_modules(open_checkpoint(checkpoint), FP32, ("tiny", "full"))
    graphs = {plan.graph_key(): bundle / f"{plan.name}.onnx" for plan in plans}
    cached = graph_cache.cached

    def take(key: str, trace: Callable[[], ir.Model]) -> ir.Model:
        return ir.load(graphs[key]) if key in graphs else cached(key, trace)

    with mock.patch.object(graph_cache, "cached", take):
        yield


def copy_with(checkpoint: Path, folder: Path, **replaced: Path | None) -> Path:
    """A checkpoint of symbolic links, with some parts replaced or, for None, left out."""
    folder.mkdir()
    for path in checkpoint.iterdir():
        target = replaced.get(path.name, path)
        if target is not None:
            (folder / path.name).symlink_to(target)
    return folder


def changed_transformer(checkpoint: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    """A checkpoint whose transformer tensors were changed in place by `change`."""
    folder.mkdir()
    new = folder / "transformer"
    new.mkdir()
    old = checkpoint / "transformer"
    (new / "config.json").write_text((old / "config.json").read_text())
    tensors = load_file(old / "diffusion_pytorch_model.safetensors")
    change(tensors)
    save_file(tensors, new / "diffusion_pytorch_model.safetensors")
    return copy_with(checkpoint, folder / "checkpoint", transformer=new)
