"""LoRA files: what tools write for Z-Image, read into one form.

A LoRA changes a linear layer's weight `[out, in]` by `up @ down`, `down [rank, in]` and `up [out, rank]`. Files differ
in how they name the two and the layer, and in where the scale stands:

| layout | a layer's two halves | scale |
| --- | --- | --- |
| PEFT, diffusers | `….attention.to_q.lora_A.weight`, `….lora_B.weight` | metadata or adapter_config.json, else 1 |
| kohya | `lora_unet_layers_0_attention_to_q.lora_down.weight`, `….lora_up.weight` | `….alpha` / rank |
| ComfyUI | `diffusion_model.….attention.qkv.lora_A.weight` or `lora_down` | `….alpha` / rank, else 1 |
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .errors import LoraError
from .tensor_file import TensorFile

# What follows a layer's name; PEFT writes an adapter's name before `.weight`.
_ROLES = (
    ("down", re.compile(r"\.(lora_A(\.[^.]+)?\.weight|lora_down\.weight|lora\.down\.weight|lora_A)$")),
    ("up", re.compile(r"\.(lora_B(\.[^.]+)?\.weight|lora_up\.weight|lora\.up\.weight|lora_B)$")),
    ("alpha", re.compile(r"\.alpha$")),
)
_PARTNER = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}

# Other ways to change a model, by what their keys hold.
_OTHER_KINDS = (
    (re.compile(r"dora_scale|lora_magnitude_vector"), "DoRA"),
    (re.compile(r"\.lokr_"), "LoKr"),
    (re.compile(r"\.hada_"), "LoHa"),
    (re.compile(r"\.b?oft_"), "OFT"),
    (re.compile(r"\.lora_mid\."), "LoCon with a Tucker core"),
    (re.compile(r"\.lora_(B|up)(\.[^.]+)?\.bias$|\.diff_b$"), "a change of biases"),
    (re.compile(r"\.diff$"), "whole matrices' differences"),
    (re.compile(r"\.lora_embedding_"), "a LoRA of an embedding"),
    (re.compile(r"\.(a1|a2|b1|b2)\.weight$"), "GLoRA"),
    (re.compile(r"\.on_input$|\.ia3_"), "(IA)³"),
    (re.compile(r"\.vera_"), "VeRA"),
)

# diffusers' `save_lora_weights` puts PEFT's settings here, each under `transformer.`.
_METADATA_KEY = "lora_adapter_metadata"


@dataclasses.dataclass(frozen=True, eq=False)
class LoraLayer:
    """One layer of a file, under the file's own name for it.

    Attributes:
        name: what stood before `.lora_A.weight`.
        down: float32 `[rank, in]`.
        up: float32 `[out, rank]`, the scale in it.
        keys: the file's own, for messages.
    """

    name: str
    down: np.ndarray
    up: np.ndarray
    keys: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """What a file holds.

    Attributes:
        path: the .safetensors file.
        layers: its layers.
        problems, bad_keys: what is wrong with it, one line each, and the keys that are meant.
        sha256: hex, of the very bytes that the layers were read from; empty if nothing was read.
    """

    path: Path
    layers: Sequence[LoraLayer]
    problems: Sequence[str]
    bad_keys: Sequence[str]
    sha256: str = ""


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA file, or PEFT's folder with adapter_model.safetensors; half a layer is among the problems.

    The file is read once, and hashed as it was read: what happens to it afterwards changes neither.

    Raises LoraError if it cannot be read or is of another kind.
    """
    if path.is_dir():
        path = path / "adapter_model.safetensors"
    try:
        file, sha256 = TensorFile(path), ""
        _refuse_other_kinds(path, file)
        if _sort(file.tensors)[0]:  # not a checkpoint of many GB, which its header gives away
            content = path.read_bytes()
            file, sha256 = TensorFile(path, content), hashlib.sha256(content).hexdigest()
            _refuse_other_kinds(path, file)
    except FileNotFoundError:
        raise LoraError(f"{path}: no such file; expected a LoRA's .safetensors file") from None
    except LoraError:
        raise
    except (OSError, ValueError) as error:
        raise LoraError(f"{path}: {error}; expected a LoRA's .safetensors file: fetch it again") from error
    parts, unknown = _sort(file.tensors)
    problems = [f"{key}: expected ….lora_A.weight, ….lora_down.weight, their halves or ….alpha" for key in unknown]
    bad = list(unknown)
    settings = _peft_settings(path, file)
    layers = []
    for name, roles in parts.items():
        problem = _incomplete(file, roles)
        if problem is None:
            layer, problem = _layer(file, name, roles, settings)
            if layer is not None:
                layers.append(layer)
        if problem is not None:
            problems.append(problem)
            bad += roles.values()
    if not parts and not unknown:
        problems.append("it holds no tensors")
    return LoraFile(path, layers, problems, bad, sha256)


