"""Checks of outputs for NaN and infinity, with the possible causes and remedies."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from .errors import NotFinite


def check_finite(values: np.ndarray, module: str) -> None:
    """Raise NotFinite if a module's output has NaN or infinity, which would become a black image."""
    # Both carry NaN on, and take no memory for a mask of everything.
    if values.size and not (np.isfinite(values.min()) and np.isfinite(values.max())):
        raise NotFinite(module)


def with_causes(error: NotFinite, precision: str, loras: Mapping[str, float], guidance_scale: float) -> NotFinite:
    """The error with its possible causes in the message; an error that names them already is returned unchanged.

    Args:
        error: the error that a backend raised.
        precision: the module's precision in the bundle: fp32, fp16 or bf16.
        loras: weights of the active LoRAs, by name.
        guidance_scale: the request's; 0 without guidance.
    """
    if error.explained:
        return error
    facts, advice = [f"it runs in {precision}"], []
    if precision == "fp16":
        facts[0] += ", which holds at most 65504"
        advice.append("export the bundle in bf16 or fp32")
    if loras:
        facts.append("LoRAs are on: " + ", ".join(f"{name!r} at {weight:g}" for name, weight in loras.items()))
        advice.append("take the LoRAs off or give them smaller weights")
    if guidance_scale > 0:
        facts.append(f"guidance_scale is {guidance_scale:g}")
        advice.append("ask for a smaller guidance_scale")
    if not advice:
        facts.append("no LoRA is on and there is no guidance")
        advice.append("the checkpoint's weights are damaged: compare its files with their source, and export it again")
    return NotFinite(error.module, f"{'; '.join(facts)}; {', or '.join(advice)}")
