"""A models folder in ComfyUI's layout: what a workflow names in it is exported to a bundle once, and kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle.manifest import Manifest
from ..bundle.modules import vae_decoder
from .articles import as_meant
from .files import EXTENSIONS, FORMER_FOLDERS, FolderFiles, find_file, list_files, relative_name, there
from .graph import Graph
from .inputs import InputError
from .kept_bundles import Ingredients, KeptBundles, Tell, state
from .made_parts import (
    WEIGHTS,
    MissingPart,
    find_tokenizer,
    make_tiny_vae,
    make_tokenizer,
    tiny_vae_sources,
    tokenizer_sources,
)
from .model_parts import CHECKPOINTS, Named, Parts, group, is_tiny_vae, names_tiny

# The folder of the bundles in a models folder.
BUNDLES = "zimage_rt"
# ComfyUI's names of folders, and where their files lie; the first that has a file counts.
FOLDERS: Mapping[str, Sequence[str]] = {
    "checkpoints": ("checkpoints",),
    "diffusion_models": ("unet", "diffusion_models"),
    "text_encoders": ("text_encoders", "clip"),
    "vae": ("vae",),
    "vae_approx": ("vae_approx",),
    "loras": ("loras",),
    "model_patches": ("model_patches",),
    "controlnet": ("controlnet", "t2i_adapter"),
    "upscale_models": ("upscale_models",),
}
# The VAE that ComfyUI lists if `vae_approx` has its two files.
TAEF1, PAIR = "taef1", "taef1_encoder and taef1_decoder (.safetensors or .pth)"
FULL, TINY = vae_decoder("full"), vae_decoder("tiny")


class ModelsFolder:
    """A models folder, and the bundles that are made of it.

    Args:
        folder: ComfyUI's `models`.
        bundles: where bundles are kept; None is `zimage_rt` in the folder.
        backend: the backend that bundles are exported for, unless `recipe.toml` beside them names another.

    Raises:
        MissingPart: there is no such folder.
    """

    def __init__(self, folder: Path, bundles: Path | None = None, backend: str = "onnxruntime") -> None:
        if not folder.is_dir():
            raise MissingPart(f"models: expected ComfyUI's models folder, got {folder}, which is none")
        self.folder = folder.absolute()
        self.kept = KeptBundles(bundles.absolute() if bundles is not None else self.folder / BUNDLES)
        self._backend = backend

    def folders(self, name: str) -> tuple[Path, ...]:
        """The folders of the files that ComfyUI lists under one name."""
        return tuple(self.folder / each for each in FOLDERS.get(FORMER_FOLDERS.get(name, name), ()))

    def list(self, name: str) -> Sequence[str]:
        """The files of one of ComfyUI's folders, relative to it and sorted, as its loaders offer them."""
        found = list_files(self.folders(name))
        return [*found, TAEF1] if name == "vae" and self.has_taef1 else found

    @property
    def has_taef1(self) -> bool:
        """Whether `vae_approx` has the two files of TAEF1."""
        return len(tiny_vae_sources(self.folder)) == 2

    def find(self, name: str, file: str) -> Path:
        """A file of one of ComfyUI's folders. Raises InputError, with those that are there."""
        found = find_file(file, self.folders(name)) if file.lower().endswith(EXTENSIONS) else None
        if found is None:
            raise InputError("value_not_in_list", f"there is no {file[:200]!r} in {name}; {there(*self.folders(name))}")
        return found

    def files(self, graph: Graph, others: FolderFiles) -> WorkflowFiles:
        """The files of one workflow; `others` has its images, LoRAs and upscale models.

        Raises ExportFailed: `recipe.toml` cannot be read.
        """
        settings = {"backend": self._backend, **self.kept.settings()}
        meant, _ = as_meant(graph)
        return WorkflowFiles(self, group(meant), names_tiny(meant), settings, others)

    def ingredients(
        self, parts: Parts, own_parts: Mapping[str, Any], is_enough: Callable[[Manifest], bool] = lambda manifest: True
    ) -> Ingredients:
        """The files that a bundle is exported from; tokenizer and tiny VAE are to be made beside the bundles.

        Args:
            parts: the bundle's files.
            own_parts: `[parts]` of `recipe.toml`, which come before those of the models folder.
            is_enough: whether a bundle needs no tiny VAE beside what it has.

        Raises:
            InputError: a file is missing.
            MissingPart: there is no tokenizer, or the text encoder lies in another model's checkpoint.
        """
        if parts.text_encoder[0] == CHECKPOINTS and parts.text_encoder != parts.model:
            raise MissingPart(
                f"the text encoder inside the checkpoint {parts.text_encoder[1]} serves only that checkpoint's own "
                f"model, and {parts.model[1]} needs one from a file: load it with CLIPLoader"
            )
        model = self.find(*parts.model)
        named = {"text_encoder": parts.text_encoder, "vae": parts.vae, "controlnet": parts.controlnet}
        paths = {key: self.find(*file) for key, file in named.items() if file is not None and file != parts.model}
        sources = [model, *paths.values()]
        paths |= {key: self.kept.folder / str(path) for key, path in own_parts.items()}
        sources += [file for key in own_parts for file in _weights(paths[key])]
        weights = [model, *(file for key, path in paths.items() if key != "tokenizer" for file in _weights(path))]
        tiny = [] if "tiny_vae" in own_parts else tiny_vae_sources(self.folder)
        if tiny:
            paths["tiny_vae"] = self.kept.folder / TAEF1
        origin = None if "tokenizer" in own_parts else find_tokenizer(self.folder)
        if origin is not None:
            paths["tokenizer"] = self.kept.folder / "tokenizer"
            sources += tokenizer_sources(origin)

        def make() -> None:
            if tiny:
                make_tiny_vae(tiny, paths["tiny_vae"])
            if origin is not None:
                make_tokenizer(origin, paths["tokenizer"])

        return Ingredients(
            {"checkpoint": str(model), "parts": {key: str(path) for key, path in paths.items()}},
            weights,
            [paths["tiny_vae"] / WEIGHTS] if tiny else [],
            None if origin is None else paths["tokenizer"] / "tokenizer.json",
            {str(path): state(path) for path in sources},
            {str(path): state(path) for path in tiny},
            make,
            is_enough,
        )


