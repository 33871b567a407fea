"""Workflows on a worker: their nodes run on its engines, and every event goes to the service."""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ...comfyui.execute import Cache, execute
from ...comfyui.graph import WorkflowError
from ...comfyui.inputs import File, InputError
from ...comfyui.plan import Plan
from ...comfyui.registry import NODES
from ...comfyui.run import Events, Made, Run, Said, only_one
from ...comfyui.save import place_of
from ...engine import Engine
from ...errors import Cancelled, EngineClosed, OutOfMemory
from ...image.formats import encode_image
from ...request.types import StepInfo
from ..config import ServiceConfig
from ..messages import Finished, Told
from ..messages import Run as RunMessage
from ..previews import JobPreviews, Previews
from ..safety import SafetyFilter, severest
from ..workflow_task import Bounds, Task
from .lora_files import find_lora
from .models import ANY_MODEL
from .upscaler_files import find_upscaler

# Keys whose results of nodes a worker keeps, each of its last workflow.
MAX_OWNERS = 8

# The events that a worker tells: `cached` with `nodes`; `begins` with `node`; `step` with `node`, `step`, `steps` and
# perhaps `preview`; `samples` with `node` and `megapixel_steps`; `executed` with `node`, `signature`, `is_cached`,
# `images` (each `group`, `prefix`, `is_preview`, `content`, `size`) and `texts` (each `group`, `text`).


class SentFiles:
    """The files of a task: those that came with it, and LoRAs of the worker's own folders."""

    def __init__(self, task: Task, config: ServiceConfig) -> None:
        self._task, self._config = task, config

    def bundle(self, folder: str, name: str) -> str:
        """See `Files`: the name of a model of the service."""
        model = self._task.models.get((folder, name))
        if model is None:
            raise InputError("value_not_in_list", f"no model of this service stands for {name!r} of {folder}")
        return model

    def lora(self, name: str) -> Path:
        """See `Files`."""
        return find_lora(self._config, name)

    def image(self, name: str) -> bytes:
        """See `Files`."""
        content = self._task.images.get(name)
        if content is None:
            raise InputError("value_not_in_list", f"the image {name!r} did not come with the workflow")
        return content

    def upscaler(self, name: str) -> Path:
        """See `Files`."""
        return find_upscaler(self._config, name)


class Kept:
    """What a worker keeps of an owner's last workflow: nodes' results, and the output nodes that were shown."""

    def __init__(self) -> None:
        self.results: Cache = {}
        self.shown: frozenset[str] = frozenset()


class WorkflowRunner:
    """Runs the workflows of a worker.

    Args:
        config: of the service.
        engine: gives the engine of a model.
        make_room: see `Engines.make_room`.
        safety: looks at prompts and images.
        previews: of the worker.
        is_cancelled: whether a job is to stop.
        send: sends a message to the service.
    """

    def __init__(
        self,
        config: ServiceConfig,
        engine: Callable[[str], Engine],
        make_room: Callable[[str], bool],
        safety: SafetyFilter,
        previews: Previews,
        is_cancelled: Callable[[str], bool],
        send: Callable[[object], None],
    ) -> None:
        self._config, self._engine, self._make_room = config, engine, make_room
        self._safety, self._previews = safety, previews
        self._is_cancelled, self._send = is_cancelled, send
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def run(self, message: RunMessage) -> Finished:
        """Run a workflow to its end. Raises what its nodes raise."""
        task = message.workflow
        assert task is not None
        start = time.perf_counter()
        words = self._safety.check_prompt(prompts_of(task.plan))
        kept = self._kept.pop(task.owner, None) or Kept()
        events = _JobEvents(self, message, task, words)
        results = dict(kept.results)  # another run of the owner may go on beside this one
        try:
            self._execute(message.model, task, events, results, kept.shown)
        finally:
            events.end()
            after = Kept()
            after.results, after.shown = results, frozenset(events.shown | (kept.shown & results.keys()))
            self._kept[task.owner] = after
            while len(self._kept) > MAX_OWNERS:
                self._kept.popitem(last=False)
        timings = {"total": time.perf_counter() - start}
        safety = events.safety if self._config.safety.is_on else None
        return Finished(message.job, message.attempt, timings=timings, warnings=task.plan.warnings, safety=safety)

    def _execute(self, model: str, task: Task, events: _JobEvents, results: Cache, shown: frozenset[str]) -> None:
        while True:
            run = Run(self._engine, SentFiles(task, self._config), events, together)
            try:
                execute(task.plan, run, results, lambda signature: signature in shown or signature in events.shown)
                return
            except EngineClosed:  # closed to make room for another model; what was computed is taken again
                continue
            except OutOfMemory:
                if not self._make_room(model):
                    raise


