"""Random weights with the shapes of a real checkpoint, to measure memory and speed at full size anywhere.

    python -m zimage_rt.benchmarks.random_checkpoint /tmp/z-image-random
    zimage-export --checkpoint /tmp/z-image-random --out /tmp/z-image-random-bf16 --precision bf16

In Python no files are needed: `export(recipe, checkpoint=random_checkpoint(tokenizer))`. A tensor is made when it is
read, with the same numbers each time on the same kind of device. Names and shapes come from the export modules; only
the config.json files are repeated here.
"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from zimage_rt.export.checkpoint import Checkpoint, CheckpointTensor, Component, read_json
from zimage_rt.export.modeling.layers import weight_sources
from zimage_rt.export.modeling.text_encoder import TextEncoder, TextEncoderConfig
from zimage_rt.export.modeling.transformer import ContextRefiner, Transformer, TransformerConfig
from zimage_rt.export.modeling.vae import FullVAEDecoder, FullVAEEncoder, TinyVAEDecoder, TinyVAEEncoder
from zimage_rt.export.precision import BF16

Config = Mapping[str, Any]
# (component, tensor name, shape) -> (mean, standard deviation)
Rule = Callable[[str, str, tuple[int, ...]], tuple[float, float]]

# Tongyi-MAI/Z-Image-Turbo: its transformer, Qwen3-4B, the autoencoder of Flux, and TAEF1.
Z_IMAGE: Mapping[str, Config] = {
    "transformer": {
        "_class_name": "ZImageTransformer2DModel",
        "all_f_patch_size": [1],
        "all_patch_size": [2],
        "axes_dims": [32, 48, 48],
        "axes_lens": [1536, 512, 512],
        "cap_feat_dim": 2560,
        "dim": 3840,
        "in_channels": 16,
        "n_heads": 30,
        "n_kv_heads": 30,
        "n_layers": 30,
        "n_refiner_layers": 2,
        "norm_eps": 1e-5,
        "qk_norm": True,
        "rope_theta": 256.0,
        "siglip_feat_dim": None,
        "t_scale": 1000.0,
    },
    "text_encoder": {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 2560,
        "intermediate_size": 9728,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "hidden_act": "silu",
        "attention_bias": False,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_parameters": {"rope_theta": 1e6, "rope_type": "default"},
        "tie_word_embeddings": True,
    },
    "vae": {
        "_class_name": "AutoencoderKL",
        "act_fn": "silu",
        "block_out_channels": [128, 256, 512, 512],
        "down_block_types": ["DownEncoderBlock2D"] * 4,
        "up_block_types": ["UpDecoderBlock2D"] * 4,
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 16,
        "layers_per_block": 2,
        "mid_block_add_attention": True,
        "norm_num_groups": 32,
        "sample_size": 1024,
        "scaling_factor": 0.3611,
        "shift_factor": 0.1159,
        "use_post_quant_conv": False,
        "use_quant_conv": False,
    },
    "tiny_vae": {
        "_class_name": "AutoencoderTiny",
        "act_fn": "relu",
        "block_out_channels": [64] * 4,
        "encoder_block_out_channels": [64] * 4,
        "decoder_block_out_channels": [64] * 4,
        "num_encoder_blocks": [1, 3, 3, 3],
        "num_decoder_blocks": [3, 3, 3, 1],
        "in_channels": 3,
        "out_channels": 3,
        "latent_channels": 16,
        "latent_magnitude": 3,
        "latent_shift": 0.5,
        "scaling_factor": 1.0,
        "shift_factor": 0.0,
        "upsampling_scaling_factor": 2,
    },
    "scheduler": {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0},
}

_CHUNK = 1 << 24  # numbers per chunk


def plain(component: str, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Distribution that keeps every activation near 1: norms near one, matrices scaled by their inputs."""
    if name.endswith("bias"):
        return 0.0, 0.02
    if name.endswith("pad_token") or name.startswith("embed_tokens"):
        return 0.0, 0.02 if component == "text_encoder" else 0.5
    if len(shape) == 1:
        return 1.0, 0.1
    return 0.0, math.prod(shape[1:]) ** -0.5


