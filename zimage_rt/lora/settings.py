"""Scales of a LoRA's layers from PEFT's settings or the file's metadata, for files without a scale per layer."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..bundle.json_codec import parse_json
from ..bundle.safetensors_file import TensorFile
from ..errors import LoraError

# diffusers' `save_lora_weights` writes PEFT's settings here, prefixed by the component: `transformer.lora_alpha`.
_METADATA_KEY = "lora_adapter_metadata"
# PEFT's settings, in the folder of its weights.
SETTINGS_FILE = "adapter_config.json"
# Prefixes that PEFT and its wrappers write before a layer's name in its component.
_WRAPPERS = ("base_model.model.", "default.")
# Metadata of tools that save PEFT's matrices unscaled: PEFT multiplies them by alpha / rank.
_PEFT_ALPHAS = ("lora_alpha", "alpha")
# kohya's metadata. Its trainers write an alpha per layer; files with this and no alpha are from converters, which
# multiply the scale into the matrices and copy the metadata.
_KOHYA_ALPHA = "ss_network_alpha"


@dataclasses.dataclass(frozen=True)
class Scales:
    """The scales of a file's layers from its settings and metadata.

    Attributes:
        path: the file, for messages.
        components: PEFT's settings by component, `transformer`; the empty name is for the whole file.
        alpha: the alpha of the file's metadata, or None.
        rslora: whether that alpha is divided by the square root of the rank.
        note: a warning about a scale that the file does not state for certain; else empty.
        sha256: hex, of the adapter_config.json that was read; empty if none was.
    """

    path: Path
    components: Mapping[str, Mapping[str, Any]]
    alpha: float | None = None
    rslora: bool = False
    note: str = ""
    sha256: str = ""

    def of(self, name: str, rank: int | None, alpha: float | None = None) -> float:
        """A layer's scale.

        Args:
            name: the file's name for the layer.
            rank: the rank of its matrices; None for a LoKr of whole matrices, which has none.
            alpha: the alpha of the layer in the file, or None.
        """
        settings, own = self._settings(name)
        if rank is None:  # LyCORIS writes a meaningless alpha of about 1e10 for such layers
            rank, alpha = settings.get("r"), None
            if not isinstance(rank, int) or rank < 1:
                return 1.0
        if alpha is not None:
            return alpha / rank
        root = bool(settings.get("use_rslora", self.rslora))
        alpha = self.alpha if not settings else _number(settings.get("lora_alpha", settings.get("alpha")))
        for pattern, value in (settings.get("alpha_pattern") or {}).items():
            if _matches(self.path, pattern, own):
                alpha = _number(value)
                break
        return 1.0 if alpha is None else alpha / (math.sqrt(rank) if root else rank)

    def uses_dora(self, name: str) -> bool:
        """Whether PEFT's settings say that a layer has magnitudes."""
        return bool(self._settings(name)[0].get("use_dora"))

    def _settings(self, name: str) -> tuple[Mapping[str, Any], str]:
        """A layer's settings, and its name in its component, which PEFT's patterns match."""
        if not self.components:
            return {}, name
        before = ""
        while before != name:
            before = name
            for prefix in _WRAPPERS:
                name = name.removeprefix(prefix)
            for component in self.components:
                if component and name.startswith(f"{component}."):
                    return self.components[component], _strip_component(name, component)
        for component in ("", "transformer"):
            if component in self.components:
                return self.components[component], _strip_component(name, "transformer")
        return {}, name


def read_scales(path: Path, file: TensorFile, has_alphas: bool) -> Scales:
    """Read a file's scales from its metadata, or from the adapter_config.json beside PEFT's own files.

    `has_alphas` is whether the file has an alpha per layer. Raises LoraError for settings that cannot be read.
    """
    config, sha256 = path.parent / SETTINGS_FILE, ""
    try:
        if _METADATA_KEY in file.metadata:
            components: dict[str, dict[str, Any]] = {}
            for key, value in _object(parse_json(file.metadata[_METADATA_KEY])).items():
                component, _, setting = key.rpartition(".")
                components.setdefault(component, {})[setting] = value
        elif path.name == "adapter_model.safetensors" and config.is_file():
            content = config.read_bytes()
            components, sha256 = {"": _object(parse_json(content))}, hashlib.sha256(content).hexdigest()
        else:
            return Scales(path, {}) if has_alphas else _metadata_scales(path, file.metadata)
        scales = Scales(path, components, sha256=sha256)
        for component, settings in components.items():  # invalid settings are refused here, once
            _check(settings)
            for pattern in settings.get("alpha_pattern") or {}:
                _matches(path, pattern, component)
    except LoraError:
        raise
    except PermissionError as error:
        raise LoraError(f"{config} cannot be read: permission denied; let this user read it") from error
    except (OSError, ValueError) as error:
        raise LoraError(f"{path}: PEFT's settings of it cannot be read: {error}; fetch it again") from error
    return scales


