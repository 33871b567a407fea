"""What a picture says of itself: its whole request, the bundle, the backend and the version.

A PNG holds it as text: `zimage_rt`, JSON that `read_record` reads back, and `parameters`, the lines of AUTOMATIC1111
that other tools show. A file beside it, `<name>.json`, has the same JSON for whoever strips or cannot read PNG text.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..atomic_write import atomic_write_all
from ..bundle.json_codec import from_json, parse_json
from ..bundle.manifest import Manifest, hash_file
from ..errors import MetadataError, RequestError
from ..image.convert import read_image
from ..image.formats import FORMATS, encode_image, sidecar_path
from ..lora.file import weights_file
from ..lora.settings import SETTINGS_FILE
from ..request.resolve import ResolvedRequest
from ..request.types import GenerateRequest
from ..sampling.samplers import FORMER_SAMPLERS, FORMER_SCHEDULES, SAMPLERS
from ..sampling.schedules import SCHEDULES
from .schema import MAX_BYTES, check_parts

KEY = "zimage_rt"
SCHEMA_VERSION = 2
# What a record of an older schema lacks, and how it is read: the first had no `warnings`.
ADDED_FIELDS: Mapping[str, Any] = {"warnings": []}

# Fields that are pictures: recorded by their hash, and by their path if they came as one.
PICTURES = ("image", "mask", "control_image")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What all images of an engine have in common; see `ImageRecord`. The engine makes it once, when it is loaded."""

    version: str
    backend: str
    backend_options: Mapping[str, Any]
    bundle_id: str
    bundle_name: str
    precision: str


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """How one picture was made.

    Attributes:
        version: of zimage_rt.
        backend, backend_options: what ran the bundle.
        bundle_id, bundle_name, precision: which bundle, as its manifest says.
        request: the fields of the GenerateRequest that draws this picture alone, defaults filled in. A picture among
            them is `{"path", "sha256"}`, of the file, or `{"sha256", …}`, of the pixels, if it came without a path.
        batch: what it was drawn together with, or None: `index`, `prompts`, `negative_prompts`, `seeds`. A picture
            drawn alone may differ from the same one of a batch by a grey level (see `ModuleDenoiser`).
        loras: those that were on, in their order: `name`, `weight`, `path`, `sha256` of what was loaded,
            `settings_sha256` of PEFT's settings, and `strict`, which is false if only a part of it was used.
        timings: seconds by stage, of the whole batch.
        warnings: what of the request had no effect, one sentence each.
        pixels_sha256: of the picture's bytes, uint8 `[height, width, 3]`, once it is saved.
    """

    version: str
    backend: str
    backend_options: Mapping[str, Any]
    bundle_id: str
    bundle_name: str
    precision: str
    request: Mapping[str, Any]
    batch: Mapping[str, Any] | None
    loras: Sequence[Mapping[str, Any]]
    timings: Mapping[str, float]
    warnings: Sequence[str] = ()
    pixels_sha256: str = ""
    schema_version: int = SCHEMA_VERSION

    def to_request(self, folder: Path | None = None, **overrides: Any) -> GenerateRequest:
        """The request again.

        Args:
            folder: where else to look for input pictures of which the recorded path leads nowhere.
            **overrides: fields to take instead of the recorded ones; without any, a picture of a batch is asked for
                with all that it was drawn with (`batch["index"]` says which one it is). So it is with some, if its
                noise is a part of the batch's (`batch_noise`).

        Raises:
            MetadataError: an input is gone, was changed, or came without a path; give it in `overrides`.
        """
        hints = typing.get_type_hints(GenerateRequest)
        recorded = dict(self.request)
        if self.batch is not None and (not overrides or recorded.get("batch_noise") == "comfyui"):
            for field, name in (("prompt", "prompts"), ("negative_prompt", "negative_prompts"), ("seed", "seeds")):
                recorded[field] = self.batch[name]
        fields = {
            name: _restored(hints[name], value, name, folder)
            for name, value in recorded.items()
            if name not in overrides
        }
        try:
            return GenerateRequest(**fields, **overrides)
        except TypeError as error:
            raise RequestError(f"{error}; known fields: {', '.join(hints)}") from error

    def find_loras(self, folder: Path | None = None) -> list[tuple[str, float, Path]]:
        """Name, weight and file of the LoRAs that were on, for `Engine.load_lora`.

        Raises MetadataError where a file is gone or was changed; `folder` as in `to_request`.
        """
        return [
            (str(lora["name"]), float(lora["weight"]), _find_file(lora, f"LoRA {lora['name']!r}", folder))
            for lora in self.loras
        ]

    def to_json(self) -> str:
        """The text of the sidecar; `read_record` reads it."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1, allow_nan=False)


def recorded_fields(request: GenerateRequest, resolved: ResolvedRequest, manifest: Manifest) -> dict[str, Any]:
    """The fields of a request as its records hold them; its pictures are hashed, which takes a while."""
    fields = {field.name: getattr(request, field.name) for field in dataclasses.fields(request)}
    fields |= {name: value for name, value in vars(resolved).items() if name in fields and _is_plain(value)}
    if request.num_inference_steps is None:
        steps = manifest.pipeline.num_inference_steps
        fields["num_inference_steps"] = steps if request.sigmas is None else len(request.sigmas)
    return {name: _recorded(name, value) for name, value in fields.items()}


def make_provenance(manifest: Manifest, backend: str, backend_options: Mapping[str, Any]) -> Provenance:
    """The provenance of the images that a bundle draws on a backend, by the manifest as it was loaded."""
    return Provenance(
        version=_version(),
        backend=backend,
        backend_options=_recorded("backend_options", backend_options),
        bundle_id=manifest.bundle_id,
        bundle_name=manifest.name,
        precision=manifest.precision,
    )


def make_records(
    provenance: Provenance,
    loras: Sequence[Mapping[str, Any]],
    fields: Mapping[str, Any],
    resolved: ResolvedRequest,
    timings: Mapping[str, float],
) -> tuple[ImageRecord, ...]:
    """One record for each image of a request, with its `recorded_fields` and the LoRAs it was drawn with."""
    together = {
        "prompts": list(resolved.prompts),
        "negative_prompts": list(resolved.negative_prompts),
        "seeds": list(resolved.seeds),
    }
    return tuple(
        ImageRecord(
            **vars(provenance),
            request={
                **fields,
                "prompt": resolved.prompts[i],
                "negative_prompt": resolved.negative_prompts[i],
                "seed": resolved.seeds[i],
                "num_images": 1,
            },
            batch={"index": i, **together} if len(resolved.seeds) > 1 else None,
            loras=loras,
            timings=timings,
            warnings=list(resolved.warnings),
        )
        for i in range(len(resolved.seeds))
    )


def _lora_file(path: Path) -> Path:
    """The weights of a LoRA that is a file, or a folder."""
    return weights_file(path)


def pixels_sha256(pixels: np.ndarray) -> str:
    """SHA-256 (hex) of a picture's bytes."""
    return hashlib.sha256(np.ascontiguousarray(pixels).data).hexdigest()


