"""The queue: fair between owners, by priority and arrival within one, bounded."""

from __future__ import annotations

import asyncio

import pytest

pytest.importorskip("fastapi", reason="the extra `server` is not installed")

from zimage_rt.server.jobs import FairQueue, Job, QueueFull


def job(owner: str, name: str, priority: int = 0) -> Job:
    return Job({"prompt": name}, model="nano", owner=owner, priority=priority)


def order(queue: FairQueue) -> list[str]:
    return [taken.fields["prompt"] for taken in iter(queue.take, None)]


def test_owners_are_served_in_rounds() -> None:
    queue = FairQueue(100)
    for number in range(4):
        queue.add(job("a", f"a{number}"))
    queue.add(job("b", "b0"))
    queue.add(job("c", "c0"))
    queue.add(job("b", "b1"))
    assert order(queue) == ["a0", "b0", "c0", "a1", "b1", "a2", "a3"]
    assert len(queue) == 0 and queue.take() is None


def test_a_priority_counts_within_its_owner_alone() -> None:
    queue = FairQueue(100)
    for name, priority in (("low", -1), ("first", 0), ("urgent", 5), ("second", 0)):
        queue.add(job("a", name, priority))
    queue.add(job("b", "other"))
    assert order(queue) == ["urgent", "other", "first", "second", "low"]


def test_positions_are_those_of_the_rounds() -> None:
    queue = FairQueue(100)
    jobs = [job(owner, owner + number) for owner, number in ("a0", "a1", "a2", "b0", "c0", "b1")]
    for each in jobs:
        queue.add(each)
    positions = {each.fields["prompt"]: queue.position(each) for each in jobs}
    assert sorted(positions, key=lambda name: positions[name]) == order(queue)
    assert queue.position(jobs[0]) is None


def test_a_full_queue_says_when_to_ask_again() -> None:
    queue = FairQueue(2)
    queue.timed(10.0)
    for number in range(2):
        queue.check_room(1)
        queue.add(job("a", str(number)))
    with pytest.raises(QueueFull, match="2 jobs wait already") as caught:
        queue.check_room(2)
    assert caught.value.retry_after == 10
    queue.timed(10_000.0)
    with pytest.raises(QueueFull) as caught:
        queue.check_room(1)
    assert caught.value.retry_after == 120  # above that OpenAI's clients do not ask again


def test_a_lost_job_comes_before_its_owners_others() -> None:
    queue = FairQueue(10)
    queue.add(job("a", "second"))
    queue.add_first(job("a", "lost"))
    assert order(queue) == ["lost", "second"]


def test_jobs_are_taken_out() -> None:
    queue = FairQueue(10)
    first, second = job("a", "first"), job("a", "second")
    queue.add(first)
    queue.add(second)
    assert queue.remove(first) and not queue.remove(first)
    assert order(queue) == ["second"]


def test_everybody_who_watches_hears_everything_once() -> None:
    async def watch() -> None:
        watched = job("a", "a")
        heard: list[list[str]] = [[], []]

        async def listen(number: int, since: int) -> None:
            async for event in watched.watch(since):
                heard[number].append(event.name)

        watched.tell("queued")
        listeners = [asyncio.create_task(listen(0, 0)), asyncio.create_task(listen(1, 1))]
        await asyncio.sleep(0)
        watched.tell("started")
        watched.tell("step", step=1, steps=2, sigma=0.5, preview=b"jpeg")
        await asyncio.sleep(0)
        watched.finish("done")
        watched.finish("failed")  # too late
        await asyncio.gather(*listeners)
        assert heard == [["queued", "started", "step", "done"], ["started", "step", "done"]]
        assert watched.progress == {"step": 1, "steps": 2} and watched.state == "done"
        watched.drop_previews()
        assert all("preview" not in event.data for event in watched.events)

    asyncio.run(watch())


def test_previews_stay_until_those_who_watch_have_read_them() -> None:
    async def watch() -> None:
        watched = job("a", "a")
        previews: list[bytes] = []

        async def listen() -> None:
            async for event in watched.watch():
                previews.extend([event.data["preview"]] if "preview" in event.data else [])

        listener = asyncio.create_task(listen())
        await asyncio.sleep(0)
        watched.tell("step", step=1, steps=2, sigma=0.5, preview=b"jpeg")
        watched.finish("done")  # before the listener has run again
        watched.drop_previews()
        await listener
        assert previews == [b"jpeg"]
        assert all("preview" not in event.data for event in watched.events)

    asyncio.run(watch())
