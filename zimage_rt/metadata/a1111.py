"""The text of parameters that AUTOMATIC1111 writes into images, which Civitai and many viewers read."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ..sampling.samplers import SAMPLERS
from ..sampling.schedules import SCHEDULES
from .record import ImageRecord


def parameters_text(record: ImageRecord) -> str:
    """The `parameters` of a record in AUTOMATIC1111's format."""
    request = record.request
    lines = [" ".join([request["prompt"], *(f"<lora:{lora['name']}:{lora['weight']:g}>" for lora in record.loras)])]
    if request["negative_prompt"]:
        lines.append(f"Negative prompt: {request['negative_prompt']}")
    settings: dict[str, Any] = {
        "Steps": request["num_inference_steps"],
        "Sampler": SAMPLERS[request["sampler"]].label,
        "Schedule type": SCHEDULES[request["schedule"]].label,
        # AUTOMATIC1111's is negative + scale * (positive - negative), 1 for none; diffusers' and ours is 0 for none.
        "CFG scale": f"{1 + request['guidance_scale']:g}",
        "Seed": request["seed"],
        "Size": f"{request['width']}x{request['height']}",
        "Model hash": record.bundle_id,
        "Model": record.bundle_name,
    }
    again = request.get("second_pass")
    if request["image"] is not None:
        settings["Denoising strength"] = _strength(request)
    elif again is not None:
        settings["Denoising strength"] = _strength(again)
    if again is not None:
        settings |= {"Hires upscale": again["scale"], "Hires upscaler": again["method"]}
    settings["Version"] = f"zimage_rt {record.version}"
    lines.append(", ".join(f"{name}: {value}" for name, value in settings.items()))
    return "\n".join(lines)


def _strength(part: Mapping[str, Any]) -> Any:
    """The strength of a request or its second pass; `denoise` overrides `strength`."""
    return part["strength"] if part.get("denoise") is None else part["denoise"]
