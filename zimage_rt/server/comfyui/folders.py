"""The folders `input`, `output` and `temp` of every owner, and the names of the files in them."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from ...atomic_write import atomic_write
from ...checks import shown
from ...comfyui.files import find_file, plain_name, read_image
from ...comfyui.inputs import InputError
from ...comfyui.save import file_name, next_number
from ...errors import RequestError
from ..store import StorageFull
from .user_data import UserData

FOLDER = "comfyui"
TYPES = ("input", "output", "temp")
# Bytes of a file's name, and folders in a path.
MAX_NAME, MAX_PARTS = 200, 8
# What LoadImage lists.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")

# A file as ComfyUI names it: `filename`, `subfolder`, `type`.
Reference = dict[str, str]


class OwnerFolder:
    """The files of one owner. Used from the event loop's thread; what is slow runs on another.

    Attributes:
        root: the folder.
        user: what the editor keeps in it.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.user = UserData(root)
        self._numbers: dict[tuple[str, str], int] = {}  # the next one, by folder and prefix
        self._writing: dict[Path, bytes] = {}
        self._uploading = threading.Lock()  # two uploads of one name must not find it free both

    def folder(self, kind: str, subfolder: str = "") -> Path:
        """A folder by its type and a path below it. Raises RequestError for one that leads elsewhere."""
        if kind not in TYPES:
            raise RequestError(f"type: expected one of {', '.join(TYPES)}, got {shown(kind)}", field="type")
        parts = PurePosixPath(subfolder.replace("\\", "/"))
        is_long = len(parts.parts) > MAX_PARTS or any(len(each.encode()) > MAX_NAME for each in parts.parts)
        if not _is_plain(subfolder) or parts.is_absolute() or ".." in parts.parts or is_long:
            raise RequestError(f"subfolder: expected a folder below {kind}, got {shown(subfolder)}", field="subfolder")
        return self.root / kind / parts

    def path(self, filename: str, kind: str, subfolder: str = "") -> Path:
        """A file's path. Raises RequestError for a name that leads elsewhere."""
        place = PurePosixPath(filename.replace("\\", "/"))
        is_long = len(place.name.encode("utf-8", "replace")) > MAX_NAME
        if place.is_absolute() or ".." in place.parts or not place.name or not _is_plain(filename) or is_long:
            raise RequestError(f"filename: expected the name of a file, got {shown(filename)}", field="filename")
        return self.folder(kind, "/".join([subfolder, *place.parts[:-1]]).strip("/")) / place.name

    def keep_image(self, place: str, content: bytes, *, is_preview: bool) -> tuple[Reference, asyncio.Future[None]]:
        """Keep an image that a workflow made, under the next number of its name; the future ends when it is written.

        Args:
            place: see `save.place_of`.
            content: of the file.
            is_preview: whether it goes to `temp`.
        """
        kind = "temp" if is_preview else "output"
        parts = PurePosixPath(place)
        subfolder = "" if str(parts.parent) == "." else str(parts.parent)
        folder = self.folder(kind, subfolder)
        key = (str(folder), parts.name)
        if key not in self._numbers:
            self._numbers[key] = next_number(folder, parts.name) if folder.is_dir() else 1
        number = self._numbers[key]
        self._numbers[key] = number + 1
        path = folder / file_name(parts.name, number)
        self._writing[path] = content
        written = asyncio.ensure_future(self._write(path, content))
        return {"filename": path.name, "subfolder": subfolder, "type": kind}, written

    async def _write(self, path: Path, content: bytes) -> None:
        try:
            await asyncio.to_thread(_write, path, content)
        finally:
            self._writing.pop(path, None)

    async def read(self, path: Path) -> bytes:
        """A file's content, also while it is being written. Raises FileNotFoundError."""
        content = self._writing.get(path)
        return content if content is not None else await asyncio.to_thread(_read, path)

    async def upload(self, content: bytes, filename: str, kind: str, subfolder: str, overwrite: bool) -> Reference:
        """Keep an uploaded image; other bytes under a taken name get a number. Raises RequestError, StorageFull."""
        path = self.path(filename, kind, subfolder)

        def keep() -> Path:
            target, number = path, 0
            with self._uploading:
                while not overwrite and target.exists():
                    if target.stat().st_size == len(content) and target.read_bytes() == content:
                        return target
                    number += 1
                    target = path.with_name(f"{path.stem} ({number}){path.suffix}")
                _write(target, content)
            return target

        kept = await asyncio.to_thread(keep)
        below = kept.relative_to(self.root / kind).parent
        return {"name": kept.name, "subfolder": "" if str(below) == "." else str(below), "type": kind}

    def image(self, name: str) -> bytes:
        """The content of an image that a workflow names: of `input`, or of the folder behind its name.

        Raises InputError.
        """
        kind = next((kind for kind in TYPES if name.endswith(f" [{kind}]")), "input")
        plain = plain_name(name)
        writing = self._writing.get(self.root / kind / plain)
        if writing is not None:
            return writing
        found = find_file(plain, (self.root / kind,))
        if found is None:
            raise InputError("value_not_in_list", f"there is no image {name!r} in {kind}; upload it (/upload/image)")
        return read_image(found, name)

    def list_images(self) -> list[str]:
        """The names of the images in `input`, not of its subfolders."""
        folder = self.root / "input"
        if not folder.is_dir():
            return []
        return sorted(path.name for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


class Folders:
    """The folders of all owners, below `comfyui` in the service's data."""

    def __init__(self, data: Path) -> None:
        self.root = data / FOLDER
        self._owners: dict[str, OwnerFolder] = {}

    def of(self, owner: str) -> OwnerFolder:
        """The folder of an owner, whose name may have any character."""
        name = f"key-{hashlib.sha256(owner.encode()).hexdigest()[:16]}" if owner else "local"
        if name not in self._owners:
            self._owners[name] = OwnerFolder(self.root / name)
        return self._owners[name]

    def prune(self, temp_seconds: float, keep_bytes: int) -> None:
        """Remove files of `temp` that are older, and the oldest of an owner's others beyond `keep_bytes`."""
        for owner in self.root.iterdir() if self.root.is_dir() else ():
            for modified, path in _files(owner / "temp"):
                if time.time() - modified > temp_seconds:
                    path.unlink(missing_ok=True)
            kept = 0
            for _, path in sorted([*_files(owner / "input"), *_files(owner / "output")], reverse=True):
                with contextlib.suppress(OSError):
                    kept += path.stat().st_size
                    if kept > keep_bytes:
                        path.unlink()

    def remove_temp(self) -> None:
        """Remove all of `temp`, as ComfyUI does when it starts."""
        for owner in self.root.iterdir() if self.root.is_dir() else ():
            shutil.rmtree(owner / "temp", ignore_errors=True)


def _is_plain(text: str) -> bool:
    return text.isprintable() and "\x00" not in text


def _write(path: Path, content: bytes) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
    except OSError as error:
        raise StorageFull(f"{path.name} cannot be kept: {error.strerror or error}") from error


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FileNotFoundError(path) from error


def _files(folder: Path) -> Iterator[tuple[float, Path]]:
    for path in folder.rglob("*") if folder.is_dir() else ():
        with contextlib.suppress(OSError):
            if path.is_file():
                yield path.stat().st_mtime, path
