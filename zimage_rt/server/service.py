"""The service: checks requests, queues them fairly, gives them to workers, and keeps the results."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..bundle.manifest import Manifest, read_manifest
from ..bundle.tokenizer import PromptTokenizer
from ..errors import RequestError, ZImageError
from ..request.codec import IMAGES, make_request
from ..request.resolve import resolve
from ..request.types import ResolvedRequest, ResolvedSecondPass
from .bounds import check_inputs
from .config import ConfigError, ServiceConfig
from .jobs import MAX_ATTEMPTS, FairQueue, Job, Output
from .keys import Keyring
from .messages import Drawn, Finished, Ready, Step, Told
from .pool import JobWorker, MakeWorkers, worker_processes
from .rate import Rates
from .safety import SafetyFilter
from .schema import OutputFields
from .store import Store
from .worker import error_json, lora_file

log = logging.getLogger(__name__)

# Seconds for running jobs to stop after their step when the service ends, and for idle workers to end.
CANCEL_SECONDS, END_SECONDS = 10.0, 1.0
# Seconds between two sweeps of expired jobs.
SWEEP_SECONDS = 30.0
# File endings by output_format.
SUFFIX = {"png": ".png", "jpeg": ".jpg", "webp": ".webp"}
# Finished jobs in memory; older ones are answered from the store.
MAX_JOBS = 1000


class Draining(ZImageError):
    """The service ends and takes no more jobs."""

    code = "draining"


class UnknownModel(RequestError):
    """A request names a model that the service does not have."""

    code = "model_not_found"


class Service:
    """Jobs from their requests to their images. All methods run on the event loop's thread.

    Attributes:
        manifests: of the bundles, by model.
        jobs: those that can be asked for, by id.
        queue, workers, store, keyring, rates: see their classes.
        on_end: called with every job that has ended.
        on_sweep: awaited when what has expired is removed.
        on_told: called with a job, a name and data for what its workflow tells.
    """

    def __init__(self, config: ServiceConfig, make_workers: MakeWorkers = worker_processes) -> None:
        self.config = config
        self.manifests: dict[str, Manifest] = {
            name: read_manifest(Path(model.bundle)) for name, model in config.models.items()
        }
        for name, model in config.models.items():
            if model.loras is not None and not Path(model.loras).is_dir():
                raise ConfigError(f"models.{name}.loras: {model.loras} is no folder; make it, or leave `loras` out")
        SafetyFilter(config.safety)  # so that the service does not start without what its workers need
        self.store = Store(Path(config.data), config)
        self.store.bundle_ids = {name: manifest.bundle_id for name, manifest in self.manifests.items()}
        self.keyring, self.rates = Keyring(self.store.folder), Rates()
        self.on_end: list[Callable[[Job], None]] = []
        self.on_sweep: list[Callable[[], Awaitable[None]]] = []
        self.on_told: Callable[[Job, str, Mapping[str, Any]], None] = lambda job, name, data: None
        self.queue = FairQueue(config.queue.max_waiting)
        self.jobs: dict[str, Job] = {}
        self._tokenizers: dict[str, PromptTokenizer] = {}
        self.workers = make_workers(config, self._on_message, self._on_death)
        # By batch: the task that lets its rows wait.
        self.feeding: dict[str, asyncio.Future[None]] = {}
        # By session: the turn that is drawn, and the task that lets it stand.
        self.turns: dict[str, tuple[Job, asyncio.Future[None]]] = {}
        self.taking: set[str] = set()  # sessions whose next turn is being checked
        self._is_draining = False
        self.has_drained = asyncio.Event()
        self._sweeping: asyncio.Task[None] | None = None

    # --- life -----------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Start the workers, and queue the promised jobs of an earlier run again."""
        await self.store.open()
        for worker in self.workers:
            worker.start()
        for job in await self.store.unfinished():
            self.jobs[job.id] = job
            self.queue.add_first(job)
            job.tell("queued", position=self.queue.position(job))
        self._sweeping = asyncio.create_task(self._sweep())

    async def drain(self) -> None:
        """Take no more jobs, and finish what runs and waits, as long as `drain_seconds` allow.

        Clients that still wait then get an error. A detached job was promised: it is drawn when the service runs again.
        """
        if self._is_draining:
            return
        self._is_draining = True
        for task in list(self.feeding.values()):
            task.cancel()
        await self._until_finished(self._unfinished, self.config.queue.drain_seconds)
        for job in self._unfinished():
            if job.detached:
                log.info("job %s is kept, and is drawn when the service runs again", job.id)
            else:
                log.warning("job %s is dropped, because the service ends", job.id)
                self.cancel(job, "the service ends; no image was made; ask another, or again later", Draining.code)
        await self._until_finished(lambda: [job for job in self._unfinished() if not job.detached], CANCEL_SECONDS)
        self.has_drained.set()

    async def stop(self) -> None:
        """Drain, if that was not done before, and end the workers and the record."""
        await self.drain()
        await asyncio.gather(*(worker.stop(END_SECONDS) for worker in self.workers))
        for job, settling in self.turns.values():
            if not job.is_finished:
                settling.cancel()  # it was promised, and stands when it is drawn by the next run
        await asyncio.gather(*(settling for _, settling in self.turns.values()), return_exceptions=True)
        if self._sweeping is not None:
            self._sweeping.cancel()
        await self.store.close()

    async def _until_finished(self, unfinished: Callable[[], Sequence[Job]], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while unfinished() and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    @property
    def is_ready(self) -> bool:
        """Whether a worker takes jobs."""
        return not self._is_draining and any(worker.is_ready for worker in self.workers)

    def _unfinished(self) -> list[Job]:
        return [job for job in self.jobs.values() if not job.is_finished]

    # --- jobs -----------------------------------------------------------------------------------------------------

    def model(self, name: str | None) -> str:
        """The model of a request. Raises UnknownModel."""
        if name is None:
            return self.config.default_model
        if name not in self.config.models:
            known = ", ".join(self.config.models)
            raise UnknownModel(f"model: there is no model {name!r}; there are: {known}", field="model")
        return name

    async def check(self, model: str, fields: Mapping[str, Any]) -> ResolvedRequest:
        """A request as it will be drawn, checked against its bundle and the service's limits. Raises RequestError."""
        manifest, limits = self.manifests[model], self.config.limits
        for name in IMAGES:
            # No text of a client's is ever opened as a path, whichever route it came by.
            if fields.get(name) is not None and not self.store.holds_input(fields[name]):
                raise RequestError(f"{name}: expected an uploaded image, got the name of a file", field=name)

        def read() -> ResolvedRequest:
            check_inputs(fields, limits.max_input_pixels)
            return resolve(make_request(**fields), manifest)

        try:
            # Only images take time to be read; a thread for the rest would take longer than the rest does.
            has_images = any(fields.get(name) is not None for name in IMAGES)
            resolved = await asyncio.to_thread(read) if has_images else read()
        except RequestError as error:
            raise RequestError(without_paths(str(error), fields), field=error.field) from None
        last = last_pass(resolved)
        if max(resolved.height * resolved.width, last.height * last.width) > limits.max_pixels:
            raise RequestError(
                f"height and width: expected at most {limits.max_pixels} pixels here, got {last.width}x{last.height}",
                field="height",
            )
        steps = total_steps(resolved)
        if steps > limits.max_steps:
            raise RequestError(f"num_inference_steps: expected at most {limits.max_steps} here, got {steps}")
        if len(resolved.seeds) > limits.max_images:
            raise RequestError(f"num_images: expected at most {limits.max_images} here, got {len(resolved.seeds)}")
        for name in resolved.loras or ():
            lora_file(self.config.models[model].loras, name)
        return resolved

    async def submit(
        self,
        model: str,
        fields: Mapping[str, Any],
        *,
        owner: str = "",
        output: Output | None = None,
        priority: int = 0,
        detached: bool = False,
        admit: Callable[[ResolvedRequest], None] = lambda request: None,
        job_id: str | None = None,
    ) -> Job:
        """Check a request and let it wait.

        Args:
            model: its name, see `model`.
            fields: of a `GenerateRequest`; images are paths of `Store.keep_input`.
            owner: the key's name.
            output: the images' format, and previews.
            priority: higher ones of an owner come first.
            detached: whether it is promised: it is then drawn although its client has gone, or the service ends.
            admit: called with the checked request just before it waits; what it raises refuses the request.
            job_id: the job's id; a new one if None.

        Raises:
            RequestError: it cannot be drawn. QueueFull: too many wait. Draining: the service ends.
        """
        self.check_takes_jobs()  # before anything is decoded
        resolved = await self.check(model, fields)
        # The seed is chosen here, so that the record has it whatever becomes of the job.
        has_seeds = resolved.batch_noise == "separate" and len(resolved.seeds) > 1
        job = Job(
            {**fields, "seed": list(resolved.seeds) if has_seeds else resolved.seeds[0]},
            model=model,
            owner=owner,
            output=output,
            priority=priority,
            detached=detached,
            job_id=job_id,
        )
        self._check_room()
        admit(resolved)
        self._add(job)
        if detached:
            try:
                await self.store.promise(job)
            except ZImageError:
                self.cancel(job)
                raise
        return job

    def check_takes_jobs(self) -> None:
        """Raise Draining, StorageFull or QueueFull unless a job may come now."""
        if self._is_draining:
            raise Draining("the service ends and takes no more jobs; ask another, or again later")
        self.store.check_room()
        self._check_room()

    def submit_workflow(self, job: Job, *, before: Job | None = None) -> None:
        """Let a workflow's job wait, right before another of its owner or last; `dispatch` gives it to a worker.

        Raises what `check_takes_jobs` does.
        """
        self.check_takes_jobs()
        self._wait(job, before)

    def _add(self, job: Job) -> None:
        self._wait(job)
        self.dispatch()

    def _wait(self, job: Job, before: Job | None = None) -> None:
        self.jobs[job.id] = job
        if before is None:
            self.queue.add(job)
        else:
            self.queue.add_before(job, before)
        job.tell("queued", position=self.queue.position(job))

    def reject(self, job_id: str, model: str, owner: str, error: Exception) -> None:
        """Record a request that cannot be drawn as a failed job."""
        job = Job({"prompt": ""}, model=model, owner=owner, detached=True, job_id=job_id)
        self._end(job, "failed", error_json(error))

    @staticmethod
    def output_of(said: OutputFields) -> dict[str, Any]:
        """How a job's images are encoded, for `Output`. Raises RequestError."""
        suffix = SUFFIX[said.output_format]
        if said.output_quality is not None and suffix == ".png":
            raise RequestError("output_quality: a PNG keeps every pixel and has none; leave it out, or ask for jpeg")
        return {"suffix": suffix, "quality": said.output_quality, "previews": said.previews}

    def _check_room(self) -> None:
        if not any(worker.has_room() for worker in self.workers):
            self.queue.check_room(sum(worker.places for worker in self.workers))

    def unfinished_of(self, owner: str) -> int:
        """How many jobs of an owner wait or run."""
        running = (job for worker in self.workers for job in worker.running.values())
        return self.queue.waiting(owner) + sum(job.owner == owner for job in running)

    def cancel(
        self, job: Job, reason: str = "the job was cancelled; no image was made", code: str = "cancelled"
    ) -> None:
        """Stop a job, at once if it waits, after its step if it runs; nothing if it has ended."""
        if job.is_finished:
            return
        error = job.cancel_error = {"code": code, "message": reason, "field": None}
        if self.queue.remove(job):
            self._end(job, "cancelled", error)
            return
        for worker in self.workers:
            if job.id in worker.running:
                job.is_cancelling = True
                worker.cancel(job)

    async def wait(self, job: Job) -> None:
        """Return when a job has ended and its record is kept."""
        await job.wait()
        await self.store.settled(job)

    async def image(self, job: Job, number: int) -> bytes:
        """The bytes of a finished job's image. Raises KeyError if there is none, FileNotFoundError if it expired."""
        if number < 0:
            raise KeyError(number)
        if number < len(job.images):
            return job.images[number].content
        if number < len(job.stored):
            return await asyncio.to_thread(job.stored[number].path.read_bytes)
        raise KeyError(number)

    async def usage(self, job: Job) -> dict[str, Any]:
        """The usage of a job, as OpenAI counts it: tokens of the prompts, and image tokens that were drawn and read."""
        manifest = self.manifests[job.model]
        tokenizer = self._tokenizers.get(job.model)
        if tokenizer is None:
            bundle = Path(self.config.models[job.model].bundle)
            tokenizer = await asyncio.to_thread(PromptTokenizer, bundle, manifest)
            self._tokenizers[job.model] = tokenizer
        prompt = job.fields["prompt"]
        prompts = [prompt] if isinstance(prompt, str) else prompt
        text = sum(tokenizer.count(each, "prompt", truncate=True, literal=False)[0] for each in prompts)
        side = manifest.pipeline.size_multiple
        drawn = sum((height // side) * (width // side) for width, height in job.sizes)
        read = drawn // max(len(job.sizes), 1) if job.fields.get("image") is not None else 0
        return {
            "input_tokens": text + read,
            "input_tokens_details": {"text_tokens": text, "image_tokens": read},
            "output_tokens": drawn,
            "total_tokens": text + read + drawn,
        }

    def dispatch(self) -> None:
        """Give jobs that wait to workers that have room."""
        while len(self.queue):
            free = [worker for worker in self.workers if worker.has_room()]
            if not free:
                return
            job = self.queue.take()
            if job is None:
                return
            worker = min(free, key=lambda each: (len(each.running), job.model not in each.models))
            job.attempts += 1
            job.is_drawn = False
            job.state, job.started = "running", time.time()
            job.tell("started", attempt=job.attempts)
            worker.give(job)

    def _on_message(self, worker: JobWorker, message: object) -> None:
        if isinstance(message, Ready):
            self.dispatch()
        if not isinstance(message, (Step, Told, Drawn, Finished)):
            return
        job = worker.running.get(message.job)
        if job is None or job.attempts != message.attempt:
            return  # of an attempt that was given up
        if isinstance(message, Step):
            data: dict[str, Any] = {"step": message.step, "steps": message.steps, "sigma": message.sigma}
            if message.preview is not None:
                data["preview"] = message.preview
            job.tell("step", **data)
            return
        if isinstance(message, Told):
            self.on_told(job, message.name, message.data)
            return
        if isinstance(message, Drawn):
            job.is_drawn = True
            self.dispatch()
            return
        del worker.running[job.id]
        job.safety = message.safety
        if message.error is None:
            job.images, job.timings, job.warnings = message.images, message.timings, message.warnings
            job.sizes = [(image.width, image.height) for image in message.images]
            self.queue.timed(message.timings.get("total", 0.0))
            self._end(job, "done", None, seeds=list(message.seeds), warnings=list(message.warnings))
        else:
            is_cancelled = message.error["code"] == "cancelled"
            error = job.cancel_error if is_cancelled and job.cancel_error else message.error
            error = {**error, "message": without_paths(error["message"], job.fields)}
            self._end(job, "cancelled" if is_cancelled else "failed", error)
        self.dispatch()

    def _end(self, job: Job, state: Any, error: Mapping[str, Any] | None, **data: Any) -> None:
        """End a job and keep its record; the answer waits for that, see `wait`."""
        job.error = error
        self.store.finished(job, state)
        job.finish(state, **({"error": error} if error is not None else data))
        job.drop_previews()
        for tell in self.on_end:
            tell(job)

    def _on_death(self, worker: JobWorker, lost: Sequence[Job]) -> None:
        for job in lost:
            if job.is_cancelling:
                self._end(job, "cancelled", job.cancel_error)
            elif job.attempts < MAX_ATTEMPTS:
                job.state = "queued"
                job.tell("queued", position=0)
                self.queue.add_first(job)
            else:
                message = f"the worker died {job.attempts} times while it drew this"
                self._end(job, "failed", {"code": "worker_died", "message": message, "field": None})
        self.dispatch()

    async def _sweep(self) -> None:
        """Forget jobs whose images have expired, and prune the record, for ever."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            try:
                self.forget_expired()
                unfinished = (value for job in self._unfinished() for value in job.fields.values())
                await self.store.prune({value.name for value in unfinished if isinstance(value, Path)})
                for sweep in self.on_sweep:
                    await sweep()
            except Exception:  # the next round may do better; without any, the disk would fill
                log.exception("what has expired was not removed")

    def forget_expired(self) -> None:
        """Forget finished jobs that are too old or too many; their records and files are still in the store."""
        now = time.time()
        # Those that the disk has not taken yet are nowhere else.
        written = [job for job in self.jobs.values() if job.finished and self.store.is_settled(job)]
        finished = sorted(written, key=lambda job: job.finished or 0.0)
        for index, job in enumerate(finished):
            too_old = now - (job.finished or now) > self.config.queue.keep_seconds
            if too_old or len(finished) - index > MAX_JOBS:
                del self.jobs[job.id]


def without_paths(message: str, fields: Mapping[str, Any]) -> str:
    """A message about a request without the names of its images' files, which are the service's business alone."""
    for value in fields.values():
        message = message.replace(str(value), "the uploaded file") if isinstance(value, Path) else message
    return message


def last_pass(request: ResolvedRequest) -> ResolvedRequest | ResolvedSecondPass:
    """The pass of a request whose size its images have."""
    return request.second_pass or request


def total_steps(request: ResolvedRequest) -> int:
    """The steps of one image of a request, over its passes."""
    return sum(len(part.sigmas) - 1 for part in (request, request.second_pass) if part is not None)
