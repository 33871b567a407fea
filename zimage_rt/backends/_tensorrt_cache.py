"""TensorRT-RTX's runtime cache on disk: the kernels that were compiled for a plan on one GPU.

A cache has machine code, and no manifest has its hash. So it is never read from a bundle, which may be untrusted. It
is read only if it belongs to the user of this process and nobody else can write it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import stat
import tempfile
from pathlib import Path

log = logging.getLogger(__name__)

USER_FOLDER = "~/.cache/zimage_rt"


def cache_folder(bundle: Path, cache_dir: str | Path | None) -> Path | None:
    """The folder of a bundle's caches, or None if there is none that can be written.

    `beside` means `NAME.cache` beside the bundle, or `~/.cache/zimage_rt` if that cannot be written (a read-only disk,
    another user's folder). A path means only that folder; None means no cache.
    """
    if cache_dir is None:
        return None
    bundle = bundle.resolve()
    if cache_dir == "beside":
        candidates = [bundle.parent / f"{bundle.name}.cache", Path(USER_FOLDER).expanduser()]
    else:
        candidates = [Path(cache_dir).expanduser()]
    found = next((folder for folder in candidates if _is_usable(folder)), None)
    if found is None:
        tried = " and ".join(map(str, candidates))
        log.warning("compiled kernels are not cached: %s cannot be written, or others can write there", tried)
    elif found != candidates[0]:
        log.warning("compiled kernels are cached in %s: %s cannot be used", found, candidates[0])
    return found


def _is_usable(folder: Path) -> bool:
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK | os.X_OK) and _is_ours(folder)


def _is_ours(path: Path) -> bool:
    """Whether a file belongs to this user and nobody else can write it."""
    try:
        status = path.stat()
    except OSError:
        return False
    return status.st_uid == os.getuid() and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def cache_file(folder: Path, plan_sha256: str, *system: str) -> Path:
    """The cache file of a plan on one system (library version, GPU, driver), the only one that it is valid for."""
    name = hashlib.sha256("\0".join((plan_sha256, *system)).encode()).hexdigest()[:32]
    return folder / f"tensorrt_rtx-{name}.bin"


def read_cache(path: Path) -> bytes:
    """The bytes of the cache, empty if there is none or it is not trusted."""
    if path.is_symlink() or not _is_ours(path):
        return b""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def write_cache(path: Path, data: bytes) -> None:
    """Replace the cache atomically. If that fails, as on a full disk, it is logged and the request continues."""
    try:
        # Files of mkstemp can be read and written by this user only.
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
            Path(name).replace(path)
        except OSError:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        log.warning("%s: compiled kernels were not saved: %s", path, error)
