"""Reader of LoRA files in the layouts that tools write for Z-Image.

A LoRA changes a linear layer's weight `[out, in]`, mostly by `scale * up @ down` with `down [rank, in]` and
`up [out, rank]`. Layouts differ in the names of layers and tensors and in the place of the scale; `docs/formats.md`
has all of them. In short:

| layout | a layer's tensors | scale |
| --- | --- | --- |
| PEFT, diffusers | `….to_q.lora_A.weight`, `….lora_B.weight`, `….lora_B.bias` | metadata, adapter_config.json, or 1 |
| kohya | `lora_unet_layers_0_attention_to_q.lora_down.weight`, `….lora_up.weight` | `….alpha` / rank |
| ComfyUI | `diffusion_model.….attention.qkv.lora_A.weight` or `lora_down` | `….alpha` / rank, else 1 |
| LyCORIS | `….lokr_w1`, `….lokr_w2`, or `_a` and `_b` of each; `….hada_w1_a` and so on | `….alpha` / rank |
| DoRA | `….dora_scale`, `….lora_magnitude_vector` or `….magnitude` beside any of these | as theirs |
| differences | `….diff`, `….w_norm`, `….set_weight` of matrices and norms; `….diff_b`, `….b_norm` of biases | 1 |
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.safetensors_file import TensorFile
from ..errors import LoraError
from .kinds import file_kind, other_adapter, remedy
from .layers import Factors, Layer, LoraLayer, VectorChange, WholeLayer, loha, lokr
from .settings import Scales, read_scales

# The weights of a folder: PEFT's file, then diffusers'.
_FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")

# The suffixes after a layer's name, by role; PEFT writes an adapter's name before `.weight`.
_ROLES = (
    ("down", re.compile(r"\.(lora_A(\.[^.]+)?\.weight|lora_down\.weight|lora\.down\.weight|lora_A)$")),
    ("up", re.compile(r"\.(lora_B(\.[^.]+)?\.weight|lora_up\.weight|lora\.up\.weight|lora_B)$")),
    ("alpha", re.compile(r"\.alpha$")),
    ("magnitude", re.compile(r"\.(dora_scale|magnitude|lora_magnitude_vector(\.[^.]+)?(\.weight)?)$")),
    ("up_bias", re.compile(r"\.(lora_B(\.[^.]+)?|lora_up|lora\.up)\.bias$")),
    ("bias", re.compile(r"\.(diff_b|b_norm)$")),
    ("diff", re.compile(r"\.(diff|w_norm)$")),
    ("set", re.compile(r"\.set_weight$")),
    *((f"lokr_{part}", re.compile(rf"\.lokr_{part}$")) for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")),
    *((f"hada_{part}", re.compile(rf"\.hada_{part}$")) for part in ("w1_a", "w1_b", "w2_a", "w2_b")),
)
_PARTNER = {"lora_A": "lora_B", "lora_down": "lora_up", "lora.down": "lora.up"}
# The roles that change a matrix, by kind; a layer has roles of one kind.
_KINDS = {"LoRA": ("down", "up"), "LoKr": "lokr_", "LoHa": "hada_", "a difference": ("diff",), "a weight": ("set",)}


@dataclasses.dataclass(frozen=True)
class LoraFile:
    """The content of a LoRA file.

    Attributes:
        path: the .safetensors file.
        layers: its layers.
        problems, bad_keys: its errors, one line each, and the keys that they are about.
        sha256: hex, of the bytes that the layers were read from; empty if nothing was read.
        settings_sha256: hex, of the adapter_config.json that its scales are from; empty if there is none.
        notes: warnings about a file that can be used.
    """

    path: Path
    layers: Sequence[Layer]
    problems: Sequence[str]
    bad_keys: Sequence[str]
    sha256: str = ""
    notes: Sequence[str] = ()
    settings_sha256: str = ""


class _LayerError(ValueError):
    """A layer cannot be read; the message names its keys."""


def weights_file(path: Path) -> Path:
    """The weights file of a LoRA's path, which is a file or a folder of PEFT or diffusers."""
    if not is_folder(path):
        return path
    try:
        return next((path / name for name in _FOLDER_FILES if (path / name).is_file()), path / _FOLDER_FILES[0])
    except PermissionError:
        return path / _FOLDER_FILES[0]


def is_folder(path: Path) -> bool:
    """Whether a path is a folder; False without permission to look, which reading then reports."""
    try:
        return path.is_dir()
    except PermissionError:
        return False


