"""The record of an image: its whole request, the bundle, the backend and the version."""

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
            name: from_reference(hints[name], value, name, folder)
            for name, value in recorded.items()
            if name not in overrides
        }
        return make_request(**fields, **overrides)

    def find_loras(self, folder: Path | None = None) -> list[tuple[str, float, Path]]:
        """Name, weight and file of the LoRAs that were on, for `Engine.load_lora`.

        Raises MetadataError where a file is gone or was changed; `folder` as in `to_request`.
        """
        return [
            (str(lora["name"]), float(lora["weight"]), find_file(lora, f"LoRA {lora['name']!r}", folder))
            for lora in self.loras
        ]

    def to_json(self) -> str:
        """The text of the sidecar; `read_record` reads it."""
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False, indent=1, allow_nan=False)


def recorded_fields(request: GenerateRequest, resolved: ResolvedRequest, manifest: Manifest) -> dict[str, Any]:
    """The fields of a request as its records hold them; its images are hashed, which takes a while."""
    # The LoRAs of a record name the files, which the request's names do not.
    fields = {
        field.name: getattr(request, field.name) for field in dataclasses.fields(request) if field.name != "loras"
    }
    fields |= {name: value for name, value in vars(resolved).items() if name in fields and is_plain(value)}
    if request.num_inference_steps is None:
        steps = manifest.pipeline.num_inference_steps
        fields["num_inference_steps"] = steps if request.sigmas is None else len(request.sigmas)
    return {name: to_reference(name, value) for name, value in fields.items()}


def make_provenance(manifest: Manifest, backend: str, backend_options: Mapping[str, Any]) -> Provenance:
    """The provenance of the images that a bundle draws on a backend, by the manifest as it was loaded."""
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
