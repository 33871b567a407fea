"""The prefix of a saved image's file: `scenes/fox` is the file `fox_00001_.png` in the folder `scenes`."""

from __future__ import annotations

import dataclasses
from pathlib import PurePosixPath
from typing import Any

from ..checks import shown
from .inputs import InputError, Text

# Bytes of a name without its number and of a folder's: file systems take 255 in all. Folders of a prefix.
MAX_NAME, MAX_FOLDERS = 200, 8
# Stands for a file without a name of its own; no prefix can have it.
NO_NAME = "\x00"


@dataclasses.dataclass(frozen=True)
class Prefix(Text):
    """An input that is a prefix."""

    def check(self, value: Any) -> str:
        """See `Spec`."""
        text = super().check(value)
        place_of_prefix(text)
        return text


def place_of_prefix(prefix: str) -> PurePosixPath:
    """A file below the folder of images, without its number and ending. Raises InputError for one that is elsewhere.

    An empty name is as good as another: ComfyUI's files are then `_00001_.png`.
    """
    text = prefix.replace("\\", "/")
    folders, _, name = text.rpartition("/")
    parts = [part for part in folders.split("/") if part not in ("", ".")]
    problem = None
    if not text.isprintable():
        problem = "printable characters"
    elif text.startswith("/") or ".." in (*parts, name):
        problem = "a name in the output folder"
    elif len(parts) > MAX_FOLDERS:
        problem = f"at most {MAX_FOLDERS} folders"
    elif any(len(part.encode()) > MAX_NAME for part in (*parts, name)):
        problem = f"names of at most {MAX_NAME} bytes"
    if problem is not None:
        raise InputError("value_not_in_list", f"expected {problem}, got {shown(prefix)}")
    return PurePosixPath(*parts, name) if name else PurePosixPath(*parts, NO_NAME)
