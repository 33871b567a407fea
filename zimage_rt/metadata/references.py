"""Conversion of a request's values to a record's JSON and back; files and arrays are replaced by their hashes."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..bundle.verify import hash_file
from ..errors import MetadataError
from ..image.convert import read_image
from ..lora.file import weights_file
from ..lora.settings import SETTINGS_FILE
from ..request.codec import IMAGES, members


def pixels_sha256(pixels: np.ndarray) -> str:
    """SHA-256 (hex) of the bytes of an image or any other array."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def is_plain(value: Any) -> bool:
    """Whether a value is a JSON scalar."""
    return value is None or isinstance(value, (bool, int, float, str))


def to_reference(name: str, value: Any) -> Any:
    """Convert a value of a request to JSON; files, images and arrays become references with their SHA-256."""
    from PIL import Image

    if isinstance(value, os.PathLike) or (name in IMAGES and isinstance(value, str)):
        path = Path(value)
        return {"path": str(path), "sha256": hash_file(path).sha256 if path.is_file() else ""}
    if is_plain(value):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Image.Image) or (name in IMAGES and isinstance(value, np.ndarray)):
        return _image_reference(value, name)
    if isinstance(value, np.ndarray):
        if value.ndim == 1:  # sigmas
            return value.tolist()
        return {"sha256": pixels_sha256(value), "dtype": str(value.dtype), "shape": list(value.shape)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_reference(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): to_reference(str(key), item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [to_reference(name, item) for item in value]
    # A value that a record cannot hold must not lose the image; drawing it again reports the missing value.
    return {"sha256": "", "type": type(value).__name__}


def _image_reference(value: Any, name: str) -> dict[str, Any]:
    image = read_image(value, name)
    # The array's own bytes are hashed: those of the PIL image would be copied twice.
    digest = pixels_sha256(value) if isinstance(value, np.ndarray) else hashlib.sha256(image.tobytes()).hexdigest()
    return {"sha256": digest, "mode": image.mode, "size": list(image.size)}


def from_reference(hint: Any, value: Any, name: str, folder: Path | None) -> Any:
    """Convert a recorded value to the request's: files are found and checked, dataclasses are built."""
    if isinstance(value, dict) and "sha256" in value:
        return find_file(value, name, folder)
    if isinstance(value, list):
        items = [arg for member in members(hint) for arg in typing.get_args(member) if arg is not Ellipsis]
        return tuple(from_reference(items[0] if items else Any, item, name, folder) for item in value)
    if isinstance(value, dict):
        for member in members(hint):
            if dataclasses.is_dataclass(member):
                hints = typing.get_type_hints(member)
                strange = sorted(set(value) - set(hints))
                if strange:
                    raise MetadataError(f"{name}: unknown {strange[0]!r}; a newer zimage_rt wrote it: upgrade")
                restored = {key: from_reference(hints[key], item, key, folder) for key, item in value.items()}
                return typing.cast(type[Any], member)(**restored)
        return {key: from_reference(Any, item, key, folder) for key, item in value.items()}
    return value


def find_file(reference: Mapping[str, Any], name: str, folder: Path | None) -> Path:
    """Find a recorded file, and check that its content is unchanged.

    Args:
        reference: `path` and `sha256`, from `to_reference`, or a record's LoRA.
        name: the field's name, for errors.
        folder: a folder to search if the path does not exist.

    Raises:
        MetadataError: the file is missing, was changed, or came without a path.
    """
    if "path" not in reference:
        raise MetadataError(f"{name}: came without a path, so that only its hash is recorded; give it again")
    path = Path(reference["path"])
    places = [path] if folder is None else [path, folder / path, folder / path.name]
    found = next((place for place in places if weights_file(place).is_file()), None)
    if found is None:
        raise MetadataError(f"{name}: expected {path}, which the image was made from, but it is gone; give it again")
    actual = hash_file(weights_file(found)).sha256
    if actual != reference["sha256"]:
        raise MetadataError(
            f"{name}: expected {found} with sha256 {reference['sha256'][:16]}…, got {actual[:16]}…: the file was "
            "changed since; give the one that was used, or this one by name"
        )
    settings = reference.get("settings_sha256")
    if settings:
        _check_settings(weights_file(found).parent / SETTINGS_FILE, settings, name)
    return found


def _check_settings(path: Path, sha256: str, name: str) -> None:
    """Raise MetadataError unless PEFT's settings are those that the LoRA was loaded with."""
    if not path.is_file():
        raise MetadataError(f"{name}: expected {path}, which it was loaded with, but it is gone; give it again")
    if hash_file(path).sha256 != sha256:
        raise MetadataError(f"{name}: {path} was changed since; give the one that was used, or the LoRA by name")
