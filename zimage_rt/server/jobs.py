"""Jobs and their queue: fair between owners, by priority and first come first served within one."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
import uuid
from collections import OrderedDict, deque
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any, Literal

from ..errors import ZImageError
from .workflow_task import Task

State = Literal["queued", "running", "done", "failed", "cancelled"]
FINISHED: tuple[State, ...] = ("done", "failed", "cancelled")
# Seconds for a job before any has been timed.
FIRST_GUESS = 2.0
# A lost worker's job is drawn once more and no oftener: it may be the job that kills workers.
MAX_ATTEMPTS = 2


class QueueFull(ZImageError):
    """Too many jobs wait; `retry_after` is when to ask again, in seconds."""

    code = "queue_full"

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after


@dataclasses.dataclass(frozen=True)
class Event:
    """An event of a job.

    Attributes:
        number: from 0, in order.
        name: `queued`, `started`, `step`, `done`, `failed` or `cancelled`.
        data: JSON; of a step `step`, `steps`, `sigma` and, if asked for, `preview` (JPEG bytes).
    """

    number: int
    name: str
    data: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Image:
    """A finished image: the file's bytes, and how it was made.

    Attributes:
        content: of a PNG, JPEG or WebP file, with the record inside.
        media_type: `image/png`, `image/jpeg` or `image/webp`.
        width, height: pixels.
        record: see `ImageRecord`; JSON.
    """

    content: bytes
    media_type: str
    width: int
    height: int
    record: Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Output:
    """The encoding of a job's images, and how much of its progress is told.

    Attributes:
        suffix: `.png`, `.jpg` or `.webp`.
        quality: 1 to 100, of JPEG and WebP; None takes the format's own.
        previews: a preview after every so many steps; 0 for none.
    """

    suffix: str = ".png"
    quality: int | None = None
    previews: int = 0


class Job:
    """One request, or one workflow, on its way through the service. Only the event loop's thread uses it."""

    def __init__(
        self,
        fields: Mapping[str, Any],
        *,
        model: str,
        owner: str,
        output: Output | None = None,
        priority: int = 0,
        detached: bool = False,
        job_id: str | None = None,
        workflow: Task | None = None,
    ) -> None:
        self.id = job_id or uuid.uuid4().hex
        self.workflow = workflow
        self.fields, self.model, self.owner = dict(fields), model, owner
        self.output = output or Output()
        self.priority, self.detached = priority, detached
        self.state: State = "queued"
        self.created = time.time()
        self.started: float | None = None
        self.finished: float | None = None
        self.attempts = 0
        self.images: Sequence[Image] = ()
        self.sizes: Sequence[tuple[int, int]] = ()  # width and height of each
        self.stored: Sequence[Any] = ()  # the same on the disk, once they are
        self.timings: Mapping[str, float] = {}
        self.warnings: Sequence[str] = ()
        self.safety: Mapping[str, Any] | None = None
        self.error: Mapping[str, Any] | None = None
        self.events: list[Event] = []
        self.is_cancelling = False  # its worker was told to stop it
        self.cancel_error: Mapping[str, Any] | None = None  # why, for its client
        self.is_drawn = False  # its worker encodes the images
        self._watchers = 0
        self._changed = asyncio.Event()

    @property
    def is_finished(self) -> bool:
        """Whether it is done, failed or cancelled."""
        return self.state in FINISHED

    def tell(self, name: str, **data: Any) -> None:
        """Append an event and wake everybody who watches."""
        self.events.append(Event(len(self.events), name, data))
        self._changed.set()
        self._changed = asyncio.Event()

    def finish(self, state: State, **data: Any) -> None:
        """End the job, once; what comes later is dropped."""
        if self.is_finished:
            return
        self.state, self.finished = state, time.time()
        self.tell(state, **data)

    def place_after(self, last: int) -> int:
        """The number of the first event for a client that has had event `last`.

        It is the last known event if `last` was counted in a former run of the service, or if nothing comes any more.
        """
        is_known = last + 1 < len(self.events) + (not self.is_finished)
        return last + 1 if is_known else len(self.events) - 1

    async def watch(self, since: int = 0) -> AsyncIterator[Event]:
        """The events from number `since` on, as they come, to the one that ends the job."""
        self._watchers += 1
        try:
            while True:
                changed = self._changed
                while since < len(self.events):
                    yield self.events[since]
                    since += 1
                if self.is_finished:
                    return
                await changed.wait()
        finally:
            self._watchers -= 1
            if self.is_finished:
                self.drop_previews()

    async def wait(self) -> None:
        """Return when the job is finished."""
        async for _ in self.watch(len(self.events)):
            pass

    def drop_previews(self) -> None:
        """Forget the previews, which nobody asks for once the images are there, unless somebody still reads them."""
        if self._watchers:
            return
        self.events = [
            dataclasses.replace(event, data={k: v for k, v in event.data.items() if k != "preview"})
            for event in self.events
        ]

    @property
    def progress(self) -> dict[str, int] | None:
        """The last step that was made, and of how many; None before the first."""
        steps = (event.data for event in reversed(self.events) if event.name == "step")
        last = next(steps, None)
        return None if last is None else {"step": last["step"], "steps": last["steps"]}

    def status(self) -> dict[str, Any]:
        """The job as JSON."""
        return {
            "id": self.id,
            "state": self.state,
            "model": self.model,
            "created": self.created,
            "started": self.started,
            "finished": self.finished,
            "progress": self.progress,
            "seeds": seeds_of(self.fields, len(self.images) or len(self.stored)),
            "images": len(self.images) or len(self.stored),
            "timings": dict(self.timings),
            "warnings": list(self.warnings),
            "error": self.error,
        } | ({} if self.safety is None else {"safety": self.safety["action"]})


