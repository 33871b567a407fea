"""Serve Z-Image compiled, fast and without PyTorch.

>>> engine = zimage_rt.Engine.load("engines/nano")
>>> engine.generate("一只熊猫", seed=7).pil_images[0].save("panda.png")
"""

import logging
import os

# ONNX Runtime 1.32 keeps a device id and a queue of events for Microsoft under ~/.cache unless it is told not to before
# it is imported (findings/onnxruntime-telemetry.sh). Setting the variable to 0 allows it.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")

from ._version import __version__
from .engine import Engine
from .errors import (
    BackendUnavailable,
    BundleMismatch,
    Cancelled,
    EngineClosed,
    LoraError,
    LoraWarning,
    ManifestError,
    MetadataError,
    NotFinite,
    OutOfMemory,
    RequestError,
    RequestWarning,
    ZImageError,
)
from .metadata.image_file import read_record
from .metadata.record import ImageRecord
from .request.types import GenerateRequest, SecondPass, StepInfo
from .result import GenerateResult
from .session import Session

# A library does not log by itself: programs that want the log add a handler.
logging.getLogger(__name__).addHandler(logging.NullHandler())
# The name in 0.2 and before.
PictureRecord = ImageRecord

__all__ = [
    "BackendUnavailable",
    "BundleMismatch",
    "Cancelled",
    "Engine",
    "EngineClosed",
    "GenerateRequest",
    "GenerateResult",
    "ImageRecord",
    "LoraError",
    "LoraWarning",
    "ManifestError",
    "MetadataError",
    "NotFinite",
    "OutOfMemory",
    "PictureRecord",
    "RequestError",
    "RequestWarning",
    "SecondPass",
    "Session",
    "StepInfo",
    "ZImageError",
    "__version__",
    "read_record",
]
