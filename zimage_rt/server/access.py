"""Who calls: the owner of a job, and what it may do."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastapi import Request

from .jobs import Job
from .service import Service


@dataclasses.dataclass(frozen=True)
class Caller:
    """The client of a request.

    Attributes:
        name: of its key; empty without one.
    """

    name: str = ""

    def may_see(self, owner: str) -> bool:
        """Whether a job of an owner is this caller's."""
        return owner == self.name

    async def check(self, service: Service, model: str, fields: Mapping[str, Any]) -> None:
        """Raise Forbidden or RateLimited if the caller's key does not allow a request."""

    def admit(self, job: Job) -> None:
        """Count a job against the caller's limits."""


async def caller(request: Request) -> Caller:
    """The caller of an HTTP request. Raises Unauthorized."""
    return Caller()
