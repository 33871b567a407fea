"""Imports between the rooms of a package, read from its sources."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path


def levels_of(order: Sequence[Sequence[str]]) -> dict[str, int]:
    """Room or module name → its level, from an order that begins with the lowest level."""
    return {name: level for level, names in enumerate(order) for name in names}


def room_of(path: Path, folder: Path) -> str:
    """The room of a file, or the name of a module at the package's top."""
    return path.relative_to(folder).parts[0].removesuffix(".py")


def imports(path: Path, folder: Path, package: str) -> Iterator[tuple[str, int]]:
    """Yields (imported room, line) for each name that a file imports from its own package.

    Args:
        path: a Python file below `folder`.
        folder: the package's folder.
        package: the package's dotted name.
    """
    own = [*package.split("."), *path.relative_to(folder).parts[:-1]]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            base = own[: len(own) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            names = [f"{module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            if name.startswith(f"{package}."):
                yield name.removeprefix(f"{package}.").split(".")[0], node.lineno


def upward_imports(path: Path, folder: Path, package: str, level: Mapping[str, int]) -> list[str]:
    """`LINE: imports ROOM` for each import of a room that is not below the file's own; level 0 is open to itself."""
    own = room_of(path, folder)
    return [
        f"{line}: imports {name}"
        for name, line in imports(path, folder, package)
        if name != own and not level[name] < level[own] and not level[name] == level[own] == 0
    ]
