"""Measures a ComfyUI workflow beside `Engine.generate` of the same request: in one process, and over the protocol.

    python -m zimage_rt.benchmarks.workflow engines/nano --size 256 --evaluations 8
    python -m zimage_rt.benchmarks.workflow /tmp/random-bf16 --backend cuda --size 1024 --evaluations 8

All systems alternate in one run, each image with another seed. `engine` draws an image; `workflow` runs the graph of
the Z-Image Turbo template, to the image that SaveImage gets. `engine_png` also encodes the PNG; `protocol` is from
`POST /prompt` until the PNG's bytes are there: a client with a websocket, and `/view`. Before each is a pause: a GPU at
its power limit runs faster after one, and encoding a PNG is one. The device must hold the model twice.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

import zimage_rt

from .service import PROMPT, service

WARM_UP = 2
PAUSE_SECONDS = 0.3


def graph(size: int, steps: int, seed: int, prompt: str = PROMPT) -> dict[str, Any]:
    """The Turbo template's graph in API format."""
    return {
        "1": _node("UNETLoader", unet_name="z_image_turbo_bf16.safetensors", weight_dtype="default"),
        "2": _node("CLIPLoader", clip_name="qwen_3_4b.safetensors", type="lumina2", device="default"),
        "3": _node("VAELoader", vae_name="ae.safetensors"),
        "4": _node("ModelSamplingAuraFlow", model=["1", 0], shift=3.0),
        "5": _node("CLIPTextEncode", clip=["2", 0], text=prompt),
        "6": _node("ConditioningZeroOut", conditioning=["5", 0]),
        "7": _node("EmptySD3LatentImage", width=size, height=size, batch_size=1),
        "8": _node(
            "KSampler", model=["4", 0], positive=["5", 0], negative=["6", 0], latent_image=["7", 0], seed=seed,
            steps=steps, cfg=1.0, sampler_name="res_multistep", scheduler="simple", denoise=1.0,
        ),
        "9": _node("VAEDecode", samples=["8", 0], vae=["3", 0]),
        "10": _node("SaveImage", images=["9", 0], filename_prefix="bench"),
    }  # fmt: skip


def _node(kind: str, **inputs: Any) -> dict[str, Any]:
    return {"class_type": kind, "inputs": inputs}


class Client:
    """A client of ComfyUI's protocol with a websocket."""

    def __init__(self, url: str, client_id: str, socket: Any) -> None:
        import httpx

        self._id, self._socket = client_id, socket
        self._http = httpx.Client(base_url=url, timeout=600)

    def draw(self, workflow: dict[str, Any]) -> bytes:
        """The bytes of a workflow's image."""
        answer = self._http.post("/prompt", json={"prompt": workflow, "client_id": self._id})
        answer.raise_for_status()
        found: dict[str, str] | None = None
        while True:
            message = json.loads(self._socket.recv())
            if message["type"] == "executed":
                found = message["data"]["output"]["images"][0]
                break
            if message["type"] == "execution_error":
                raise RuntimeError(message["data"]["exception_message"])
        return self._http.get("/view", params=found).raise_for_status().content


def main(
    bundle: Path,
    backend: Annotated[str, typer.Option()] = "onnxruntime",
    size: Annotated[int, typer.Option()] = 256,
    evaluations: Annotated[int, typer.Option()] = 8,
    rounds: Annotated[int, typer.Option()] = 20,
    output: Annotated[Path | None, typer.Option("--json")] = None,
) -> None:
    """Print the medians as JSON."""
    from websockets.sync.client import connect

    from ..comfyui.execute import Cache, execute
    from ..comfyui.files import FolderFiles
    from ..comfyui.plan import plan
    from ..comfyui.run import Run
    from ..comfyui.workflow_file import parse_workflow
    from ..image.formats import encode_image

    engine = zimage_rt.Engine.load(bundle, backend=backend)
    files = FolderFiles({}, "model", None, ())
    cache: Cache = {}

    def draw(seed: int) -> Any:
        vae = "full" if "full_vae_decoder" in engine.manifest.modules else "tiny"
        sampler = {"sampler": "res_multistep", "schedule": "simple", "guidance_scale": 0.0}
        sides = {"height": size, "width": size}
        request: dict[str, Any] = {**sides, **sampler, "num_inference_steps": evaluations, "vae": vae, "seed": seed}
        return engine.generate(PROMPT, **request).images[0]

    def run_workflow(seed: int) -> Any:
        run = Run(lambda name: engine, files)
        execute(plan(parse_workflow(graph(size, evaluations, seed)), files), run, cache)
        return run.made[0].pixels

    with contextlib.ExitStack() as stack:
        url, client_id = stack.enter_context(service(bundle, backend, slots=1)), str(uuid.uuid4())
        address = f"ws{url.removeprefix('http')}/ws?clientId={client_id}"
        client = Client(url, client_id, stack.enter_context(connect(address, max_size=None)))
        systems: dict[str, Callable[[int], Any]] = {
            "engine": draw,
            "workflow": run_workflow,
            "engine_png": lambda seed: encode_image(draw(seed), ".png", {}, ""),
            "protocol": lambda seed: client.draw(graph(size, evaluations, seed)),
        }
        seconds: dict[str, list[float]] = {name: [] for name in systems}
        for number in range(WARM_UP + rounds):
            for name, system in systems.items():
                time.sleep(PAUSE_SECONDS)
                start = time.perf_counter()
                system(number)
                if number >= WARM_UP:
                    seconds[name].append(time.perf_counter() - start)
    medians = {name: round(1000 * statistics.median(each), 3) for name, each in seconds.items()}
    differences = {
        "workflow_over_engine": round(medians["workflow"] / medians["engine"], 4),
        "protocol_less_engine_png_ms": round(medians["protocol"] - medians["engine_png"], 3),
    }
    found = {"bundle": bundle.name, "backend": backend, "size": size, "evaluations": evaluations, "rounds": rounds}
    text = json.dumps({**found, "median_ms": medians, **differences}, indent=1)
    print(text)
    if output is not None:
        output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
