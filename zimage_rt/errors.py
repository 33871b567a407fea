"""The errors this package raises on purpose. Every message says what was wanted, what came, and what to do."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import ClassVar

# Characters of a message: about a screen. Names and values in messages come from whoever asks.
MAX_MESSAGE = 3000
# The field that a message is about, which is how one begins: `second_pass.scale: expected …`.
_FIELD = re.compile(r"([A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)?): ")


class ZImageError(Exception):
    """Base of every error zimage_rt raises on purpose; a message that is too long is cut in its middle.

    Attributes:
        code: the kind of the error, for programs; it stays the same where messages change.
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
    """A bundle's files are not the ones its manifest names, or cannot serve on this machine."""

    code: ClassVar[str] = "bundle_mismatch"


class BackendUnavailable(ZImageError):
    """The backend's library is not installed or does not run here; the message names what to install."""

    code: ClassVar[str] = "backend_unavailable"


class RequestError(ZImageError, ValueError):
    """A request or an argument asks for something impossible; nothing was computed.

    Attributes:
        field: the name of the field or argument that is wrong, as the message begins with it; `second_pass.scale` for a
            part of one, None if no single one is.
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
    """A module gave NaN or infinity; no image was made, and the engine keeps working.

    Attributes:
        module: its name in the manifest.
        explained: whether the message names what can be the cause.
    """

    code: ClassVar[str] = "not_finite"

    def __init__(self, module: str, causes: str = "") -> None:
        super().__init__(f"{module}: gave numbers that are not finite{causes and ': '}{causes}")
        self.module, self.explained = module, bool(causes)


class EngineClosed(ZImageError):
    """The engine was closed; load the bundle again."""

    code: ClassVar[str] = "engine_closed"


class Cancelled(ZImageError):
    """The caller's callback asked to stop; no image was made."""

    code: ClassVar[str] = "cancelled"


class MetadataError(ZImageError):
    """A picture says nothing of how it was made, says it in a damaged way, or names an input that is gone."""

    code: ClassVar[str] = "metadata"


class RequestWarning(UserWarning):
    """A request can be served, but something in it has no effect; images are recorded with these."""


class LoraError(ZImageError, ValueError):
    """A LoRA cannot be used with this bundle; nothing was changed.

    Attributes:
        keys: the file's keys that could not be placed, where that is why.
    """

    code: ClassVar[str] = "lora"

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)


class LoraWarning(UserWarning):
    """A LoRA is used, but not all of it, or not as its file makes certain.

    Attributes:
        keys: the file's keys that were left out, where that is why.
    """

    def __init__(self, message: str, keys: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.keys = tuple(keys)
