"""A worker process: engines on one device, and the jobs that the service sends."""

from __future__ import annotations

import dataclasses
import logging
import os
import signal
import threading
import time
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from ..comfyui.graph import WorkflowError
from ..engine import Engine
from ..errors import Cancelled, EngineClosed, OutOfMemory, RequestError, RequestWarning, ZImageError
from ..image.formats import media_type
from ..metadata.image_file import encode_with_record
from ..metadata.record import ImageRecord
from ..metadata.references import pixels_sha256
from ..request.codec import IMAGES, make_request
from ..request.types import GenerateRequest, StepInfo
from ..result import GenerateResult
from .comfyui.runner import WorkflowRunner
from .config import ModelConfig, ServiceConfig
from .jobs import Image
from .logs import configure
from .messages import Cancel, Drawn, Finished, Loaded, Ready, Run, Step, Stop
from .previews import JobPreviews, Previews
from .safety import Blocked, SafetyFilter

log = logging.getLogger(__name__)

# Jobs of a worker whose images are encoded at once, while others are drawn. A PNG of noise takes a third of the time
# that the full model takes to draw it, and a small image longer than the small model.
MAX_ENCODING = min(8, os.cpu_count() or 1)
# Seconds between two readings of the device's memory, which cost a call of its driver each.
MEMORY_SECONDS = 2.0