def read_lora(path: Path) -> LoraFile:
    """Read a LoRA file, or a folder of PEFT or diffusers; incomplete layers are among its problems.

    The hash is of the bytes that were read, even if the file changes later. Raises LoraError if it cannot be read.
    """
    path = weights_file(path)
    try:
        file, sha256 = TensorFile(path), ""
        if _group_by_layer(file.tensors)[0]:  # by its header no checkpoint of many GB
            content = path.read_bytes()
            file, sha256 = TensorFile(path, content), hashlib.sha256(content).hexdigest()
    except FileNotFoundError:
        raise LoraError(f"{path}: no such file; expected a LoRA's .safetensors file") from None
    except LoraError:
        raise
    except PermissionError as error:
        raise LoraError(
            f"{path} cannot be read: permission denied; let this user read the file and enter its folders"
        ) from error
    except OSError as error:
        raise LoraError(
            f"{path} cannot be read: {error.strerror or error}; expected a LoRA's .safetensors file"
        ) from error
    except ValueError as error:
        kind = file_kind(path)
        what = f"it seems to be {kind}" if kind else str(error)
        raise LoraError(f"{path}: {what}; expected a LoRA's .safetensors file: {remedy(kind)}") from error
    parts, unknown = _group_by_layer(file.tensors)
    problems, bad = [_unknown_key(key) for key in unknown], list(unknown)
    scales = read_scales(path, file, any("alpha" in roles for roles in parts.values()))
    layers: list[Layer] = []
    for name, roles in parts.items():
        try:
            layers += _read_layer(file, name, roles, scales)
        except ValueError as error:
            problems.append(str(error))
            bad += roles.values()
    if not parts and not unknown:
        problems.append("it holds no tensors")
    return LoraFile(path, layers, problems, bad, sha256, [scales.note] if scales.note else [], scales.sha256)


def _group_by_layer(keys: Mapping[str, Any]) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Group keys by layer name and role; returns also the keys without a role."""
    parts: dict[str, dict[str, str]] = {}
    unknown = []
    for key in keys:
        for role, pattern in _ROLES:
            if match := pattern.search(key):
                roles = parts.setdefault(key[: match.start()], {})
                if role in roles:
                    unknown.append(key)
                roles.setdefault(role, key)
                break
        else:
            unknown.append(key)
    return parts, unknown


def _unknown_key(key: str) -> str:
    kind = other_adapter(key)
    if kind is not None:
        return (
            f"{key}: this is {kind}; expected LoRA, LoKr, LoHa, DoRA or whole differences: convert it with the tool "
            "that made it, or merge it into the checkpoint and export that"
        )
    return f"{key}: expected ….lora_A.weight, ….lora_down.weight, their halves or ….alpha, once a layer"


def _read_layer(file: TensorFile, name: str, roles: Mapping[str, str], scales: Scales) -> list[Layer]:
    """Read a layer's changes in fp32: of its matrix, its bias, or both. Raises ValueError."""
    kinds = [
        kind
        for kind, wanted in _KINDS.items()
        if any(role.startswith(wanted) if isinstance(wanted, str) else role in wanted for role in roles)
    ]
    keys = tuple(roles.values())
    if len(kinds) > 1:
        raise _LayerError(f"{', '.join(keys)}: expected one way to change a layer, got {' and '.join(kinds)}")
    if not kinds and "bias" not in roles:
        raise _LayerError(f"{keys[0]}: expected the layer's two matrices beside it")
    alpha = file.number(roles["alpha"]) if "alpha" in roles else None
    if alpha is not None and not math.isfinite(alpha):
        raise _LayerError(f"{roles['alpha']}: expected a finite number, got {alpha}")
    scale_of: Callable[[int | None], float] = partial(scales.of, name, alpha=alpha)
    layers: list[Layer] = []
    if kinds:
        layers.append(_read_change(file, name, roles, kinds[0], scale_of))
        if kinds[0] != "LoRA" or "magnitude" in roles:
            layers[0] = _with_magnitude(file, layers[0], roles)
        elif scales.uses_dora(name):
            raise _LayerError(f"{', '.join(keys)}: its settings say DoRA: expected ….lora_magnitude_vector beside it")
    elif "magnitude" in roles or "alpha" in roles:
        raise _LayerError(f"{', '.join(keys)}: expected the layer's two matrices beside it")
    if "up_bias" in roles:
        if kinds != ["LoRA"]:
            raise _LayerError(f"{roles['up_bias']}: expected the layer's two matrices beside it")
        scale = np.float32(scale_of(_matrix(file, roles["down"]).shape[0]))
        layers.append(VectorChange(name, "bias", _vector(file, roles["up_bias"]) * scale, (roles["up_bias"],)))
    if "bias" in roles:
        layers.append(VectorChange(name, "bias", _vector(file, roles["bias"]), (roles["bias"],)))
    return layers


def _read_change(
    file: TensorFile,
    name: str,
    roles: Mapping[str, str],
    kind: str,
    scale_of: Callable[[int | None], float],
) -> Layer:
    keys = tuple(roles[role] for role in roles if role not in ("up_bias", "bias"))
    if kind == "LoRA":
        down, up = _low_rank_pair(file, roles)
        return LoraLayer(name, down, up * np.float32(scale_of(len(down))), keys)
    if kind == "LoKr":
        w1, w2 = _factors(file, roles, "lokr_w1"), _factors(file, roles, "lokr_w2", roles.get("lokr_t2"))
        return lokr(name, w1, w2, scale_of(w2.rank or w1.rank), keys)
    if kind == "LoHa":
        w1, w2 = _factors(file, roles, "hada_w1"), _factors(file, roles, "hada_w2")
        if w1.shape != w2.shape:
            raise _LayerError(f"{', '.join(keys)}: expected two products of one shape, got {w1.shape} and {w2.shape}")
        return loha(name, w1, w2, scale_of(w1.rank), keys)
    role = "diff" if kind == "a difference" else "set"
    values = _floats(file, roles[role])
    if values.ndim == 1:
        return VectorChange(name, "weight", values, (roles[role],), replaces=role == "set")
    rows, columns = _matrix(file, roles[role]).shape
    # Read again when it is applied: the differences of a whole model are as large as the model.
    return WholeLayer(name, (rows, columns), partial(_matrix, file, roles[role]), keys, replaces=role == "set")


