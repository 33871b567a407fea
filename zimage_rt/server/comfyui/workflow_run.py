"""A workflow that waits or runs."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from ..access import Caller
from ..jobs import Job


@dataclasses.dataclass
class WorkflowRun:
    """A workflow that waits or runs.

    Attributes:
        job: of the service.
        who: sent it.
        number: its place among all that came.
        graph: as it was sent.
        extra_data: as it was sent, with the client's id.
        targets: the ids of the nodes that it is run for.
        outputs: what output nodes showed, by node.
        log: the messages that the history keeps.
        progress: the state of every node that has begun, by id.
        node: the id of the node that runs.
        writes: the files that are being written.
    """

    job: Job
    who: Caller
    number: float
    graph: Mapping[str, Any]
    extra_data: Mapping[str, Any]
    targets: Sequence[str]
    outputs: dict[str, dict[str, list[Any]]] = dataclasses.field(default_factory=dict)
    log: list[tuple[str, dict[str, Any]]] = dataclasses.field(default_factory=list)
    progress: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    node: str | None = None
    writes: list[asyncio.Future[None]] = dataclasses.field(default_factory=list)

    @property
    def client(self) -> str | None:
        """The id of the client that sent it."""
        client = self.extra_data.get("client_id")
        return client if isinstance(client, str) else None

    def queue_entry(self) -> list[Any]:
        """The workflow as `/queue` and the history have it."""
        return [self.number, self.job.id, self.graph, self.extra_data, list(self.targets)]