def _weights(path: Path) -> Sequence[Path]:
    """The weight files of a part, which is a file or diffusers' folder."""
    return sorted(path.glob("*.safetensors")) if path.is_dir() else [path]


@dataclasses.dataclass(frozen=True)
class _Bundle:
    parts: Parts
    name: str


class WorkflowFiles:
    """The files of one workflow in a models folder; see `Files`. Its bundles are paths, which `ready` makes."""

    def __init__(
        self,
        models: ModelsFolder,
        parts: Sequence[Parts],
        names_tiny: bool,
        settings: Mapping[str, Any],
        others: FolderFiles,
    ) -> None:
        self._models, self._names_tiny, self._settings, self._others = models, names_tiny, settings, others
        self._bundles = {
            str(models.kept.folder / name): _Bundle(each, name)
            for each in parts
            for name in [models.kept.name(Path(each.model[1]).stem, dataclasses.astuple(each), settings)]
        }

    def bundle(self, folder: str, name: str) -> str:
        """See `Files`: the path of the first bundle that has a file, which may not have been exported yet."""
        named: Named = (folder, relative_name(name) or name)
        is_tiny = is_tiny_vae(named)
        if named != ("vae", TAEF1):
            self._models.find(folder, name)
        elif not (self._models.has_taef1 or "tiny_vae" in self._settings.get("parts", {})):
            raise InputError(
                "value_not_in_list",
                f"there is no {name!r}: expected {PAIR} in {self._models.folder / 'vae_approx'}; "
                f"{there(*self._models.folders('vae'))}",
            )
        for path, bundle in self._bundles.items():
            if is_tiny or named in dataclasses.astuple(bundle.parts):
                return path
        raise InputError(
            "value_not_in_list",
            f"no model is drawn with {name!r} in this workflow: expected a model, a text encoder and a sampler that "
            "they lead to, for a bundle has all three",
        )

    def together(self, part: str, model: str, other: str) -> str:
        """See `run.Together`."""
        known, wanted = self._bundles[model].parts, self._bundles[other].parts
        sought = {"model": known.model, "text_encoder": known.text_encoder, "controlnet": known.controlnet}
        sought[part] = getattr(wanted, part)
        for path, bundle in self._bundles.items():
            if all(getattr(bundle.parts, key) == value for key, value in sought.items()):
                return path
        raise InputError(
            "value_not_in_list",
            f"model and {part}: no sampler has {known.model[1]} together with {(sought[part] or ('', 'none'))[1]}",
        )

    def lora(self, name: str) -> Path:
        """See `Files`."""
        return self._others.lora(name)

    def image(self, name: str) -> bytes:
        """See `Files`."""
        return self._others.image(name)

    def upscaler(self, name: str) -> Path:
        """See `Files`."""
        return self._others.upscaler(name)

    def ready(self, bundle: str, say: Tell = lambda text: None, step: Tell = lambda text: None) -> Path:
        """The folder of a bundle that `bundle` gave, exported if it is not there or its files have changed since.

        Args:
            bundle: its path.
            say, step: see `KeptBundles.ready`.

        Raises:
            ExportFailed: see `KeptBundles.ready`.
            MissingPart: a file that no node names is missing, such as the tokenizer.
            InputError: a file of the workflow is missing.
        """
        found = self._bundles[bundle]
        own = self._settings.get("parts", {})

        def is_enough(manifest: Manifest) -> bool:
            """The tiny VAE is there if it is named, or if the backend has no full one."""
            needs_tiny = self._names_tiny or (found.parts.vae is not None and FULL not in manifest.modules)
            return not needs_tiny or TINY in manifest.modules

        ingredients = self._models.ingredients(found.parts, own, is_enough)
        manifest = self._models.kept.ready(found.name, self._settings, ingredients, say, step)
        if found.parts.vae is not None and FULL not in manifest.modules:
            if TINY not in manifest.modules:
                raise MissingPart(
                    f"the backend has no full VAE, so that {found.parts.vae[1]} is not used, and there is no tiny "
                    f"one; put {PAIR} into vae_approx"
                )
            say(f"the backend has no full VAE: TAEF1 is used in place of {found.parts.vae[1]}")
        return Path(bundle)
