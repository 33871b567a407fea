"""Reads Z-Image checkpoints: diffusers folders, ComfyUI's single files, and GGUF, plain and quantised.

From the bottom up: `tensor` (number formats, stored numbers, scales), `layouts` (a function per quantised layout),
readers per file format (`safetensors_file`, `gguf_file`), per layout of files (`folder`, `single_file`, `controlnet`),
and `open_checkpoint`. `foreign` detects quantisations that are not supported.
"""

from .component import CONFIGURED, PARTS, Checkpoint, Component, read_json
from .folder import read_component
from .open import open_checkpoint
from .safetensors_file import open_safetensors
from .tensor import CheckpointTensor

__all__ = (
    "CONFIGURED",
    "PARTS",
    "Checkpoint",
    "CheckpointTensor",
    "Component",
    "open_checkpoint",
    "open_safetensors",
    "read_component",
    "read_json",
)
