"""The folders that an export makes beside a bundle, and what a killed one leaves of them."""

from __future__ import annotations

from pathlib import Path


def new_prefix(bundle: Path) -> str:
    """What the name of the folder that is being written begins with; the process's number follows."""
    return f".{bundle.name}.new-"


def old_prefix(bundle: Path) -> str:
    """What the name of the bundle that is being replaced begins with."""
    return f".{bundle.name}.old-"


def find_leftovers(bundle: Path) -> list[Path]:
    """Folders of exports that do not run any more: an unfinished bundle, or one that was replaced."""
    bundle = bundle.absolute()
    prefixes = (new_prefix(bundle), old_prefix(bundle))
    found = [path for path in bundle.parent.glob(f".{bundle.name}.*") if path.name.startswith(prefixes)]
    return sorted(path for path in found if not _is_in_use(path))


def _is_in_use(path: Path) -> bool:
    """Whether the process that made a folder of an export still runs."""
    process = path.name.rpartition(".")[2].partition("-")[2].partition("-")[0]
    return process.isdigit() and Path(f"/proc/{process}").exists()
