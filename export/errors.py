"""The errors the exporter raises on purpose."""

from __future__ import annotations

import errno
from pathlib import Path

from zimage_rt.errors import ZImageError


class ExportError(ZImageError):
    """Base of every error of the exporter; nothing was written where the bundle should be."""


class RecipeError(ExportError):
    """The recipe or the command line asks for something unknown or impossible."""


class CheckpointError(ExportError):
    """The checkpoint is missing, damaged, or not a Z-Image checkpoint."""


class TensorError(CheckpointError):
    """A tensor of the checkpoint is missing, wrongly shaped, or does not fit the bundle's precision."""


class ReaderUnavailable(CheckpointError):
    """The library that reads this kind of file is not installed; the message names the extra."""


class ParityError(ExportError):
    """An exported module does not compute what its reference computes."""


class BuilderUnavailable(ExportError):
    """The library that builds engines is not installed, or does not run here; the message names what to install."""


class BuildError(ExportError):
    """A library could not build an engine of a module; the message has its own words."""


class BuildMemoryError(BuildError):
    """Building an engine took more memory than there is."""


class DiskFullError(ExportError):
    """The disk under the bundle is full."""


def disk_error(error: OSError, path: Path) -> Exception:
    """The typed error for a full disk; any other error as it is."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return DiskFullError(
            f"no space left on the disk of {path.parent.parent}; free some or choose another --out "
            "(the old bundle, if there was one, is untouched)"
        )
    return error
