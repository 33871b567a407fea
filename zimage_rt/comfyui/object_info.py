"""The nodes as ComfyUI's `/object_info` describes them, made from the signatures of their functions."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from .inputs import Choice, File, Flag, Number, Socket, Spec, Text, Whole
from .nodes.dynamic import GROUPS, Group
from .registry import REQUIRED, Input, NodeKind

# The titles that ComfyUI's editor shows, if they are not the class's own words.
TITLES: Mapping[str, str] = {
    "UNETLoader": "Load Diffusion Model", "CheckpointLoaderSimple": "Load Checkpoint", "CLIPLoader": "Load CLIP",
    "VAELoader": "Load VAE", "LoraLoader": "Load LoRA (Model and CLIP)", "LoraLoaderModelOnly": "Load LoRA",
    "CLIPTextEncode": "CLIP Text Encode (Prompt)", "KSampler": "KSampler", "KSamplerAdvanced": "KSampler (Advanced)",
    "VAEDecode": "VAE Decode", "VAEEncode": "VAE Encode", "VAEDecodeTiled": "VAE Decode (Tiled)",
    "VAEEncodeForInpaint": "VAE Encode (for Inpainting)", "EmptyLatentImage": "Empty Latent Image",
    "EmptySD3LatentImage": "EmptySD3LatentImage", "LatentUpscaleBy": "Upscale Latent By",
    "LatentUpscale": "Upscale Latent", "LoadImageMask": "Load Image (as Mask)", "ImageScale": "Upscale Image",
    "ImageScaleBy": "Upscale Image By", "ImageUpscaleWithModel": "Upscale Image (using Model)",
    "UpscaleModelLoader": "Load Upscale Model", "PrimitiveInt": "Int", "PrimitiveFloat": "Float",
    "PrimitiveString": "String", "PrimitiveStringMultiline": "String (Multiline)", "PrimitiveBoolean": "Boolean",
}  # fmt: skip
# Names of outputs that are not their types.
OUTPUT_NAMES: Mapping[str, Sequence[str]] = {
    "GetImageSize": ("width", "height", "batch_size"),
    "ResolutionSelector": ("width", "height"),
    "InpaintModelConditioning": ("positive", "negative", "latent"),
    "SamplerCustom": ("output", "denoised_output"),
    "SamplerCustomAdvanced": ("output", "denoised_output"),
    "SplitSigmas": ("high_sigmas", "low_sigmas"),
    "SplitSigmasDenoise": ("high_sigmas", "low_sigmas"),
    "StringLength": ("length",),
    "StringContains": ("contains",),
    "RegexMatch": ("matches",),
    "ComfySwitchNode": ("output",),
    "ComfyPassOrNoneNode": ("output", "is_none"),
    "ComfyMathExpression": ("FLOAT", "INT", "BOOL"),
    "ResizeImageMaskNode": ("resized",),
    "MaskPreview": ("mask",),
}
# The widgets of seeds, beside which the editor has `control_after_generate`.
SEEDS = ("seed", "noise_seed")

# The files of one of ComfyUI's folders.
ListFiles = Callable[[str], Sequence[str]]


def object_info(kind: NodeKind, list_files: ListFiles) -> dict[str, Any]:
    """The description of a kind of node; `list_files` names what loaders may choose."""
    inputs: dict[str, dict[str, Any]] = {"required": {}, "optional": {}}
    group = GROUPS.get(kind.name)
    for name, wanted in kind.inputs.items():
        if group is not None and name.startswith(f"{group.name}."):
            inputs["required"][group.name] = _group(group)
            continue
        is_optional = isinstance(wanted.spec, Socket) and wanted.default is not REQUIRED
        inputs["optional" if is_optional else "required"][name] = _input(name, wanted, name in kind.lazy, list_files)
    used = {place: given for place, given in inputs.items() if given or place == "required"}
    return {
        "input": used,
        "input_order": {place: list(given) for place, given in used.items()},
        "is_input_list": False,
        "output": list(kind.outputs),
        "output_is_list": [False] * len(kind.outputs),
        "output_name": list(OUTPUT_NAMES.get(kind.name, kind.outputs)),
        "name": kind.name,
        "display_name": TITLES.get(kind.name) or _words(kind.name),
        "description": (kind.function.__doc__ or "").strip(),
        "python_module": "nodes",
        "category": kind.category,
        "output_node": kind.is_output,
        "search_aliases": [],
    }


def _input(name: str, wanted: Input, is_lazy: bool, list_files: ListFiles) -> list[Any]:
    """ComfyUI's form of an input: its type, or the list of its values, and the widget's options."""
    spec = wanted.spec
    if isinstance(spec, Socket):
        return [spec.type, {"lazy": True}] if is_lazy else [spec.type]
    default = spec.default if wanted.default in (REQUIRED, None) else wanted.default
    if isinstance(spec, File):
        more = {"image_upload": True} if spec.folder == "input" else {}
        return [list(list_files(spec.folder)), more]
    if isinstance(spec, Choice):
        return [list(spec.options), {"default": spec.options[0] if default is None else default}]
    return [spec.type, _options(name, spec, default)]


def _group(group: Group) -> list[Any]:
    """ComfyUI's form of a group that grows in the editor."""
    place = "required" if group.least else "optional"
    template = {"input": {place: {"value": [group.spec.type, {}]}}, "names": list(group.names), "min": group.least}
    return ["COMFY_AUTOGROW_V3", {"template": template}]


def _options(name: str, spec: Spec, default: Any) -> dict[str, Any]:
    if isinstance(spec, (Whole, Number)):
        least = type(spec.low)(min(max(0, spec.low), spec.high))
        options = {"default": least if default is None else default, "min": spec.low, "max": spec.high}
        options["step"] = spec.step
        return options | ({"control_after_generate": True} if name in SEEDS else {})
    if isinstance(spec, Text):
        return {"default": default, "multiline": spec.is_long} | ({"dynamicPrompts": True} if spec.is_long else {})
    assert isinstance(spec, Flag)
    return {"default": bool(default)}


def _words(name: str) -> str:
    """A class's name as words: `ImageInvert` as `Image Invert`."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", " ", name)