def _with_magnitude(file: TensorFile, layer: Layer, roles: Mapping[str, str]) -> Layer:
    """The layer with DoRA's magnitude, if the file has one."""
    if "magnitude" not in roles:
        return layer
    key = roles["magnitude"]
    if isinstance(layer, VectorChange) or (isinstance(layer, WholeLayer) and layer.replaces):
        raise _LayerError(f"{key}: expected the layer's two matrices beside it")
    values = _floats(file, key)
    out, width = layer.shape
    if values.ndim == 1:
        values = values[:, None]
    values = values.reshape(values.shape[:2]) if values.size == math.prod(values.shape[:2]) else values
    if values.shape not in ((out, 1), (1, width)):
        raise _LayerError(f"{key}: expected a magnitude of [{out}], [{out}, 1] or [1, {width}], got {file.shape(key)}")
    return dataclasses.replace(layer, magnitude=values)


def _low_rank_pair(file: TensorFile, roles: Mapping[str, str]) -> tuple[np.ndarray, np.ndarray]:
    """A plain LoRA's `down` and `up`."""
    if "down" not in roles or "up" not in roles:
        key = roles["down" if "down" in roles else "up"]
        raise _LayerError(f"{key}: expected {_counterpart(key)} beside it")
    down, up = (_squeeze_kernel(file.shape(roles[role])) for role in ("down", "up"))
    if len(down) != 2 or len(up) != 2 or down[0] != up[1] or 0 in (*down, *up):
        expected = "expected [rank, in] and [out, rank]"
        raise _LayerError(f"{roles['down']}, {roles['up']}: {expected}, got {list(down)} and {list(up)}")
    return _matrix(file, roles["down"]), _matrix(file, roles["up"])


def _counterpart(key: str) -> str:
    for first, second in _PARTNER.items():
        for one, other in ((first, second), (second, first)):
            if f".{one}" in key:
                return key.replace(f".{one}", f".{other}")
    return "its other half"


def _factors(file: TensorFile, roles: Mapping[str, str], role: str, core: str | None = None) -> Factors:
    """Read `….w1`, or `….w1_a` and `….w1_b`; with a Tucker `core` `[rank, rank, 1, 1]`, `a` is transposed."""
    if role in roles:
        return Factors(_matrix(file, roles[role]))
    halves = [roles.get(f"{role}_{half}") for half in "ab"]
    if halves[0] is None or halves[1] is None:
        (key,) = [key for key in halves if key] or [next(iter(roles.values()))]
        raise _LayerError(f"{key}: expected {role} beside it, or {role}_a and {role}_b")
    a, b = _matrix(file, halves[0]), _matrix(file, halves[1])
    if core is not None:
        middle = _matrix(file, core)
        if (len(a), len(b)) != middle.shape:
            raise _LayerError(f"{core}: expected [{len(a)}, {len(b)}], got {list(middle.shape)}")
        a = a.T @ middle
    if a.shape[1] != len(b):
        expected = "expected [rows, rank] and [rank, columns]"
        raise _LayerError(f"{halves[0]}, {halves[1]}: {expected}, got {list(a.shape)} and {list(b.shape)}")
    return Factors(None, a, b)


def _floats(file: TensorFile, key: str) -> np.ndarray:
    values = file.read(key)
    if not np.isfinite(values).all():
        raise _LayerError(f"{key}: expected finite numbers")
    if values.size == 0:
        raise _LayerError(f"{key}: expected numbers, got {list(values.shape)}")
    return values


def _vector(file: TensorFile, key: str) -> np.ndarray:
    values = _floats(file, key)
    if values.ndim != 1:
        raise _LayerError(f"{key}: expected a vector, got {list(values.shape)}")
    return values


def _matrix(file: TensorFile, key: str) -> np.ndarray:
    """Read a matrix, or the kernel of a 1x1 convolution as a matrix."""
    values = _floats(file, key)
    values = values.reshape(_squeeze_kernel(values.shape))
    if values.ndim != 2:
        raise _LayerError(f"{key}: expected a matrix, got {list(values.shape)}")
    return values


def _squeeze_kernel(shape: tuple[int, ...]) -> tuple[int, ...]:
    """A kernel's shape without its trailing dimensions, if all of them are 1."""
    return shape[:2] if math.prod(shape[2:]) == 1 else shape
