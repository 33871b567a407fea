"""Writes a bundle of random weights without graphs, for the `cuda` backend, at the speed of the disk.

    python -m zimage_rt.benchmarks.random_bundle /tmp/random-bf16 --precision bf16

Modules, layouts and weight files are those of `zimage-export` for the same checkpoint; no graph is traced and parity is
not measured. Several threads make and write the tensors, on the GPU if there is one, and hash the files, so that 20 GB
take seconds instead of minutes.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from zimage_rt.benchmarks.random_checkpoint import RULES, Z_IMAGE, Config, random_checkpoint, read_configs
from zimage_rt.export import weights
from zimage_rt.export.bundle import pipeline_spec
from zimage_rt.export.checkpoint import Checkpoint, Component, open_checkpoint
from zimage_rt.export.modeling.layers import Source, weight_sources
from zimage_rt.export.plan import ModulePlan, plan_modules
from zimage_rt.export.precision import PRECISIONS
from zimage_rt.export.recipe import ExportRecipe

import zimage_rt
from zimage_rt.bundle.manifest import Manifest, ModuleSpec, write_manifest
from zimage_rt.bundle.verify import hash_file

NANO = Path("checkpoints/zimage-nano")
SIZES = ("full", "nano")
THREADS = min(16, os.cpu_count() or 1)


def default_device() -> str:
    """The GPU if there is one, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def configs_of(size: str, nano: Path = NANO) -> dict[str, Config]:
    """Configs of the components: Z-Image's, or those of the small checkpoint."""
    return dict(Z_IMAGE) if size == "full" else read_configs(nano)


def shortened(
    configs: Mapping[str, Config], layers: int, refiner_layers: int, encoder_layers: int
) -> dict[str, Config]:
    """The same widths with fewer layers; `encoder_layers` does not count the last layer, which never runs."""
    encoder: dict[str, Any] = {**configs["text_encoder"], "num_hidden_layers": encoder_layers + 1}
    if "layer_types" in encoder:
        encoder["layer_types"] = encoder["layer_types"][:1] * (encoder_layers + 1)
    transformer = {**configs["transformer"], "n_layers": layers, "n_refiner_layers": refiner_layers}
    return {**configs, "text_encoder": encoder, "transformer": transformer}


def _store(path: Path, component: Component, stored: list[tuple[Source, weights.StoredTensor]], device: str) -> None:
    """Makes the stored tensors of the same sources and writes each at its offset."""
    first = stored[0][0]
    parts = [component.read(name, shape).to(device) for name, shape in zip(first.names, first.shapes, strict=True)]
    handle = os.open(path, os.O_WRONLY)
    try:
        for source, place in stored:
            tensor = source.assemble(parts).to(place.dtype).contiguous().cpu()
            data = tensor.reshape(-1).view(torch.uint8).numpy().data
            written = 0
            while written < len(data):  # one call writes 2 GB at most
                written += os.pwrite(handle, data[written:], place.offset + written)
    finally:
        os.close(handle)


def _write_weights(plan: ModulePlan, folder: Path, device: str, pool: ThreadPoolExecutor) -> list[Future[None]]:
    """Starts to write a module's weights: as `weights.write`, but in any order and without fsync."""
    module = plan.meta_module()
    header, stored = weights.layout(module)
    path = folder / f"{plan.name}.safetensors"
    with path.open("wb") as file:
        file.write(header)
        file.truncate(max(place.offset + place.size for place in stored.values()))
    # A matrix in 8 bits and its scales have the same sources, which are made once.
    groups: dict[object, list[tuple[Source, weights.StoredTensor]]] = {}
    for name, _, source in weight_sources(module):
        groups.setdefault(source.names or name, []).append((source, stored[name]))
    return [pool.submit(_store, path, plan.component, group, device) for group in groups.values()]


