"""The record: searched, drawn again, pruned, and whole after 20 deaths of the process that writes it."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
import multiprocessing
import os
import signal
import sqlite3
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image as PilImage
from shared import ROOT
from typer.testing import CliRunner

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from services import Server, kill

from zimage_rt.cli.main import app
from zimage_rt.errors import RequestError
from zimage_rt.server.config import ModelConfig, QueueConfig, ServiceConfig
from zimage_rt.server.database import connect
from zimage_rt.server.jobs import Image, Job
from zimage_rt.server.log_queries import read_since
from zimage_rt.server.retention import INPUTS_GRACE
from zimage_rt.server.store import Store

SMALL: dict[str, Any] = {"prompt": "a panda", "height": 64, "width": 64, "num_inference_steps": 2, "seed": 3}
LORAS = ROOT / "checkpoints" / "zimage-nano-cyanotype"
DEATHS = 20


def log(*arguments: str) -> tuple[int, str]:
    """Exit status and standard output of `zimage log`."""
    result = CliRunner().invoke(app, ["log", *arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.stdout


def config_of(data: Path, **fields: Any) -> ServiceConfig:
    return ServiceConfig({"nano": ModelConfig("nano")}, data=str(data), **fields)


def png(image: np.ndarray) -> bytes:
    encoded = io.BytesIO()
    PilImage.fromarray(image).save(encoded, "PNG")
    return encoded.getvalue()


@pytest.fixture(scope="module")
def drawn(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The configuration of a service that has ended, and the ids of its jobs."""
    folder = tmp_path_factory.mktemp("log")
    config = folder / "service.toml"
    config.write_text(
        f'data = "data"\n[models.nano]\nbundle = "{bundle}"\nloras = "{LORAS}"\n'
        f'[models.other]\nbundle = "{bundle}"\nloras = "{LORAS}"\nload = false\n'
    )
    server = Server(folder, "--config", str(config))
    server.wait_until_ready()
    rng = np.random.default_rng(1)
    mask = np.zeros((64, 64, 3), np.uint8)
    mask[:32] = 255
    files = {"image": png(rng.integers(0, 256, (64, 64, 3), np.uint8)), "mask": png(mask)}
    lora = server.client.get("/v1/models").json()["data"][0]["loras"][0]
    jobs = {
        "two": server.draw(**SMALL, num_images=2),
        "lora": server.draw(**{**SMALL, "prompt": "100% 中文 panda"}, loras={lora: 0.7}, model="other"),
        "scaled": server.draw(**SMALL, second_pass={"scale": 2.0}),
    }
    texts = {"prompt": "an owl", "seed": "5", "num_inference_steps": "5", "strength": "0.7"}
    jobs["edit"] = server.finish(server.client.post("/v1/jobs", data=texts, files=files).json()["id"])
    turns = f"/v1/sessions/{server.client.post('/v1/sessions').json()['id']}/turns"
    for task in ("generate", "refine"):
        jobs[task] = server.finish(server.client.post(f"{turns}/{task}", json=SMALL).json()["id"])
    assert all(job["state"] == "done" for job in jobs.values()), jobs
    cancelled = server.client.post("/v1/jobs", json={**SMALL, "num_inference_steps": 100}).json()["id"]
    server.client.delete(f"/v1/jobs/{cancelled}")
    server.finish(cancelled)
    assert server.stop() == 0
    return config, {name: job["id"] for name, job in jobs.items()} | {"cancelled": cancelled}


def ids(*arguments: str) -> list[str]:
    return [json.loads(line)["id"] for line in log(*arguments, "--jsonl")[1].splitlines()]


def test_the_record_is_searched(drawn: tuple[Path, dict[str, str]]) -> None:
    config, jobs = drawn
    where = ("--config", str(config))
    order = ["cancelled", "refine", "generate", "edit", "scaled", "lora", "two"]
    assert ids(*where) == ids(*where, "--since", "1h", "--key", "") == [jobs[name] for name in order]
    assert ids(*where, "--limit", "2") == [jobs["cancelled"], jobs["refine"]]
    assert ids(*where, "--state", "cancelled") == [jobs["cancelled"]]
    assert ids(*where, "--model", "other") == ids(*where, "--grep", "100% 中") == [jobs["lora"]]
    assert ids(*where, "--grep", "AN OWL", "--state", "done") == [jobs["edit"]]
    assert ids(*where, "--grep", "no image was made") == [jobs["cancelled"]]  # of the error
    for nothing in (("--grep", "1%0"), ("--key", "alice"), ("--since", "2999-01-01"), ("--state", "queued")):
        assert ids(*where, *nothing) == []
    line = log(*where, "--model", "other")[1]
    assert line.startswith(jobs["lora"]) and "done" in line and "100% 中文 panda" in line and "1 images" in line
    record = json.loads(log(*where, "--state", "cancelled", "--jsonl")[1])
    assert record["error"]["code"] == "cancelled" and record["fields"]["num_inference_steps"] == 100
    assert read_since("2h", 10_000.0) == 2800.0
    with pytest.raises(RequestError, match="--since: expected a time ago"):
        log(*where, "--since", "yesterday")