class Engines:
    """The engines of one worker: loaded on first use, the one unused for longest closed if memory runs out.

    Args:
        models: by name.
        device: the GPU's number, or None for the backend's own.
        max_loaded: engines at once.
        changed: called when one was loaded or closed.
    """

    def __init__(
        self,
        models: Mapping[str, ModelConfig],
        device: int | None,
        max_loaded: int,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        self._models, self._device, self._max = models, device, max_loaded
        self._changed = changed
        self._loaded: OrderedDict[str, Engine] = OrderedDict()
        self._memory: dict[str, dict[str, int]] = {}  # by model
        self._closed_counts = (0, 0)  # of the prompt caches of engines that were closed
        self._loading = threading.Lock()

    def get(self, name: str) -> Engine:
        """The engine of a model. Raises what `Engine.load` raises, OutOfMemory if it does not fit alone."""
        with self._loading:
            if name in self._loaded:
                self._loaded.move_to_end(name)
                return self._loaded[name]
            while len(self._loaded) >= self._max:
                self._close_oldest()
            while True:
                try:
                    engine = self._load(self._models[name])
                except OutOfMemory:
                    if not self._loaded:
                        raise
                    self._close_oldest()
                    continue
                self.read_memory(name, engine)
                self._loaded[name] = engine
                self._changed()
                return engine

    def make_room(self, name: str) -> bool:
        """Close the engine unused for longest, if another than `name` is loaded; whether one was."""
        with self._loading:
            other = next((loaded for loaded in self._loaded if loaded != name), None)
            if other is None:
                return False
            self._close(other)
            return True

    def close(self) -> None:
        """Close all."""
        with self._loading:
            while self._loaded:
                self._close_oldest()

    @property
    def names(self) -> list[str]:
        """The models that are loaded."""
        return list(self._loaded)

    def prompt_cache_counts(self) -> tuple[int, int]:
        """See `Engine.prompt_cache_counts`; of all engines so far."""
        return _sum([self._closed_counts, *(engine.prompt_cache_counts for engine in list(self._loaded.values()))])

    def memory(self) -> dict[str, int]:
        """Bytes of device memory by use, as they were last read; empty if no backend knows.

        Weights, workspace and graphs are the sum over the engines; what the device has free and in all is the last
        reading.
        """
        found: dict[str, int] = {}
        for memory in list(self._memory.values()):
            for use, size in memory.items():
                found[use] = size + (0 if use in ("free", "total") else found.get(use, 0))
        return found

    def read_memory(self, name: str, engine: Engine) -> None:
        """Read an engine's memory. Only for the thread that runs it, or before any does.

        The pipeline has one lock for everything: another thread would wait for the request that runs.
        """
        read = getattr(engine.pipeline, "memory", None)
        if read is not None:
            self._memory.pop(name, None)  # so that it is the last
            self._memory[name] = dict(read())

    def _load(self, model: ModelConfig) -> Engine:
        options = dict(model.backend_options)
        if self._device is not None:
            options["device" if model.backend != "onnxruntime" else "device_id"] = self._device
        return Engine.load(model.bundle, backend=model.backend, backend_options=options)

    def _close_oldest(self) -> None:
        self._close(next(iter(self._loaded)))

    def _close(self, name: str) -> None:
        # The engine waits for the requests that run on it.
        engine = self._loaded.pop(name)
        engine.close()
        self._memory.pop(name, None)
        self._closed_counts = _sum([self._closed_counts, engine.prompt_cache_counts])
        self._changed()


class Worker:
    """Draws jobs until it is told to stop. `send` may be called from any thread."""

    def __init__(self, config: ServiceConfig, device: int | None, send: Callable[[object], None]) -> None:
        self._config, self._send = config, send
        self.engines = Engines(config.models, device, config.max_loaded, self._tell)
        self._jobs = ThreadPoolExecutor(config.slots, "zimage-job")
        self._encoders = ThreadPoolExecutor(MAX_ENCODING, "zimage-encode")
        self._given: set[str] = set()
        self._cancelled: set[str] = set()
        self._loras = threading.Lock()
        self._safety = SafetyFilter(config.safety)
        self._previews = Previews(config.preview_share)
        self._workflows = WorkflowRunner(
            config,
            self.engines.get,
            self.engines.make_room,
            self._safety,
            self._previews,
            lambda job: job in self._cancelled,
            send,
        )
        self._lora_counts: Counter[str] = Counter()
        self._memory_read = -MEMORY_SECONDS

    def warm_up(self) -> None:
        """Load the models that are to be ready, and draw their sizes once; then say so."""
        problems: dict[str, str] = {}
        self._safety.load()
        for name, model in self._config.models.items():
            if not model.load:
                continue
            try:
                engine = self.engines.get(name)
                for size in model.warm:
                    width, _, height = size.partition("x")
                    engine.generate("warm-up", height=int(height), width=int(width), num_inference_steps=1, seed=0)
            except (ZImageError, OSError) as error:
                problems[name] = f"{type(error).__name__}: {error}"
        self._send(Ready(problems))

    def run(self, message: Run) -> None:
        """Begin a job on a thread of its own."""
        self._given.add(message.job)
        self._jobs.submit(self._run, message)

    def cancel(self, job: str) -> None:
        """Stop a job after its step; nothing if it has ended."""
        if job in self._given:
            self._cancelled.add(job)

    def stop(self) -> None:
        """Wait for the jobs, and close the engines."""
        self._jobs.shutdown(wait=True)
        self._encoders.shutdown(wait=True)
        self._previews.stop()
        self.engines.close()

    def _run(self, message: Run) -> None:
        try:
            if message.job in self._cancelled:
                raise Cancelled("the job was cancelled; no image was made")
            if message.workflow is not None:
                self._finish(self._workflows.run(message))
                return
            request = make_request(**message.fields)
            words = self._safety.check_prompt(request.prompt)
            result = self._draw(message, request)
        except BaseException as error:
            self._finish(_failed(message, error))
            return
        self._send(Drawn(message.job, message.attempt))
        self._encoders.submit(self._encode, message, result, words)

    def _encode(self, message: Run, result: GenerateResult, words: Sequence[str]) -> None:
        """Check and encode the images while the device draws another job."""
        try:
            finished = self._encoded(message, result, words)
        except BaseException as error:
            finished = _failed(message, error)
        self._finish(finished)

    def _finish(self, finished: Finished) -> None:
        self._given.discard(finished.job)
        self._cancelled.discard(finished.job)
        self._send(finished)
        self._tell()

    def _draw(self, message: Run, request: GenerateRequest) -> GenerateResult:
        while True:
            engine = self.engines.get(message.model)
            previews = self._previews_of(message, request)
            try:
                self._load_loras(engine, message.model, request)
                return engine.run(request, callback=self._callback(message, engine, previews))
            except EngineClosed:  # closed to make room for another model, between the two lines
                continue
            except OutOfMemory:
                if not self.engines.make_room(message.model):
                    raise
            finally:
                previews.flush()  # no step is sent after the end

    def _encoded(self, message: Run, result: GenerateResult, words: Sequence[str]) -> Finished:
        suffix = message.output.suffix
        decision = self._safety.check_images(list(result.images), words)
        images = []
        for pixels, drawn in zip(decision.images, result.records, strict=True):
            record = dataclasses.replace(scrubbed(drawn), pixels_sha256=pixels_sha256(pixels))
            content = encode_with_record(pixels, record, suffix, message.output.quality)
            height, width = pixels.shape[:2]
            images.append(Image(content, media_type(suffix), width, height, dataclasses.asdict(record)))
        return Finished(
            message.job,
            message.attempt,
            images,
            result.timings,
            result.seeds,
            list(result.records[0].warnings),
            decision.safety if self._config.safety.is_on else None,
        )

    def _previews_of(self, message: Run, request: GenerateRequest) -> JobPreviews:
        every = 0 if self._config.safety.hides_images else message.output.previews
        kind = (message.model, request.height, request.width, request.num_images)

        def send(info: StepInfo, preview: bytes | None) -> None:
            sigma = float(info.sigma_next)
            self._send(Step(message.job, message.attempt, info.step + 1, info.num_steps, sigma, preview))

        return self._previews.of_job(every, kind, send)

    def _callback(self, message: Run, engine: Engine, previews: JobPreviews) -> Callable[[StepInfo], bool]:
        def on_step(info: StepInfo) -> bool:
            if message.job in self._cancelled:
                return False
            if time.monotonic() - self._memory_read >= MEMORY_SECONDS:
                self._memory_read = time.monotonic()
                self.engines.read_memory(message.model, engine)
            previews.step(info)
            return True

        return on_step

    def _load_loras(self, engine: Engine, model: str, request: GenerateRequest) -> None:
        """Load the LoRAs that a request names, from the model's folder, switched off. Raises RequestError."""
        folder = self._config.models[model].loras
        with self._loras:
            for name in request.loras or ():
                self._lora_counts["hit" if name in engine.loras else "miss"] += 1
            load_loras(engine, folder, request)

    def _tell(self) -> None:
        """Tell which engines there are and what they use."""
        hits, misses = self.engines.prompt_cache_counts()
        caches = {("prompt", "hit"): hits, ("prompt", "miss"): misses}
        caches |= {("lora", result): self._lora_counts[result] for result in ("hit", "miss")}
        self._send(Loaded(self.engines.names, self.engines.memory(), caches))


def _failed(message: Run, error: BaseException) -> Finished:
    if not isinstance(error, ZImageError):
        log.error("job %s failed", message.job, exc_info=error, extra={"job": message.job, "model": message.model})
    safety = error.safety if isinstance(error, Blocked) else None
    return Finished(message.job, message.attempt, safety=safety, error=error_json(error))


def _sum(counts: Sequence[tuple[int, int]]) -> tuple[int, int]:
    return sum(hits for hits, _ in counts), sum(misses for _, misses in counts)


def lora_names(folder: str | None) -> dict[str, Path]:
    """The LoRAs of a folder by their names: files without their ending, and folders as PEFT writes them."""
    if folder is None or not Path(folder).is_dir():
        return {}
    found = sorted(Path(folder).iterdir())
    return {
        path.stem if path.is_file() else path.name: path
        for path in found
        if not path.name.startswith(".") and (path.suffix == ".safetensors" or path.is_dir())
    }


def lora_file(folder: str | None, name: str) -> Path:
    """The file of a LoRA. Raises RequestError for a name that the folder does not have: no path is made of it."""
    known = lora_names(folder)
    if name not in known:
        raise RequestError(f"loras: no LoRA named {name!r} here; there are: {', '.join(known) or 'none'}")
    return known[name]


def load_loras(engine: Engine, folder: str | None, request: GenerateRequest) -> None:
    """Load the LoRAs that a request names and the engine has not, from a folder, switched off. Raises RequestError."""
    for name in request.loras or ():
        if name not in engine.loras:
            engine.load_lora(lora_file(folder, name), 0.0, name, strict=False)


def scrubbed(record: ImageRecord) -> ImageRecord:
    """The record without the service's paths: inputs by their hashes, LoRAs by their files' names."""
    request = {
        name: {key: item for key, item in value.items() if key != "path"}
        if name in IMAGES and isinstance(value, Mapping)
        else value
        for name, value in record.request.items()
    }
    loras = [{**lora, "path": Path(lora["path"]).name} for lora in record.loras]
    return dataclasses.replace(record, request=request, loras=loras, backend_options={})


def error_json(error: BaseException) -> dict[str, Any]:
    """An error as `{code, message, field}` for a client. An unexpected one does not reveal the service's internals."""
    if isinstance(error, ZImageError):
        found = {"code": error.code, "message": str(error), "field": getattr(error, "field", None)}
        return found | ({"node_errors": error.node_errors} if isinstance(error, WorkflowError) else {})
    return {"code": "internal", "message": "the service failed; its log has the reason", "field": None}


def main(config: ServiceConfig, device: int | None, connection: Connection) -> None:
    """Run a worker process: obey the messages of the connection until `Stop`, or until the service has ended."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the service's to handle
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    warnings.simplefilter("ignore", RequestWarning)
    configure(config.log_format)
    sending = threading.Lock()

    def send(message: object) -> None:
        with sending:
            try:
                connection.send(message)
            except (BrokenPipeError, OSError):  # the service is gone, and nobody waits for anything
                os._exit(1)

    worker = Worker(config, device, send)
    threading.Thread(target=worker.warm_up, name="zimage-warm-up", daemon=True).start()
    started = time.monotonic()
    while True:
        try:
            message = connection.recv()
        except (EOFError, OSError):
            os._exit(0)
        if isinstance(message, Run):
            worker.run(message)
        elif isinstance(message, Cancel):
            worker.cancel(message.job)
        elif isinstance(message, Stop):
            worker.stop()
            log.info("worker %d ends after %.0f s", os.getpid(), time.monotonic() - started)
            return
