"""The record of an image: its complete request, the bundle, the backend and the version."""

from __future__ import annotations

import dataclasses
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from .._version import __version__
from ..bundle.manifest import Manifest
from ..request.codec import make_request
from ..request.types import GenerateRequest, ResolvedRequest
from .references import find_file, from_reference, is_plain, to_reference

SCHEMA_VERSION = 2


@dataclasses.dataclass(frozen=True)
class Provenance:
    """The fields of `ImageRecord` that all images of an engine have in common; made once per engine."""

    version: str
    backend: str
    backend_options: Mapping[str, Any]
    bundle_id: str
    bundle_name: str
    precision: str


@dataclasses.dataclass(frozen=True)
class ImageRecord:
    """The record of how an image was made.

    Attributes:
        version: the version of zimage_rt.
        backend, backend_options: the backend's name and options.
        bundle_id, bundle_name, precision: the bundle, from its manifest.
        request: the fields of the GenerateRequest that draws this image alone, with defaults filled in. Input images
            are `{"path", "sha256"}` of the file, or `{"sha256", …}` of the pixels if they came without a path.
        batch: the batch that it was drawn in, or None: `index`, `prompts`, `negative_prompts`, `seeds`. An image drawn
            alone may differ from that of a batch by a grey level (see `ModuleDenoiser`).
        loras: the active LoRAs in order: `name`, `weight`, `path`, `sha256` of the loaded bytes, `settings_sha256` of
            PEFT's settings, and `strict`, which is false if only a part of it was used.
        timings: seconds by stage, of the whole batch.
        warnings: one sentence per field of the request that had no effect.
        pixels_sha256: hash of the image's bytes, uint8 `[height, width, 3]`; empty until it is saved.
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
        """The request that draws the image again.

        Args:
            folder: a folder to search for input images whose recorded path does not exist.
            **overrides: values in place of the recorded fields. Without any, the request of a batch's image is the
                whole batch (`batch["index"]` is its number in it); also with some, if `batch_noise` was `comfyui`.

        Raises:
            MetadataError: an input is missing, was changed, or came without a path; give it in `overrides`.
        """
        hints = typing.get_type_hints(GenerateRequest)
        recorded = dict(self.request)
        if self.batch is not None and (not overrides or recorded.get("batch_noise") == "comfyui"):
            for field, name in (("prompt", "prompts"), ("negative_prompt", "negative_prompts"), ("seed", "seeds")):
                recorded[field] = self.batch[name]
        fields = {
            name: from_reference(hints[name], value, name, folder)
            for name, value in recorded.items()
            if name not in overrides
        }
        return make_request(**fields, **overrides)

    def find_loras(self, folder: Path | None = None) -> list[tuple[str, float, Path]]:
        """Name, weight and file of the LoRAs that were active, for `Engine.load_lora`.

        Raises MetadataError if a file is missing or was changed; `folder` as in `to_request`.
        """
        return [
            (str(lora["name"]), float(lora["weight"]), find_file(lora, f"LoRA {lora['name']!r}", folder))
            for lora in self.loras
        ]

    def to_json(self) -> str:
        """The record as JSON, the text of the sidecar, which `read_record` reads."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1, allow_nan=False)


def recorded_fields(request: GenerateRequest, resolved: ResolvedRequest, manifest: Manifest) -> dict[str, Any]:
    """The fields of a request as JSON values for its records; input images are hashed, which takes time."""
    # A record has the LoRAs with their files in a field of its own.
    fields = {
        field.name: getattr(request, field.name) for field in dataclasses.fields(request) if field.name != "loras"
    }
    fields |= {name: value for name, value in vars(resolved).items() if name in fields and is_plain(value)}
    if request.num_inference_steps is None:
        steps = manifest.pipeline.num_inference_steps
        fields["num_inference_steps"] = steps if request.sigmas is None else len(request.sigmas)
    return {name: to_reference(name, value) for name, value in fields.items()}


def make_provenance(manifest: Manifest, backend: str, backend_options: Mapping[str, Any]) -> Provenance:
    """The provenance of the images of a bundle on a backend, from the manifest as it was loaded."""
    return Provenance(
        version=__version__,
        backend=backend,
        backend_options=to_reference("backend_options", backend_options),
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
    """One record per image of a request, from its `recorded_fields` and the active LoRAs."""
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
