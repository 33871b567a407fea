"""Measures the service beside plain `Engine.generate`: latency, what it adds, previews, and jobs drawn as one batch.

    python -m zimage_rt.benchmarks.service engines/nano --size 256 --evaluations 8
    python -m zimage_rt.benchmarks.service /tmp/random-bf16 --backend cuda --size 256 --size 1024
    python -m zimage_rt.benchmarks.service engines/nano --batching --size 64 --size 128 --size 256
    python -m zimage_rt.benchmarks.service /tmp/random-bf16 --backend cuda --size 1024 --devices 2

Both systems are measured in one run and alternate: a round of the engine, then one of the service, at the same clocks.
The device must hold the model twice. A client asks again as soon as it has its answer; `clients` of them do so at once.
The engine's clients are threads. `--devices` compares services alone: one with that many devices, and one with the
first.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

import zimage_rt

PROMPT = "a small red house beside a quiet lake under tall pine trees"
CLIENTS = (1, 4, 16)
START_SECONDS = 600.0
# Draws one image with the seed and returns when its bytes are there.
Draw = Callable[[int], object]


@contextlib.contextmanager
def service(bundle: Path, backend: str, slots: int, devices: int | None = None) -> Iterator[str]:
    """A service in a process of its own, with so many devices; its address."""
    with tempfile.TemporaryDirectory() as name, socket.socket() as probe:
        folder = Path(name)
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
        probe.close()
        config = folder / "service.toml"
        head = f"slots = {slots}\n" + ("" if devices is None else f"devices = {list(range(devices))}\n")
        config.write_text(
            f'{head}[models.model]\nbundle = "{bundle.absolute()}"\nbackend = "{backend}"\n', encoding="utf-8"
        )
        command = [sys.executable, "-m", "zimage_rt.cli.main", "serve", "--config", str(config), "--port", str(port)]
        log = (folder / "log").open("wb")
        process = subprocess.Popen([*command, "--data", str(folder / "data")], stdout=log, stderr=log)
        try:
            wait_until_ready(f"http://127.0.0.1:{port}", process, folder / "log", devices or 1)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            process.wait(60)
            log.close()


def wait_until_ready(url: str, process: subprocess.Popen[bytes], log: Path, workers: int) -> None:
    """Return when so many workers take jobs. Raises RuntimeError with the log if the service ends before."""
    import httpx

    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        with contextlib.suppress(httpx.TransportError):
            if sum(worker["ready"] for worker in httpx.get(f"{url}/readyz", timeout=5).json()["workers"]) == workers:
                return
        time.sleep(0.1)
    raise RuntimeError(f"the service did not start: {log.read_text(errors='replace')[-3000:]}")


def percentiles(seconds: list[float]) -> dict[str, float]:
    """p50 and p99 in milliseconds; of fewer than 100 values p99 is the largest."""
    ordered = sorted(seconds)
    return {
        "p50_ms": round(1e3 * statistics.median(ordered), 2),
        "p99_ms": round(1e3 * ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))], 2),
    }


def run_clients(draw: Draw, clients: int, requests: int, first_seed: int) -> tuple[list[float], float]:
    """Each client draws `requests` images, one after another: the seconds of each request, and of all."""
    taken: list[float] = []
    failed: list[BaseException] = []

    def client(number: int) -> None:
        try:
            for request in range(requests):
                start = time.perf_counter()
                draw(first_seed + number * requests + request)
                taken.append(time.perf_counter() - start)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    start = time.perf_counter()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return taken, time.perf_counter() - start


def over_http(url: str, size: int, evaluations: int, previews: int | None = None) -> Draw:
    """Draws by OpenAI's protocol, which answers with the image; as a stream with so many previews at most, if given."""
    # Python's own client adds the least, so that the service is measured; one connection per thread.
    host, connections = url.removeprefix("http://"), threading.local()
    fields: dict[str, Any] = {"prompt": PROMPT, "size": f"{size}x{size}", "num_inference_steps": evaluations}
    if previews is not None:
        fields |= {"stream": True, "partial_images": previews}

    def draw(seed: int) -> object:
        if not hasattr(connections, "own"):
            connections.own = http.client.HTTPConnection(host, timeout=600)
        body = json.dumps({**fields, "seed": seed})
        connections.own.request("POST", "/v1/images/generations", body, {"Content-Type": "application/json"})
        answer = connections.own.getresponse()
        content = answer.read()
        assert answer.status == 200 and (previews is None or b"generation.completed" in content), content[:500]
        return content

    return draw