class _JobEvents(Events):
    """Sends a run's events to the service, and keeps to its bounds."""

    def __init__(self, runner: WorkflowRunner, message: RunMessage, task: Task, words: Sequence[str]) -> None:
        self._runner, self._message, self._task, self._words = runner, message, task, words
        self._previews: JobPreviews | None = None
        self.shown: set[str] = set()
        self.safety: Mapping[str, Any] | None = None

    def cached(self, nodes: Sequence[str]) -> None:
        """See `Events`."""
        self._tell("cached", nodes=list(nodes))

    def begins(self, node: str) -> None:
        """See `Events`."""
        self.end()
        self._check_cancelled()
        self._tell("begins", node=node)

    def samples(self, node: str, shape: Sequence[int], steps: int) -> None:
        """See `Events`. Raises WorkflowError for more than the bounds allow."""
        batch, _, height, width = shape
        pixels = 64 * height * width
        check_bounds(self._task.bounds, batch, pixels, steps)
        self._tell("samples", node=node, megapixel_steps=pixels * steps * batch / 1e6)
        every = 0 if self._runner._config.safety.hides_images else self._task.previews

        def send(info: StepInfo, preview: bytes | None) -> None:
            more = {} if preview is None else {"preview": preview}
            self._tell("step", node=node, step=info.step + 1, steps=info.num_steps, **more)

        kind = (self._message.model, batch, height, width)
        self._previews = self._runner._previews.of_job(every, kind, send)

    def step(self, node: str, info: StepInfo) -> bool:
        """See `Events`."""
        if self._runner._is_cancelled(self._message.job):
            return False
        assert self._previews is not None
        self._previews.step(info)
        return True

    def progress(self, node: str, done: int, count: int) -> bool:
        """See `Events`."""
        self._tell("step", node=node, step=done, steps=count)
        return not self._runner._is_cancelled(self._message.job)

    def executed(self, node: str, signature: str, shown: Sequence[Made | Said], *, is_cached: bool) -> None:
        """See `Events`."""
        self._check_cancelled()
        made = [each for each in shown if isinstance(each, Made)]
        places = [str(place_of(each)) for each in made]
        decision = self._runner._safety.check_images([each.pixels for each in made], self._words)
        self.safety = severest(self.safety, decision.safety)
        images = [
            {
                "group": each.group,
                "prefix": place,
                "is_preview": each.is_preview,
                "content": encode_image(pixels, ".png", self._task.texts, ""),
                "size": (pixels.shape[1], pixels.shape[0]),
            }
            for each, place, pixels in zip(made, places, decision.images, strict=True)
        ]
        # Nodes can make halves of characters, which cannot be sent.
        said = [(each.group, each.text.encode("utf-8", "replace").decode()) for each in shown if isinstance(each, Said)]
        texts = [{"group": group, "text": text} for group, text in said]
        self._tell("executed", node=node, signature=signature, is_cached=is_cached, images=images, texts=texts)
        self.shown.add(signature)

    def end(self) -> None:
        """Return when all steps are sent."""
        if self._previews is not None:
            self._previews.flush()
            self._previews = None

    def _check_cancelled(self) -> None:
        if self._runner._is_cancelled(self._message.job):
            raise Cancelled("the job was cancelled; no image was made")

    def _tell(self, name: str, **data: Any) -> None:
        self._runner._send(Told(self._message.job, self._message.attempt, name, data))


def together(part: str, model: str, other: str) -> str:
    """The model that has both a transformer and another part; see `Run`."""
    return model if other == ANY_MODEL else only_one(part, model, other)


def check_bounds(bounds: Bounds, batch: int, pixels: int, steps: int) -> None:
    """Raise WorkflowError for a sampler that does more than a run may."""
    for what, most, got in (
        ("pixels", bounds.max_pixels, pixels),
        ("steps", bounds.max_steps, steps),
        ("images of a batch", bounds.max_images, batch),
    ):
        if got > most:
            raise WorkflowError(f"expected at most {most} {what} here, got {got}")


def prompts_of(plan: Plan) -> list[str]:
    """The texts of a workflow's nodes that may reach a model."""
    return [
        value
        for name in plan.order
        for key, value in plan.graph[name].inputs.items()
        if isinstance(value, str) and value and not _names_a_file(plan, name, key)
    ]


def _names_a_file(plan: Plan, name: str, key: str) -> bool:
    wanted = NODES[plan.graph[name].kind].inputs.get(key)
    return wanted is not None and (isinstance(wanted.spec, File) or wanted.spec.type == "COMBO")
