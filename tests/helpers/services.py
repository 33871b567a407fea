"""A service in a process of its own, and clients of it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
from shared import ROOT

START_SECONDS = 60


class Server:
    """`zimage serve` in a process of its own.

    Attributes:
        url: where it listens.
        client: of httpx.
    """

    def __init__(self, folder: Path, *arguments: str, bundle: Path | None = None, port: int = 0) -> None:
        self.folder, self._log = folder, folder / "server.log"
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "zimage_rt.cli.main", "serve", *([str(bundle)] if bundle else [])]
        command += ["--data", str(folder / "data"), "--port", str(port), *arguments]
        self._log_start = self._log.stat().st_size if self._log.exists() else 0
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, cwd=ROOT)
        self.url = self._wait_for_address()
        self.client = httpx.Client(base_url=self.url, timeout=60)

    def _wait_for_address(self) -> str:
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            for line in self.log.splitlines():
                if "listening at http://" in line:
                    return "http://" + line.partition("listening at http://")[2].split()[0].rstrip('",}')
            if self.process.poll() is not None:
                break
            time.sleep(0.05)
        raise AssertionError(f"the service did not start: {self.log}")

    @property
    def log(self) -> str:
        """What this process wrote so far."""
        return self._log.read_bytes()[self._log_start :].decode("utf-8", "replace") if self._log.exists() else ""

    def wait_until_ready(self) -> None:
        """Return when a worker takes jobs."""
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            if self.client.get("/readyz").status_code == 200:
                return
            time.sleep(0.05)
        raise AssertionError(f"no worker became ready: {self.log}")

    def workers(self) -> list[int]:
        """The process numbers of its workers."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        found = []
        for pid in map(int, children):
            with contextlib.suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
        return found

    def draw(self, **fields: Any) -> dict[str, Any]:
        """A job, waited for; its last status."""
        answer = self.client.post("/v1/jobs", json=fields)
        assert answer.status_code == 202, answer.text
        return self.finish(answer.json()["id"])

    def finish(self, job: str, seconds: float = 60) -> dict[str, Any]:
        """A job's status when it has ended."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            status = self.client.get(f"/v1/jobs/{job}").json()
            if status["state"] in ("done", "failed", "cancelled"):
                return status
            time.sleep(0.02)
        raise AssertionError(f"job {job} did not end: {status}")

    def events(self, job: str, since: int | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
        """A job's events, as they come."""
        headers = {} if since is None else {"Last-Event-ID": str(since)}
        with self.client.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as answer:
            name = ""
            for line in answer.iter_lines():
                if line.startswith("event: "):
                    name = line.removeprefix("event: ")
                elif line.startswith("data: "):
                    yield name, json.loads(line.removeprefix("data: "))

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM; the exit status."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        finally:
            self.client.close()
            if self.process.poll() is None:
                self.process.kill()


def kill(pid: int) -> None:
    """End a process as a lack of memory would."""
    os.kill(pid, signal.SIGKILL)