def seeds_of(fields: Mapping[str, Any], images: int) -> list[int]:
    """The seeds of a job's images by its fields; none if it was refused before it had any.

    Args:
        fields: of a job, or of its record, which may be without prompts.
        images: how many were drawn; 0 before that.
    """
    seed = fields.get("seed")
    if seed is None:
        return []
    if isinstance(seed, Sequence):
        return list(seed)
    prompt = fields.get("prompt", "")
    prompts = 1 if isinstance(prompt, str) else len(prompt)
    return [seed] * (images or prompts * fields.get("num_images", 1))  # several with one seed: see `batch_noise`


class FairQueue:
    """Waiting jobs: round robin over owners, each with its highest priority first, then in the order of arrival."""

    def __init__(self, max_waiting: int) -> None:
        self._max = max_waiting
        self._owners: OrderedDict[str, list[tuple[int, int, Job]]] = OrderedDict()
        self._order = itertools.count()
        self._fronts = itertools.count(-1, -1)
        self._durations: deque[float] = deque(maxlen=64)

    def __len__(self) -> int:
        return sum(len(jobs) for jobs in self._owners.values())

    def check_room(self, places: int) -> None:
        """Raise QueueFull if as many jobs wait as may; `places` jobs are drawn at once."""
        if len(self) >= self._max:
            wait = round(self.seconds_per_job * len(self) / max(places, 1))
            # Above 120 s OpenAI's clients do not try again at all.
            raise QueueFull(f"{len(self)} jobs wait already, as many as may; ask again later", max(1, min(120, wait)))

    def add(self, job: Job) -> None:
        """Let a job wait."""
        self._put(job, next(self._order))

    def add_first(self, job: Job) -> None:
        """Let a job wait again, before its owner's others of its priority; never refused."""
        self._put(job, next(self._fronts))

    def add_before(self, job: Job, other: Job) -> None:
        """Let a job wait right before another of its owner and priority, which waits."""
        jobs = self._owners[job.owner]
        place = next(i for i, entry in enumerate(jobs) if entry[2] is other)
        jobs.insert(place, (*jobs[place][:2], job))  # sorting keeps the order of equal ones

    def _put(self, job: Job, order: int) -> None:
        jobs = self._owners.setdefault(job.owner, [])
        jobs.append((-job.priority, order, job))
        jobs.sort(key=lambda entry: entry[:2])

    def take(self) -> Job | None:
        """The next job, whose owner then comes last; None if none waits."""
        for owner, jobs in self._owners.items():
            job = jobs.pop(0)[2]
            self._owners.move_to_end(owner)
            if not jobs:
                del self._owners[owner]
            return job
        return None

    def remove(self, job: Job) -> bool:
        """Take a job out; False if it does not wait."""
        jobs = self._owners.get(job.owner, [])
        kept = [entry for entry in jobs if entry[2] is not job]
        if len(kept) == len(jobs):
            return False
        if kept:
            self._owners[job.owner] = kept
        else:
            del self._owners[job.owner]
        return True

    def position(self, job: Job) -> int | None:
        """The number of jobs before this one, if no other arrives; None if it does not wait."""
        place = next((i for i, entry in enumerate(self._owners.get(job.owner, ())) if entry[2] is job), None)
        if place is None:
            return None
        owners = list(self._owners)
        own = owners.index(job.owner)
        # Round robin: of each owner `place` jobs come first, and one more of those before this job's owner.
        return place + sum(
            min(len(self._owners[owner]), place + (index < own)) for index, owner in enumerate(owners) if index != own
        )

    def waiting(self, owner: str) -> int:
        """How many jobs of an owner wait."""
        return len(self._owners.get(owner, ()))

    def timed(self, seconds: float) -> None:
        """Note how long a job took."""
        self._durations.append(seconds)

    @property
    def seconds_per_job(self) -> float:
        """Mean seconds of the last jobs."""
        return sum(self._durations) / len(self._durations) if self._durations else FIRST_GUESS

    def jobs(self) -> list[Job]:
        """All jobs that wait, in no order."""
        return [entry[2] for jobs in self._owners.values() for entry in jobs]