def save_image(
    path: Path,
    pixels: np.ndarray,
    record: ImageRecord,
    *,
    sidecar: bool = True,
    replace: bool = True,
    quality: int | None = None,
) -> int:
    """Write uint8 `[height, width, 3]` in the format of its name, and its record.

    A PNG holds the record; JPEG and WebP hold the parameters alone, as AUTOMATIC1111 writes them. The record is also
    beside it, see `sidecar_path`. Each file is written whole under a temporary name and renamed, the image last: where
    an image is, its sidecar is. `quality` is for JPEG and WebP, see `encode_image`. Returns the image's bytes.

    Raises:
        RequestError: a file that is no record has the sidecar's name.
        FileExistsError: one of the names is taken, and `replace` is False; nothing was written.
        OSError: the folder is missing, cannot be written, or is full; what was there is as it was.
    """
    # Here, not when it is drawn: who does not save does not pay for it.
    record = dataclasses.replace(record, pixels_sha256=pixels_sha256(pixels))
    parameters, text = parameters_text(record), record.to_json()
    encoded = encode_image(pixels, path.suffix, {"parameters": parameters, KEY: text}, parameters, quality)
    contents = {path: encoded}
    if sidecar:
        if replace:
            check_sidecar(path)
        contents = {sidecar_path(path): text.encode() + b"\n", **contents}
    atomic_write_all(contents, replace=replace)
    return len(encoded)


def check_sidecar(path: Path) -> None:
    """Raise RequestError if a file that is no record has the name of an image's sidecar: it is somebody's own."""
    beside = sidecar_path(path)
    if not beside.exists():
        return
    try:
        read_record(beside)
    except MetadataError as error:
        raise RequestError(
            f"output: {beside} is there and is no record of an image, so that it is not replaced ({error}); "
            "name another output, move it away, or write no sidecar (sidecar=False, --no-sidecar)"
        ) from error


