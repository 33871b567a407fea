"""Files that are whole or not there at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_whole(path: Path, content: bytes, *, replace: bool = True) -> None:
    """Write a file under a temporary name, then rename it: no reader, and no crash, sees half of it.

    It is on the disk, its name too, when this returns.

    Raises:
        FileExistsError: the name is taken, and `replace` is False.
        OSError: the folder is missing or cannot be written, or the disk is full; nothing is left behind.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if replace:
            temporary.replace(path)
        else:
            _link(temporary, path)
            temporary.unlink(missing_ok=True)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _link(source: Path, path: Path) -> None:
    """Give a file another name, if that is free: of several who try at once, one may."""
    try:
        os.link(source, path)
    except FileExistsError:
        raise
    except OSError:  # a file system without links, as memory cards have: the next best
        with path.open("xb"):
            pass
        source.replace(path)


def sync_folder(folder: Path) -> None:
    """Bring a folder's names to the disk: without it a rename may be lost with the power."""
    if os.name != "posix":  # elsewhere a folder cannot be opened
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