# Factors in the modulated blocks, as on the real weights. Doubled queries and keys give scores a standard deviation of
# 4, so few keys get most of the weight. The others raise the post-norms' inputs to 1e5 with peaks of 5e5 and more,
# while the weights stay below 1e3, within fp16's range.
_LOUD: Mapping[str, float] = {
    "attention.norm_q.weight": 2.0,
    "attention.norm_k.weight": 2.0,
    "attention.to_v.weight": 64.0,
    "attention.to_out.0.weight": 4096.0,
    "feed_forward.w1.weight": 4.0,
    "feed_forward.w3.weight": 4.0,
    "feed_forward.w2.weight": 16384.0,
}


def loud(component: str, name: str, shape: tuple[int, ...]) -> tuple[float, float]:
    """Like `plain`, with peaked attention and post-norm inputs beyond fp16's range, as on the real weights."""
    mean, deviation = plain(component, name, shape)
    if component == "transformer" and name.startswith(("layers.", "noise_refiner.")):
        for ending, factor in _LOUD.items():
            if name.endswith(ending):
                return mean * factor, deviation * factor
    return mean, deviation


RULES: Mapping[str, Rule] = {"plain": plain, "loud": loud}


def _modules(name: str, config: Config) -> Iterator[nn.Module]:
    """Export modules that together read every tensor of a component."""
    if name == "transformer":
        sizes = TransformerConfig.from_dict(config)
        yield ContextRefiner(sizes, BF16)
        yield Transformer(sizes, BF16)
    elif name == "text_encoder":
        # The export module lacks the last layer, which the checkpoint has.
        yield TextEncoder(
            TextEncoderConfig.from_dict({**config, "num_hidden_layers": config["num_hidden_layers"] + 1}), BF16
        )
    elif name == "vae":
        yield FullVAEDecoder(config, BF16)
        yield FullVAEEncoder(config, BF16)
    else:
        yield TinyVAEDecoder(config, BF16)
        yield TinyVAEEncoder(config, BF16)


def tensor_shapes(name: str, config: Config) -> dict[str, tuple[int, ...]]:
    """Shapes of a component's tensors by diffusers' or transformers' name."""
    shapes: dict[str, tuple[int, ...]] = {}
    with torch.device("meta"):
        for module in _modules(name, config):
            for _, _, source in weight_sources(module):
                shapes.update(zip(source.names, source.shapes, strict=True))
    if name == "text_encoder":
        shapes["norm.weight"] = (config["hidden_size"],)
    return shapes


def draw(shape: tuple[int, ...], mean: float, deviation: float, seed: int, device: str) -> Tensor:
    """Normal numbers in bf16, made on `device` in chunks of fp32, returned on the CPU."""
    generator = torch.Generator(device).manual_seed(seed)
    tensor = torch.empty(math.prod(shape), dtype=torch.bfloat16, device=device)
    for chunk in tensor.split(_CHUNK):
        chunk.copy_(torch.empty(len(chunk), device=device).normal_(mean, deviation, generator=generator))
    return tensor.reshape(shape).cpu()


def random_tensors(
    name: str, config: Config, *, seed: int = 0, rule: Rule = plain, device: str = "cpu"
) -> dict[str, CheckpointTensor]:
    """Tensors of a component in bf16, each made when it is loaded.

    Args:
        name: `transformer`, `text_encoder`, `vae` or `tiny_vae`.
        config: its config.json.
        seed: seed of the numbers, which also depend on the kind of `device`.
        rule: gives mean and standard deviation of each tensor.
        device: device that makes the numbers; the tensors are returned on the CPU.
    """

    def lazy(tensor: str, shape: tuple[int, ...]) -> CheckpointTensor:
        digest = hashlib.sha256(f"{seed}/{name}/{tensor}".encode()).digest()
        own_seed = int.from_bytes(digest[:7], "little")
        mean, deviation = rule(name, tensor, shape)
        return CheckpointTensor.plain(shape, lambda: draw(shape, mean, deviation, own_seed, device))

    return {tensor: lazy(tensor, shape) for tensor, shape in tensor_shapes(name, config).items()}


def random_checkpoint(
    tokenizer: Path,
    configs: Mapping[str, Config] = Z_IMAGE,
    *,
    seed: int = 0,
    rule: Rule = plain,
    device: str = "cpu",
) -> Checkpoint:
    """A whole checkpoint with nothing on the disk but the tokenizer's folder; arguments as of `random_tensors`."""

    def component(name: str) -> Component:
        tensors = random_tensors(name, configs[name], seed=seed, rule=rule, device=device)
        return Component(name, configs[name], tensors, ())

    return Checkpoint(
        "random",
        Path("random"),
        component("transformer"),
        component("text_encoder"),
        component("vae") if "vae" in configs else None,
        component("tiny_vae") if "tiny_vae" in configs else None,
        configs["scheduler"],
        tokenizer,
    )


