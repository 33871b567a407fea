"""Compares LoRA, LoKr, LoHa and DoRA files with LyCORIS: weights and images on zimage-nano in fp32, without a GPU.

Not part of CI, because LyCORIS is used nowhere else:

    pip install --no-deps --target /tmp/lycoris lycoris-lora==3.4.0
    PYTHONPATH=.:/tmp/lycoris python tests/hardware/lora_libraries.py

LyCORIS adds each network to diffusers' transformer and saves it. The engine loads the file, and both draw from the same
latents. Prints the relative difference of the patches and the images' PSNR. The reference is the forward pass, which
training uses: `merge_to` of 3.4.0 multiplies a LoKr or LoHa by alpha / rank twice.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from diffusers import ZImagePipeline  # noqa: E402
from lora_images import image_of, ours  # noqa: E402
from lora_layouts import changes_of  # noqa: E402
from lycoris import LycorisNetwork, create_lycoris  # type: ignore[import-not-found]  # noqa: E402
from shared import BUNDLE, CHECKPOINT  # noqa: E402
from zimage_rt.benchmarks.fidelity import psnr  # noqa: E402

import zimage_rt  # noqa: E402
from zimage_rt.bundle.manifest import read_manifest  # noqa: E402
from zimage_rt.lora.file import read_lora  # noqa: E402
from zimage_rt.lora.match import match_layers  # noqa: E402

NETWORKS: dict[str, dict[str, Any]] = {
    "LoRA": {"algo": "lora", "linear_dim": 4, "linear_alpha": 2.0},
    "LoKr, whole": {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1.0, "factor": 8},
    "LoKr, thin": {"algo": "lokr", "linear_dim": 4, "linear_alpha": 2.0, "factor": 8},
    "LoKr, both thin": {"algo": "lokr", "linear_dim": 2, "linear_alpha": 2.0, "factor": -1, "decompose_both": True},
    "LoHa": {"algo": "loha", "linear_dim": 4, "linear_alpha": 2.0},
    "LoHa, large": {"algo": "loha", "linear_dim": 16, "linear_alpha": 4.0},
    "DoRA by outputs": {"algo": "lora", "linear_dim": 4, "linear_alpha": 2.0, "dora_wd": True, "wd_on_output": True},
    "DoRA by inputs": {"algo": "lora", "linear_dim": 4, "linear_alpha": 2.0, "dora_wd": True, "wd_on_output": False},
    "DoRA of LoKr": {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1.0, "factor": 8, "dora_wd": True},
}


def make_network(transformer: Any, settings: dict[str, Any]) -> Any:
    LycorisNetwork.apply_preset({"target_name": [".*attention.to_.*", ".*feed_forward.w2", ".*adaLN_modulation.0"]})
    network = create_lycoris(transformer, 1.0, **settings)
    network.apply_to()
    generator = torch.Generator().manual_seed(1)
    for name, parameter in network.named_parameters():
        if name.endswith("dora_scale"):
            parameter.data *= 1 + 0.1 * torch.randn(parameter.shape, generator=generator)
        else:
            parameter.data = 0.15 * torch.randn(parameter.shape, generator=generator)
    network.eval()
    return network


@torch.no_grad()
def weight_of(transformer: Any, name: str) -> torch.Tensor:
    """Effective weight of a layer, float64 `[out, in]`, from its product with the identity."""
    layer = transformer.get_submodule(name)
    zeros = torch.zeros(1, layer.in_features)
    return (layer(torch.eye(layer.in_features)).double() - layer(zeros).double()).T


def main() -> int:
    """Compare every network; exit status 1 if an image has less than 45 dB."""
    engine, manifest = zimage_rt.Engine.load(BUNDLE), read_manifest(BUNDLE)
    plain = ours(engine)
    worst = np.inf
    for title, settings in NETWORKS.items():
        pipeline = ZImagePipeline.from_pretrained(str(CHECKPOINT), dtype=torch.float32)
        pipeline.set_progress_bar_config(disable=True)
        before = {name: value.clone() for name, value in pipeline.transformer.state_dict().items()}
        network = make_network(pipeline.transformer, settings)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.safetensors"
            network.save_weights(str(path), torch.float32, {})
            matrices, _ = changes_of(match_layers(read_lora(path), manifest, BUNDLE), manifest, BUNDLE)
            engine.load_lora(path, name="network")
        differences = [
            np.linalg.norm(delta - (weight_of(pipeline.transformer, name) - before[f"{name}.weight"]).numpy())
            / np.linalg.norm(delta)
            for name, delta in matrices.items()
        ]
        changed = len(network.loras)
        image = ours(engine)
        engine.unload_lora("network")
        close = psnr(image, image_of(pipeline))
        worst = min(worst, close)
        print(
            f"{title:18} {len(matrices)} of {changed} matrices, differing by {max(differences):.1e} at most; "
            f"image {close:.1f} dB (from the plain one: {psnr(image, plain):.1f} dB)",
            flush=True,
        )
    return 0 if worst >= 45 else 1


if __name__ == "__main__":
    sys.exit(main())
