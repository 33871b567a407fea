"""The errors the exporter raises on purpose."""

from __future__ import annotations

from typing import ClassVar

from zimage_rt.errors import ZImageError


class ExportError(ZImageError):
    """Base of every error of the exporter; nothing was written where the bundle should be."""

    code: ClassVar[str] = "export"


class RecipeError(ExportError):
    """The recipe or the command line asks for something unknown or impossible."""

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
    """An exported module does not compute what its reference computes."""

    code: ClassVar[str] = "parity"


class BuilderUnavailable(ExportError):
    """The library that builds engines is not installed, or does not run here; the message names what to install."""

    code: ClassVar[str] = "builder_unavailable"


class BuildError(ExportError):
    """A library could not build an engine of a module; the message has its own words."""

    code: ClassVar[str] = "build"


class BuildMemoryError(BuildError):
    """Building an engine took more memory than there is."""

    code: ClassVar[str] = "build_memory"


class DiskFullError(ExportError):
    """The disk under the bundle is full."""

    code: ClassVar[str] = "disk_full"