def _object(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected an object, got {value!r:.60}")
    return value


def _check(settings: Mapping[str, Any]) -> None:
    """Raise ValueError for a used setting whose type is not PEFT's."""
    _number(settings.get("lora_alpha", settings.get("alpha")))
    rank = settings.get("r")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ValueError(f"r: expected a whole number of 1 or more, got {rank!r:.60}")
    for name in ("use_rslora", "use_dora"):
        if not isinstance(settings.get(name), (bool, type(None))):
            raise ValueError(f"{name}: expected true or false, got {settings[name]!r:.60}")
    for value in _object(settings.get("alpha_pattern") or {}).values():
        _number(value)


def _metadata_scales(path: Path, metadata: Mapping[str, str]) -> Scales:
    for key in _PEFT_ALPHAS:
        alpha = _text_number(metadata.get(key))
        if alpha is not None:
            rslora = metadata.get("use_rslora", "").lower() in ("true", "1")
            divisor = "the root of the rank" if rslora else "the rank"
            note = (
                f"no layer has an alpha, and the file's metadata says {key} = {alpha:g}: the scale taken is that "
                f"divided by {divisor}, as PEFT trains; ComfyUI takes 1"
            )
            return Scales(path, {}, alpha, rslora, note)
    alpha = _text_number(metadata.get(_KOHYA_ALPHA))
    if alpha is None:
        return Scales(path, {})
    rank = _text_number(metadata.get("ss_network_dim"))
    other = f"weight={alpha / rank:g}" if rank else "a weight of alpha / rank"
    note = (
        f"no layer has an alpha, and the file's metadata says {_KOHYA_ALPHA} = {alpha:g}: the scale taken is 1, as in "
        f"ComfyUI, since converters that drop the alphas multiply them in; if this one did not, use {other}"
    )
    return Scales(path, {}, note="" if alpha == rank else note)


def _text_number(text: str | None) -> float | None:
    try:
        number = float(text or "")
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) and number > 0 else None


def _number(value: Any) -> float | None:
    """An alpha of PEFT's settings as float; None stays None. Raises ValueError unless it is a finite number."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= sys.float_info.max:
        raise ValueError(f"expected a finite number as alpha, got {value!r:.60}")
    return float(value)


def _strip_component(name: str, component: str) -> str:
    """A name without its component and the wrappers' prefixes after it."""
    name = name.removeprefix("diffusion_model.").removeprefix(f"{component}.")
    for prefix in _WRAPPERS:
        name = name.removeprefix(prefix)
    return name


def _matches(path: Path, pattern: str, name: str) -> bool:
    """Whether PEFT's `get_pattern_key` finds the pattern in a name: `re.match(rf"(.*\\.)?({pattern})$", name)`.

    Patterns are from untrusted files, and a regular expression can take exponential time. Only names, which diffusers
    and PEFT write, are supported: `^` anchors them at the beginning, otherwise they match the end; `.` is any
    character. Raises LoraError for other patterns.
    """
    whole = pattern.startswith("^")
    body = pattern.removeprefix("^").removesuffix("$")
    characters: list[str | None] = []  # None matches any character
    escaped = False
    for character in body:
        if escaped:
            if character.isalnum():
                raise _unsupported_pattern(path, pattern)
            characters.append(character)
            escaped = False
        elif character == "\\":
            escaped = True
        elif character.isalnum() or character in "_-/ ":
            characters.append(character)
        elif character == ".":
            characters.append(None)
        else:
            raise _unsupported_pattern(path, pattern)
    if escaped or not characters:
        raise _unsupported_pattern(path, pattern)
    end = len(name) - len(characters)
    if end < 0 or any(want not in (None, got) for want, got in zip(characters, name[end:], strict=True)):
        return False
    return end == 0 or (not whole and name[end - 1] == ".")


def _unsupported_pattern(path: Path, pattern: str) -> LoraError:
    return LoraError(
        f"{path}: alpha_pattern {pattern!r}: expected a layer's name or the end of one, such as "
        "'^layers.0.attention.to_k'; other regular expressions are not read: save it with the layers' names"
    )
