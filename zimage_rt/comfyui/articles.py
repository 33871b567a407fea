"""Workflows as articles about Z-Image print them, put right: nodes and inputs that ComfyUI never had."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from .graph import Graph, Link, Node
from .registry import NODES

# The kind of node that is meant, and its inputs by the names that are printed.
KINDS: Mapping[str, tuple[str, Mapping[str, str]]] = {
    "ImageToLatent": ("VAEEncode", {}),
    "MaskToLatent": ("SetLatentNoiseMask", {"latent": "samples"}),
    "LoadMask": ("LoadImageMask", {"mask": "image"}),
}
# Values that such a node does not say: a mask file is black and white, without alpha.
VALUES: Mapping[str, Mapping[str, Any]] = {"LoadMask": {"channel": "red"}}
# The input that is printed for a checkpoint's file.
MODEL_NAME, CHECKPOINT = "model_name", "CheckpointLoaderSimple"


def as_meant(graph: Graph) -> tuple[Graph, list[str]]:
    """The workflow that is meant, and a warning for each thing that was put right."""
    warnings: list[str] = []
    found = {name: _renamed(node, warnings) for name, node in graph.items()}
    checkpoints = {
        name for name, node in graph.items() if node.kind == CHECKPOINT and MODEL_NAME in node.inputs
    }  # only theirs have links to the wrong output
    return {name: _relinked(node, checkpoints, warnings) for name, node in found.items()}, warnings


def _renamed(node: Node, warnings: list[str]) -> Node:
    if node.kind == CHECKPOINT and MODEL_NAME in node.inputs and "ckpt_name" not in node.inputs:
        warnings.append(f"{node.label}: {MODEL_NAME} is no input of it; ckpt_name is meant")
        return dataclasses.replace(node, inputs={"ckpt_name": node.inputs[MODEL_NAME]})
    if node.kind in NODES or node.kind not in KINDS:
        return node
    kind, names = KINDS[node.kind]
    warnings.append(f"{node.label}: there is no such node in ComfyUI; {kind} is meant")
    inputs = {names.get(name, name): value for name, value in node.inputs.items()}
    return dataclasses.replace(node, kind=kind, inputs={**VALUES.get(node.kind, {}), **inputs})


def _relinked(node: Node, checkpoints: set[str], warnings: list[str]) -> Node:
    kind, outputs = NODES.get(node.kind), NODES[CHECKPOINT].outputs
    inputs = dict(node.inputs)
    for name, link in node.inputs.items():
        if kind is None or name not in kind.inputs or not isinstance(link, Link) or link.node not in checkpoints:
            continue
        wanted = kind.inputs[name].spec.type
        if wanted in outputs and (link.output >= len(outputs) or outputs[link.output] != wanted):
            inputs[name] = Link(link.node, outputs.index(wanted))
            warnings.append(f"{node.label}: {name} leads to output {link.output}; its {wanted} is meant")
    return dataclasses.replace(node, inputs=inputs)
