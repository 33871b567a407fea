"""`/view` and `/upload`: images of workflows, by the names that ComfyUI gives them."""

from __future__ import annotations

import asyncio
import io
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from starlette.datastructures import UploadFile

from ...checks import shown
from ...errors import RequestError
from ...image.convert import FORMATS
from ..bounds import check_pixels, parse_json, read_form
from ..errors import NotFound
from ..jobs_api import CallerOf
from .folders import MAX_NAME
from .prompt_api import WorkflowsOf

router = APIRouter(include_in_schema=False)

MEDIA_TYPES = {
    ".png": "image/png", ".jpg": "image/jpeg", ".jpeg": "image/jpeg", ".webp": "image/webp", ".gif": "image/gif",
    ".bmp": "image/bmp", ".avif": "image/avif", ".tif": "image/tiff", ".tiff": "image/tiff",
}  # fmt: skip
PREVIEW_FORMATS = ("webp", "jpeg")
CHANNELS = ("rgba", "rgb", "a")


@router.get("/view")
async def view(
    workflows: WorkflowsOf,
    who: CallerOf,
    filename: str,
    type: str = "output",
    subfolder: str = "",
    preview: str | None = None,
    channel: str = "rgba",
) -> Response:
    """An image's file; as a smaller format with `preview`, or some of its channels with `channel`."""
    for kind in ("input", "output", "temp"):
        if filename.endswith(f" [{kind}]"):
            filename, type = filename.removesuffix(f" [{kind}]"), kind
    if channel not in CHANNELS:
        raise RequestError(f"channel: expected one of {', '.join(CHANNELS)}, got {shown(channel)}", field="channel")
    folder = workflows.folder(who.name)
    path = folder.path(filename, type, subfolder)
    try:
        content = await folder.read(path)
    except FileNotFoundError as error:
        raise NotFound(f"filename: there is no {path.name!r} in {type}") from error
    media_type = MEDIA_TYPES.get(path.suffix.lower(), "application/octet-stream")
    if preview is not None:
        content, media_type = await asyncio.to_thread(_preview, content, preview)
    elif channel != "rgba":
        content, media_type = await asyncio.to_thread(_channels, content, channel), "image/png"
    # The name of the file, as ComfyUI says it, for clients that save it; nothing of it runs in a browser.
    name = path.name.encode("ascii", "replace").decode().replace('"', "")
    headers = {"Content-Disposition": f'filename="{name}"', "X-Content-Type-Options": "nosniff"}
    return Response(content, media_type=media_type, headers=headers)


def _opened(content: bytes) -> Any:
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except Exception as error:  # Pillow has no error of its own for damaged files
        raise RequestError(f"filename: it cannot be read as an image: {error}", field="filename") from error
    return image


def _preview(content: bytes, wanted: str) -> tuple[bytes, str]:
    kind, _, quality = wanted.partition(";")
    kind = kind if kind in PREVIEW_FORMATS else "webp"
    image = _opened(content)
    encoded = io.BytesIO()
    value = int(quality) if quality.isdecimal() and 1 <= int(quality[:4]) <= 100 else 90
    image.convert("RGB" if kind == "jpeg" else "RGBA").save(encoded, kind.upper(), quality=value)
    return encoded.getvalue(), f"image/{kind}"


def _channels(content: bytes, channel: str) -> bytes:
    from PIL import Image

    image = _opened(content)
    if channel == "rgb":
        found = image.convert("RGB")
    else:
        found = Image.new("RGBA", image.size)  # the alpha alone, on black
        found.putalpha(image.convert("RGBA").getchannel("A"))
    encoded = io.BytesIO()
    found.save(encoded, "PNG")
    return encoded.getvalue()


@router.post("/upload/image")
async def upload_image(request: Request, workflows: WorkflowsOf, who: CallerOf) -> dict[str, str]:
    """Keep an image for LoadImage. Other bytes under a taken name get a number, unless `overwrite` says true."""
    content, filename, said = await _read(request, workflows)
    kind, overwrite = said.get("type", "input"), said.get("overwrite", "").lower() in ("true", "1")
    return await workflows.folder(who.name).upload(content, filename, kind, said.get("subfolder", ""), overwrite)


@router.post("/upload/mask")
async def upload_mask(request: Request, workflows: WorkflowsOf, who: CallerOf) -> dict[str, str]:
    """Keep an image with the alpha of the uploaded one and the colours of `original_ref`."""
    content, filename, said = await _read(request, workflows)
    folder = workflows.folder(who.name)
    reference = _reference(said.get("original_ref"))
    path = folder.path(reference["filename"], reference.get("type", "output"), reference.get("subfolder", ""))
    try:
        original = await folder.read(path)
    except FileNotFoundError as error:
        raise NotFound(f"original_ref: there is no {path.name!r}") from error
    masked = await asyncio.to_thread(_masked, original, content)
    kind, overwrite = said.get("type", "input"), said.get("overwrite", "").lower() in ("true", "1")
    return await folder.upload(masked, filename, kind, said.get("subfolder", ""), overwrite)


def _reference(text: str | None) -> dict[str, str]:
    found = parse_json((text or "").encode())
    if not isinstance(found.get("filename"), str) or not all(isinstance(each, str) for each in found.values()):
        raise RequestError("original_ref: expected an object with filename, subfolder and type", field="original_ref")
    return found


def _masked(original: bytes, mask: bytes) -> bytes:
    """The original's colours and texts, and the alpha of the mask."""
    from PIL.PngImagePlugin import PngInfo

    opened = _opened(original)
    texts = PngInfo()
    for name, text in getattr(opened, "text", {}).items():  # a saved image has its workflow in them
        texts.add_text(name, text)
    image = opened.convert("RGBA")
    alpha = _opened(mask).convert("RGBA").getchannel("A")
    image.putalpha(alpha.resize(image.size) if alpha.size != image.size else alpha)
    encoded = io.BytesIO()
    image.save(encoded, "PNG", compress_level=4, pnginfo=texts)
    return encoded.getvalue()


async def _read(request: Request, workflows: WorkflowsOf) -> tuple[bytes, str, dict[str, str]]:
    """An upload: the image's content, its name, and the form's texts. Raises RequestError."""
    form = await read_form(request)
    image = form.get("image")
    if not isinstance(image, UploadFile):
        raise RequestError("image: expected a file in a multipart form, got none", field="image")
    content = await image.read()
    await asyncio.to_thread(_check_image, content, workflows.config.limits.max_input_pixels)
    said = {name: value for name, value in form.items() if isinstance(value, str)}
    name = (image.filename or "image.png").replace("\\", "/").rpartition("/")[2][-MAX_NAME:]
    return content, name, said


def _check_image(content: bytes, most: int) -> None:
    from PIL import Image

    check_pixels(content, "image", most)
    try:
        with Image.open(io.BytesIO(content), formats=FORMATS) as opened:
            opened.verify()
    except Exception as error:  # Pillow has no error of its own for damaged files, and some name an address
        raise RequestError(f"image: expected a whole file of {', '.join(FORMATS)}", field="image") from error