def in_process(engine: zimage_rt.Engine, size: int, evaluations: int) -> Draw:
    """Draws with the engine. The image is encoded as the service does it, as both must give the same file."""
    from zimage_rt.metadata.image_file import encode_with_record

    def draw(seed: int) -> object:
        result = engine.generate(PROMPT, height=size, width=size, num_inference_steps=evaluations, seed=seed)
        return encode_with_record(result.images[0], result.records[0], ".png")

    return draw


def measure_cancelling(url: str, size: int, rounds: int) -> dict[str, float]:
    """Milliseconds from asking for the end of a job, which runs, to its last event, and of one step."""
    import httpx

    cancelled, steps = [], []
    with httpx.Client(base_url=url, timeout=600) as client:
        for number in range(rounds):
            fields = {"prompt": PROMPT, "height": size, "width": size, "num_inference_steps": 100, "seed": number}
            job = client.post("/v1/jobs", json=fields).json()["id"]
            begun, asked = 0.0, 0.0
            with client.stream("GET", f"/v1/jobs/{job}/events") as events:
                for line in events.iter_lines():
                    if line == "event: step" and not begun:
                        begun = time.perf_counter()
                    elif line == "event: step" and not asked:
                        asked = time.perf_counter()
                        client.delete(f"/v1/jobs/{job}")
                    elif line == "event: cancelled":
                        cancelled.append(time.perf_counter() - asked)
                        steps.append(asked - begun)
    assert len(cancelled) == rounds, "a job was done before it was cancelled"
    return {"step_ms": round(1e3 * statistics.median(steps), 2), **percentiles(cancelled)}


def measure_devices(
    bundle: Path, backend: str, slots: int, devices: int, load: tuple[int, int, int, int, int]
) -> dict[str, Any]:
    """Images per second of services with one device and with all, one after another and back again.

    Args:
        bundle, backend, slots, devices: see `service`.
        load: size, evaluations, clients, requests of a client, rounds.
    """
    size, evaluations, clients, requests, rounds = load
    rates: dict[int, list[float]] = {1: [], devices: []}
    for number in range(rounds):
        for count in (1, devices) if number % 2 == 0 else (devices, 1):
            with service(bundle, backend, slots, count) as url:
                draw = over_http(url, size, evaluations)
                run_clients(draw, clients, 1, 10**6)  # graphs and tuning
                taken, total = run_clients(draw, clients, requests, 0)
                rates[count].append(len(taken) / total)
    found = {f"images_per_second_{count}": round(statistics.mean(each), 3) for count, each in rates.items()}
    ratio = round(statistics.mean(rates[devices]) / statistics.mean(rates[1]), 3)
    return {"size": size, "clients": clients, **found, "ratio": ratio}