def _sort(keys: Mapping[str, Any]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Layer name → role → key, and the keys that have no role."""
    parts: dict[str, dict[str, str]] = {}
    unknown = []
    for key in keys:
        for role, pattern in _ROLES:
            if match := pattern.search(key):
                parts.setdefault(key[: match.start()], {})[role] = key
                break
        else:
            unknown.append(key)
    return parts, unknown


def _incomplete(file: TensorFile, roles: Mapping[str, str]) -> str | None:
    """What a layer lacks, or has of a wrong shape; None where it is whole."""
    if "down" not in roles or "up" not in roles:
        (key,) = [roles[role] for role in ("down", "up", "alpha") if role in roles][:1]
        if "down" not in roles and "up" not in roles:
            return f"{key}: expected the layer's two matrices beside it"
        return f"{key}: expected {_partner(key)} beside it"
    down, up = file.shape(roles["down"]), file.shape(roles["up"])
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or 0 in (*down, *up):
        expected = "expected [rank, in] and [out, rank]"
        return f"{roles['down']}, {roles['up']}: {expected}, got {list(down)} and {list(up)}"
    if "alpha" in roles and file.shape(roles["alpha"]) not in ((), (1,)):
        return f"{roles['alpha']}: expected one number, got {list(file.shape(roles['alpha']))}"
    return None


def _partner(key: str) -> str:
    for first, second in _PARTNER.items():
        for one, other in ((first, second), (second, first)):
            if f".{one}" in key:
                return key.replace(f".{one}", f".{other}")
    return "its other half"


def _layer(
    file: TensorFile, name: str, roles: Mapping[str, str], settings: Mapping[str, Any]
) -> tuple[LoraLayer | None, str | None]:
    """A layer in fp32, or what is wrong with its numbers."""
    try:
        down, up = file.read(roles["down"]), file.read(roles["up"])
        alpha = float(file.read(roles["alpha"]).reshape(())) if "alpha" in roles else None
    except ValueError as error:
        return None, str(error)
    if not (np.isfinite(down).all() and np.isfinite(up).all() and (alpha is None or math.isfinite(alpha))):
        return None, f"{roles['down']}, {roles['up']}: expected finite numbers"
    rank = len(down)
    scale = _peft_scale(settings, name, rank) if alpha is None else alpha / rank
    return LoraLayer(name, down, up * np.float32(scale), tuple(roles.values())), None


def _refuse_other_kinds(path: Path, file: TensorFile) -> None:
    for pattern, kind in _OTHER_KINDS:
        keys = [key for key in file.tensors if pattern.search(key)]
        if keys:
            raise LoraError(
                f"{path}: this is {kind} (e.g. {keys[0]}); expected a plain LoRA, of two matrices a layer: "
                "convert it to one with the tool that made it, or merge it into the checkpoint and export that",
                keys,
            )


def _peft_settings(path: Path, file: TensorFile) -> Mapping[str, Any]:
    """PEFT's `lora_alpha` and the like: of the file's metadata, or of the adapter_config.json of PEFT's own files."""
    config = path.parent / "adapter_config.json"
    try:
        if _METADATA_KEY in file.metadata:
            settings = json.loads(file.metadata[_METADATA_KEY])
            settings = {key.rpartition(".")[2]: value for key, value in settings.items()}
        elif path.name == "adapter_model.safetensors" and config.is_file():
            settings = json.loads(config.read_text(encoding="utf-8"))
        else:
            return {}
    except (OSError, ValueError, AttributeError) as error:
        raise LoraError(f"{path}: PEFT's settings of it cannot be read: {error}; fetch it again") from error
    if settings.get("use_dora"):
        raise LoraError(f"{path}: this is DoRA; expected a plain LoRA: merge it into the checkpoint and export that")
    return settings


def _peft_scale(settings: Mapping[str, Any], name: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) where PEFT says `use_rslora`; 1 where nothing says alpha."""
    alpha = settings.get("lora_alpha")
    for pattern, value in (settings.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", name):  # as PEFT's get_pattern_key
            alpha = value
            break
    if alpha is None:
        return 1.0
    return float(alpha) / (math.sqrt(rank) if settings.get("use_rslora") else rank)
