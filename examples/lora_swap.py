"""A style LoRA on a live engine: loaded, mixed at half weight, switched off and unloaded.

    python examples/lora_swap.py engines/nano checkpoints/zimage-nano-cyanotype/cyanotype.safetensors

`load_lora`, `set_loras` and `unload_lora` wait for running requests and hold new ones, so they may be called while
other threads generate. Every change makes the weights anew from the bundle's file (0.7 s for the 6 B model on one H100,
benchmarks/README.md), so a service should group requests by LoRA.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

import zimage_rt


def main() -> None:
    """Draw the same prompt and seed without the LoRA, with it at 1 and 0.5, and without it again."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle", type=Path, help="folder of a bundle")
    parser.add_argument("lora", type=Path, help="LoRA file (*.safetensors)")
    parser.add_argument(
        "--backend", default="onnxruntime", help="onnxruntime (default), cuda, tensorrt or tensorrt_rtx"
    )
    parser.add_argument("--prompt", default="a panda, green background", help="what to draw")
    parser.add_argument("--seed", type=int, default=5, help="seed of every image (default 5)")
    parser.add_argument("--out", type=Path, default=Path("out/loras"), help="folder for the images (default out/loras)")
    arguments = parser.parse_args()

    engine = zimage_rt.Engine.load(arguments.bundle, backend=arguments.backend)

    def draw(name: str) -> np.ndarray:
        result = engine.generate(arguments.prompt, seed=arguments.seed)
        (path,) = result.save(arguments.out / f"{name}.png")
        print(f"{path}  {engine.loras or 'no LoRA'}")
        return result.images[0]

    plain = draw("plain")
    style = engine.load_lora(arguments.lora)  # weight 1
    full = draw("full")
    engine.set_loras({style: 0.5})
    half = draw("half")
    engine.set_loras({})  # off, but still loaded
    off = draw("off")
    engine.unload_lora(style)

    change = [float(np.abs(image.astype(int) - plain).mean()) for image in (half, full, off)]
    print("mean change in grey levels: half {:.1f}, full {:.1f}, off {:.1f}".format(*change))
    if not np.array_equal(off, plain):
        raise SystemExit("the weights are not the bundle's own after the LoRA was switched off")


if __name__ == "__main__":
    main()
