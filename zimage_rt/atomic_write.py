"""Atomic file writes: a name has the complete new file, or is unchanged."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from collections.abc import Mapping
from pathlib import Path

from .errors import RequestError

# Bytes per name. File systems allow 255; temporary names and added numbers are longer than the name itself.
MAX_NAME = 200


def atomic_write(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write a file under a temporary name, then rename it, so that no reader and no crash sees half of it.

    The content and the name are on the disk when this returns.

    Raises:
        FileExistsError: the name is taken, and `replace` is False.
        OSError: the folder is missing or cannot be written, or the disk is full; it names the file. No temporary file
            is left.
    """
    atomic_write_all({path: content}, replace=replace)


def atomic_write_all(contents: Mapping[Path, bytes], *, replace: bool = True) -> None:
    """Write files of one folder as `atomic_write` does, all or none; they are renamed in order.

    All are on the disk under temporary names before the first is renamed, so that a full disk changes none of them.

    Raises the errors of `atomic_write`.
    """
    temporary = {path: path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp") for path in contents}
    linked: list[Path] = []
    path = next(iter(contents))
    try:
        for path, content in contents.items():
            with temporary[path].open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for path in contents:
            if replace:
                temporary[path].replace(path)
            else:
                _link(temporary[path], path)
                linked.append(path)
                temporary[path].unlink(missing_ok=True)
    except BaseException as error:
        with contextlib.suppress(OSError):
            for name in (*temporary.values(), *linked):
                name.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise named_error(error, path) from error
        raise
    sync_folder(path.parent)


def named_error(error: OSError, path: Path) -> OSError:
    """The same error with the name of the file: Python's error for a full disk has none."""
    if error.errno is None:
        return error
    return OSError(error.errno, error.strerror or os.strerror(error.errno), str(path))


def check_path(path: Path) -> None:
    """Raise RequestError unless a file or folder can have that name on this system."""
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError("a zero byte is in it")
    except ValueError as error:  # also a lone surrogate
        raise RequestError(f"output: expected a path, got {str(path)!r} ({error})") from error
    for part in path.parts:
        if len(os.fsencode(part)) > MAX_NAME:
            raise RequestError(f"output: {part} is too long a name; choose one of at most {MAX_NAME} bytes")


def check_folder(folder: Path) -> None:
    """Raise RequestError unless a folder can be written, or created. Leaves no files."""
    check_path(folder)
    place = folder
    try:
        while not place.exists():
            if place.is_symlink():
                raise RequestError(f"output: {place} is a link that leads nowhere; choose another folder")
            place = place.parent
        if not place.is_dir():
            raise RequestError(f"output: expected a folder, got {place}, which is a file; choose another name")
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        raise RequestError(
            f"output: {folder} cannot be written ({place}: {error.strerror}); choose another folder"
        ) from error


def _link(source: Path, path: Path) -> None:
    """Link a file to a second name, which must be free; of several concurrent calls one succeeds."""
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links, such as FAT: create the name exclusively, then replace it
        with path.open("xb"):
            pass
        source.replace(path)


def sync_folder(folder: Path) -> None:
    """Flush a folder's names to the disk; otherwise a rename may be lost in a power failure."""
    if os.name != "posix":  # other systems cannot open a folder
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
