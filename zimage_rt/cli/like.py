"""`zimage generate --like image.png`: the recorded request of an image, with options of the command line over it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import typer

from .._version import __version__
from ..checks import shown
from ..engine import Engine
from ..errors import RequestError
from ..metadata.record import ImageRecord
from ..metadata.references import pixels_sha256
from ..request.types import GenerateRequest
from ..result import GenerateResult
from .common import backend_options, is_given, load_engine, load_lora, load_loras, stderr, warn

# Options of backends that are numbers, booleans or words of this package, and those words (docs/backends.md). Options
# with paths (cache_dir), libraries (plugins, providers by ONNX Runtime's names) or their options are excluded.
PLAIN_OPTIONS = (
    "cuda_graph",
    "cudnn",
    "device",
    "fused_gemm",
    "io_binding",
    "memory_limit",
    "num_threads",
    "provider",
    "shape_kernels",
    "text_encoder",
)
PLAIN_WORDS = ("cpu", "cuda", "host", "lazy", "eager", "none", "nv_tensorrt_rtx", "resident", "tensorrt")


def requests_of(
    prompts: list[str], fields: dict[str, Any], record: ImageRecord | None, like: Path | None
) -> list[GenerateRequest]:
    """The requests of `zimage generate`: one per prompt, or the recorded one of an image.

    Args:
        prompts: the prompts of the command line.
        fields: the other fields of the command line; a seed is the first image's, and later ones count up.
        record, like: the image's record and path.

    Raises:
        RequestError: there is no prompt and no record.
        MetadataError: an input of the recorded image is missing or was changed.
    """
    if record is not None and like is not None and not prompts and not fields:
        return [request_like(record, like, {})]
    if record is None and not prompts:
        raise RequestError("prompt: expected what to draw; give it with -p, or an image with --like")
    requests = []
    for number, text in enumerate(prompts or [None]):
        own = dict(fields)
        if text is not None:
            own["prompt"] = text
        if "seed" in own:
            own["seed"] += number * own.get("num_images", 1)
        if record is not None and like is not None:
            requests.append(request_like(record, like, own))
        else:
            requests.append(GenerateRequest(**own))
    return requests


def request_like(record: ImageRecord, image: Path, overrides: dict[str, Any]) -> GenerateRequest:
    """The recorded request with fields of the command line in place of its own. Raises MetadataError."""
    overrides = dict(overrides)
    if overrides.keys() & {"num_inference_steps", "schedule", "denoise"}:
        overrides.setdefault("sigmas", None)  # the recorded ones would contradict the options
    if "strength" in overrides:
        overrides.setdefault("denoise", None)  # a recorded one would override the option
    elif overrides.get("denoise") is not None:
        overrides["strength"] = GenerateRequest.strength  # a recorded one would be warned of
    if "image" in overrides:
        overrides |= {name: None for name in ("latents", "image_latents") if name in record.request}
    return record.to_request(image.parent, **overrides)


def open_engine_like(
    ctx: typer.Context, bundle: Path, record: ImageRecord, image: Path, *, take_backend: bool
) -> Engine:
    """Load a bundle to draw a recorded image again, with its LoRAs, and with its backend if `take_backend`.

    Options of the command line override the record. Differences are printed on standard error.

    Raises:
        MetadataError: a LoRA of the image is missing or was changed.
    """
    backend, options = ctx.params["backend"], backend_options(ctx.params["backend_option"] or [])
    if not options and not is_given(ctx, "backend"):
        backend, options = recorded_backend(record, backend, take=take_backend)
    engine = load_engine(bundle, backend, options)
    warn_of_differences(record, engine)
    own, partly = ctx.params["lora"], ctx.params["lora_partial"]
    if not own:
        found = record.find_loras(image.parent)
        for (name, weight, path), recorded in zip(found, record.loras, strict=True):
            load_lora(engine, path, weight, name, partly or not recorded.get("strict", True))
    load_loras(engine, own or [], partly)
    return engine


def recorded_backend(record: ImageRecord, backend: str, *, take: bool) -> tuple[str, dict[str, Any]]:
    """The backend and its options for `--like`: the command's, or, with `take`, the harmless options of the record.

    Images are untrusted, and options can name libraries to load and folders to write, which are never used. Recorded
    options that are not used are printed on standard error.
    """
    if not take:
        if (record.backend, dict(record.backend_options)) != (backend, {}):
            warn(
                f"the image was drawn by {_described(record.backend, record.backend_options)}, which is not taken "
                "from it; give --like-backend, or --backend and -O, to use them"
            )
        return backend, {}
    taken = {name: value for name, value in record.backend_options.items() if _is_harmless(name, value)}
    left = {name: value for name, value in record.backend_options.items() if name not in taken}
    if left:
        warn(f"not taken from the image, give them with -O if you trust them: {_options_text(left)}")
    return record.backend, taken


def _described(backend: str, options: Mapping[str, Any]) -> str:
    return f"backend {shown(backend)} with {_options_text(options)}" if options else f"backend {shown(backend)}"


def _options_text(options: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={shown(value)}" for name, value in options.items())


def _is_harmless(name: str, value: Any) -> bool:
    """Whether a recorded option is in `PLAIN_OPTIONS` with a plain value: no path, library or further options."""
    if name not in PLAIN_OPTIONS:
        return False
    return value is None or isinstance(value, (bool, int, float)) or value in PLAIN_WORDS


def warn_of_differences(record: ImageRecord, engine: Engine) -> None:
    """Warn on standard error about differences to the record with which the image may differ."""
    there = f"{record.bundle_name} {record.precision}, bundle {record.bundle_id}"
    here = f"{engine.manifest.name} {engine.manifest.precision}, bundle {engine.bundle_id}"
    differences = [
        (there, here, record.bundle_id != engine.bundle_id),
        (f"zimage_rt {record.version}", f"zimage_rt {__version__}", record.version != __version__),
        (
            f"backend {record.backend} {dict(record.backend_options) or ''}".rstrip(),
            f"backend {engine.backend} {engine.backend_options or ''}".rstrip(),
            (record.backend, record.backend_options) != (engine.backend, engine.backend_options),
        ),
    ]
    for recorded, now, differs in differences:
        if differs:
            warn(f"the image was drawn by {recorded}; this is {now}: it may come out otherwise")


def select_and_compare(result: GenerateResult, record: ImageRecord) -> tuple[GenerateResult, bool]:
    """The recorded image of a batch that was drawn again, and whether it is equal to the byte."""
    result = result[0 if record.batch is None else record.batch["index"]]
    same = pixels_sha256(result.images[0]) == record.pixels_sha256
    if same:
        stderr.print("the same image to the byte", highlight=False)
    else:
        warn("the image is not the recorded one to the byte; another machine or library may round otherwise")
    return result, same
