"""The errors that this package raises on purpose. Every message says what was expected, what it got, and what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

# Characters per message, about one screen: names and values in messages come from callers and may be long.
MAX_MESSAGE = 3000
# Messages about a field begin with its name: `second_pass.scale: expected …`.
_FIELD = re.compile(r"([A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)?): ")


class ZImageError(Exception):
    """Base class of the errors that zimage_rt raises on purpose; long messages are cut in the middle.

    Attributes:
        code: the kind of error, for programs; stable while messages may change.
    """

    code: ClassVar[str] = "error"

    def __init__(self, message: str = "") -> None:
        if len(message) > MAX_MESSAGE:
            half = MAX_MESSAGE // 2
            message = f"{message[:half]} … {message[-half:]}"
        super().__init__(message)


class ManifestError(ZImageError):
    """A bundle's manifest cannot be read: missing, not JSON, an unknown key, or a newer schema."""

    code: ClassVar[str] = "manifest"


class BundleMismatch(ZImageError):
    """A bundle's files are not those that its manifest names, or cannot be served on this machine."""

    code: ClassVar[str] = "bundle_mismatch"


class BackendUnavailable(ZImageError):
    """The backend's library is not installed or does not run here; the message names what to install."""

    code: ClassVar[str] = "backend_unavailable"


class RequestError(ZImageError, ValueError):
    """A request or an argument is invalid; nothing was computed.

    Attributes:
        field: the name of the invalid field or argument, with which the message begins: `second_pass.scale` for a part
            of a field, None if no single field is at fault.
    """

    code: ClassVar[str] = "invalid_request"

    def __init__(self, message: str = "", *, field: str | None = None) -> None:
        super().__init__(message)
        found = _FIELD.match(message)
        self.field = field if field is not None or found is None else found[1]


class OutOfMemory(ZImageError, MemoryError):
    """The request does not fit in memory; the engine keeps working."""

    code: ClassVar[str] = "out_of_memory"


class NotFinite(ZImageError):
    """A module's output has NaN or infinity; no image was made, and the engine keeps working.

    Attributes:
        module: its name in the manifest.
        explained: whether the message names possible causes.
    """

    code: ClassVar[str] = "not_finite"

    def __init__(self, module: str, causes: str = "") -> None:
        super().__init__(f"{module}: gave numbers that are not finite{causes and ': '}{causes}")
        self.module, self.explained = module, bool(causes)


class EngineClosed(ZImageError):
    """The engine was closed; load the bundle again."""

    code: ClassVar[str] = "engine_closed"


class Cancelled(ZImageError):
    """The caller's callback cancelled the request; no image was made."""

    code: ClassVar[str] = "cancelled"


class MetadataError(ZImageError):
    """An image has no record, or a damaged one, or its record names an input file that is missing."""

    code: ClassVar[str] = "metadata"


class RequestWarning(UserWarning):
    """A field of a request has no effect. The request is served, and its images' records hold the message."""


class LoraError(ZImageError, ValueError):
    """A LoRA cannot be used with this bundle; nothing was changed.

    Attributes:
        keys: the file's keys that match no layer of the bundle, if that is the reason.
    """

    code: ClassVar[str] = "lora"

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class LoraWarning(UserWarning):
    """A LoRA is used in part only, or with a scale that its file does not state for certain.

    Attributes:
        keys: the file's keys that were left out, if that is the reason.
    """

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)
