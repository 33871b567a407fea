"""The files that workflows name: models stand for bundles, LoRAs and images lie in folders."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath

from ..checks import shown
from .inputs import InputError

# Endings of the files that ComfyUI lists in its loaders, and that of ComfyUI-GGUF.
EXTENSIONS = (".safetensors", ".sft", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
# ComfyUI's older names of folders.
FORMER_FOLDERS: Mapping[str, str] = {"unet": "diffusion_models", "clip": "text_encoders"}
# Names of files that a message lists.
MAX_LISTED = 60


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
        found = named(self._bundles, name) or self._default
        if found is None:
            known = ", ".join(self._bundles) or "none"
            raise InputError(
                "value_not_in_list",
                f"no bundle stands for {name!r} of {folder}; there are: {known}. Add -b FILE=BUNDLE",
            )
        return found

    def lora(self, name: str) -> Path:
        """See `Files`."""
        found = find_file(name, () if self._loras is None else (self._loras,))
        if found is None:
            where = "there is no folder of LoRAs; name one with --loras" if self._loras is None else there(self._loras)
            raise InputError("value_not_in_list", f"there is no LoRA {shown(name)}: {where}")
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
            where = "name their folder with --upscalers" if self._upscalers is None else there(self._upscalers)
            raise InputError("value_not_in_list", f"there is no upscale model {shown(name)}: {where}")
        return found


def named(bundles: Mapping[str, str], file: str) -> str | None:
    """The bundle that stands for a file, by its name as it is, without folder, or without ending too; None if none."""
    path = PurePosixPath(file.replace("\\", "/"))
    return next((bundles[key] for key in (file, path.name, path.stem) if key in bundles), None)


def plain_name(name: str) -> str:
    """The name of an input image without the folder that ComfyUI writes behind it."""
    return name.removesuffix(" [input]").removesuffix(" [output]").removesuffix(" [temp]")


def read_image(path: Path, name: str) -> bytes:
    """The content of an input image's file. Raises InputError."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError("value_not_in_list", f"{name!r} cannot be read: {error.strerror or error}") from error


def find_file(name: str, folders: Sequence[Path]) -> Path | None:
    """A file of the first folder that has it; names that lead out of it are not found.

    Either separator parts a name's folders.
    """
    relative = relative_name(name)
    if relative is None:
        return None
    for folder in folders:
        try:
            if (folder / relative).is_file():
                return folder / relative
        except (OSError, ValueError):  # a name that no file can have: too long, or a lone surrogate
            return None
    return None


def relative_name(name: str) -> str | None:
    """A file's name inside its folder, with `/` between its parts; None if it leads out of the folder."""
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or not path.parts or PureWindowsPath(name).drive:
        return None
    return path.as_posix()


def list_files(folders: Sequence[Path], extensions: Sequence[str] = EXTENSIONS) -> list[str]:
    """The names of the files of folders and of all folders in them, sorted, as ComfyUI's loaders list them."""
    return sorted({name for folder in folders for name in _names(folder) if name.lower().endswith(tuple(extensions))})


def _names(folder: Path) -> Iterator[str]:
    seen: set[str] = set()
    for place, folders, files in os.walk(folder, followlinks=True):
        seen.add(os.path.realpath(place))
        # Links that lead back into a folder above would never end.
        folders[:] = [each for each in folders if os.path.realpath(Path(place, each)) not in seen and each != ".git"]
        yield from (Path(place, file).relative_to(folder).as_posix() for file in files)


def there(*folders: Path) -> str:
    """The files of folders for a message."""
    names = list_files(folders)
    more = "" if len(names) <= MAX_LISTED else f" and {len(names) - MAX_LISTED} more"
    return f"{' and '.join(map(str, folders))} has {', '.join(names[:MAX_LISTED]) or 'none'}{more}"
