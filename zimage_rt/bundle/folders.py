"""Temporary folders that an export makes beside a bundle, and those that a killed export has left."""

from __future__ import annotations

from pathlib import Path


def new_prefix(bundle: Path) -> str:
    """The prefix of the folder that an export writes to; the process id follows."""
    return f".{bundle.name}.new-"


def old_prefix(bundle: Path) -> str:
    """The prefix of the folder that the replaced bundle is renamed to; the process id follows."""
    return f".{bundle.name}.old-"


def find_leftovers(bundle: Path) -> list[Path]:
    """Folders of exports that no longer run: unfinished or replaced bundles."""
    bundle = bundle.absolute()
    prefixes = (new_prefix(bundle), old_prefix(bundle))
    found = [path for path in bundle.parent.glob(f".{bundle.name}.*") if path.name.startswith(prefixes)]
    return sorted(path for path in found if not _is_in_use(path))


def _is_in_use(path: Path) -> bool:
    """Whether the process that made a folder is still running."""
    process = path.name.rpartition(".")[2].partition("-")[2].partition("-")[0]
    return process.isdigit() and Path(f"/proc/{process}").exists()
