"""Replaces a bundle by a new one atomically."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from zimage_rt.atomic_write import sync_folder
from zimage_rt.bundle.folders import find_leftovers, new_prefix, old_prefix

from .errors import ExportError, disk_error

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # of fcntl.h and linux/fs.h


@contextlib.contextmanager
def replacing(out: Path) -> Iterator[Path]:
    """Yields a temporary folder that replaces `out` when the block succeeds, and is deleted when it fails.

    If the system can exchange two names, a whole bundle has the name `out` at every instant.

    Raises:
        ExportError: `out` is not a bundle, or the disk is full or read-only.
    """
    out = out.absolute()
    if out.exists() and not (out / "manifest.json").is_file() and (not out.is_dir() or any(out.iterdir())):
        raise ExportError(f"{out} exists and is not a bundle; it is left alone: choose another --out")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(out)
        folder = Path(tempfile.mkdtemp(prefix=f"{new_prefix(out)}{os.getpid()}-", dir=out.parent))
        folder.chmod(0o755)
    except OSError as error:
        raise ExportError(f"{out} cannot be written: {error}") from error
    try:
        yield folder
        _sync(folder)
        _swap(folder, out)
        sync_folder(out.parent)
    except OSError as error:
        known = disk_error(error, folder / "x")
        raise (ExportError(f"the export to {out} failed: {error}") if known is error else known) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _swap(folder: Path, out: Path) -> None:
    """Renames `folder` to `out` and deletes the old `out`."""
    if not out.exists():
        folder.rename(out)
        return
    old = out.parent / f"{old_prefix(out)}{os.getpid()}"
    if exchange(folder, out):
        folder.rename(old)  # after a crash from here on it is not mistaken for an unfinished bundle
    else:
        out.rename(old)
        folder.rename(out)
    shutil.rmtree(old, ignore_errors=True)


def exchange(one: Path, other: Path) -> bool:
    """Exchanges the names of two folders atomically; False if the system or the file system cannot.

    Raises OSError: another failure; both folders keep their names.
    """
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or glibc before 2.28
        return False
    paths = (os.fsencode(one), os.fsencode(other))
    if renameat2(_AT_FDCWD, paths[0], _AT_FDCWD, paths[1], _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def _remove_stale(out: Path) -> None:
    """Deletes temporary folders of killed exports; restores an old bundle that was moved and not replaced."""
    for path in out.parent.glob(f"{old_prefix(out)}*"):
        if not out.exists():  # killed between two renames
            path.rename(out)
    for path in find_leftovers(out):
        shutil.rmtree(path, ignore_errors=True)


def _sync(folder: Path) -> None:
    """Flushes a folder and its files to the disk."""
    for path in (*(path for path in folder.iterdir() if path.is_file()), folder):
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
