"""Compares the images of a bundle's plans with ONNX Runtime on the CPU, and times them.

    python tests/hardware/tensorrt_parity.py --backend tensorrt_rtx --bundle nano-fp16 --reference engines/nano

Prints tables in Markdown and, with --json, writes the figures. Exit status 1 if images differ.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from zimage_rt.benchmarks.fidelity import psnr
from zimage_rt.benchmarks.quality.prompts import read_prompts

import zimage_rt
from zimage_rt.backends.registry import probe_backends
from zimage_rt.errors import RequestError

# tests/backends/test_cuda_engine.py asks the same of our own programs; ONNX Runtime's fp16 against its fp32 gives more.
MEAN_DB = 38.0

SETTINGS: dict[str, dict[str, Any]] = {
    "256², tiny VAE": {},
    "256², full VAE": {"vae": "full"},
    "256², guidance 2": {"guidance_scale": 2.0, "negative_prompt": "text, blue background"},
    "512×768": {"height": 512, "width": 768, "num_inference_steps": 4},
}
LATENCIES = (256, 512, 1024)


def parity(engine: zimage_rt.Engine, reference: zimage_rt.Engine, count: int) -> list[dict[str, Any]]:
    """PSNR of every setting, in dB over the prompts; large images on fewer, for the CPU draws them too."""
    rows = []
    for name, setting in SETTINGS.items():
        prompts = read_prompts(count if "height" not in setting else max(count // 10, 1))
        scores = []
        for prompt in prompts:
            ours, theirs = (
                system.generate(prompt["caption"], seed=prompt["seed"], **setting).images[0]
                for system in (engine, reference)
            )
            scores.append(psnr(ours, theirs))
        rows.append({"setting": name, "prompts": len(prompts), "mean": np.mean(scores), "worst": np.min(scores)})
    return rows


def latency(engine: zimage_rt.Engine, repeats: int) -> list[dict[str, Any]]:
    """Median milliseconds of an image (8 evaluations, tiny VAE, a prompt seen before), by size."""
    rows = []
    for size in LATENCIES:
        options = {"height": size, "width": size, "num_inference_steps": 8}
        timings = [engine.generate("a panda", seed=seed, **options).timings for seed in range(repeats + 3)][3:]
        stages = ("denoise", "decode", "total")
        rows.append({"size": size} | {key: 1e3 * statistics.median(t[key] for t in timings) for key in stages})
    return rows


def check_refusal(engine: zimage_rt.Engine) -> bool:
    """Whether ids longer than every profile are refused, and the engine goes on."""
    most = engine.manifest.shapes.prompt_tokens.max
    try:
        engine.pipeline.context(np.zeros((1, most + 1), np.int64))
    except RequestError:
        return engine.generate("a panda", seed=1).images.std() > 1
    return False


def load(bundle: Path, backend: str, options: dict[str, Any]) -> tuple[zimage_rt.Engine, float]:
    """An engine, and the seconds from nothing to its first image."""
    start = time.perf_counter()
    engine = zimage_rt.Engine.load(bundle, backend=backend, backend_options=options)
    engine.generate("a panda", seed=1)
    return engine, time.perf_counter() - start


def main() -> int:
    """Run the command; return its exit status."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", required=True)
    parser.add_argument("--bundle", type=Path, required=True)
    parser.add_argument("--reference", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=20)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    probe = next(probe for probe in probe_backends() if probe.name.startswith(arguments.backend))
    if probe.problem is not None:
        print(f"{arguments.backend} cannot run here: {probe.problem}")
        return 1
    graphs = {"on": {"cuda_graph": True}, "off": {"cuda_graph": False}}
    if arguments.backend == "onnxruntime":  # to try this script where there is no GPU
        graphs = {"none": {}}
    reference = zimage_rt.Engine.load(arguments.reference)
    report: dict[str, Any] = {"versions": dict(probe.versions), "devices": [device.name for device in probe.devices]}
    failed = []
    print(f"{arguments.backend} {report['versions']} on {', '.join(report['devices']) or 'the CPU'}")
    for name, options in graphs.items():
        engine, first = load(arguments.bundle, arguments.backend, options)
        engine, second = load(arguments.bundle, arguments.backend, options)
        rows = parity(engine, reference, arguments.prompts)
        times = latency(engine, arguments.repeats)
        refused = check_refusal(engine) if arguments.backend != "onnxruntime" else True
        report[f"cuda graph {name}"] = {"first": first, "second": second, "parity": rows, "latency": times}
        print(f"\nCUDA graphs {name}; first image after {first:.1f} s, in the next start {second:.1f} s\n")
        print("| setting | prompts | mean dB | worst dB |\n| --- | --- | --- | --- |")
        for row in rows:
            print(f"| {row['setting']} | {row['prompts']} | {row['mean']:.1f} | {row['worst']:.1f} |")
            if not row["mean"] >= MEAN_DB:  # NaN fails too
                failed.append(f"CUDA graphs {name}, {row['setting']}: {row['mean']:.1f} dB, expected {MEAN_DB:g}")
        print("\n| size | denoise ms | decode ms | total ms |\n| --- | --- | --- | --- |")
        for row in times:
            print(f"| {row['size']}² | {row['denoise']:.2f} | {row['decode']:.2f} | {row['total']:.2f} |")
        if not refused:
            failed.append("a prompt outside every profile was not refused")
    if arguments.json:
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
    for line in failed:
        print(f"FAILED {line}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
