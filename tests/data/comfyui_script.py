"""ComfyScript against a service: python comfyui_script.py URL; prints one line of JSON after what ComfyScript says.

It is a process of its own because ComfyScript changes asyncio for all of a process.
"""

from __future__ import annotations

import base64
import io
import json
import sys

from comfy_script.runtime import Workflow, load, queue

load(sys.argv[1])
queue.watch_display(False)

import comfy_script.runtime.nodes as nodes  # noqa: E402  (filled by `load`)

steps = []
with Workflow() as workflow:
    model = nodes.UNETLoader("zimage_nano_bf16.safetensors", "default")
    model = nodes.ModelSamplingAuraFlow(model, 3.0)
    clip = nodes.CLIPLoader("qwen3_nano.safetensors", "lumina2", "default")
    positive = nodes.CLIPTextEncode("a panda, green background, flat style", clip)
    latent = nodes.EmptySD3LatentImage(256, 256, 1)
    # Positional, in the order that /object_info has: a wrong order is another image.
    latent = nodes.KSampler(
        model, 42, 8, 1.0, "res_multistep", "simple", positive, nodes.ConditioningZeroOut(positive), latent, 1.0
    )
    image = nodes.VAEDecode(latent, nodes.VAELoader("ae_nano.safetensors"))
    saved = nodes.SaveImage(image, "script")
workflow.task.add_progress_callback(lambda progress: steps.append((progress.value, progress.max)))
result = workflow.task.wait_result(saved)
images = []
for each in result.wait():
    encoded = io.BytesIO()
    each.save(encoded, "PNG")
    images.append(base64.b64encode(encoded.getvalue()).decode())
print(json.dumps({"images": images, "steps": steps, "outputs": result._output}))