@pytest.mark.parametrize("name", ["two", "lora", "scaled", "edit", "refine"])
def test_a_record_is_drawn_again_to_the_byte(drawn: tuple[Path, dict[str, str]], name: str, tmp_path: Path) -> None:
    config, jobs = drawn
    status, text = log("repeat", jobs[name], "--config", str(config), "-o", str(tmp_path))
    images = 2 if name == "two" else 1
    assert status == 0 and text.count("the same to the byte") == images
    assert len(list(tmp_path.glob("*.png"))) == images


def test_a_difference_is_said_by_the_exit_status(drawn: tuple[Path, dict[str, str]], bundle: Path) -> None:
    config, jobs = drawn
    data = config.parent / "data"

    def change(job: str, column: str, edit: Callable[[Any], Any]) -> None:
        with contextlib.closing(connect(data)) as database:
            (text,) = database.execute(f"SELECT {column} FROM jobs WHERE id = ?", (job,)).fetchone()
            changed = json.dumps(edit(json.loads(text)))
            database.execute(f"UPDATE jobs SET {column} = ? WHERE id = ?", (changed, job))
            database.commit()

    def set_seed(fields: dict[str, Any], seed: int) -> dict[str, Any]:
        return {**fields, "seed": seed}

    change(jobs["scaled"], "fields", lambda fields: set_seed(fields, 4))
    status, text = log("--data", str(data), "repeat", jobs["scaled"], "--bundle", str(bundle))
    assert status == 1 and text == "image 0: not the recorded one to the byte\n"
    change(jobs["scaled"], "fields", lambda fields: set_seed(fields, 3))
    with pytest.raises(RequestError, match="is cancelled, so that there is no image"):
        log("repeat", jobs["cancelled"], "--config", str(config))
    with pytest.raises(RequestError, match="the record has no job 'none'"):
        log("repeat", "none", "--config", str(config))
    with pytest.raises(RequestError, match="expected the bundle of model 'nano'"):
        log("repeat", jobs["two"], "--data", str(data))
    inputs = sorted((data / "inputs").iterdir())
    moved = [path.rename(config.parent / path.name) for path in inputs]
    with pytest.raises(RequestError, match=r"which .* was made from, is there no longer"):
        log("repeat", jobs["edit"], "--config", str(config))
    for path in moved:
        path.rename(data / "inputs" / path.name)


# --- the store alone --------------------------------------------------------------------------------------------------


def finished(prompt: str = "a panda", **fields: Any) -> Job:
    job = Job({"prompt": prompt, "seed": 1, **fields}, model="nano", owner="alice")
    job.images = [Image(b"content", "image/png", 8, 8, {"pixels_sha256": "0" * 64})]
    return job


def with_store(config: ServiceConfig, work: Callable[[Store], Any]) -> Any:
    """The result of a coroutine function that is given an open store."""

    async def run() -> Any:
        store = Store(Path(config.data), config)
        await store.open()
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


async def keep(store: Store, job: Job) -> Job:
    """Write a job as done."""
    store.finished(job, "done")
    await store.settled(job)
    return job


def test_prompts_are_kept_as_hashes_if_so_configured(tmp_path: Path) -> None:
    async def work(store: Store) -> str:
        job = finished("a secret", negative_prompt="another secret")
        await store.promise(job)
        return (await keep(store, job)).id

    job = with_store(config_of(tmp_path, record_prompts=False), work)
    assert json.loads(log("--data", str(tmp_path), "--jsonl")[1])["prompt"] is None
    assert "sha256 " in log("--data", str(tmp_path))[1]
    with pytest.raises(RequestError, match="record_prompts = false"):
        log("repeat", job, "--data", str(tmp_path), "--bundle", "nano")
    with contextlib.closing(connect(tmp_path)) as database:
        assert "secret" not in str([tuple(row) for row in database.execute("SELECT * FROM jobs")])


def test_records_are_kept_for_so_long_and_so_many(tmp_path: Path) -> None:
    async def work(store: Store) -> tuple[list[Job], Job]:
        jobs = [finished() for _ in range(6)]
        for age, job in enumerate(jobs):
            job.created -= 86400 * age
            await keep(store, job)
        waiting = finished()
        waiting.created = 0.0
        await store.promise(waiting)
        await store.prune()
        return jobs, waiting

    jobs, waiting = with_store(config_of(tmp_path, queue=QueueConfig(retain_days=4, retain_rows=3)), work)
    assert ids("--data", str(tmp_path)) == [job.id for job in jobs[:3]] + [waiting.id]
    jobs, waiting = with_store(config_of(tmp_path / "b", queue=QueueConfig(retain_days=2)), work)
    assert ids("--data", str(tmp_path / "b")) == [job.id for job in jobs[:2]] + [waiting.id]


