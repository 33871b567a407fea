"""Measures an export: seconds and peak memory per step and module.

    python -m zimage_rt.benchmarks.export_cost /tmp/z-image-random /tmp/bundle --precision bf16
    python -m zimage_rt.benchmarks.export_cost --random checkpoints/zimage-nano /tmp/bundle --no-parity \
        --recipe engines/z-image-rtx-fp16.toml

Runs the code of `zimage-export` and reads the process's memory from /proc twenty times a second. *Anonymous* memory is
allocated by the export. *Mapped* memory is pages of the checkpoint and the bundle, which the kernel may drop at any
time: a machine needs the first, and is faster with the second.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import threading
import time
from pathlib import Path
from typing import Annotated

import typer
from zimage_rt.benchmarks.random_checkpoint import RULES, Z_IMAGE, random_checkpoint
from zimage_rt.export.bundle import export
from zimage_rt.export.recipe import ExportRecipe, read_recipe

INTERVAL = 0.05  # seconds between two samples


@dataclasses.dataclass
class Cost:
    """Seconds, and peaks of memory in bytes."""

    seconds: float = 0.0
    anonymous: int = 0
    mapped: int = 0


def memory() -> tuple[int, int]:
    """Anonymous and file-mapped bytes of this process now, from /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    values = {key: value for key, _, value in (line.partition(":") for line in lines)}
    anonymous, mapped = (1024 * int(values[key].split()[0]) for key in ("RssAnon", "RssFile"))
    return anonymous, mapped


class Meter:
    """Assigns time and peak memory to the step that the export reported last."""

    def __init__(self) -> None:
        self.costs: dict[tuple[str, str], Cost] = {}
        self._current = Cost()
        self._since = time.perf_counter()
        self._done = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def step(self, step: str, module: str, done: int, total: int) -> None:
        """`zimage_rt.export.bundle.Progress`."""
        module = "bundle" if step == "hash" else module  # of this step it is a file's name
        with self._lock:
            now = time.perf_counter()
            self._current.seconds += now - self._since
            self._since = now
            self._current = self.costs.setdefault((module, step), Cost())

    def stop(self) -> None:
        """Assign the last step's time and end the sampling thread."""
        self.step("end", "bundle", 0, 0)
        del self.costs["bundle", "end"]
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(INTERVAL):
            anonymous, mapped = memory()
            with self._lock:
                self._current.anonymous = max(self._current.anonymous, anonymous)
                self._current.mapped = max(self._current.mapped, mapped)


def main(
    checkpoint: Annotated[
        Path, typer.Argument(help="Checkpoint: a diffusers folder, or a single .safetensors or .gguf file.")
    ],
    out: Annotated[Path, typer.Argument(help="Folder to write the bundle to.")],
    precision: Annotated[str | None, typer.Option(help="fp32, fp16 or bf16. By default the recipe's, or fp32.")] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="Recipe with all other settings; CHECKPOINT and OUT override its paths.")
    ] = None,
    random: Annotated[
        bool,
        typer.Option(
            "--random", help="Export random weights of the 6 B model's size; only the tokenizer of CHECKPOINT is read."
        ),
    ] = False,
    parity: Annotated[bool, typer.Option(help="Measure parity.")] = True,
    to_json: Annotated[Path | None, typer.Option("--json", help="File to write the figures to as JSON.")] = None,
) -> None:
    """Export a checkpoint and print the seconds and peak memory of each step."""
    start = time.perf_counter()
    meter = Meter()
    chosen = ExportRecipe(checkpoint, out, out.name) if recipe is None else read_recipe(recipe)
    chosen = dataclasses.replace(
        chosen, checkpoint=checkpoint, out=out, precision=precision or chosen.precision, parity=parity
    )
    tensors = random_checkpoint(checkpoint / "tokenizer", Z_IMAGE, rule=RULES["loud"]) if random else None
    manifest = export(chosen, meter.step, tensors)
    meter.stop()
    seconds = time.perf_counter() - start
    for (module, step), cost in meter.costs.items():
        memory_text = f"anonymous {cost.anonymous / 1e9:5.2f} GB  mapped {cost.mapped / 1e9:5.2f} GB"
        typer.echo(f"{module:<18} {step:<9} {cost.seconds:7.1f} s  {memory_text}")
    for name, spec in manifest.modules.items():
        if spec.parity is not None:
            error = max(case.relative_error for case in spec.parity.cases)
            typer.echo(f"{name:<18} {spec.precision}  relative error {error:.1e}  ({spec.parity.reference})")
        for engine in spec.engines:
            typer.echo(
                f"{engine.file:<22} {manifest.files[engine.file].size / 1e9:6.2f} GB  "
                f"activations {engine.activation_bytes / 1e9:5.2f} GB"
            )
    size = sum(entry.size for entry in manifest.files.values())
    anonymous = max(cost.anonymous for cost in meter.costs.values())
    resident = 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    typer.echo(
        f"{seconds:.0f} s, {size / 1e9:.1f} GB; peak anonymous {anonymous / 1e9:.2f} GB, "
        f"resident with mapped files {resident / 1e9:.2f} GB"
    )
    report = {
        "precision": chosen.precision,
        "bytes": size,
        "seconds": seconds,
        "peak_anonymous": anonymous,
        "peak_resident": resident,
        "steps": [
            {"module": module, "step": step, **dataclasses.asdict(cost)} for (module, step), cost in meter.costs.items()
        ],
    }
    if to_json:
        to_json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