def write_random_bundle(
    checkpoint: Checkpoint,
    out: Path,
    precision: str = "bf16",
    *,
    vaes: tuple[str, ...] = ("tiny",),
    device: str | None = None,
    threads: int = THREADS,
) -> Manifest:
    """Writes a bundle without graphs.

    Args:
        checkpoint: from `random_checkpoint`, or a real one.
        out: the folder; an existing one is replaced.
        precision: as in a recipe.
        vaes: VAEs to include.
        device: device that makes the tensors; the GPU if there is one.
        threads: number of tensors in memory at once; each may take a gigabyte.
    """
    device = device or default_device()
    if out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True)
    recipe = ExportRecipe(checkpoint.path, out, out.name, precision, vae=vaes, parity=False)
    plans = plan_modules(checkpoint, PRECISIONS[precision], vaes)
    with ThreadPoolExecutor(threads) as pool:
        # All files are started before the first wait, so that the largest one does not delay the others.
        for future in [future for plan in plans for future in _write_weights(plan, out, device, pool)]:
            future.result()
        shutil.copyfile(checkpoint.tokenizer / "tokenizer.json", out / "tokenizer.json")
        names = sorted(path.name for path in out.iterdir())
        files = dict(zip(names, pool.map(hash_file, [out / name for name in names]), strict=True))
    manifest = Manifest(
        name=recipe.name,
        precision=precision,
        producer={"zimage-rt": zimage_rt.__version__, "torch": torch.__version__},
        source={"format": checkpoint.format, "files": {}},
        pipeline=pipeline_spec(checkpoint, recipe),
        shapes=recipe.shapes,
        tokenizer="tokenizer.json",
        modules={
            plan.name: ModuleSpec(
                inputs=plan.inputs,
                outputs=plan.outputs,
                precision=plan.precision.name,
                graph=None,
                weights=f"{plan.name}.safetensors",
                config=dict(plan.config),
                linears=weights.linear_places(plan.meta_module()),
            )
            for plan in plans
        },
        files=files,
    )
    write_manifest(manifest, out)
    return manifest


def main(
    out: Annotated[Path, typer.Argument(help="Folder to write the bundle to; an existing one is replaced.")],
    precision: Annotated[str, typer.Option(help=f"{', '.join(PRECISIONS)}.")] = "bf16",
    size: Annotated[str, typer.Option(help=f"Size of the model: {' or '.join(SIZES)}.")] = "full",
    rule: Annotated[
        str, typer.Option(help=f"Scale of the weights: {' or '.join(RULES)} (as large as the real ones).")
    ] = "plain",
    seed: Annotated[int, typer.Option(help="Seed of the random numbers.")] = 0,
    device: Annotated[str, typer.Option(help="Device that makes the tensors.")] = default_device(),
    threads: Annotated[int, typer.Option(help="Tensors in memory at once.")] = THREADS,
    nano: Annotated[Path, typer.Option(help="The small checkpoint, for the tokenizer and the sizes of nano.")] = NANO,
    checkpoint: Annotated[
        Path | None, typer.Option(help="Weights of this checkpoint in place of random ones; --size, --rule do nothing.")
    ] = None,
) -> None:
    """Write a bundle of random weights, without graphs."""
    for value, known, option in (
        (precision, PRECISIONS, "--precision"),
        (size, SIZES, "--size"),
        (rule, RULES, "--rule"),
    ):
        if value not in known:
            raise typer.BadParameter(f"expected one of {', '.join(known)}, got {value!r}", param_hint=option)
    start = time.perf_counter()
    if checkpoint is not None:
        source = open_checkpoint(checkpoint)
    else:
        configs = configs_of(size, nano)
        source = random_checkpoint(nano / "tokenizer", configs, seed=seed, rule=RULES[rule], device=device)
    manifest = write_random_bundle(source, out, precision, device=device, threads=threads)
    size_gb = sum(entry.size for entry in manifest.files.values()) / 1e9
    typer.echo(f"{out}: {size_gb:.2f} GB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    typer.run(main)
