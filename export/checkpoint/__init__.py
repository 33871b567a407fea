"""Reads Z-Image checkpoints: diffusers folders, ComfyUI's single files, and GGUF, plain and quantised.

`tensor` has a tensor's number format, stored numbers and scales; `layouts` one function per quantised layout; on them
stand the readers of one kind of file each (`safetensors_file`, `gguf_file`), of places (`folder`, `single_file`), and
`open_checkpoint`. `foreign` names what is not read.
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
