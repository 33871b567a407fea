"""Errors as answers: a status per code, and the two forms that clients read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.responses import JSONResponse

from ..errors import ZImageError

# By the error's code; others are the service's fault.
STATUS: Mapping[str, int] = {
    "invalid_request": 400,
    "lora": 400,
    "model_not_found": 404,
    "not_found": 404,
    "method_not_allowed": 405,
    "unauthorized": 401,
    "forbidden": 403,
    "gone": 410,
    "too_large": 413,
    "rate_limited": 429,
    "queue_full": 429,
    "blocked": 400,
    "cancelled": 409,
    "already_exists": 409,
    "out_of_memory": 503,
    "draining": 503,
    "storage_full": 507,
    "worker_died": 503,
    "bundle_mismatch": 503,
    "manifest": 503,
    "backend_unavailable": 503,
}


class NotFound(ZImageError):
    """There is nothing of the name, or not for this key."""

    code = "not_found"


class AlreadyExists(ZImageError):
    """The name is taken."""

    code = "already_exists"


class Gone(ZImageError):
    """It was there, and has expired."""

    code = "gone"


class TooLarge(ZImageError):
    """A request's body has more bytes than the service takes."""

    code = "too_large"


class Unauthorized(ZImageError):
    """A key is missing, unknown or revoked."""

    code = "unauthorized"


class Forbidden(ZImageError):
    """The key, the host or the origin may not do this."""

    code = "forbidden"


class RateLimited(ZImageError):
    """A key's limit is reached; `retry_after` is when to ask again, in seconds."""

    code = "rate_limited"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def status_of(code: str) -> int:
    """The HTTP status of an error's code."""
    return STATUS.get(code, 500)


def openai_type(status: int) -> str:
    """The `type` that OpenAI's error objects have for a status."""
    if status == 429:
        return "rate_limit_error"
    if status in (401, 403):
        return "authentication_error"
    return "invalid_request_error" if status < 500 else "server_error"


def error_body(code: str, message: str, field: str | None = None) -> dict[str, Any]:
    """The body of an error: OpenAI's object, whose `code` and `param` are ours."""
    kind = openai_type(status_of(code))
    return {"error": {"message": _sendable(message), "type": kind, "param": _sendable(field), "code": code}}


def _sendable(text: Any) -> Any:
    """A text without halves of characters, which JSON can name and UTF-8 cannot say."""
    return text.encode("utf-8", "backslashreplace").decode() if isinstance(text, str) else text


def answer(error: Mapping[str, Any], headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An answer for an error as `{code, message, field}`."""
    code = error["code"]
    more = {"WWW-Authenticate": "Bearer"} if code == "unauthorized" else {}
    return JSONResponse(
        error_body(code, error["message"], error.get("field")), status_of(code), headers={**more, **(headers or {})}
    )


def answer_to(error: ZImageError) -> JSONResponse:
    """An answer for an exception, with Retry-After if it says when to ask again."""
    headers = {"Retry-After": str(error.retry_after)} if hasattr(error, "retry_after") else {}
    return answer({"code": error.code, "message": str(error), "field": getattr(error, "field", None)}, headers)
