"""The errors this package raises on purpose. Every message says what was wanted, what came, and what to do."""

from __future__ import annotations

from collections.abc import Sequence

# Characters of a message: about a screen. Names and values in messages come from whoever asks.
MAX_MESSAGE = 3000


class ZImageError(Exception):
    """Base of every error zimage_rt raises on purpose; a message that is too long is cut in its middle."""

    def __init__(self, message: str = "") -> None:
        if len(message) > MAX_MESSAGE:
            half = MAX_MESSAGE // 2
            message = f"{message[:half]} … {message[-half:]}"
        super().__init__(message)


class ManifestError(ZImageError):
    """A bundle's manifest cannot be read: missing, not JSON, an unknown key, or a newer schema."""


class BundleMismatch(ZImageError):
    """A bundle's files are not the ones its manifest names, or cannot serve on this machine."""


class BackendUnavailable(ZImageError):
    """The backend's library is not installed or does not run here; the message names what to install."""


class RequestError(ZImageError, ValueError):
    """A request asks for something impossible; nothing was computed."""


class OutOfMemory(ZImageError, MemoryError):
    """The request does not fit in memory; the engine keeps working."""


class NotFinite(ZImageError):
    """A module gave NaN or infinity; no image was made, and the engine keeps working.

    Attributes:
        module: its name in the manifest.
        explained: whether the message names what can be the cause.
    """

    def __init__(self, module: str, causes: str = "") -> None:
        super().__init__(f"{module}: gave numbers that are not finite{causes and ': '}{causes}")
        self.module, self.explained = module, bool(causes)


class Cancelled(ZImageError):
    """The caller's callback asked to stop; no image was made."""


class MetadataError(ZImageError):
    """A picture says nothing of how it was made, says it in a damaged way, or names an input that is gone."""


class RequestWarning(UserWarning):
    """A request can be served, but something in it has no effect; images are recorded with these."""


class LoraError(ZImageError, ValueError):
    """A LoRA cannot be used with this bundle; nothing was changed.

    Attributes:
        keys: the file's keys that could not be placed, where that is why.
    """

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