def measure(systems: dict[str, Draw], clients: int, requests: int, rounds: int) -> dict[str, Any]:
    """Percentiles of each system over the rounds, in which they alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in systems}
    totals = dict.fromkeys(systems, 0.0)
    for draw in systems.values():  # graphs and tuning
        run_clients(draw, clients, 1, 10**6)
    for number in range(rounds):
        for name, draw in systems.items():
            taken, total = run_clients(draw, clients, requests, number * clients * requests)
            seconds[name] += taken
            totals[name] += total
    return {
        name: {**percentiles(taken), "images_per_second": round(len(taken) / totals[name], 3)}
        for name, taken in seconds.items()
    }


def measure_batching(engine: zimage_rt.Engine, size: int, evaluations: int, rounds: int) -> list[dict[str, Any]]:
    """Images of one size and their own prompts, drawn one after another and as one batch; and whether the bytes agree.

    Each batch has prompts of one length, and of different lengths: the engine groups samples by the length.
    """
    found = []
    fields: dict[str, Any] = {"height": size, "width": size, "num_inference_steps": evaluations}
    kinds = {
        "one length": lambda number: f"{PROMPT}, {chr(97 + number)}",
        "lengths differ": lambda number: " ".join([PROMPT] * (1 + number % 3)) + f", {chr(97 + number)}",
    }
    for count in (2, 4, 8):
        for kind, prompt in kinds.items():
            prompts, seeds = [prompt(number) for number in range(count)], list(range(count))
            single, batch = [], []
            for number in range(rounds + 1):
                start = time.perf_counter()
                alone = [
                    engine.generate(text, seed=seed, **fields).images[0]
                    for text, seed in zip(prompts, seeds, strict=True)
                ]
                middle = time.perf_counter()
                together = engine.generate(prompts, seed=seeds, **fields).images
                if number:  # the first captures graphs
                    single.append(middle - start)
                    batch.append(time.perf_counter() - middle)
            same = [bool((a == b).all()) for a, b in zip(alone, together, strict=True)]
            found.append(
                {
                    "size": size,
                    "images": count,
                    "prompts": kind,
                    "one_by_one_ms": round(1e3 * statistics.median(single), 2),
                    "batch_ms": round(1e3 * statistics.median(batch), 2),
                    "speedup": round(statistics.median(single) / statistics.median(batch), 3),
                    "same_bytes": f"{sum(same)} of {count}",
                }
            )
    return found


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle with the tiny VAE.")],
    backend: Annotated[str, typer.Option(help="Backend: onnxruntime or cuda.")] = "onnxruntime",
    size: Annotated[list[int] | None, typer.Option(help="Width and height; may be repeated. By default 256.")] = None,
    clients: Annotated[list[int] | None, typer.Option(help="Clients at once. By default 1, 4 and 16.")] = None,
    evaluations: Annotated[int, typer.Option(help="Function evaluations per image.")] = 8,
    requests: Annotated[int, typer.Option(help="Requests of a client per round.")] = 5,
    rounds: Annotated[int, typer.Option(help="Rounds, in which the systems alternate.")] = 5,
    slots: Annotated[int, typer.Option(help="Jobs that the service's worker has at once.")] = 2,
    batching: Annotated[bool, typer.Option(help="Measure batches instead, with the engine alone.")] = False,
    devices: Annotated[int | None, typer.Option(help="Measure a service with so many devices against one.")] = None,
    output: Annotated[Path | None, typer.Option("--json", help="File to write the figures to.")] = None,
) -> None:
    """Print latencies as JSON."""
    sizes = size or [256]
    found: dict[str, Any] = {"bundle": bundle.name, "backend": backend, "evaluations": evaluations, "slots": slots}
    if devices is not None:
        loads = [(side, evaluations, count, requests, rounds) for side in sizes for count in clients or (8 * devices,)]
        found["devices"] = [measure_devices(bundle, backend, slots, devices, load) for load in loads]
    elif batching:
        engine = zimage_rt.Engine.load(bundle, backend=backend, verify=False)
        found["batching"] = [row for side in sizes for row in measure_batching(engine, side, evaluations, rounds)]
    else:
        engine = zimage_rt.Engine.load(bundle, backend=backend, verify=False)
        found["latency"] = []
        with service(bundle, backend, slots) as url:
            for side in sizes:
                systems = {
                    "engine": in_process(engine, side, evaluations),
                    "service": over_http(url, side, evaluations),
                }
                streams = {f"stream, {count} previews": over_http(url, side, evaluations, count) for count in (0, 3)}
                for count in clients or CLIENTS:
                    row = measure(systems | streams if count == 1 else systems, count, requests, rounds)
                    added = row["service"]["p50_ms"] - row["engine"]["p50_ms"]
                    found["latency"].append({"size": side, "clients": count, "adds_ms": round(added, 2), **row})
                found.setdefault("cancelling", []).append({"size": side, **measure_cancelling(url, side, 4 * rounds)})
    text = json.dumps(found, indent=1)
    typer.echo(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