def _shards(tensors: Mapping[str, CheckpointTensor], limit: int) -> list[list[str]]:
    """Names of the tensors per file of at most `limit` bytes."""
    shards: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        more = 2 * math.prod(tensor.shape)
        if shards[-1] and size + more > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += more
    return shards


def _write_shard(path: Path, tensors: Mapping[str, CheckpointTensor], names: list[str], prefix: str) -> int:
    """Writes a safetensors file tensor by tensor; returns the bytes of the tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name in names:
        end = position + 2 * math.prod(tensors[name].shape)
        header[prefix + name] = {
            "dtype": "BF16",
            "shape": list(tensors[name].shape),
            "data_offsets": [position, end],
        }
        position = end
    text = json.dumps(header).encode()
    text = text.ljust(-(-len(text) // 8) * 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            file.write(tensors[name].load().reshape(-1).view(torch.uint8).numpy().data)
    return position


def write_component(component: Component, folder: Path, shard_bytes: int) -> int:
    """Writes config.json and shards with their index, as diffusers and transformers do; returns the bytes."""
    text = component.name == "text_encoder"
    stem = "model" if text else "diffusion_pytorch_model"
    prefix = "model." if text else ""  # the original's files are those of the causal language model
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(dict(component.config), indent=2) + "\n")
    shards = _shards(component.tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    total = 0
    for i, names in enumerate(shards):
        file = f"{stem}.safetensors" if len(shards) == 1 else f"{stem}-{i + 1:05}-of-{len(shards):05}.safetensors"
        total += _write_shard(folder / file, component.tensors, names, prefix)
        weight_map.update({prefix + name: file for name in names})
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / f"{stem}.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
    return total


def write_checkpoint(checkpoint: Checkpoint, folder: Path, shard_bytes: int = 5_000_000_000) -> int:
    """Writes a checkpoint as a new diffusers folder; returns the bytes of its tensors."""
    folder.mkdir(parents=True)
    shutil.copytree(checkpoint.tokenizer, folder / "tokenizer")
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(dict(checkpoint.scheduler)) + "\n")
    components = (checkpoint.transformer, checkpoint.text_encoder, checkpoint.vae, checkpoint.tiny_vae)
    total = sum(write_component(one, folder / one.name, shard_bytes) for one in components if one is not None)
    index = {
        "_class_name": "ZImagePipeline",
        "scheduler": ["diffusers", checkpoint.scheduler["_class_name"]],
        "text_encoder": ["transformers", "Qwen3Model"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "ZImageTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2) + "\n")
    return total


def read_configs(folder: Path) -> dict[str, Config]:
    """Reads the configs of a diffusers folder. Raises CheckpointError."""
    files = {name: "scheduler_config.json" if name == "scheduler" else "config.json" for name in Z_IMAGE}
    return {name: read_json(folder / name / file) for name, file in files.items() if (folder / name).is_dir()}


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write; it must not exist.")],
    like: Annotated[
        Path | None, typer.Option(help="Checkpoint to take the sizes from. By default Z-Image-Turbo's.")
    ] = None,
    tokenizer: Annotated[Path, typer.Option(help="Folder of the tokenizer to copy.")] = Path(
        "checkpoints/zimage-nano/tokenizer"
    ),
    rule: Annotated[
        str, typer.Option(help=f"Scale of the weights: {' or '.join(RULES)} (as large as the real ones).")
    ] = "plain",
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    device: Annotated[str, typer.Option(help="Device that makes the tensors.")] = "cpu",
) -> None:
    """Write a checkpoint of random weights in the diffusers layout, in bf16."""
    if rule not in RULES:
        raise typer.BadParameter(f"expected {' or '.join(RULES)}, got {rule!r}", param_hint="--rule")
    if out.exists():
        raise typer.BadParameter(f"{out} exists; it is left alone", param_hint="OUT")
    configs = Z_IMAGE if like is None else read_configs(like)
    checkpoint = random_checkpoint(tokenizer, configs, seed=seed, rule=RULES[rule], device=device)
    typer.echo(f"{out}: {write_checkpoint(checkpoint, out) / 1e9:.2f} GB of tensors")


if __name__ == "__main__":
    typer.run(main)
