"""Errors of the exporter."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import ClassVar

from zimage_rt.errors import ZImageError


class ExportError(ZImageError):
    """Base of the exporter's errors; an older bundle at the target is untouched."""

    code: ClassVar[str] = "export"


class RecipeError(ExportError):
    """The recipe or the command line has an unknown or impossible setting."""

    code: ClassVar[str] = "recipe"


class CheckpointError(ExportError):
    """The checkpoint is missing, damaged, or not a Z-Image checkpoint."""

    code: ClassVar[str] = "checkpoint"


class TensorError(CheckpointError):
    """A tensor of the checkpoint is missing, wrongly shaped, or does not fit the bundle's precision."""

    code: ClassVar[str] = "tensor"


class ReaderUnavailable(CheckpointError):
    """The library that reads this kind of file is not installed; the message names the extra."""

    code: ClassVar[str] = "reader_unavailable"


class ParityError(ExportError):
    """An exported module differs from its reference by more than the tolerance."""

    code: ClassVar[str] = "parity"


class BuilderUnavailable(ExportError):
    """The library that builds engines is not installed or does not run here; the message names the package."""

    code: ClassVar[str] = "builder_unavailable"


class BuildError(ExportError):
    """A library could not build an engine of a module; the message quotes it."""

    code: ClassVar[str] = "build"


class BuildMemoryError(BuildError):
    """The machine has too little memory to build an engine."""

    code: ClassVar[str] = "build_memory"


class DiskFullError(ExportError):
    """The disk under the bundle is full."""

    code: ClassVar[str] = "disk_full"


def disk_error(error: OSError, path: Path) -> Exception:
    """`DiskFullError` for a full disk, otherwise `error` itself; `path` is a file in the bundle's temporary folder."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            f"no space left on the disk of {path.parent.parent}; free some or choose another --out "
            "(the old bundle, if there was one, is untouched)"
        )
    return error