def parameters_text(record: ImageRecord) -> str:
    """The request as AUTOMATIC1111 writes it into `parameters`, which Civitai and many viewers read."""
    request = record.request
    lines = [" ".join([request["prompt"], *(f"<lora:{lora['name']}:{lora['weight']:g}>" for lora in record.loras)])]
    if request["negative_prompt"]:
        lines.append(f"Negative prompt: {request['negative_prompt']}")
    settings: dict[str, Any] = {
        "Steps": request["num_inference_steps"],
        "Sampler": SAMPLERS[request["sampler"]].label,
        "Schedule type": SCHEDULES[request["schedule"]].label,
        # Theirs is negative + scale * (positive - negative), where 1 is none; ours is diffusers', where 0 is none.
        "CFG scale": f"{1 + request['guidance_scale']:g}",
        "Seed": request["seed"],
        "Size": f"{request['width']}x{request['height']}",
        "Model hash": record.bundle_id,
        "Model": record.bundle_name,
    }
    again = request.get("second_pass")
    if request["image"] is not None:
        settings["Denoising strength"] = _strength(request)
    elif again is not None:
        settings["Denoising strength"] = _strength(again)
    if again is not None:
        settings |= {"Hires upscale": again["scale"], "Hires upscaler": again["method"]}
    settings["Version"] = f"zimage_rt {record.version}"
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def _strength(part: Mapping[str, Any]) -> Any:
    """Of a request or its second pass; ComfyUI's measure goes before diffusers'."""
    return part["strength"] if part.get("denoise") is None else part["denoise"]


def read_record(path: str | Path) -> ImageRecord:
    """Read how a picture was made, from the PNG, from the sidecar beside it, or from a sidecar that is named itself.

    Raises:
        MetadataError: there is no such file, it is no PNG, is cut off or damaged, or holds no record.
    """
    path = Path(path)
    is_sidecar = path.suffix == ".json"
    sidecar = path if is_sidecar else sidecar_path(path)
    try:
        if FORMATS.get(path.suffix.lower(), "PNG") != "PNG":
            if path.is_file() and not sidecar.is_file():
                raise MetadataError(
                    f"{path}: expected {sidecar.name} beside it, which holds its record; {path.suffix} holds none"
                )
            path.stat()
        elif not is_sidecar:
            text = _png_text(path)
            if text is not None:
                return _parse(text, path)
            if not sidecar.is_file():
                raise MetadataError(
                    f"{path}: expected a PNG that zimage_rt wrote, got one without its text `{KEY}`, and there is no "
                    f"{sidecar.name} beside it; some programs strip such text: use the file as it was saved"
                )
        if sidecar.stat().st_size > MAX_BYTES:
            raise MetadataError(f"{sidecar}: expected a record of at most {MAX_BYTES >> 20} MiB, got more")
        return _parse(sidecar.read_bytes(), sidecar)
    except FileNotFoundError:
        raise MetadataError(f"{path}: there is no such file; name a PNG that zimage_rt wrote, or its sidecar") from None
    except (OSError, ValueError) as error:
        raise MetadataError(f"{path} cannot be read: {error}") from error


def _png_text(path: Path) -> str | None:
    """The text of our key, None if there is none. The whole file is checked, so that half a picture is not taken."""
    from PIL import Image

    with path.open("rb") as file:
        signature = file.read(8)
    if signature != b"\x89PNG\r\n\x1a\n":
        raise MetadataError(
            f"{path}: expected a PNG, got something else; other formats carry no record: use the PNG, or its sidecar"
        )
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.verify()  # checksums to the end; it uses the file up
        with Image.open(path, formats=["PNG"]) as image:
            image.load()  # text may stand behind the pixels
            return image.info.get(KEY)
    # What Pillow raises for damage: it has no error of its own for it.
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise MetadataError(f"{path}: this PNG is cut off or damaged ({error}); copy it again, whole") from error


