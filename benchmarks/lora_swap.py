"""Times changes of LoRAs on a live engine: load, switch on, swap, switch off.

    python -m zimage_rt.benchmarks.lora_swap engines/nano
    python -m zimage_rt.benchmarks.lora_swap /tmp/random-bf16 --backend cuda --rank 32

The LoRAs are random and patch every linear layer of the transformer and the context refiner, more than most LoRAs do.
Requests wait during a change, so these times are the pauses that users see.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer
from safetensors.torch import save_file

import zimage_rt
from zimage_rt.bundle.manifest import Manifest

MODULES = ("context_refiner", "transformer")


def write_random_lora(manifest: Manifest, path: Path, rank: int, seed: int) -> Path:
    """Writes a LoRA for every linear layer of `MODULES`, in fp16 like most files; returns the path."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for module in MODULES:
        for name, place in manifest.module(module).linears.items():
            down = torch.randn(rank, place.in_features, generator=generator)
            up = torch.randn(place.columns, rank, generator=generator) * (0.01 / place.in_features**0.5)
            tensors[f"transformer.{name}.lora_A.weight"] = down.half()
            tensors[f"transformer.{name}.lora_B.weight"] = up.half()
    save_file(tensors, path)
    return path


def measure(engine: zimage_rt.Engine, rank: int, repeats: int) -> dict[str, float]:
    """Median seconds of each change; every repeat starts and ends with the bundle's own weights."""
    times: dict[str, list[float]] = {}

    def timed(name: str, function: Callable[[], object]) -> None:
        start = time.perf_counter()
        function()
        times.setdefault(name, []).append(time.perf_counter() - start)

    with tempfile.TemporaryDirectory() as folder:
        one, other = (write_random_lora(engine.manifest, Path(folder) / f"{i}.safetensors", rank, i) for i in (1, 2))
        for _ in range(repeats):
            timed("read one, switched off", lambda: engine.load_lora(one, 0.0, "one"))
            engine.load_lora(other, 0.0, "other")
            timed("switch the first one on", lambda: engine.set_loras({"one": 1.0}))
            timed("swap it for another", lambda: engine.set_loras({"other": 1.0}))
            timed("both at once", lambda: engine.set_loras({"one": 0.5, "other": 0.5}))
            timed("switch all off", lambda: engine.set_loras({}))
            for name in ("one", "other"):
                engine.unload_lora(name)
    return {name: statistics.median(values) for name, values in times.items()}


def main(
    bundle: Annotated[Path, typer.Argument(help="Bundle whose manifest lists its linear layers.")],
    backend: Annotated[str, typer.Option(help="Backend: onnxruntime or cuda.")] = "onnxruntime",
    rank: Annotated[int, typer.Option(help="Rank of the random LoRAs.")] = 16,
    repeats: Annotated[int, typer.Option(help="Repeats; medians are printed.")] = 5,
    output: Annotated[Path | None, typer.Option("--json", help="File to write the figures to as JSON.")] = None,
) -> None:
    """Print the seconds of each change."""
    engine = zimage_rt.Engine.load(bundle, backend=backend, verify=False)
    medians = measure(engine, rank, repeats)
    layers = sum(len(engine.manifest.module(module).linears) for module in MODULES)
    size = sum(engine.manifest.files[engine.manifest.module(module).weights].size for module in MODULES)
    typer.echo(f"{bundle}, {backend}, rank {rank}: {layers} layers in {size / 1e6:.0f} MB of weights")
    for name, seconds in medians.items():
        typer.echo(f"  {name}: {seconds:.3f} s")
    if output is not None:
        figures = {"backend": backend, "rank": rank, "layers": layers, "weight_bytes": size, "seconds": medians}
        output.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
