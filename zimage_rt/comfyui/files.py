"""The files that workflows name: models stand for bundles, LoRAs and images lie in folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from .inputs import InputError


class FolderFiles:
    """Files by configuration.

    Args:
        bundles: the names of bundles by the files that stand for them, with or without folder and ending.
        default: the bundle of every other file; None refuses them.
        loras: the folder of LoRAs, or None.
        images: the folders of input images, the first first.
        upscalers: the folder of upscale models, or None.
    """

    def __init__(
        self,
        bundles: Mapping[str, str],
        default: str | None,
        loras: Path | None,
        images: tuple[Path, ...],
        upscalers: Path | None = None,
    ) -> None:
        self._bundles, self._default, self._loras, self._images = dict(bundles), default, loras, images
        self._upscalers = upscalers

    def bundle(self, folder: str, name: str) -> str:
        """See `Files`."""
        path = PurePosixPath(name.replace("\\", "/"))
        for key in (name, path.name, path.stem):
            if key in self._bundles:
                return self._bundles[key]
        if self._default is None:
            known = ", ".join(self._bundles) or "none"
            raise InputError(
                "value_not_in_list",
                f"no bundle stands for {name!r} of {folder}; there are: {known}. Add -b FILE=BUNDLE",
            )
        return self._default

    def lora(self, name: str) -> Path:
        """See `Files`."""
        found = find_file(name, () if self._loras is None else (self._loras,))
        if found is None:
            where = "there is no folder of LoRAs; name one with --loras" if self._loras is None else str(self._loras)
            raise InputError("value_not_in_list", f"there is no LoRA {name!r}: {where}")
        return found

    def image(self, name: str) -> bytes:
        """See `Files`; ` [input]` and the like at the end of a name are ComfyUI's folders."""
        found = find_file(plain_name(name), self._images)
        if found is None:
            folders = ", ".join(str(folder) for folder in self._images)
            raise InputError(
                "value_not_in_list", f"there is no image {name!r} in {folders}; name a folder with --input"
            )
        return read_image(found, name)

    def upscaler(self, name: str) -> Path:
        """See `Files`."""
        found = find_file(name, () if self._upscalers is None else (self._upscalers,))
        if found is None:
            where = "name their folder with --upscalers" if self._upscalers is None else str(self._upscalers)
            raise InputError("value_not_in_list", f"there is no upscale model {name!r}: {where}")
        return found


def plain_name(name: str) -> str:
    """The name of an input image without the folder that ComfyUI writes behind it."""
    return name.removesuffix(" [input]").removesuffix(" [output]").removesuffix(" [temp]")


def read_image(path: Path, name: str) -> bytes:
    """The content of an input image's file. Raises InputError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError("value_not_in_list", f"{name!r} cannot be read: {error.strerror or error}") from error


def find_file(name: str, folders: tuple[Path, ...]) -> Path | None:
    """A file of a folder; names that lead out of it are not found."""
    relative = PurePosixPath(name.replace("\\", "/"))
    if relative.is_absolute() or ".." in relative.parts or not relative.parts:
        return None
    paths = (folder / relative for folder in folders)
    return next((path for path in paths if path.is_file()), None)