def test_images_are_kept_for_so_long_and_so_many_bytes(tmp_path: Path) -> None:
    async def work(store: Store) -> list[bool]:
        jobs = [await keep(store, finished()) for _ in range(4)]
        folders = [store.folder / "images" / job.id for job in jobs]
        for age, folder in enumerate(folders):
            os.utime(folder, (time.time() - 100 * age,) * 2)
        await store.prune()
        return [folder.exists() for folder in folders]

    size = len(b"content")
    assert with_store(config_of(tmp_path, queue=QueueConfig(keep_seconds=250)), work) == [True, True, True, False]
    two = QueueConfig(keep_bytes=2 * size)
    assert with_store(config_of(tmp_path / "b", queue=two), work) == [True, True, False, False]


def test_inputs_are_kept_as_long_as_a_record_names_them(tmp_path: Path) -> None:
    async def work(store: Store) -> dict[str, bool]:
        paths = {name: await store.keep_input(name.encode()) for name in ("named", "older", "waits", "nobody", "young")}
        for name in ("named", "older"):
            await keep(store, finished(image=paths[name]))
        for age, name in enumerate(("waits", "named", "older", "nobody")):
            os.utime(paths[name], (time.time() - INPUTS_GRACE - 100 - age,) * 2)
        await store.prune({paths["waits"].name})
        assert paths["nobody"].exists()  # it was looked at a moment ago
        store.look_at_inputs()
        await store.prune({paths["waits"].name})
        return {name: path.exists() for name, path in paths.items()}

    kept = {"named": True, "older": True, "waits": True, "nobody": False, "young": True}
    assert with_store(config_of(tmp_path), work) == kept
    # The young, the one that waits and the newest that is named have 15 bytes together.
    config = config_of(tmp_path / "b", queue=QueueConfig(retain_input_bytes=15))
    assert with_store(config, work) == {**kept, "older": False}


# --- deaths -----------------------------------------------------------------------------------------------------------


def write_for_ever(folder: Path, connection: Connection) -> None:
    """A process that promises and ends jobs, many at once, and says which of them were answered."""

    async def work(store: Store) -> None:
        async def one(number: int) -> None:
            while True:
                job = finished(f"job {number}", image=await store.keep_input(os.urandom(8)))
                job.detached = bool(number % 2)
                if job.detached:
                    await store.promise(job)
                    connection.send(("queued", job.id))
                connection.send(("done", (await keep(store, job)).id))

        await asyncio.gather(*(one(number) for number in range(8)))

    with_store(config_of(folder), work)


def check_whole(folder: Path, answered: dict[str, str]) -> None:
    """The database is whole, and has what was answered at least as it was."""
    with contextlib.closing(sqlite3.connect(folder / "service.sqlite")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        rows = {row[0]: row[1:] for row in database.execute("SELECT id, state, images FROM jobs")}
    for job, state in answered.items():
        assert job in rows and (state == "queued" or rows[job][0] == "done"), (job, state, rows.get(job))
    for job, (state, images) in rows.items():
        for image in json.loads(images):
            assert (folder / "images" / image["file"]).read_bytes() == b"content", (job, state)


def test_a_writer_that_is_killed_leaves_a_whole_record(tmp_path: Path) -> None:
    context, answered = multiprocessing.get_context("fork"), {}
    for death in range(DEATHS):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=write_for_ever, args=(tmp_path, theirs))
        process.start()
        theirs.close()
        with contextlib.suppress(EOFError):
            for _ in range(3 + 5 * death):  # then in the midst of the next ones
                state, job = ours.recv()
                answered[job] = state
            os.kill(process.pid, signal.SIGKILL)
            while True:
                state, job = ours.recv()
                answered[job] = state
        process.join()
        check_whole(tmp_path, answered)
    assert len(answered) > 100


@pytest.fixture
def killed(bundle: Path, tmp_path: Path) -> Iterator[Callable[[], Server]]:
    """Starts a service in the same folder again and again."""
    servers: list[Server] = []

    def start() -> Server:
        servers.append(Server(tmp_path, bundle=bundle))
        return servers[-1]

    yield start
    for server in servers:
        server.stop()


def test_a_service_that_is_killed_has_recorded_what_it_answered(killed: Callable[[], Server], tmp_path: Path) -> None:
    answered: dict[str, str] = {}
    for death in range(3):
        server = killed()
        with contextlib.suppress(httpx.HTTPError):
            for number in range(10 + 7 * death):
                answer = server.client.post("/v1/jobs", json={**SMALL, "seed": number})
                answered[answer.json()["id"]] = "queued"
        kill(server.process.pid)
        server.process.wait()
        check_whole_service(tmp_path / "data", answered)
    last = killed()
    for job in answered:
        assert last.finish(job)["state"] == "done"


def check_whole_service(folder: Path, answered: dict[str, str]) -> None:
    """The database of a service is whole, and has all jobs that were answered."""
    with contextlib.closing(sqlite3.connect(folder / "service.sqlite")) as database:
        assert database.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        assert answered.keys() <= {row[0] for row in database.execute("SELECT id FROM jobs")}
