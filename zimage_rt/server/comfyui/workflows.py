"""Workflows as jobs of the service: checked, queued, told of in ComfyUI's messages, and kept in its history."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..._version import __version__
from ...comfyui.graph import Graph, WorkflowError
from ...comfyui.plan import Plan, plan
from ...errors import ZImageError
from ..access import Caller
from ..config import ServiceConfig
from ..jobs import Job
from ..service import Service
from ..workflow_task import Bounds, Task
from . import messages
from .folders import Folders, OwnerFolder
from .history import History
from .hub import Hub, plain_preview, preview_with_metadata
from .models import ANY_MODEL, ModelFiles, WorkflowFiles
from .workflow_run import WorkflowRun

log = logging.getLogger(__name__)

# Seconds between two `status` messages while a workflow runs: a client calls a silent server disconnected.
STATUS_SECONDS = 5.0
# Seconds after which a workflow begins although nobody has read its id.
BEGIN_SECONDS = 1.0
# Output nodes whose files are known, so that an unchanged one need not be run again.
MAX_SHOWN = 10_000
# Values of `preview_method` that ask for previews; there is one kind of them here.
PREVIEW_METHODS = ("auto", "latent2rgb", "taesd")
# The text of a PNG with our own record of the workflow's image.
RECORD = "zimage_rt_workflow"


class Workflows:
    """All workflows of a service.

    Attributes:
        runs: those that wait or run, by id.
        folders, files, history, hub: see their classes.
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self.folders = Folders(service.store.folder)
        self.files = ModelFiles(service.config, service.manifests)
        self.history = History(service.store, is_kept=service.config.record_prompts)
        self.hub = Hub()
        self.runs: dict[str, WorkflowRun] = {}
        self._numbers = itertools.count()
        self._shown: OrderedDict[tuple[str, str], dict[str, list[Any]]] = OrderedDict()
        self._held: dict[str, deque[tuple[Job, Callable[..., None], tuple[Any, ...]]]] = {}
        self._tasks: set[asyncio.Future[None]] = set()
        self._repeating: asyncio.Future[None] | None = None
        self._reserved: set[str] = set()  # ids of workflows that are being checked
        service.on_told = self._told
        service.on_end.append(self._ended)
        service.on_sweep.append(self._prune)

    @property
    def config(self) -> ServiceConfig:
        """The configuration of the service."""
        return self._service.config

    def devices(self) -> list[dict[str, Any]]:
        """The devices of the workers, as `/system_stats` has them."""
        return [
            {
                "name": "cpu" if worker.device is None else f"cuda:{worker.device}",
                "type": "cpu" if worker.device is None else "cuda",
                "index": worker.device,
                "vram_total": worker.memory.get("total", 0),
                "vram_free": worker.memory.get("free", 0),
                "torch_vram_total": 0,
                "torch_vram_free": 0,
            }
            for worker in self._service.workers
        ]

    async def start(self) -> None:
        """Begin; the service runs."""
        await self.history.open()
        await asyncio.to_thread(self.folders.remove_temp)
        self._repeating = asyncio.ensure_future(self._repeat_status())

    async def stop(self) -> None:
        """End all connections."""
        self.hub.close()
        if self._repeating is not None:
            self._repeating.cancel()
        while self._tasks:  # the end of one workflow may begin that of the next
            await asyncio.gather(*self._tasks, return_exceptions=True)

    # --- queueing ---------------------------------------------------------------------------------------------------

    async def submit(
        self,
        who: Caller,
        graph: Graph,
        sent: Mapping[str, Any],
        extra_data: Mapping[str, Any],
        *,
        job_id: str | None = None,
        number: float | None = None,
        first: bool = False,
        targets: Sequence[str] | None = None,
    ) -> tuple[WorkflowRun, Plan]:
        """Check a workflow and let it wait; `begin` then starts it.

        Args:
            who: sends it.
            graph: the workflow.
            sent: the same as it came.
            extra_data: texts for the images, and the client's id.
            job_id: its id, which nobody's job may have had; None takes a new one.
            number: its place in the queue, the lowest first; None takes the next.
            first: whether it comes before all that wait.
            targets: the output nodes that it is run for; None takes all.

        Raises:
            WorkflowError: it cannot be run. Forbidden, RateLimited: the key may not.
        """
        self._service.check_takes_jobs()
        who.admit_workflow()
        if job_id is None:
            return await self._submit(who, graph, sent, extra_data, str(uuid.uuid4()), number, first, targets)
        if job_id in self._reserved:  # another request has sent it at the same time
            raise _used(job_id)
        self._reserved.add(job_id)
        try:
            is_known = job_id in self._service.jobs or await self._service.store.row(job_id) is not None
            if is_known or await self.history.knows(job_id):
                raise _used(job_id)
            return await self._submit(who, graph, sent, extra_data, job_id, number, first, targets)
        finally:
            self._reserved.discard(job_id)

    async def _submit(
        self,
        who: Caller,
        graph: Graph,
        sent: Mapping[str, Any],
        extra_data: Mapping[str, Any],
        job_id: str,
        number: float | None,
        first: bool,
        targets: Sequence[str] | None,
    ) -> tuple[WorkflowRun, Plan]:
        files = WorkflowFiles(self.files, self._service.config, self.folders.of(who.name), graph)
        checked = await asyncio.to_thread(plan, graph, files, targets)
        models = sorted(set(files.models.values()) - {ANY_MODEL}) or [self._service.config.default_model]
        for model in models:
            who.check_model(model)
        if number is None:
            number = next(self._numbers) * (-1 if first else 1)
        task = Task(
            owner=who.name,
            plan=checked,
            models=files.models,
            images=files.images,
            texts=self._texts(sent, extra_data, models),
            bounds=self._bounds(who),
            previews=self._wants_previews(who.name, extra_data),
        )
        fields = {"prompt": prompt_of(checked), "workflow": dict(sent)}
        job = Job(fields, model=models[0], owner=who.name, job_id=job_id, workflow=task)
        run = WorkflowRun(job, who, number, sent, extra_data, checked.outputs)
        self.runs[job.id] = run
        try:
            waiting = (each for each in self.of(who.name) if each.job.state == "queued" and each is not run)
            following = next((each.job for each in waiting if each.number > number), None)
            self._service.submit_workflow(job, before=following)
        except BaseException:
            del self.runs[job.id]
            raise
        self._send_status(who.name)
        asyncio.get_running_loop().call_later(BEGIN_SECONDS, self._service.dispatch)  # if its client has gone meanwhile
        return run, checked

    def _texts(self, sent: Mapping[str, Any], extra_data: Mapping[str, Any], models: Sequence[str]) -> dict[str, str]:
        """The texts of saved PNGs: `prompt` and what comes with it, as ComfyUI writes them, and our own record."""
        extra = extra_data.get("extra_pnginfo")
        extra = extra if isinstance(extra, Mapping) else {}
        named = {name: value for name, value in extra.items() if name.isascii() and 0 < len(name) <= 79}
        ids = {name: self._service.manifests[name].bundle_id for name in models}
        record = {"version": __version__, "models": ids}
        return {name: json.dumps(value) for name, value in ({"prompt": sent} | named | {RECORD: record}).items()}

    def _bounds(self, who: Caller) -> Bounds:
        limits = self._service.config.limits
        pixels, steps = who.limits.max_pixels, who.limits.max_steps
        return Bounds(
            max_pixels=limits.max_pixels if pixels is None else min(pixels, limits.max_pixels),
            max_steps=limits.max_steps if steps is None else min(steps, limits.max_steps),
            max_images=limits.max_images,
        )

    def _wants_previews(self, owner: str, extra_data: Mapping[str, Any]) -> int:
        method = extra_data.get("preview_method", "default")
        if method == "none":
            return 0
        if method in PREVIEW_METHODS:
            return 1
        client = extra_data.get("client_id")
        socket = self.hub.client(owner, client if isinstance(client, str) else None)
        return int(socket is not None and socket.takes_metadata)

    async def begin(self) -> None:
        """Let the workflows that wait begin, if there is room."""
        self._service.dispatch()

    def of(self, owner: str) -> list[WorkflowRun]:
        """The workflows of an owner that wait or run, in their order."""
        return sorted((run for run in self.runs.values() if run.job.owner == owner), key=lambda run: run.number)

    def folder(self, owner: str) -> OwnerFolder:
        """The files of an owner."""
        return self.folders.of(owner)

    def cancel(self, run: WorkflowRun) -> None:
        """Stop a workflow: at once if it waits, after its step if it runs."""
        self._service.cancel(run.job)

    def remaining(self, owner: str) -> int:
        """How many workflows of an owner wait or run."""
        return sum(run.job.owner == owner for run in self.runs.values())

    # --- what a worker tells ----------------------------------------------------------------------------------------

    def _told(self, job: Job, name: str, data: Mapping[str, Any]) -> None:
        self._in_order(job, getattr(self, f"_on_{name}"), data)

    def _in_order(self, job: Job, handle: Callable[..., None], *data: Any) -> None:
        """Handle what is told of a workflow after the end of the owner's one before it, which takes a moment.

        A client hears of one workflow's end before the next begins, as of ComfyUI, which has one worker.
        """
        run = self.runs.get(job.id)
        if run is None:
            return
        held = self._held.get(job.owner)
        if held is None:
            handle(run, *data)
        else:
            held.append((job, handle, data))

    def _release(self, owner: str) -> None:
        """Handle what was held back, to the end of another workflow."""
        held = self._held.pop(owner)
        while held and owner not in self._held:
            job, handle, data = held.popleft()
            self._in_order(job, handle, *data)
        if held:
            self._held[owner].extend(held)

    def _on_cached(self, run: WorkflowRun, data: Mapping[str, Any]) -> None:
        run.outputs.clear()
        run.log.clear()
        self._tell(run, "execution_start", is_logged=True)
        self._tell(run, "execution_cached", is_logged=True, nodes=data["nodes"])
        run.progress = {node: messages.node_state(run.job.id, node, 1, 1, "finished") for node in data["nodes"]}

    def _on_begins(self, run: WorkflowRun, data: Mapping[str, Any]) -> None:
        self._finish_node(run)
        node = run.node = data["node"]
        run.job.tell("node", node=node)
        self._tell(run, "executing", node=node, display_node=node)
        run.progress[node] = messages.node_state(run.job.id, node, 0, 1, "running")
        self._tell(run, "progress_state", nodes=run.progress)

    def _on_samples(self, run: WorkflowRun, data: Mapping[str, Any]) -> None:
        try:
            run.who.spend_megapixel_steps(data["megapixel_steps"])
        except ZImageError as error:
            self._service.cancel(run.job, str(error), error.code)

    def _on_step(self, run: WorkflowRun, data: Mapping[str, Any]) -> None:
        run.job.tell("step", **data)
        node, value, most = data["node"], data["step"], data["steps"]
        run.progress[node] = messages.node_state(run.job.id, node, value, most, "running")
        self._tell(run, "progress_state", nodes=run.progress)
        self._tell(run, "progress", node=node, value=value, max=most)
        socket = self.hub.client(run.job.owner, run.client)
        if socket is None or data.get("preview") is None:
            return
        if socket.takes_metadata:
            socket.send(preview_with_metadata(data["preview"], messages.place_of_node(run.job.id, node)))
        elif run.extra_data.get("preview_method") in PREVIEW_METHODS:  # others take every binary message for a result
            socket.send(plain_preview(data["preview"]))

    def _on_executed(self, run: WorkflowRun, data: Mapping[str, Any]) -> None:
        node, key = data["node"], (run.job.owner, data["signature"])
        if data["is_cached"]:
            output = self._shown.get(key, {})
            if output:
                self._shown.move_to_end(key)
        else:
            output = self._keep(run, data)
            self._shown[key] = output
            while len(self._shown) > MAX_SHOWN:
                self._shown.popitem(last=False)
        run.outputs[node] = output
        run.job.tell("executed", node=node, output=output)
        self._tell(run, "executed", node=node, display_node=node, output=output)

    def _keep(self, run: WorkflowRun, data: Mapping[str, Any]) -> dict[str, list[Any]]:
        output: dict[str, list[Any]] = {}
        folder = self.folders.of(run.job.owner)
        for image in data["images"]:
            kept = folder.keep_image(image["prefix"], image["content"], is_preview=image["is_preview"])
            reference, written = kept
            run.writes.append(written)
            output.setdefault(image["group"], []).append(reference)
            run.job.sizes = [*run.job.sizes, image["size"]]
        for text in data["texts"]:
            output.setdefault(text["group"], []).append(text["text"])
        return output

    def _finish_node(self, run: WorkflowRun) -> None:
        if run.node in run.progress:
            run.progress[run.node] = run.progress[run.node] | {"state": "finished"}
        run.node = None

    def _tell(self, run: WorkflowRun, kind: str, *, is_logged: bool = False, **data: Any) -> None:
        """Send a message about a workflow to its client."""
        said = {**data, "prompt_id": run.job.id}
        if is_logged:
            said["timestamp"] = int(time.time() * 1000)
            run.log.append((kind, said))
        self.hub.send(run.job.owner, run.client, kind, said)

    # --- the end ----------------------------------------------------------------------------------------------------

    def _ended(self, job: Job) -> None:
        self._in_order(job, self._end)

    def _end(self, run: WorkflowRun) -> None:
        self._held[run.job.owner] = deque()
        self._background(self._finish_and_release(run))

    async def _finish_and_release(self, run: WorkflowRun) -> None:
        try:
            await self._finish(run)
        finally:
            self._release(run.job.owner)

    async def _finish(self, run: WorkflowRun) -> None:
        """File a workflow that has ended, and tell it: clients read the history when they hear of the end."""
        failed = [each for each in await asyncio.gather(*run.writes, return_exceptions=True) if each is not None]
        for failure in failed:
            log.error("an image of workflow %s was not written: %s", run.job.id, failure)
        if run.job.state == "cancelled" and run.job.started is None:
            # What is taken from the queue leaves nothing, as in ComfyUI.
            self.runs.pop(run.job.id, None)
            self._send_status(run.job.owner)
            return
        kind, said = messages.end_of(run, failed)
        logged = {**said, "prompt_id": run.job.id, "timestamp": int(time.time() * 1000)}
        run.log.append((kind, logged))
        try:
            await self.history.add(run.job.owner, messages.listed_job(run), messages.history_entry(run))
        except Exception:  # a full disk; the client gets its images all the same
            log.exception("workflow %s is not kept in the history", run.job.id)
        finally:
            self.runs.pop(run.job.id, None)
        self._finish_node(run)
        if kind == "execution_success":
            self._tell(run, "progress_state", nodes=run.progress)
        self.hub.send(run.job.owner, run.client, kind, logged)
        self._send_status(run.job.owner)
        self._tell(run, "executing", node=None)

    def _send_status(self, owner: str) -> None:
        self.hub.send_to_all(owner, "status", messages.status(self.remaining(owner)))

    async def _repeat_status(self) -> None:
        while True:
            await asyncio.sleep(STATUS_SECONDS)
            for owner in self.hub.owners():
                if self.remaining(owner):
                    self._send_status(owner)

    async def _prune(self) -> None:
        config = self._service.config
        await asyncio.to_thread(self.folders.prune, config.queue.keep_seconds, config.comfyui.keep_bytes)
        await self.history.prune(config.queue.retain_days)

    def _background(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _used(job_id: str) -> WorkflowError:
    return WorkflowError(f"prompt_id: {job_id} has been used; send another, or none", "invalid_prompt_id")


def prompt_of(checked: Plan) -> str:
    """The prompts of a workflow, for the record."""
    nodes = (checked.graph[name] for name in checked.order)
    texts = [node.inputs.get("text") for node in nodes if node.kind == "CLIPTextEncode"]
    return "\n".join(text for text in texts if isinstance(text, str))
