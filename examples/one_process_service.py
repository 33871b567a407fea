"""One engine in one process for many callers: a bounded queue, progress, cancelling and deadlines.

    python examples/one_process_service.py engines/nano
    python examples/one_process_service.py engines/z-image-turbo --backend cuda

A GPU runs one request at a time, so one worker thread owns the engine and callers wait for their jobs. The callback
that reports progress is also what stops a request: it returns False once the job is cancelled or its deadline passed.
"""

from __future__ import annotations

import argparse
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import zimage_rt

Progress = Callable[[int, int], None]


class Busy(Exception):
    """The queue is full; the caller should try again later."""


class Job:
    """One request in the queue. `result` waits for it; `cancel` stops it, also while it runs."""

    def __init__(self, fields: dict[str, Any], timeout: float | None, on_progress: Progress | None) -> None:
        self.fields = fields
        self.future: Future[zimage_rt.GenerateResult] = Future()
        self._deadline = None if timeout is None else time.monotonic() + timeout
        self._on_progress = on_progress
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        """Stop the job before its next step, or before it starts."""
        self._cancelled.set()

    def result(self) -> zimage_rt.GenerateResult:
        """Wait for the images.

        Raises:
            zimage_rt.Cancelled: `cancel` was called.
            TimeoutError: the deadline passed before the images were ready.
            zimage_rt.ZImageError: the request is impossible or failed.
        """
        return self.future.result()

    def check(self) -> None:
        """Raise Cancelled or TimeoutError if the job must not go on."""
        if self._cancelled.is_set():
            raise zimage_rt.Cancelled("the job was cancelled")
        if self._deadline is not None and time.monotonic() >= self._deadline:
            raise TimeoutError("the job's deadline passed")

    def on_step(self, info: zimage_rt.StepInfo) -> bool:
        """The engine's callback: report progress; False stops the request."""
        if self._on_progress is not None:
            self._on_progress(info.step + 1, info.num_steps)
        try:
            self.check()
        except (zimage_rt.Cancelled, TimeoutError):
            return False
        return True


class Service:
    """Owns an engine and the thread that runs it. Use it in a `with` statement.

    Args:
        engine: what draws.
        max_waiting: how many jobs may wait; `submit` raises Busy beyond that.
    """

    def __init__(self, engine: zimage_rt.Engine, max_waiting: int = 16) -> None:
        self._engine = engine
        self._jobs: queue.Queue[Job | None] = queue.Queue(max_waiting)
        self._worker = threading.Thread(target=self._run, name="zimage-worker")

    def __enter__(self) -> Service:
        self._worker.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._jobs.put(None)  # after the jobs that wait already
        self._worker.join()

    def submit(
        self, prompt: str, *, timeout: float | None = None, on_progress: Progress | None = None, **fields: Any
    ) -> Job:
        """Queue a request.

        Args:
            prompt: what to draw.
            timeout: seconds from now; waiting in the queue counts.
            on_progress: called in the worker's thread with (steps done, steps in all).
            **fields: those of `Engine.generate`.

        Raises Busy if the queue is full.
        """
        job = Job({"prompt": prompt, **fields}, timeout, on_progress)
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Busy(f"{self._jobs.maxsize} jobs are waiting; try again later") from None
        return job

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.check()
                job.future.set_result(self._engine.generate(**job.fields, callback=job.on_step))
            except zimage_rt.Cancelled as error:
                # The engine reports both reasons as Cancelled; the job knows which one it was.
                job.future.set_exception(_reason(job, error))
            except Exception as error:  # a job that fails must not stop the others
                job.future.set_exception(error)


def _reason(job: Job, error: zimage_rt.Cancelled) -> Exception:
    try:
        job.check()
    except (zimage_rt.Cancelled, TimeoutError) as reason:
        return reason
    return error


def main() -> None:
    """Submit four jobs: two that finish, one that is cancelled on the way, one whose deadline has passed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument(
        "--backend", default="onnxruntime", help="onnxruntime (default), cuda, tensorrt or tensorrt_rtx"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("out/service"), help="folder for the images (default out/service)"
    )
    arguments = parser.parse_args()

    engine = zimage_rt.Engine.load(arguments.bundle, backend=arguments.backend)
    with Service(engine) as service:

        def stop_after_two(done: int, count: int) -> None:
            if done == 2:
                cancelled.cancel()

        jobs = {
            "panda": service.submit("a panda, blue background", seed=1),
            "fox": service.submit("a fox, green background", seed=2, on_progress=lambda i, n: print(f"fox: {i}/{n}")),
        }
        cancelled = jobs["cancelled"] = service.submit("an owl, white background", seed=3, on_progress=stop_after_two)
        jobs["late"] = service.submit("a cat, pink background", seed=4, timeout=0.0)
        for name, job in jobs.items():
            try:
                paths = job.result().save(arguments.out / f"{name}.png")
                print(f"{name}: {paths[0]}")
            except (zimage_rt.ZImageError, TimeoutError) as error:
                print(f"{name}: {type(error).__name__}: {error}")


if __name__ == "__main__":
    main()
