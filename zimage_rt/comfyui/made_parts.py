"""Parts of a bundle that ComfyUI's folders hold in a form that the exporter does not read: tokenizer and tiny VAE."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_write import atomic_write
from ..errors import ZImageError
from .files import list_files
from .upscale.weights import open_weights

# Z-Image's template, in place of a tokenizer's own: that of Qwen2.5 has a system prompt.
TEMPLATE = "<|im_start|>user\n{{ messages[0].content }}<|im_end|>\n<|im_start|>assistant{{ '\\n' }}"
# How Qwen parts a text before it pairs bytes (tokenizer.json of Qwen3-4B).
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
# The file of the weights in a folder of diffusers.
WEIGHTS = "diffusion_pytorch_model.safetensors"
# Endings of TAEF1's files: those of safetensors, and of `torch.save`, as its author gives them for ComfyUI.
TINY_ENDINGS = (".safetensors", ".sft", ".pth", ".pt")
# config.json of madebyollin/taef1: no tensor shows these numbers.
_TINY_CONFIG = {
    "_class_name": "AutoencoderTiny", "act_fn": "relu", "in_channels": 3, "out_channels": 3, "latent_channels": 16,
    "block_out_channels": [64] * 4, "encoder_block_out_channels": [64] * 4, "decoder_block_out_channels": [64] * 4,
    "num_encoder_blocks": [1, 3, 3, 3], "num_decoder_blocks": [3, 3, 3, 1], "latent_magnitude": 3, "latent_shift": 0.5,
    "scaling_factor": 1.0, "shift_factor": 0.0, "force_upcast": False, "upsample_fn": "nearest",
    "upsampling_scaling_factor": 2,
}  # fmt: skip


class MissingPart(ZImageError):
    """A file that a bundle needs is not in the models folder, or cannot be read."""

    code = "missing_part"


def find_tokenizer(models: Path) -> Path:
    """The folder of the tokenizer: `tokenizer` in the models folder, or that of the ComfyUI around it.

    Raises MissingPart.
    """
    around = dict.fromkeys((models.absolute().parent, models.resolve().parent))
    places = [models / "tokenizer", *(folder / "comfy" / "text_encoders" / "qwen25_tokenizer" for folder in around)]
    for folder in places:
        if tokenizer_sources(folder):
            return folder
    raise MissingPart(
        f"{models} has no tokenizer, and no ComfyUI that has one is around it; put the folder `tokenizer` of "
        f"Tongyi-MAI/Z-Image-Turbo into {models}"
    )


def tokenizer_sources(folder: Path) -> list[Path]:
    """The files that a folder's tokenizer is made of; none if it has no tokenizer."""
    whole = folder / "tokenizer.json"
    parts = [folder / name for name in ("vocab.json", "merges.txt", "tokenizer_config.json")]
    if whole.is_file():
        return [whole]
    return parts if all(path.is_file() for path in parts) else []


def make_tokenizer(source: Path, folder: Path) -> None:
    """Write a tokenizer with Z-Image's template as the exporter reads it. Raises MissingPart."""
    files = tokenizer_sources(source)
    try:
        content = files[0].read_bytes() if len(files) == 1 else _joined(*files)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise MissingPart(f"{source}: the tokenizer cannot be read: {error}; fetch it again") from error
    _write(folder / "tokenizer.json", content)
    _write(folder / "chat_template.jinja", TEMPLATE.encode())


def _joined(vocabulary: Path, merges: Path, config: Path) -> bytes:
    """`tokenizer.json` of a byte-level BPE in three files."""
    added = json.loads(config.read_text(encoding="utf-8"))["added_tokens_decoder"]
    lines = merges.read_text(encoding="utf-8").removesuffix("\n").split("\n")
    pairs = [line.split(" ") for line in lines if line and not line.startswith("#version")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"{merges.name}: expected two tokens in each line")
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": int(number), "content": token["content"], **{name: bool(token[name]) for name in _TOKEN_FLAGS}}
            for number, token in sorted(added.items(), key=lambda item: int(item[0]))
        ],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _SPLIT}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": json.loads(vocabulary.read_text(encoding="utf-8")),
            "merges": pairs,
        },
    }
    return json.dumps(tokenizer, ensure_ascii=False).encode()


def tiny_vae_sources(models: Path) -> list[Path]:
    """The files of TAEF1: ComfyUI's pair in `vae_approx`, or one in `vae`; none if there is none."""
    names = list_files([models / "vae_approx"], TINY_ENDINGS)
    pair = [
        next((name for name in names if name.startswith(f"taef1_{part}.")), None) for part in ("encoder", "decoder")
    ]
    if all(pair):
        return [models / "vae_approx" / str(name) for name in pair]
    single = [name for name in list_files([models / "vae"], TINY_ENDINGS) if name.lower().startswith("taef1")]
    return [models / "vae" / single[0]] if single else []


def make_tiny_vae(sources: list[Path], folder: Path) -> None:
    """Write TAEF1 as diffusers' folder, from the files of `tiny_vae_sources`. Raises MissingPart."""
    tensors: dict[str, np.ndarray] = {}
    for source in sources:
        prefix = source.name.partition(".")[0].replace("taef1_", "taesd_") + "." if len(sources) == 2 else ""
        try:
            weights = open_weights(source)
            tensors |= {_diffusers_name(prefix + name): weights.load(name) for name in weights.shapes}
        except (OSError, ValueError) as error:
            raise MissingPart(f"{source} cannot be read as TAEF1: {error}; fetch it again") from error
    header: dict[str, Any] = {}
    place = 0
    for name, numbers in tensors.items():
        places = [place, place + numbers.nbytes]
        header[name] = {"dtype": "F32", "shape": list(numbers.shape), "data_offsets": places}
        place = places[1]
    head = _padded(json.dumps(header).encode())
    body = b"".join(numbers.astype("<f4", copy=False).tobytes() for numbers in tensors.values())
    _write(folder / WEIGHTS, len(head).to_bytes(8, "little") + head + body)
    _write(folder / "config.json", json.dumps(_TINY_CONFIG, indent=1).encode())


def _padded(header: bytes) -> bytes:
    return header + b" " * (-len(header) % 8)


def _diffusers_name(name: str) -> str:
    """diffusers' name of a tensor of TAEF1. Its decoder begins after the clamp, which is layer 0 of the original's."""
    part, _, rest = name.partition(".")
    number, _, leaf = rest.partition(".")
    first = {"taesd_encoder": ("encoder", 0), "taesd_decoder": ("decoder", 1)}.get(part)
    if first is None or not number.isdigit():
        return name
    return f"{first[0]}.layers.{int(number) - first[1]}.{leaf}"


def _write(path: Path, content: bytes) -> None:
    """Write a file, unless it has that content: another process may be reading it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not path.is_file() or path.read_bytes() != content:
        atomic_write(path, content)
