"""Size and hash checks of a bundle's files, before a file is first read."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ..errors import BundleMismatch
from .manifest import FileEntry, Manifest

log = logging.getLogger(__name__)

# Bytes per read when hashing.
_CHUNK = 8 << 20


class BundleFiles:
    """The files of a bundle, each checked against the manifest before its first use.

    Args:
        bundle: the bundle's folder.
        manifest: its manifest.
        verify: hash every file; if False, only sizes are checked.
        modules: the modules that are loaded with the engine, whose files count in the progress.
        on_stage: called with (`hash`, done, total) in bytes as files are read, until `loaded`.
    """

    def __init__(
        self,
        bundle: Path,
        manifest: Manifest,
        verify: bool,
        modules: Sequence[str],
        on_stage: Callable[[str, int, int], object] | None,
    ) -> None:
        self._bundle, self._manifest, self._verify = bundle, manifest, verify
        self._verified: set[str] = set()
        self._on_stage = on_stage
        names = {manifest.tokenizer, *(file for module in modules for file in manifest.module_files(module))}
        self._sizes = {name: manifest.files[name].size for name in names if name in manifest.files}

    def check_module(self, name: str) -> None:
        """Check the files that a module reads. Raises BundleMismatch."""
        for file in self._manifest.module_files(name):
            self.check(file)

    def check(self, file: str) -> None:
        """Check one file. Raises BundleMismatch."""
        if file not in self._manifest.files:
            raise BundleMismatch(f"{file}: not among the manifest's files; export the bundle again")
        # Each file is hashed once: 12 GB take seconds, and two modules may read the same file.
        hashed = self._verify and file not in self._verified
        before = sum(size for name, size in self._sizes.items() if name in self._verified)
        total, read = sum(self._sizes.values()), 0

        def tell(count: int) -> None:
            nonlocal read
            read += count
            if self._on_stage is not None:
                self._on_stage("hash", before + read if file in self._sizes else before, total)

        if hashed:
            tell(0)
        start = time.perf_counter()
        check_file(self._bundle, file, self._manifest.files[file], content=hashed, on_bytes=tell)
        self._verified.add(file)
        log.debug("%s: %s checked in %.3f s", file, "content" if hashed else "size", time.perf_counter() - start)

    def loaded(self) -> None:
        """Stop reporting progress: files that are read from now on belong to a request."""
        self._on_stage = None


def hash_file(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> FileEntry:
    """Size and SHA-256 of a file, which is read in chunks; `on_bytes` is called with the size of each chunk."""
    digest, size, chunk = hashlib.sha256(), 0, memoryview(bytearray(_CHUNK))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(chunk):
            digest.update(chunk[:count])
            size += count
            on_bytes(count)
    return FileEntry(size, digest.hexdigest())


def check_file(
    bundle: Path,
    name: str,
    entry: FileEntry,
    *,
    content: bool = True,
    on_bytes: Callable[[int], object] = lambda count: None,
) -> None:
    """Raise BundleMismatch unless the file exists with its size and, with `content`, its SHA-256."""
    path = bundle / name
    again = "copy the bundle again, or export it again"
    if not path.is_file():
        raise BundleMismatch(f"{path}: the manifest names it, but it is missing; {again}")
    size = path.stat().st_size
    if size != entry.size:
        raise BundleMismatch(f"{path}: expected {entry.size} bytes, got {size}; {again}")
    if content and (actual := hash_file(path, on_bytes).sha256) != entry.sha256:
        raise BundleMismatch(
            f"{path}: expected sha256 {entry.sha256[:16]}…, got {actual[:16]}…: the file was changed; {again}"
        )