def _parse(text: str | bytes, path: Path) -> ImageRecord:
    try:
        data = parse_json(text)
    except ValueError as error:
        raise MetadataError(f"{path}: its record cannot be read ({error}); it was damaged") from error
    version = data.get("schema_version") if isinstance(data, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise MetadataError(f"{path}: expected a record that zimage_rt wrote, got other JSON; name an image's sidecar")
    if version > SCHEMA_VERSION:
        raise MetadataError(f"{path}: expected a record of schema {SCHEMA_VERSION}, got {version}; upgrade zimage_rt")
    if version < SCHEMA_VERSION:
        data = {**ADDED_FIELDS, **data}
    todo = "it was damaged, or written by another version"
    from_json(ImageRecord, data, f"{path}: record", MetadataError, todo)
    check_parts(data, _version(), path, PICTURES)
    return ImageRecord(**{**data, "request": _with_todays_names(data["request"])})


def _with_todays_names(request: Mapping[str, Any]) -> dict[str, Any]:
    """A recorded request whose sampler and schedule have the names that they have now.

    0.1 called diffusers' ways by ComfyUI's names. Its requests have no `shift`, which all later ones have.
    """
    if "shift" in request:
        return dict(request)
    names = {"sampler": FORMER_SAMPLERS, "schedule": FORMER_SCHEDULES}
    return {name: names.get(name, {}).get(value, value) if name in names else value for name, value in request.items()}


def _version() -> str:
    from .. import __version__

    return __version__


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float, str))


def _recorded(name: str, value: Any) -> Any:
    """A value of a request as JSON."""
    from PIL import Image

    if isinstance(value, os.PathLike) or (name in PICTURES and isinstance(value, str)):
        path = Path(value)
        return {"path": str(path), "sha256": hash_file(path).sha256 if path.is_file() else ""}
    if _is_plain(value):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Image.Image) or (name in PICTURES and isinstance(value, np.ndarray)):
        return _picture_reference(value, name)
    if isinstance(value, np.ndarray):
        if value.ndim == 1:  # sigmas
            return value.tolist()
        return {"sha256": pixels_sha256(value), "dtype": str(value.dtype), "shape": list(value.shape)}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _recorded(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _recorded(str(key), item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_recorded(name, item) for item in value]
    # Nothing that a record cannot hold may cost the picture; asking for it again says what is missing.
    return {"sha256": "", "type": type(value).__name__}


def _picture_reference(value: Any, name: str) -> dict[str, Any]:
    image = read_image(value, name)
    # An array's bytes are its picture's; PIL would copy them twice.
    digest = pixels_sha256(value) if isinstance(value, np.ndarray) else hashlib.sha256(image.tobytes()).hexdigest()
    return {"sha256": digest, "mode": image.mode, "size": list(image.size)}


def _members(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type."""
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _restored(hint: Any, value: Any, name: str, folder: Path | None) -> Any:
    """A recorded value as the request wants it: files found and checked, dataclasses built."""
    if isinstance(value, dict) and "sha256" in value:
        return _find_file(value, name, folder)
    if isinstance(value, list):
        items = [arg for member in _members(hint) for arg in typing.get_args(member) if arg is not Ellipsis]
        return tuple(_restored(items[0] if items else Any, item, name, folder) for item in value)
    if isinstance(value, dict):
        for member in _members(hint):
            if dataclasses.is_dataclass(member):
                hints = typing.get_type_hints(member)
                strange = sorted(set(value) - set(hints))
                if strange:
                    raise MetadataError(f"{name}: unknown {strange[0]!r}; a newer zimage_rt wrote it: upgrade")
                restored = {key: _restored(hints[key], item, key, folder) for key, item in value.items()}
                return typing.cast(type[Any], member)(**restored)
        return {key: _restored(Any, item, key, folder) for key, item in value.items()}
    return value


def _find_file(reference: Mapping[str, Any], name: str, folder: Path | None) -> Path:
    if "path" not in reference:
        raise MetadataError(f"{name}: came without a path, so that only its hash is recorded; give it again")
    path = Path(reference["path"])
    places = [path] if folder is None else [path, folder / path, folder / path.name]
    found = next((place for place in places if _lora_file(place).is_file()), None)
    if found is None:
        raise MetadataError(f"{name}: expected {path}, which the picture was made from, but it is gone; give it again")
    actual = hash_file(_lora_file(found)).sha256
    if actual != reference["sha256"]:
        raise MetadataError(
            f"{name}: expected {found} with sha256 {reference['sha256'][:16]}…, got {actual[:16]}…: the file was "
            "changed since; give the one that was used, or this one by name"
        )
    settings = reference.get("settings_sha256")
    if settings:
        _check_settings(_lora_file(found).parent / SETTINGS_FILE, settings, name)
    return found


def _check_settings(path: Path, sha256: str, name: str) -> None:
    """Raises MetadataError unless PEFT's settings are those that a LoRA was loaded with."""
    if not path.is_file():
        raise MetadataError(f"{name}: expected {path}, which it was loaded with, but it is gone; give it again")
    if hash_file(path).sha256 != sha256:
        raise MetadataError(f"{name}: {path} was changed since; give the one that was used, or the LoRA by name")
