"""Whole requests against what ComfyUI's graphs gave (`tests/data/comfyui_workflows.npz`, its `source`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import zimage_rt

# Their cfg is our guidance_scale + 1.
GRAPHS: dict[str, dict[str, Any]] = {
    "01_template_turbo": {"prompt": "a panda, green background, flat style", "seed": 42, "sampler": "res_multistep"},
    "03_dpmpp_2m_karras": {
        "prompt": "a rocket above an elephant, pink background, flat style",
        "seed": 123,
        "sampler": "dpmpp_2m",
        "schedule": "karras",
    },
    "05_img2img_denoise_05": {"prompt": "a tiger, yellow background, classic style", "seed": 5, "denoise": 0.5},
    "07_batch_3": {
        "prompt": 'a sign that says "SALE", orange background',
        "seed": 2024,
        "num_images": 3,
        "sampler": "res_multistep",
        "batch_noise": "comfyui",
    },
    "15_custom_advanced": {
        "prompt": "a strawberry, flat style, yellow background",
        "negative_prompt": "classic style",
        "guidance_scale": 0.5,
        "seed": 808,
        "sampler": "euler_ancestral",
        "schedule": "beta",
    },
}


@pytest.mark.parametrize("graph", GRAPHS)
def test_a_graph_of_comfyui_is_drawn(engine: zimage_rt.Engine, graph: str) -> None:
    with np.load(Path(__file__).parents[1] / "data" / "comfyui_workflows.npz") as file:
        expected, begin = file[graph], file.get(f"{graph}_in")
    fields: dict[str, Any] = {"schedule": "simple", "num_inference_steps": 8, "height": 256, "width": 256}
    result = engine.generate(**{**fields, **GRAPHS[graph], "image_latents": begin})
    assert np.abs(result.latents - expected).max() < 1e-4  # measured: 1.4e-5


def test_the_rest_of_a_batch_has_other_noise_alone(engine: zimage_rt.Engine) -> None:
    """What `batch_noise` is for: image 0 is a single image's, image 1 is nobody's alone."""
    fields: dict[str, Any] = {"height": 64, "width": 64, "num_inference_steps": 2, "sampler": "euler_ancestral"}
    joint = engine.generate("a cat", seed=3, num_images=2, batch_noise="comfyui", **fields)
    assert joint.seeds == (3, 3)
    separate = engine.generate("a cat", seed=3, num_images=2, **fields)
    assert np.abs(joint.latents[1] - separate.latents[1]).max() > 0.1
    record = joint.records[1]
    assert record.batch is not None
    again = engine.run(record.to_request(vae="tiny"))
    assert again.latents.shape[0] == 2  # a part of its batch also when something is asked for otherwise
    assert again.images[record.batch["index"]].tobytes() == joint.images[1].tobytes()
