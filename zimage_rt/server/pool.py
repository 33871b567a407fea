"""Workers of a service: processes, one per device, that are started, watched, and started again if they die."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import multiprocessing
import threading
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection
from typing import Any, Protocol

from . import worker
from .config import ServiceConfig
from .jobs import Job
from .messages import Cancel, Loaded, Ready, Run, Stop

log = logging.getLogger(__name__)

# Seconds before a worker that died is started again: doubled each time, reset when it becomes ready.
FIRST_PAUSE, LONGEST_PAUSE = 0.2, 30.0

# A message of a worker, and what the worker had been given when it died.
OnMessage = Callable[["JobWorker", object], None]
OnDeath = Callable[["JobWorker", Sequence[Job]], None]


class JobWorker(Protocol):
    """A place that draws jobs, as the service sees it. `WorkerProcess` describes the attributes."""

    device: int | None
    running: dict[str, Job]
    is_ready: bool
    models: Sequence[str]
    memory: Mapping[str, int]
    caches: Mapping[tuple[str, str], int]
    problems: Mapping[str, str]
    deaths: int

    @property
    def places(self) -> int:
        """Jobs that it draws at once."""

    def start(self) -> None:
        """Begin; the worker sends `Ready` when it takes jobs."""

    def has_room(self) -> bool:
        """Whether it takes another job now."""

    def give(self, job: Job) -> None:
        """Send a job; a death of the worker gives it back."""

    def cancel(self, job: Job) -> None:
        """Stop a job after the step that runs."""

    async def stop(self, seconds: float) -> None:
        """End when the jobs have ended, or after `seconds`."""


# Makes the workers of a service.
MakeWorkers = Callable[[ServiceConfig, OnMessage, OnDeath], Sequence[JobWorker]]


def worker_processes(config: ServiceConfig, on_message: OnMessage, on_death: OnDeath) -> list[JobWorker]:
    """One worker process per device of the configuration, or one without."""
    return [WorkerProcess(config, device, on_message, on_death) for device in (config.devices or (None,))]


class WorkerProcess:
    """One worker process and the jobs that it has. Only the event loop's thread uses it, except for the reader.

    Attributes:
        device: the GPU's number, or None.
        running: the jobs that it was given and that have not ended, by id.
        is_ready: whether it has loaded its models.
        models: those that it has loaded.
        memory, caches: see `Loaded`.
        problems: why a model could not be loaded, by model.
        deaths: how often it died.
    """

    def __init__(self, config: ServiceConfig, device: int | None, on_message: OnMessage, on_death: OnDeath) -> None:
        self._config, self.device = config, device
        self._on_message, self._on_death = on_message, on_death
        self.running: dict[str, Job] = {}
        self.is_ready = False
        self.models: Sequence[str] = ()
        self.memory: Mapping[str, int] = {}
        self.caches: Mapping[tuple[str, str], int] = {}
        self.problems: Mapping[str, str] = {}
        self.deaths = 0
        self._pause = FIRST_PAUSE
        self._process: Any = None
        self._connection: Connection | None = None
        self._ending = False
        self._gone = asyncio.Event()

    @property
    def places(self) -> int:
        """Jobs that it draws at once."""
        return self._config.slots

    @property
    def pid(self) -> int | None:
        """The process's number, while there is one."""
        return None if self._process is None else self._process.pid

    def start(self) -> None:
        """Start the process; it tells when it is ready."""
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe(duplex=True)
        self._gone = asyncio.Event()
        self._process = context.Process(
            target=worker.main, args=(self._config, self.device, theirs), name="zimage-worker", daemon=True
        )
        self._process.start()
        theirs.close()
        self._connection = ours
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(ours, loop), name="zimage-worker-reader", daemon=True).start()

    def has_room(self) -> bool:
        """Whether it takes another job now."""
        drawing = sum(not job.is_drawn for job in self.running.values())
        is_free = drawing < self._config.slots and len(self.running) - drawing < worker.MAX_ENCODING
        return self.is_ready and not self._ending and is_free

    def give(self, job: Job) -> None:
        """Send a job. If the process dies meanwhile, its death gives the job back."""
        self.running[job.id] = job
        self._send(Run(job.id, job.attempts, job.model, job.fields, job.output, job.workflow))

    def cancel(self, job: Job) -> None:
        """Stop a job after the step that runs."""
        self._send(Cancel(job.id))

    async def stop(self, seconds: float) -> None:
        """Let the process end when its jobs have ended; kill it after `seconds`."""
        self._ending = True
        self._send(Stop())
        with contextlib.suppress(asyncio.TimeoutError):
            await asyncio.wait_for(self._gone.wait(), seconds)
        if self._process is not None and self._process.is_alive():
            self._process.kill()
            await self._gone.wait()

    def _send(self, message: object) -> None:
        if self._connection is not None:
            with contextlib.suppress(OSError):  # it died: the reader finds out
                self._connection.send(message)

    def _read(self, connection: Connection, loop: asyncio.AbstractEventLoop) -> None:
        """The reader's thread: messages go to the event loop in their order, the end of the process last."""
        with contextlib.suppress(RuntimeError):  # the loop is closed
            while True:
                try:
                    message = connection.recv()
                except (EOFError, OSError):
                    loop.call_soon_threadsafe(self._died)
                    return
                loop.call_soon_threadsafe(self._heard, message)

    def _heard(self, message: object) -> None:
        if isinstance(message, Ready):
            self.is_ready, self.problems, self._pause = True, message.problems, FIRST_PAUSE
            for model, problem in message.problems.items():
                log.error("worker of device %s cannot load %s: %s", self.device, model, problem)
        elif isinstance(message, Loaded):
            self.models, self.memory, self.caches = message.models, message.memory, message.caches
        self._on_message(self, message)

    def _died(self) -> None:
        lost, self.running = list(self.running.values()), {}
        self.is_ready, self.models, self.memory, self.caches = False, (), {}, {}
        self._gone.set()
        if self._ending:
            return
        self.deaths += 1
        log.error("worker of device %s died with %d jobs; it is started again", self.device, len(lost))
        self._on_death(self, lost)
        asyncio.get_running_loop().call_later(self._pause, self._restart)
        self._pause = min(2 * self._pause, LONGEST_PAUSE)

    def _restart(self) -> None:
        if not self._ending:
            self.start()
