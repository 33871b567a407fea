"""What the editor keeps per user: its settings, and files such as saved workflows, in the owner's folder `user`.

The names are ComfyUI's: what is in its `user/default` may be copied here.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from ...atomic_write import MAX_NAME, atomic_write
from ...checks import shown
from ...errors import RequestError
from ..errors import AlreadyExists, Forbidden, NotFound, TooLarge
from ..store import StorageFull

FOLDER, SETTINGS = "user", "comfy.settings.json"
# Folders in a path.
MAX_PARTS = 8
# Bytes of a file, bytes of all files of an owner, their number, and the number of settings.
MAX_FILE, MAX_BYTES, MAX_FILES, MAX_SETTINGS = 32 << 20, 512 << 20, 10_000, 5000


class UserData:
    """The editor's files of one owner. Used from the event loop's thread; what is slow runs on another."""

    def __init__(self, owner_folder: Path) -> None:
        self.root = owner_folder / FOLDER
        self._lock = asyncio.Lock()  # of all that changes a file

    # --- settings ---------------------------------------------------------------------------------------------------

    async def settings(self) -> dict[str, Any]:
        """All settings; none if the file is damaged."""
        return await asyncio.to_thread(self._read_settings)

    def _read_settings(self) -> dict[str, Any]:
        try:
            found = json.loads((self.root / SETTINGS).read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}

    async def change_settings(self, changes: Mapping[str, Any]) -> None:
        """Change some settings. Raises RequestError, TooLarge, StorageFull."""

        def change() -> None:
            settings = {**self._read_settings(), **changes}
            if len(settings) > MAX_SETTINGS or any(len(name) > MAX_NAME for name in changes):
                raise RequestError(f"settings: expected at most {MAX_SETTINGS}, whose names have {MAX_NAME} characters")
            self._write(self.root / SETTINGS, json.dumps(settings, indent=4).encode())

        async with self._lock:
            await asyncio.to_thread(change)

    # --- files ------------------------------------------------------------------------------------------------------

    def path(self, name: str) -> Path:
        """The path of a file or folder. Raises Forbidden for a name that leads elsewhere or is no name."""
        place = PurePosixPath(name.replace("\\", "/"))
        is_plain = name.isprintable() and not place.is_absolute() and ".." not in place.parts
        if (
            not is_plain
            or len(place.parts) > MAX_PARTS
            or any(len(os.fsencode(part)) > MAX_NAME for part in place.parts)
        ):
            raise _elsewhere(name)
        return self.root / place

    async def read(self, name: str) -> bytes:
        """The content of a file. Raises NotFound, Forbidden."""
        path = self.path(name)
        try:
            return await asyncio.to_thread(path.read_bytes)
        except OSError as error:
            raise NotFound(f"file: there is no {shown(name)}") from error

    async def write(self, name: str, content: bytes, *, overwrite: bool) -> Path:
        """Write a file. Raises AlreadyExists, Forbidden, TooLarge, StorageFull."""
        path = self.path(name)

        def write() -> None:
            if not overwrite and path.exists():
                raise AlreadyExists(f"file: {shown(name)} exists; send overwrite=true, or another name")
            self._write(path, content)

        async with self._lock:
            await asyncio.to_thread(write)
        return path

    async def move(self, name: str, target: str, *, overwrite: bool) -> Path:
        """Rename a file. Raises NotFound, AlreadyExists, Forbidden, StorageFull."""
        source, path = self.path(name), self.path(target)

        def move() -> None:
            if not source.is_file():
                raise NotFound(f"file: there is no {shown(name)}")
            if not overwrite and path.exists():
                raise AlreadyExists(f"file: {shown(target)} exists; send overwrite=true, or another name")
            with _kept(target):
                path.parent.mkdir(parents=True, exist_ok=True)
                source.replace(path)

        async with self._lock:
            await asyncio.to_thread(move)
        return path

    async def remove(self, name: str) -> None:
        """Remove a file. Raises NotFound, Forbidden."""
        path = self.path(name)
        async with self._lock:
            try:
                await asyncio.to_thread(path.unlink)
            except OSError as error:
                raise NotFound(f"file: there is no {shown(name)}") from error

    async def listed(self, name: str, *, recurse: bool) -> tuple[Path, list[Path]]:
        """A folder, and the files in it by name, with `recurse` in its folders too. Raises NotFound, Forbidden."""
        folder = self.path(name)
        if not folder.is_dir():
            raise NotFound(f"dir: there is no folder {shown(name)}")
        found = await asyncio.to_thread(lambda: [path for path in below(folder, recurse=recurse) if path.is_file()])
        return folder, sorted(found)

    async def entries(self, name: str) -> list[dict[str, Any]]:
        """The folders and then the files below a folder, as `/v2/userdata` lists them. Raises NotFound, Forbidden."""
        folder = self.path(name)
        if not folder.is_dir():
            if folder == self.root:
                return []
            raise NotFound(f"path: there is no folder {shown(name)}")

        def entry(path: Path) -> dict[str, Any]:
            said = {"name": path.name, "path": path.relative_to(self.root).as_posix()}
            if path.is_dir():
                return {**said, "type": "directory"}
            found = path.stat()
            return {**said, "type": "file", "size": found.st_size, "modified": found.st_mtime}

        found = await asyncio.to_thread(lambda: [entry(path) for path in below(folder, recurse=True)])
        return sorted(found, key=lambda each: (each["type"] != "directory", each["name"].lower()))

    def _write(self, path: Path, content: bytes) -> None:
        if len(content) > MAX_FILE:
            raise TooLarge(f"file: expected at most {MAX_FILE} bytes, got {len(content)}")
        others = [each for each in self.root.rglob("*") if each.is_file() and each != path]
        kept = sum(each.stat().st_size for each in others)
        if len(others) >= MAX_FILES or kept + len(content) > MAX_BYTES:
            raise StorageFull(f"file: a user may keep {MAX_FILES} files of {MAX_BYTES} bytes; delete some")
        with _kept(path.name):
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(path, content)


@contextlib.contextmanager
def _kept(name: str) -> Iterator[None]:
    """Raise the service's errors for those of the file system."""
    try:
        yield
    except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:  # a file is in a folder's place
        raise _elsewhere(name) from error
    except OSError as error:
        raise StorageFull(f"file: {shown(name)} cannot be kept: {error.strerror or error}") from error


def _elsewhere(name: str) -> Forbidden:
    return Forbidden(f"file: expected the name of a file below the user's folder, got {shown(name)}")


def below(folder: Path, *, recurse: bool) -> Iterator[Path]:
    """What is in a folder, with `recurse` in its folders too, but nothing hidden: as ComfyUI lists it."""
    try:
        found = sorted(folder.iterdir())
    except OSError:
        return
    for path in found:
        if path.name.startswith("."):
            continue
        yield path
        if recurse and path.is_dir() and not path.is_symlink():
            yield from below(path, recurse=True)


def file_info(path: Path, folder: Path) -> dict[str, Any]:
    """A file as the editor lists it: its path below a folder, bytes, and times in milliseconds."""
    found = path.stat()
    return {
        "path": path.relative_to(folder).as_posix(),
        "size": found.st_size,
        "modified": int(found.st_mtime * 1000),
        "created": int(found.st_ctime * 1000),
    }
