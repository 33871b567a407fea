"""Asks a service for thousands of images while it is disturbed, and checks every answer against its request.

    python tests/hardware/service_stress.py engines/nano --json benchmarks/results/service-stress-cpu.json
    python tests/hardware/service_stress.py engines/nano --requests 0 --uploads 1000

64 clients draw small images by every protocol. Mixed in by seed: clients that hang up, jobs that are cancelled, bad
bodies; meanwhile workers are killed, and the disk under the service's data is full for a while (a tmpfs: mounting one
needs root). A refused request (429, 503, 507) is asked again. At the end each answer must have been the one of its
request, each accepted job must be in the record once, with the state that its client saw, and the memory of the
processes must be as it was.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import collections
import contextlib
import json
import os
import random
import re
import sqlite3
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

from damaged_uploads import damaged_uploads, encoded
from disturbances import Disturbances, resident, small_disk
from service_checks import Attempt, check_image, check_record, lost_jobs
from services import Server

import zimage_rt
from zimage_rt.metadata.references import pixels_sha256

SIDE, SUBJECTS = 64, ("a panda", "a red car", "一只猫", "a lighthouse", "two apples")
# How often each kind of client comes.
KINDS = {
    "generate": 34, "job": 22, "stream": 10, "edit": 6, "bad": 8,
    "hang up": 5, "hang up in a stream": 6, "cancel": 9,
}  # fmt: skip
JOBS, GENERATIONS, EDITS = "/v1/jobs", "/v1/images/generations", "/v1/images/edits"
BAD_BODIES: tuple[tuple[str, Any], ...] = (
    (JOBS, b"{"), (JOBS, b"\xff\xfe"), (JOBS, b"[" * 5000), (JOBS, b"[]"), (JOBS, b"{}"),
    (JOBS, {"prompt": "x", "height": 63}), (JOBS, {"prompt": 3}), (JOBS, {"prompt": "x", "seed": 1e99}),
    (JOBS, {"prompt": "x", "image": "http://127.0.0.1/"}), (JOBS, {"prompt": "x", "steps": 9}), (JOBS, {"\ud800": 1}),
    (GENERATIONS, b"null"), (GENERATIONS, {"prompt": "x", "size": "9x9"}), (GENERATIONS, {"prompt": "\ud800"}),
    (GENERATIONS, {"prompt": "x", "n": 99}), (GENERATIONS, {"prompt": "x", "quality": []}),
    (GENERATIONS, {"prompt": "x", "model": {}}), (GENERATIONS, {"prompt": "x", "image": "/etc/passwd"}),
    (EDITS, {"prompt": "x", "images": 3}), (EDITS, {"prompt": "x"}),
)  # fmt: skip
# Answers that a client asks again after.
AGAIN = (429, 503, 507)
# The last line of a traceback in the service's log.
TRACEBACK = re.compile(r"Traceback \(most recent call last\):\n(?:[ \t].*\n)*(.*)")


class Stress:
    """The clients and what they saw.

    Attributes:
        attempts: every request for images that was sent.
        counts: of answers, by kind and status.
        seconds: from the first try to the whole answer, by kind.
        faults: sentences; none is the aim.
    """

    def __init__(self, server: Server, seed: int, seconds: float) -> None:
        self.server, self.seed = server, seed
        self.start, self.most_seconds = time.monotonic(), seconds
        self.attempts: list[Attempt] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.seconds: dict[str, list[float]] = collections.defaultdict(list)
        self.faults: list[str] = []
        self.ended = 0
        limits = httpx.Limits(max_connections=256, max_keepalive_connections=256)
        self.http = httpx.AsyncClient(base_url=server.url, timeout=180, limits=limits)

    def share(self, total: int) -> float:
        """Of the requests, those that have ended; of the seconds, those that have passed, if that is more."""
        passed = (time.monotonic() - self.start) / self.most_seconds
        return min(1.0, max(self.ended / max(total, 1), passed))

    async def client(self, numbers: Iterator[int]) -> None:
        """One client: requests from the common list, one after another."""
        for number in numbers:
            if time.monotonic() - self.start > self.most_seconds:
                return
            rng = random.Random(f"{self.seed} {number}")
            kind = rng.choices(list(KINDS), list(KINDS.values()))[0]
            start = time.perf_counter()
            try:
                await getattr(self, kind.replace(" ", "_"))(number, rng)
            except Exception as error:
                self.faults.append(f"{kind} {number}: {type(error).__name__}: {str(error)[:300]}")
            self.seconds[kind].append(time.perf_counter() - start)
            self.ended += 1

    def attempt(self, number: int, again: int, rng: random.Random, **more: Any) -> tuple[Attempt, dict[str, Any]]:
        """A new attempt, and its fields."""
        prompt = f"{rng.choice(SUBJECTS)}, number {number}.{again}"
        steps = more.get("num_inference_steps", 1)
        attempt = Attempt(prompt, rng.randrange(2**31), steps)
        self.attempts.append(attempt)
        return attempt, {"prompt": prompt, "seed": attempt.seed, "num_inference_steps": steps, **more}

    async def again(self, kind: str, answer: httpx.Response, tries: int) -> bool:
        """Count an answer; whether it is to be asked again, after the time that it says. Raises for other refusals."""
        self.counts[f"{kind} {answer.status_code}"] += 1
        if answer.status_code < 300:
            return False
        error = json.loads(await answer.aread())["error"]
        self.counts[f"code {error['code']}"] += 1
        assert answer.status_code in AGAIN, error
        assert tries < 100, f"refused 100 times: {error}"
        await asyncio.sleep(min(float(answer.headers.get("retry-after", 0.5)), 3.0) * random.uniform(0.5, 1.5))
        return True

    # --- the kinds of clients -------------------------------------------------------------------------------------

    async def generate(self, number: int, rng: random.Random) -> None:
        """OpenAI's generations: one or two images in one answer."""
        count = 1 if rng.random() < 0.9 else 2
        for tries in range(101):
            attempt, fields = self.attempt(number, tries, rng, size=f"{SIDE}x{SIDE}", n=count)
            answer = await self.http.post("/v1/images/generations", json=fields)
            attempt.job = answer.headers.get("x-zimage-job")
            if await self.again("generate", answer, tries):
                continue
            self.take(attempt, [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]], count)
            return

    async def edit(self, number: int, rng: random.Random) -> None:
        """OpenAI's edits, as a form."""
        image = encoded(rng, "PNG")
        for tries in range(101):
            attempt, fields = self.attempt(number, tries, rng, size=f"{SIDE}x{SIDE}")
            attempt.is_plain = False
            form = {name: str(value) for name, value in fields.items()}
            answer = await self.http.post("/v1/images/edits", data=form, files={"image": ("a.png", image)})
            attempt.job = answer.headers.get("x-zimage-job")
            if await self.again("edit", answer, tries):
                continue
            self.take(attempt, [base64.b64decode(image["b64_json"]) for image in answer.json()["data"]], 1)
            return

    async def job(self, number: int, rng: random.Random) -> None:
        """Our own protocol: a job, its events or its state, and its images."""
        count = rng.choice((1, 1, 1, 2))
        for tries in range(101):
            fields = {"height": SIDE, "width": SIDE, "num_images": count, "priority": rng.randrange(-2, 3)}
            attempt, fields = self.attempt(number, tries, rng, **fields)
            answer = await self.http.post("/v1/jobs", json=fields)
            if await self.again("job", answer, tries):
                continue
            attempt.job = answer.json()["id"]
            attempt.state = await (self.listen if rng.random() < 0.5 else self.ask)(attempt.job)
            if attempt.state == "done":
                await self.fetch(attempt, count)
                return
            assert attempt.state == "failed", attempt.state  # its worker died twice
            self.counts["job failed"] += 1

    async def stream(self, number: int, rng: random.Random) -> None:
        """OpenAI's stream, with partial images."""
        for tries in range(101):
            fields = {"size": f"{SIDE}x{SIDE}", "stream": True, "partial_images": 1, "num_inference_steps": 2}
            attempt, fields = self.attempt(number, tries, rng, **fields)
            async with self.http.stream("POST", "/v1/images/generations", json=fields) as answer:
                attempt.job = answer.headers.get("x-zimage-job")
                if await self.again("stream", answer, tries):
                    continue
                events = [event async for event in read_events(answer)]
            names = [name for name, _ in events if not name.endswith("partial_image")]
            if names == ["error"]:
                self.counts[f"stream {events[-1][1]['error']['code']}"] += 1
                assert events[-1][1]["error"]["code"] == "worker_died", events[-1]
                continue
            assert names == ["image_generation.completed"], names
            self.counts["partial images"] += len(events) - 1
            self.take(attempt, [base64.b64decode(events[-1][1]["b64_json"])], 1)
            return

    async def bad(self, number: int, rng: random.Random) -> None:
        """A body that is refused, with a reason."""
        path, body = rng.choice(BAD_BODIES)
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        answer = await self.http.post(path, content=content, headers={"Content-Type": "application/json"})
        self.counts[f"bad {answer.status_code}"] += 1
        assert 400 <= answer.status_code < 500, (path, content[:80], answer.status_code)
        if answer.status_code != 429:
            assert answer.json()["error"]["message"] and answer.json()["error"]["code"], answer.text

    async def hang_up(self, number: int, rng: random.Random) -> None:
        """A client that does not wait for its answer."""
        _, fields = self.attempt(number, 0, rng, size=f"{SIDE}x{SIDE}", num_inference_steps=rng.choice((1, 8)))
        with contextlib.suppress(asyncio.TimeoutError):
            post = self.http.post("/v1/images/generations", json=fields)
            await asyncio.wait_for(post, rng.choice((0.01, 0.1, 0.5)))

    async def hang_up_in_a_stream(self, number: int, rng: random.Random) -> None:
        """A client that leaves in the middle of the events."""
        fields = {"size": f"{SIDE}x{SIDE}", "stream": True, "partial_images": 3, "num_inference_steps": 8}
        _, fields = self.attempt(number, 0, rng, **fields)
        with contextlib.suppress(asyncio.TimeoutError):
            async with asyncio.timeout(rng.choice((0.2, 2.0, 20.0))):
                async with self.http.stream("POST", "/v1/images/generations", json=fields) as answer:
                    async for name, _ in read_events(answer):
                        if name.endswith("partial_image"):
                            self.counts["hung up after a partial image"] += 1
                            return

    async def cancel(self, number: int, rng: random.Random) -> None:
        """A job that is cancelled while it waits, or while it runs."""
        for tries in range(101):
            attempt, fields = self.attempt(number, tries, rng, height=SIDE, width=SIDE, num_inference_steps=8)
            answer = await self.http.post("/v1/jobs", json=fields)
            if await self.again("cancel", answer, tries):
                continue
            attempt.job = answer.json()["id"]
            if rng.random() < 0.5:
                with contextlib.suppress(StopAsyncIteration):
                    await self.listen(attempt.job, until="step")
            answer = await self.http.delete(f"/v1/jobs/{attempt.job}")
            assert answer.status_code == 200, answer.text
            attempt.state = await self.ask(attempt.job)
            self.counts[f"cancel: {attempt.state}"] += 1
            if attempt.state == "done":
                await self.fetch(attempt, 1)
            return

    # --- answers --------------------------------------------------------------------------------------------------

    def take(self, attempt: Attempt, contents: list[bytes], count: int) -> None:
        """Check the images of an answer against their request."""
        assert len(contents) == count, f"{len(contents)} images, and {count} were asked for"
        attempt.images = [
            check_image(content, attempt.prompt, attempt.seed + number) for number, content in enumerate(contents)
        ]
        attempt.state = "done"

    async def fetch(self, attempt: Attempt, count: int) -> None:
        """Fetch the images of a job and check them; there are no more of them."""
        answers = [await self.http.get(f"/v1/jobs/{attempt.job}/images/{number}") for number in range(count + 1)]
        assert [answer.status_code for answer in answers] == [200] * count + [404], answers
        self.take(attempt, [answer.content for answer in answers[:-1]], count)

    async def listen(self, job: str, until: str | None = None) -> str:
        """The name of a job's last event, or of the first one of a name; each comes once and in order."""
        name, expected = "", 0
        async with self.http.stream("GET", f"/v1/jobs/{job}/events") as answer:
            assert answer.status_code == 200, await answer.aread()
            async for name, data in read_events(answer):
                assert data["number"] == expected and data["id"] == job, (name, data, expected)
                expected += 1
                if name == until:
                    break
        return name

    async def ask(self, job: str) -> str:
        """The state of a job when it has ended."""
        while True:
            answer = await self.http.get(f"/v1/jobs/{job}")
            assert answer.status_code == 200, answer.text
            state = answer.json()["state"]
            if state in ("done", "failed", "cancelled"):
                return state
            await asyncio.sleep(0.2)


