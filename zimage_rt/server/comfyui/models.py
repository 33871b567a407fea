"""The model files that workflows name, and the models of the service that stand for them."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from ...bundle.manifest import Manifest
from ...comfyui.files import FORMER_FOLDERS, named
from ...comfyui.graph import Graph
from ...comfyui.inputs import File, InputError
from ...comfyui.registry import NODES
from ..config import ServiceConfig
from .folders import OwnerFolder
from .lora_files import find_lora, list_loras
from .upscaler_files import find_upscaler, list_upscalers

# The files that ComfyUI's templates and Comfy-Org's repositories have for Z-Image, by the role of the model.
TRANSFORMERS: Mapping[str, tuple[str, ...]] = {
    "turbo": ("z_image_turbo_bf16.safetensors", "z_image_turbo_int8_convrot.safetensors"),
    "base": ("z_image_bf16.safetensors", "z_image_int8_convrot.safetensors"),
    "edit": ("z_image_edit_bf16.safetensors",),
}
TEXT_ENCODERS = ("qwen_3_4b.safetensors", "qwen_3_4b_fp8_mixed.safetensors")
VAES, TINY_VAES = ("ae.safetensors",), ("taef1", "taef1.safetensors")
PATCHES = ("Z-Image-Turbo-Fun-Controlnet-Union.safetensors", "Z-Image-Turbo-Fun-Controlnet-Union-2.1.safetensors")
# What a text encoder that every model has stands for: that of the model that it meets.
ANY_MODEL = "*"
TRANSFORMER_FOLDERS = ("diffusion_models", "checkpoints")


class ModelFiles:
    """The names of all model files of a service, by ComfyUI's folders."""

    def __init__(self, config: ServiceConfig, manifests: Mapping[str, Manifest]) -> None:
        self._config = config
        self._names: dict[str, dict[str, str]] = {
            folder: {} for folder in ("diffusion_models", "checkpoints", "text_encoders", "vae", "model_patches")
        }
        self._controlled = [name for name, manifest in manifests.items() if "controlnet" in manifest.modules]
        for name, model in config.models.items():
            for file in (name, *TRANSFORMERS[model.role]):
                self._names["diffusion_models"].setdefault(file, name)
                self._names["checkpoints"].setdefault(file, name)
            for file in (*TEXT_ENCODERS, name):
                self._names["text_encoders"].setdefault(file, name)
            for file in (*VAES, *TINY_VAES, name):
                self._names["vae"].setdefault(file, name)
            if name in self._controlled:
                for file in (*PATCHES, name):
                    self._names["model_patches"].setdefault(file, name)
        for names in self._names.values():
            names.update(config.comfyui.files)

    def folders(self) -> list[str]:
        """ComfyUI's names of the folders that hold models."""
        return [*self._names, "loras", "upscale_models"]

    def listed(self, folder: str, images: OwnerFolder | None = None) -> list[str]:
        """The names in a folder."""
        folder = FORMER_FOLDERS.get(folder, folder)
        if folder == "input":
            return [] if images is None else images.list_images()
        if folder == "loras":
            return list_loras(self._config)
        if folder == "upscale_models":
            return list_upscalers(self._config)
        return list(self._names.get(folder, ()))

    def has(self, folder: str, name: str, model: str) -> bool:
        """Whether a model has a file of its own that several models have."""
        is_vae = folder == "vae" and name in (*VAES, *TINY_VAES)
        return is_vae or (folder == "model_patches" and name in PATCHES and model in self._controlled)

    def model(self, folder: str, name: str) -> str:
        """The model that a file stands for. Raises InputError."""
        names = self._names[folder]
        found = named(names, name)
        if found is None:
            listed = ", ".join(list(names)[:20]) or "none"
            raise InputError("value_not_in_list", f"there is no {name!r} here; there are: {listed} (comfyui.files)")
        return found


class WorkflowFiles:
    """The files that one workflow names; see `comfyui.run.Files`.

    Attributes:
        models: those of the service, by folder and name; ANY_MODEL for a text encoder that all have.
        images: the contents of input images, by name.
    """

    def __init__(self, files: ModelFiles, config: ServiceConfig, folder: OwnerFolder, graph: Graph) -> None:
        self._files, self._config, self._folder = files, config, folder
        self.models: dict[tuple[str, str], str] = {}
        self.images: dict[str, bytes] = {}
        self._main = self._main_model(graph)

    def bundle(self, folder: str, name: str) -> str:
        """See `Files`."""
        model, file = self._files.model(folder, name), PurePosixPath(name).name
        if file not in self._config.comfyui.files:
            if folder == "text_encoders" and file in TEXT_ENCODERS:
                model = ANY_MODEL
            elif self._main is not None and self._files.has(folder, file, self._main):
                model = self._main
        self.models[folder, name] = model
        return model

    def lora(self, name: str) -> Path:
        """See `Files`."""
        return find_lora(self._config, name)

    def image(self, name: str) -> bytes:
        """See `Files`."""
        if name not in self.images:
            self.images[name] = self._folder.image(name)
        return self.images[name]

    def upscaler(self, name: str) -> Path:
        """See `Files`."""
        return find_upscaler(self._config, name)

    def _main_model(self, graph: Graph) -> str | None:
        """The model of the workflow's first transformer."""
        for node in graph.values():
            kind = NODES.get(node.kind)
            for key, wanted in kind.inputs.items() if kind else ():
                value, spec = node.inputs.get(key), wanted.spec
                if isinstance(spec, File) and spec.folder in TRANSFORMER_FOLDERS and isinstance(value, str):
                    with contextlib.suppress(InputError):
                        return self._files.model(spec.folder, value)
        return None
