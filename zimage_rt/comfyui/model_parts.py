"""The files that meet in a workflow's samplers and decoders, grouped to bundles."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from . import nodes
from .files import relative_name
from .graph import Graph, Link, Node
from .inputs import File, Socket
from .nodes.loaders import TINY_VAES
from .registry import ANY, NODES, NodeKind

assert nodes.__all__  # importing them registers them

# A file as a workflow names it: ComfyUI's folder, and the name in it.
Named = tuple[str, str]

CHECKPOINTS = "checkpoints"
# The folders of the files that bundles are made of.
MODEL_FOLDERS = ("diffusion_models", CHECKPOINTS, "text_encoders", "vae", "model_patches")
# The sockets that files come through: to a sampler as its model, as its prompts, and from there to a VAE.
_MODEL, _PROMPT = frozenset({"MODEL", "MODEL_PATCH"}), frozenset({"CONDITIONING", "CLIP"})
_DRAWN, _ANY_VAE = _MODEL | {"LATENT", "GUIDER"}, _MODEL | {"LATENT", "GUIDER", "CONDITIONING", "VAE"}


@dataclasses.dataclass(frozen=True)
class Parts:
    """The files of one bundle; a text encoder or VAE that is the model's own file lies in that checkpoint.

    Attributes:
        model: the transformer, or a checkpoint.
        text_encoder: the text encoder.
        vae: the full VAE; None if the workflow has none.
        controlnet: the ControlNet; None if the workflow has none.
    """

    model: Named
    text_encoder: Named
    vae: Named | None = None
    controlnet: Named | None = None


def group(graph: Graph) -> tuple[Parts, ...]:
    """The bundles that a workflow needs, in the order of its nodes.

    A model has a bundle for each text encoder and each ControlNet that it meets in a sampler. Its VAE is the first that
    encodes or decodes its latents. A further VAE has a bundle beside one of these models.
    """
    meetings = _meetings(graph)
    met = _vaes_by_model(graph)
    vaes = list(dict.fromkeys(vae for each in met.values() for vae in each))
    # A bundle with a ControlNet draws without it, too.
    controlled = {(model, text_encoder) for model, text_encoder, controlnet in meetings if controlnet}
    found = []
    for model, text_encoder, controlnet in meetings:
        if controlnet or (model, text_encoder) not in controlled:
            own = [vae for vae in met.get(model, vaes) if _is_alone(vae, model)]
            found.append(Parts(model, text_encoder, own[0] if own else None, controlnet))
    for vae in vaes:
        if any(parts.vae == vae for parts in found):
            continue
        near = [parts for parts in found if vae in met.get(parts.model, ())]
        if vae[0] == CHECKPOINTS:
            found.append(Parts(vae, vae, vae))
        elif near or found:
            found.append(dataclasses.replace((near or found)[0], vae=vae))
    return tuple(dict.fromkeys(found))


def is_tiny_vae(file: Named) -> bool:
    """Whether a file stands for the tiny VAE: its name says so."""
    return file[0] == "vae" and file[1].lower().startswith(TINY_VAES)


def names_tiny(graph: Graph) -> bool:
    """Whether a workflow loads the tiny VAE."""
    loaded = (_loaded(graph, node) for node in graph.values())
    return any(file is not None and is_tiny_vae(file) for file in loaded)


def _is_alone(vae: Named, model: Named) -> bool:
    """Whether a VAE is a file of its own, or the model's checkpoint has it: others' are not read from there."""
    return vae[0] != CHECKPOINTS or vae == model


def _meetings(graph: Graph) -> list[tuple[Named, Named, Named | None]]:
    """Each model, text encoder and ControlNet that meet in a node that takes a model and prompts."""
    models, prompts = _Sources(graph, _MODEL), _Sources(graph, _PROMPT)
    found: dict[tuple[Named, Named, Named | None], None] = {}
    for _, links in _linked(graph):
        if not {"MODEL", "CONDITIONING"} <= {kind for kind, _ in links}:
            continue
        loaded = models.of(link for kind, link in links if kind == "MODEL")
        patches: list[Named | None] = [file for kind, file in loaded if kind == "MODEL_PATCH"]
        patches = [file for kind, file in loaded if kind == "MODEL_PATCH"] or [None]
        encoders = prompts.of(link for kind, link in links if kind == "CONDITIONING")
        found |= {
            (model, text_encoder, patch): None
            for kind, model in loaded
            if kind == "MODEL"
            for _, text_encoder in encoders
            for patch in patches or [None]
        }
    return list(found)


def _vaes_by_model(graph: Graph) -> dict[Named | None, list[Named]]:
    """The full VAEs that meet a model's latents, by the model; None has those that meet no model's."""
    models, vaes = _Sources(graph, _DRAWN), _Sources(graph, _ANY_VAE)
    found: dict[Named | None, dict[Named, None]] = {}
    for _, links in _linked(graph):
        if not {"LATENT", "VAE"} & {kind for kind, _ in links}:
            continue
        own = vaes.of(link for kind, link in links if kind == "VAE") | vaes.of(link for _, link in links)
        full = {file: None for kind, file in own if kind == "VAE" and not is_tiny_vae(file)}
        drawn: list[Named | None] = [file for kind, file in models.of(link for _, link in links) if kind == "MODEL"]
        for model in drawn or [None]:
            found.setdefault(model, {}).update(full)
    return {model: list(each) for model, each in found.items()}


def _linked(graph: Graph) -> Iterator[tuple[NodeKind, list[tuple[str, Link]]]]:
    """Each node that is known, with its links by the types of their inputs."""
    for node in graph.values():
        if (kind := NODES.get(node.kind)) is not None:
            yield kind, _links(kind, node.inputs)


def _links(kind: NodeKind, inputs: Mapping[str, Any]) -> list[tuple[str, Link]]:
    return [
        (wanted.spec.type, inputs[name])
        for name, wanted in kind.inputs.items()
        if isinstance(wanted.spec, Socket) and isinstance(inputs.get(name), Link)
    ]


class _Sources:
    """The files that lead to a link through sockets of some types, each with the type of its loader's output."""

    def __init__(self, graph: Graph, types: frozenset[str]) -> None:
        self._graph, self._types = graph, types | {ANY}
        self._known: dict[Link, dict[tuple[str, Named], None]] = {}

    def of(self, links: Iterable[Link]) -> dict[tuple[str, Named], None]:
        """The files, in the order of the links."""
        found: dict[tuple[str, Named], None] = {}
        for link in links:
            found |= self._of(link)
        return found

    def _of(self, link: Link) -> dict[tuple[str, Named], None]:
        # Without recursion: workflows may be thousands of nodes deep. A circle is a fault that the plan finds.
        waiting, begun = [link], set[Link]()
        while waiting:
            top = waiting[-1]
            loaded, needs = self._step(top)
            missing = [each for each in needs if each not in self._known and each not in begun]
            if missing and top not in self._known:
                begun.add(top)
                waiting += reversed(missing)
                continue
            waiting.pop()
            if top not in self._known:
                for each in needs:
                    loaded |= self._known.get(each, {})
                self._known[top] = loaded
        return self._known[link]

    def _step(self, link: Link) -> tuple[dict[tuple[str, Named], None], list[Link]]:
        """The file of a loader's output, or the links of another node that files may come through."""
        node = self._graph.get(link.node)
        kind = None if node is None else NODES.get(node.kind)
        if node is None or kind is None or not 0 <= link.output < len(kind.outputs):
            return {}, []
        if any(isinstance(each.spec, File) and each.spec.folder in MODEL_FOLDERS for each in kind.inputs.values()):
            file = _loaded(self._graph, node)
            return {} if file is None else {(kind.outputs[link.output], file): None}, []
        links = _links(kind, node.inputs)
        if "LATENT" in self._types and "VAE" not in self._types and {"MODEL", "GUIDER"} & {of for of, _ in links}:
            links = [(of, each) for of, each in links if of != "LATENT"]  # a sampler's own model draws its latents
        return {}, [each for of, each in links if of in self._types]


def _loaded(graph: Graph, node: Node) -> Named | None:
    """The file that a node loads for a bundle, if its name is known."""
    kind = NODES.get(node.kind)
    for name, wanted in kind.inputs.items() if kind is not None else ():
        if isinstance(wanted.spec, File) and wanted.spec.folder in MODEL_FOLDERS:
            file = _text(graph, node.inputs.get(name))
            return None if file is None else (wanted.spec.folder, file)
    return None


def _text(graph: Graph, value: Any) -> str | None:
    """A file's name that a node says, or that a primitive node gives to it."""
    if isinstance(value, Link):
        node = graph.get(value.node)
        value = node.inputs.get("value") if node is not None and node.kind.startswith("Primitive") else None
    return relative_name(value) if isinstance(value, str) else None
