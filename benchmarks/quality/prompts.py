"""Held-out prompts of zimage-nano, with the scenes that they describe."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from zimage_rt.benchmarks.quality.judge import DATA, UNSEEN, canvas_name


def read_prompts(count: int, path: Path = DATA / "prompts.jsonl") -> list[dict[str, Any]]:
    """Return the first ``count`` held-out prompts; the file is interleaved, so any count has all kinds."""
    lines = path.read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines[:count]]


def kind_of(prompt: dict[str, Any]) -> str:
    """Return the kind of a prompt, e.g. ``single``, ``unseen_pair``, ``single_192x320``."""
    layout = {"left_right": "pair", "top_bottom": "pair"}.get(prompt["scene"]["layout"], prompt["scene"]["layout"])
    canvas = canvas_name(prompt["scene"])
    name = f"{UNSEEN}{layout}" if prompt["unseen"] else layout
    return name if canvas == "256x256" else f"{name}_{canvas}"


def take_kinds(prompts: list[dict[str, Any]], each: int, kinds: list[str] | None = None) -> list[dict[str, Any]]:
    """Return the first ``each`` prompts of every kind, or of ``kinds``, in the file's order."""
    taken: dict[str, int] = {}
    chosen = []
    for prompt in prompts:
        kind = kind_of(prompt)
        taken[kind] = taken.get(kind, 0) + 1
        if taken[kind] <= each and (not kinds or kind in kinds):
            chosen.append(prompt)
    return chosen
