"""A client of `zimage serve` in one file: it draws prompts with progress, and cancels on Ctrl-C.

    python examples/client.py "a panda, blue background" "a fox" --url http://127.0.0.1:8188 --out out

Needs httpx. The key, if the service wants one, is in the environment variable ZIMAGE_KEY.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

# Tries of a request that the service refuses because it is busy or starting, and of a stream that breaks.
ATTEMPTS = 10
BUSY = (429, 503)
FINISHED = ("done", "failed", "cancelled")


class ServiceError(Exception):
    """An answer that is an error; `code` is the service's, such as `invalid_request` or `queue_full`."""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(f"{code}: {message}")
        self.code = code


class Client:
    """Jobs of a service. Use it as a context manager, so that its connections are closed."""

    def __init__(self, url: str, key: str | None = None) -> None:
        headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._http = httpx.Client(base_url=url, headers=headers, timeout=httpx.Timeout(30, read=60))

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self._http.close()

    def submit(self, files: Mapping[str, Path] | None = None, **fields: Any) -> str:
        """Send a request and return its job's id. `fields` are those of a request, `files` are its images by field."""
        if not files:
            return self._call("POST", "/v1/jobs", json=fields)["id"]
        form = {name: value if isinstance(value, str) else json.dumps(value) for name, value in fields.items()}
        parts = {name: (path.name, path.read_bytes()) for name, path in files.items()}
        return self._call("POST", "/v1/jobs", data=form, files=parts)["id"]

    def events(self, job: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """A job's events to its end, each as its name and its data; a broken stream is continued after the last one."""
        last, name = "", ""
        for attempt in range(ATTEMPTS):
            try:
                headers = {"Last-Event-ID": last} if last else {}
                with self._http.stream("GET", f"/v1/jobs/{job}/events", headers=headers) as answer:
                    if answer.is_error:
                        answer.read()
                    self._check(answer)
                    for line in answer.iter_lines():
                        field, _, value = line.partition(": ")
                        if field == "id":
                            last = value
                        elif field == "event":
                            name = value
                        elif field == "data":
                            yield name, json.loads(value)
                if name in FINISHED:
                    return
            except httpx.TransportError:
                if attempt == ATTEMPTS - 1:
                    raise
            time.sleep(1)

    def images(self, job: str) -> list[bytes]:
        """The files of a job that is done. Raises ServiceError with the reason if it is not."""
        status = self._call("GET", f"/v1/jobs/{job}")
        if status["state"] != "done":
            error = status["error"] or {"code": status["state"], "message": "the job has no images"}
            raise ServiceError(error["code"], error["message"])
        return [self._get(f"/v1/jobs/{job}/images/{number}").content for number in range(status["images"])]

    def cancel(self, job: str) -> None:
        """Stop a job after the step that runs."""
        self._call("DELETE", f"/v1/jobs/{job}")

    def _get(self, path: str) -> httpx.Response:
        answer = self._http.get(path)
        self._check(answer)
        return answer

    def _call(self, method: str, path: str, **content: Any) -> Any:
        """An answer's JSON; a busy service is asked again when it says."""
        for _ in range(ATTEMPTS - 1):
            answer = self._http.request(method, path, **content)
            if answer.status_code not in BUSY:
                break
            time.sleep(float(answer.headers.get("Retry-After", 1)))
        else:
            answer = self._http.request(method, path, **content)
        self._check(answer)
        return answer.json()

    @staticmethod
    def _check(answer: httpx.Response) -> None:
        if answer.is_error:
            error = answer.json()["error"]
            raise ServiceError(error["code"], error["message"])


def main() -> None:
    """Draw the prompts of the command line, one after the other."""
    parser = argparse.ArgumentParser(description="Draws prompts with a service.")
    parser.add_argument("prompts", nargs="+", help="a prompt per image")
    parser.add_argument("--url", default="http://127.0.0.1:8188")
    parser.add_argument("--out", type=Path, default=Path("out"))
    parser.add_argument("--seed", type=int, default=0, help="of the first image; the others count up")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    with Client(arguments.url, os.environ.get("ZIMAGE_KEY")) as client:
        for number, prompt in enumerate(arguments.prompts):
            job = client.submit(prompt=prompt, seed=arguments.seed + number)
            try:
                for name, data in client.events(job):
                    if name == "step":
                        print(f"{prompt}: {data['step']}/{data['steps']}")
            except KeyboardInterrupt:
                client.cancel(job)
                raise
            path = arguments.out / f"{number:05}.png"
            path.write_bytes(client.images(job)[0])
            print(path)


if __name__ == "__main__":
    main()
