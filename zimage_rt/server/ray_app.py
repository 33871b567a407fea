"""The service on a Ray cluster: one replica with the queue, and replicas with engines that Ray Serve scales.

    serve run zimage_rt.server.ray_app:app config=service.toml max_replicas=4

`Service` is the same as without Ray: the protocols, the queue and the record. Its one worker, `ReplicaWorker`, sends
the jobs to the deployment `Engines`, whose replicas hold a `worker.Worker` each.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hashlib
import logging
import tempfile
import warnings
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict, Field
from ray import serve
from ray.serve.config import AutoscalingConfig

from ..errors import RequestWarning
from .app import create_app
from .config import ConfigError, ServiceConfig, read_config
from .database import exclusive
from .jobs import Job
from .logs import configure
from .main import refuse_strangers
from .messages import Finished, Ready, Run, Step, Told
from .pool import JobWorker, OnDeath, OnMessage
from .worker import Worker

log = logging.getLogger(__name__)

# The deployments' names, which a YAML file of Serve may use to change their options.
SERVICE, ENGINES = "Service", "Engines"
# Seconds between two looks at how many replicas run.
LOOK_SECONDS = 0.5
# A replica that died is sent requests until Ray knows; they come back before a step was made, and are sent again.
SEND_ATTEMPTS, SEND_PAUSE = 5, 0.5
# Unexpected errors in a row after which a replica calls itself unhealthy, so that Ray starts another.
MAX_FAILURES = 3
# Requests that the replica of the queue has at once: a client that waits for a job, or watches its events, is one.
MAX_CLIENTS = 10_000
# The lock of the data's folder, held as long as the process of the queue.
HELD = contextlib.ExitStack()


class RayArguments(BaseModel):
    """The arguments of the application, from `serve run` or `args` of a YAML file."""

    model_config = ConfigDict(extra="forbid")

    config: Annotated[str, Field(description="The TOML file of the service, as for `zimage serve --config`.")]
    min_replicas: Annotated[int, Field(ge=1, le=1000, description="Replicas that are always there.")] = 1
    max_replicas: Annotated[int, Field(ge=1, le=1000, description="The most replicas under load.")] = 4
    gpus_per_replica: Annotated[float, Field(ge=0, le=64, description="GPUs of a replica; 0 for the CPU.")] = 0
    cpus_per_replica: Annotated[float, Field(ge=0, le=1024, description="CPU cores that Ray reserves for it.")] = 1


def app(given: Mapping[str, Any]) -> serve.Application:
    """Build the application from `RayArguments`.

    Raises:
        ValidationError: an argument is wrong. ConfigError: the file is. RequestError: nobody would need a key.
    """
    arguments = RayArguments.model_validate(given)
    config = read_config(Path(arguments.config).absolute())
    if config.devices:
        raise ConfigError("devices: Ray gives every replica its own GPUs; leave it out, and set gpus_per_replica")
    if arguments.max_replicas < arguments.min_replicas:
        raise ConfigError(f"max_replicas: expected {arguments.min_replicas} or more, got {arguments.max_replicas}")
    # Ray's proxy listens, at an address that the service does not know.
    refuse_strangers(dataclasses.replace(config, host="Ray's proxy"))
    engines = serve.deployment(
        EngineReplica,
        name=ENGINES,
        max_ongoing_requests=config.slots,
        autoscaling_config=AutoscalingConfig(
            min_replicas=arguments.min_replicas,
            max_replicas=arguments.max_replicas,
            target_ongoing_requests=config.slots,
        ),
        ray_actor_options={"num_cpus": arguments.cpus_per_replica, "num_gpus": arguments.gpus_per_replica},
        graceful_shutdown_timeout_s=config.queue.drain_seconds,
    )

    def build() -> FastAPI:
        configure(config.log_format)
        HELD.enter_context(exclusive(Path(config.data)))
        return create_app(config, replica_workers(arguments.max_replicas))

    front = serve.deployment(
        serve.ingress(build)(),
        name=SERVICE,
        num_replicas=1,  # it has the queue and writes the record
        max_ongoing_requests=MAX_CLIENTS,
        ray_actor_options={"num_cpus": 0},  # it waits more than it computes, and must always find a place
        graceful_shutdown_timeout_s=config.queue.drain_seconds + 5,
    )
    return front.bind(engines.bind(config))


# --- the replicas with engines ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Content:
    """The bytes of an input image, which travel instead of a path on another machine."""

    content: bytes


class EngineReplica:
    """Engines of one replica. Ray calls it ready when the constructor returns: loaded, and warm for its sizes.

    Raises ConfigError: a model that is to be loaded at the start cannot be.
    """

    def __init__(self, config: ServiceConfig) -> None:
        configure(config.log_format)
        warnings.simplefilter("ignore", RequestWarning)
        self._listeners: dict[tuple[str, int], Callable[[object], object]] = {}
        self._problems: Mapping[str, str] = {}
        self._failures = 0
        self._worker = Worker(config, None, self._hear)
        self._worker.warm_up()
        if self._problems:
            raise ConfigError("; ".join(f"{model} cannot be loaded: {text}" for model, text in self._problems.items()))

    def check_health(self) -> None:
        """Raise RuntimeError after several unexpected errors in a row: Ray then replaces the replica."""
        if self._failures >= MAX_FAILURES:
            raise RuntimeError(f"the last {self._failures} jobs failed unexpectedly; the log has the reasons")

    async def draw(self, run: Run) -> AsyncIterator[object]:
        """Draw a job; yields what happens, and then `Finished`. A caller that stops listening cancels it."""
        loop = asyncio.get_running_loop()
        messages: asyncio.Queue[object] = asyncio.Queue()
        attempt = (run.job, run.attempt)
        self._listeners[attempt] = lambda message: loop.call_soon_threadsafe(messages.put_nowait, message)
        is_finished = False
        with tempfile.TemporaryDirectory(prefix="zimage-inputs-", ignore_cleanup_errors=True) as folder:
            try:
                fields = await asyncio.to_thread(write_inputs, run.fields, Path(folder))
                self._worker.run(dataclasses.replace(run, fields=fields))
                while not is_finished:
                    message = await messages.get()
                    is_finished = isinstance(message, Finished)
                    yield message
            finally:
                if not is_finished:
                    self._worker.cancel(run.job)
                self._listeners.pop(attempt, None)

    def _hear(self, message: object) -> None:
        """Take a message of the worker, on any thread."""
        if isinstance(message, Ready):
            self._problems = message.problems
        if isinstance(message, Finished):
            is_unexpected = message.error is not None and message.error["code"] == "internal"
            self._failures = self._failures + 1 if is_unexpected else 0
        if isinstance(message, (Step, Told, Finished)):
            listener = self._listeners.get((message.job, message.attempt))
            if listener is not None:
                listener(message)


def read_inputs(fields: Mapping[str, Any]) -> dict[str, Any]:
    """A request's fields with the bytes of its input images instead of their paths. Raises OSError."""
    return {name: Content(value.read_bytes()) if isinstance(value, Path) else value for name, value in fields.items()}


