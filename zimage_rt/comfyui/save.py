"""Saving a workflow's images as ComfyUI does: their names, and the workflow inside."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from ..atomic_write import atomic_write
from ..image.formats import encode_image
from .graph import Graph, Link, WorkflowError
from .inputs import InputError
from .prefix import NO_NAME, place_of_prefix
from .run import Made


def save_images(made: Sequence[Made], graph: Graph, folder: Path) -> list[Path]:
    """Write images as `PREFIX_00001_.png`, numbered on from those that are there; the files in their order.

    Previews go to the folder `temp` of it. Raises WorkflowError for a prefix that leads out of the folder.
    """
    text = json.dumps(to_api(graph), ensure_ascii=False)
    places = [place_of(image) for image in made]  # all of them before one is written
    saved = []
    for image, relative in zip(made, places, strict=True):
        place = (folder / "temp" if image.is_preview else folder) / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        path = place.with_name(file_name(place.name, next_number(place.parent, place.name)))
        atomic_write(path, encode_image(image.pixels, ".png", {"prompt": text}, ""))
        saved.append(path)
    return saved


def file_name(prefix: str, number: int) -> str:
    """The name of an image's file."""
    return f"{prefix.removeprefix(NO_NAME)}_{number:05}_.png"


def place_of(image: Made) -> PurePosixPath:
    """The file of an image in the folder of images, without its number and ending. Raises WorkflowError."""
    now = time.localtime()
    words = {"width": image.pixels.shape[1], "height": image.pixels.shape[0]}
    words |= {"year": now.tm_year, "month": f"{now.tm_mon:02}", "day": f"{now.tm_mday:02}"}
    words |= {"hour": f"{now.tm_hour:02}", "minute": f"{now.tm_min:02}", "second": f"{now.tm_sec:02}"}
    prefix = re.sub(r"%(\w+)%", lambda found: str(words.get(found[1], found[0])), image.prefix)
    try:
        return place_of_prefix(prefix)
    except InputError as error:
        raise WorkflowError(f"filename_prefix of #{image.node}: {error}") from error


def next_number(folder: Path, prefix: str) -> int:
    """The number after the largest that the images of a prefix have in a folder; 1 if there are none."""
    pattern = re.compile(rf"{re.escape(prefix.removeprefix(NO_NAME))}_(\d+)_?\.\w+")
    found = (pattern.fullmatch(path.name) for path in folder.iterdir())
    return max((int(match[1]) for match in found if match), default=0) + 1


def to_api(graph: Graph) -> dict[str, dict[str, object]]:
    """A graph in API format."""
    return {
        node.id: {
            "class_type": node.kind,
            "inputs": {
                name: [value.node, value.output] if isinstance(value, Link) else value
                for name, value in node.inputs.items()
            },
            **({"_meta": {"title": node.title}} if node.title else {}),
        }
        for node in graph.values()
    }