async def read_events(answer: httpx.Response) -> AsyncIterator[tuple[str, dict[str, Any]]]:
    """Server-sent events; `number` is their id."""
    name, number = "", None
    async for line in answer.aiter_lines():
        if line.startswith("event: "):
            name = line.removeprefix("event: ")
        elif line.startswith("id: "):
            number = int(line.removeprefix("id: "))
        elif line.startswith("data: ") and line != "data: [DONE]":
            yield name, {**json.loads(line.removeprefix("data: ")), "number": number}


# --- the whole --------------------------------------------------------------------------------------------------------


async def disturb(stress: Stress, disturbances: Disturbances, total: int, clients: int) -> float:
    """Send all requests; the seconds that they took."""
    numbers, start = iter(range(total)), time.perf_counter()
    others = [
        asyncio.create_task(each())
        for each in (disturbances.kill_workers, disturbances.fill_disk, disturbances.watch_memory)
    ]
    await asyncio.gather(*(stress.client(numbers) for _ in range(clients)))
    seconds = time.perf_counter() - start
    await asyncio.gather(*others)
    return seconds


async def upload(stress: Stress, count: int) -> dict[str, Any]:
    """Send damaged uploads as data URLs and as parts of forms; each must be refused with a reason, before a worker."""
    refused: collections.Counter[str] = collections.Counter()
    waiting = asyncio.Semaphore(8)

    async def send(number: int, kind: str, content: bytes) -> None:
        async with waiting:
            url = "data:image/png;base64," + base64.b64encode(content).decode()
            fields, file = {"prompt": "a panda"}, {"image": ("a.png", content)}
            path, sent = (
                (JOBS, {"json": {**fields, "image": url}}),
                (JOBS, {"data": fields, "files": file}),
                (EDITS, {"json": {**fields, "images": [{"image_url": url}]}}),
                (EDITS, {"data": fields, "files": file}),
            )[number % 4]
            answer = await stress.http.post(path, **sent)
            message = answer.json()["error"]["message"]
            if not (400 <= answer.status_code < 500 and answer.status_code != 429 and message):
                stress.faults.append(f"upload {number} {kind}: {answer.status_code} {message[:200]}")
            refused[f"{kind} {answer.status_code}"] += 1

    uploads = list(damaged_uploads(count, stress.seed))
    memory = []
    for first, last in ((0, count // 10), (count // 10, count)):
        await asyncio.gather(*(send(number, *uploads[number]) for number in range(first, last)))
        memory.append((resident(stress.server.process.pid) or 0) >> 20)
    with contextlib.closing(sqlite3.connect(stress.server.folder / "data" / "service.sqlite")) as database:
        jobs = database.execute("SELECT count(*) FROM jobs").fetchone()[0]
    return {"count": count, "answers": dict(refused), "service_mb_at_10_and_100_percent": memory, "jobs_recorded": jobs}


def compare_with_engine(bundle: Path, attempts: list[Attempt], most: int) -> int:
    """Draw some of the images again without a service; how many. Raises AssertionError if the bytes are others."""
    engine = zimage_rt.Engine.load(bundle)
    plain = [attempt for attempt in attempts if attempt.is_plain and len(attempt.images) == 1]
    plain = plain[:: max(1, len(plain) // most)]
    for attempt in plain:
        drawn = engine.generate(
            attempt.prompt, height=SIDE, width=SIDE, seed=attempt.seed, num_inference_steps=attempt.steps
        )
        assert pixels_sha256(drawn.images[0]) == attempt.images[0], attempt
    return len(plain)


def percentiles(seconds: list[float]) -> dict[str, float]:
    """The median and the 99th percentile, in milliseconds."""
    ordered = sorted(seconds)
    return {
        name: round(1e3 * ordered[int(share * (len(ordered) - 1))], 1) for name, share in (("p50", 0.5), ("p99", 0.99))
    }


def report(stress: Stress, disturbances: Disturbances, seconds: float, record: dict[str, Any]) -> dict[str, Any]:
    """The figures."""
    memory = [
        {"share": share, "service_mb": service >> 20, "worker_mb": None if worker is None else worker >> 20}
        for share, service, worker in disturbances.memory
    ]
    return {
        "machine": f"{os.uname().machine}, {os.cpu_count()} cores",
        "requests": stress.ended,
        "attempts": len(stress.attempts),
        "seconds": round(seconds, 1),
        "requests_per_second": round(stress.ended / seconds, 2),
        "milliseconds": {kind: percentiles(each) for kind, each in sorted(stress.seconds.items())},
        "kills": disturbances.kills,
        "disk_full_seconds": disturbances.full,
        "answers": dict(sorted(stress.counts.items())),
        "record": record,
        "memory": memory,
        "faults": stress.faults[:50],
    }


async def run(options: argparse.Namespace, folder: Path, disk: Path | None) -> dict[str, Any]:
    """Start a service, disturb it, end it, and read its record."""
    config = folder / "service.toml"
    config.write_text(f'[models.nano]\nbundle = "{options.bundle.absolute()}"\n[queue]\nmax_waiting = 40\n')
    server = Server(folder, "--config", str(config))
    found: dict[str, Any] = {}
    try:
        server.wait_until_ready()
        stress = Stress(server, options.seed, options.seconds)
        disturbances = Disturbances(server, lambda: stress.share(options.requests), options.kills, disk)
        if options.requests:
            seconds = await disturb(stress, disturbances, options.requests, options.clients)
        if options.uploads:
            found["uploads"] = await upload(stress, options.uploads)
            found["faults"] = stress.faults
        await stress.http.aclose()
    finally:
        status = server.stop(90)
    assert status == 0, server.log[-3000:]
    if options.requests:
        record = check_record(folder / "data" / "service.sqlite", stress.attempts, lost_jobs(server.log))
        found |= report(stress, disturbances, seconds, record)
        found["compared_with_the_engine"] = compare_with_engine(options.bundle, stress.attempts, 100)
        found["tracebacks"] = dict(collections.Counter(TRACEBACK.findall(server.log)))
    return found


def main() -> int:
    """Print the figures; the exit status is 1 if anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seconds", type=float, default=7200.0, help="No request is begun after that.")
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--uploads", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--disk", default="1g", help="Size of the disk under the service's data.")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with small_disk(folder / "data", options.disk) as disk:
            found = asyncio.run(run(options, folder, disk))
    text = json.dumps(found, indent=1, ensure_ascii=False)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n", encoding="utf-8")
    return 1 if found["faults"] or found.get("record", {}).get("faults") or found.get("tracebacks") else 0


if __name__ == "__main__":
    sys.exit(main())