def write_inputs(fields: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The fields that `read_inputs` was given, with the images as files of a folder, named by their hashes."""
    written = dict(fields)
    for name, value in fields.items():
        if isinstance(value, Content):
            written[name] = folder / hashlib.sha256(value.content).hexdigest()
            written[name].write_bytes(value.content)
    return written


# --- the replica with the queue ---------------------------------------------------------------------------------------


def replica_workers(max_replicas: int) -> Callable[[ServiceConfig, OnMessage, OnDeath], Sequence[JobWorker]]:
    """Makes the one worker of a service on Ray."""

    def make(config: ServiceConfig, on_message: OnMessage, on_death: OnDeath) -> list[JobWorker]:
        return [ReplicaWorker(config, max_replicas, on_message, on_death)]

    return make


class ReplicaWorker:
    """All replicas of the deployment `Engines`, as one worker of the service; see `WorkerProcess`.

    Ray chooses the replica of a job. A job whose replica died is given back, as that of a worker process.
    """

    def __init__(self, config: ServiceConfig, max_replicas: int, on_message: OnMessage, on_death: OnDeath) -> None:
        self._slots, self._max_replicas = config.slots, max_replicas
        self._on_message, self._on_death = on_message, on_death
        self.device: int | None = None
        self.running: dict[str, Job] = {}
        self.is_ready = False
        self.models: Sequence[str] = ()
        self.memory: Mapping[str, int] = {}
        self.caches: Mapping[tuple[str, str], int] = {}
        self.problems: Mapping[str, str] = {}
        self.deaths = 0
        self._loaded = [name for name, model in config.models.items() if model.load]
        self._app_name = serve.get_replica_context().app_name
        self._handle = serve.get_deployment_handle(ENGINES, self._app_name).options(stream=True)
        self._replicas = 0
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._cancelled: set[str] = set()
        self._looking: asyncio.Task[None] | None = None
        self._is_ending = False

    @property
    def places(self) -> int:
        """Jobs that the replicas draw at once."""
        return self._slots * max(1, self._replicas)

    def start(self) -> None:
        """Look for replicas from now on."""
        self._looking = asyncio.ensure_future(self._look())

    def has_room(self) -> bool:
        """Whether it takes another job now.

        While more replicas may come, the jobs of one replica more are sent: Ray starts replicas for those that wait
        in its router, and knows nothing of the service's queue.
        """
        ahead = self._slots if self._replicas < self._max_replicas else 0
        return self.is_ready and not self._is_ending and len(self.running) < self._slots * self._replicas + ahead

    def give(self, job: Job) -> None:
        """Send a job to the replica that Ray chooses."""
        self.running[job.id] = job
        self._tasks[job.id] = asyncio.ensure_future(self._draw(job))

    def cancel(self, job: Job) -> None:
        """End a job; its replica stops after the step that runs."""
        task = self._tasks.get(job.id)
        if task is not None:
            self._cancelled.add(job.id)
            task.cancel()

    async def stop(self, seconds: float) -> None:
        """Let the jobs end; cancel them after `seconds`."""
        self._is_ending = True
        if self._looking is not None:
            self._looking.cancel()
        tasks = list(self._tasks.values())
        if tasks:
            _, late = await asyncio.wait(tasks, timeout=seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _look(self) -> None:
        """Keep the number of replicas that run, and tell the service when there are more."""
        while True:
            before = self._replicas
            with contextlib.suppress(Exception):  # the controller starts again; the last number holds
                self._replicas = await asyncio.to_thread(running_replicas, self._app_name)
            self.is_ready = self._replicas > 0
            self.models = self._loaded if self.is_ready else ()
            if self._replicas > before:
                self._on_message(self, Ready({}))
            await asyncio.sleep(LOOK_SECONDS)

    async def _draw(self, job: Job) -> None:
        """Draw a job on a replica and tell its messages; the job is given back if the replica dies."""
        attempt = job.attempts
        try:
            async for message in self._messages(job):
                self._on_message(self, message)
        except asyncio.CancelledError:
            if job.id not in self._cancelled:
                return  # the service ends; a promised job is drawn when it runs again
            error = {"code": "cancelled", "message": "the job was cancelled; no image was made", "field": None}
            self._on_message(self, Finished(job.id, attempt, error=error))
        except Exception as error:
            log.error("job %s was lost with its replica: %s", job.id, error)
        finally:
            self._tasks.pop(job.id, None)
            self._cancelled.discard(job.id)
        # The service takes a job out of `running` when it hears that it has finished.
        if self.running.pop(job.id, None) is not None:
            self.deaths += 1
            self._on_death(self, [job])

    async def _messages(self, job: Job) -> AsyncIterator[object]:
        """The messages of an attempt. A replica that is lost before its first message is replaced by another."""
        fields = await asyncio.to_thread(read_inputs, job.fields)
        run = Run(job.id, job.attempts, job.model, fields, job.output, job.workflow)
        for last in (*[False] * (SEND_ATTEMPTS - 1), True):
            has_begun = False
            answer = self._handle.draw.remote(run)
            try:
                async for message in answer:
                    has_begun = True
                    yield message
                return
            except Exception as error:
                if has_begun or last:
                    raise
                log.warning("job %s was not begun by its replica: %s", job.id, error)
            finally:
                answer.cancel()  # nothing, if it has ended
            await asyncio.sleep(SEND_PAUSE)


def running_replicas(app_name: str) -> int:
    """How many replicas with engines are ready."""
    application = serve.status().applications.get(app_name)
    engines = None if application is None else application.deployments.get(ENGINES)
    return 0 if engines is None else engines.replica_states.get("RUNNING", 0)
