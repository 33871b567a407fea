"""Workflows as ComfyUI's editor saves them, converted to API format.

The editor's file has what is drawn: nodes with lists of widget values, links by number, subgraphs as kinds of nodes of
their own, nodes that are bypassed or muted, reroutes and notes. Ids of nodes in a subgraph are `57:3`: the subgraph's
node, then its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import nodes as all_nodes
from .graph import MAX_NODES, Link, Node, WorkflowError
from .inputs import Socket
from .nodes.dynamic import Branch
from .registry import NODES, NodeKind

assert all_nodes.__all__  # importing them registers them

# Modes of a node; others run.
MUTED, BYPASSED = 2, 4
# The ends of a subgraph's links that lead to its own inputs and outputs.
INPUTS, OUTPUTS = -10, -20
# Nodes that only the editor has.
NOTES = ("MarkdownNote", "Note")
REROUTE, PRIMITIVE = "Reroute", "PrimitiveNode"
# Widgets after which the editor puts one of its own: what happens to the seed after a run.
SEEDS = ("seed", "noise_seed")
CONTROL = ("fixed", "increment", "decrement", "randomize")
# Levels of subgraphs, and links that are followed one after another.
MAX_DEPTH, MAX_FOLLOWED = 16, 200


@dataclasses.dataclass(frozen=True)
class Value:
    """A value that stands where a link could."""

    value: Any


@dataclasses.dataclass(frozen=True)
class Scope:
    """A level of the file: the top, or a subgraph in its node.

    Attributes:
        prefix: of the ids, `57:` or empty.
        nodes: by their number.
        links: the origin of a link by its number: a node's number and the number of its output.
        subgraph: its definition; None at the top.
        host: the node that it is in; None at the top.
        outer: the level of that node.
    """

    prefix: str
    nodes: Mapping[int, Mapping[str, Any]]
    links: Mapping[int, tuple[int, int]]
    subgraph: Mapping[str, Any] | None = None
    host: Mapping[str, Any] | None = None
    outer: Scope | None = None


class _Reader:
    def __init__(self, data: Mapping[str, Any]) -> None:
        definitions = data.get("definitions") or {}
        self._subgraphs = {each["id"]: each for each in definitions.get("subgraphs") or ()}
        self.top = _scope("", data)
        self._seen = 0
        self._scopes: dict[str, Scope] = {}  # of subgraphs' nodes, by prefix

    def nodes(self, scope: Scope, depth: int = 0) -> Iterator[Node]:
        """The nodes of a level and of those in it, in API format."""
        if depth > MAX_DEPTH:
            raise WorkflowError(f"workflow: expected at most {MAX_DEPTH} levels of subgraphs, got more")
        for number, node in scope.nodes.items():
            self._seen += 1
            if self._seen > MAX_NODES:  # before all of them are there: a small file can hold millions
                raise WorkflowError(f"workflow: expected at most {MAX_NODES} nodes in all subgraphs, got more")
            kind = node["type"]
            if node.get("mode") in (MUTED, BYPASSED) or kind in (*NOTES, REROUTE, PRIMITIVE):
                continue
            if kind in self._subgraphs:
                yield from self.nodes(self._inside(scope, number), depth + 1)
                continue
            title = node.get("title")
            yield Node(
                f"{scope.prefix}{number}", kind, self._inputs(scope, node), title if isinstance(title, str) else ""
            )

    def _inside(self, scope: Scope, number: int) -> Scope:
        prefix = f"{scope.prefix}{number}:"
        if prefix not in self._scopes:
            host = scope.nodes[number]
            subgraph = self._subgraphs[host["type"]]
            self._scopes[prefix] = dataclasses.replace(
                _scope(prefix, subgraph), subgraph=subgraph, host=host, outer=scope
            )
        return self._scopes[prefix]

    def _inputs(self, scope: Scope, node: Mapping[str, Any]) -> dict[str, Any]:
        found: dict[str, Any] = dict(_widget_values(node))
        for entry in node.get("inputs") or ():
            if entry.get("link") is None:
                continue
            origin = self._origin(scope, entry["link"])
            if isinstance(origin, Value):
                found[entry["name"]] = origin.value
            elif origin is not None:
                found[entry["name"]] = origin
            elif not entry.get("widget"):
                found.pop(entry["name"], None)
        return found

    def _origin(self, scope: Scope, link: int, depth: int = 0) -> Link | Value | None:
        """The source of a link: a node's output, a value, or nothing, so that a widget keeps its own value."""
        if depth > MAX_FOLLOWED:
            raise WorkflowError(
                f"workflow: expected links that lead to a node over at most {MAX_FOLLOWED} others, got more or a circle"
            )
        if link not in scope.links:
            return None
        number, slot = scope.links[link]
        if number == INPUTS:
            return self._from_host(scope, slot, depth + 1)
        node = scope.nodes.get(number)
        if node is None or node.get("mode") == MUTED:
            return None
        if node.get("mode") == BYPASSED or node["type"] == REROUTE:
            through = _through(node, slot)
            return None if through is None else self._origin(scope, through, depth + 1)
        if node["type"] == PRIMITIVE:
            values = node.get("widgets_values") or [None]
            return Value(values[0])
        if node["type"] in self._subgraphs:
            inner = self._inside(scope, number)
            outputs = self._subgraphs[node["type"]].get("outputs") or ()
            links = outputs[slot].get("linkIds") if 0 <= slot < len(outputs) else None
            return self._origin(inner, links[0], depth + 1) if links else None
        return Link(f"{scope.prefix}{number}", slot)

    def _from_host(self, scope: Scope, slot: int, depth: int) -> Link | Value | None:
        """The source of a subgraph's input: its node's link, else its node's value."""
        assert scope.subgraph is not None and scope.host is not None and scope.outer is not None
        inputs = scope.subgraph.get("inputs") or ()
        if not 0 <= slot < len(inputs):
            return None
        name = inputs[slot]["name"]
        entry = next((each for each in scope.host.get("inputs") or () if each.get("name") == name), None)
        if entry is not None and entry.get("link") is not None:
            return self._origin(scope.outer, entry["link"], depth)
        named = scope.host.get("widgets_values_named")
        if isinstance(named, dict) and name in named:
            return Value(named[name])
        values = scope.host.get("widgets_values")
        widgets = [each["name"] for each in inputs if _is_widget(scope, each)]
        if isinstance(values, list) and name in widgets and widgets.index(name) < len(values):
            return Value(values[widgets.index(name)])
        return None


def read_editor_format(data: Mapping[str, Any], where: str) -> dict[str, Node]:
    """The graph of a file in the editor's format. Raises WorkflowError."""
    try:
        reader = _Reader(data)
        return {node.id: node for node in reader.nodes(reader.top)}
    except (KeyError, TypeError, AttributeError, IndexError, ValueError) as error:
        raise WorkflowError(
            f"{where}: expected nodes and links as ComfyUI's editor writes them, got others; save the file again"
        ) from error


def _scope(prefix: str, data: Mapping[str, Any]) -> Scope:
    nodes = {int(node["id"]): node for node in data["nodes"]}
    links: dict[int, tuple[int, int]] = {}
    for link in data.get("links") or ():
        if isinstance(link, dict):
            links[link["id"]] = (int(link["origin_id"]), link["origin_slot"])
        else:
            links[link[0]] = (int(link[1]), link[2])
    return Scope(prefix, nodes, links)


def _is_widget(scope: Scope, entry: Mapping[str, Any]) -> bool:
    """Whether an input of a subgraph leads to a widget of one of its nodes."""
    wanted = set(entry.get("linkIds") or ())
    found = (each for node in scope.nodes.values() for each in node.get("inputs") or () if each.get("link") in wanted)
    return any(each.get("widget") for each in found)


def _through(node: Mapping[str, Any], slot: int) -> int | None:
    """The link that passes through a bypassed node to one of its outputs: that of an input of the same type."""
    inputs, outputs = node.get("inputs") or [], node.get("outputs") or []
    kind = outputs[slot].get("type") if 0 <= slot < len(outputs) else None
    at_once = inputs[slot : slot + 1] if kind else []
    for entry in (*at_once, *inputs):
        if entry.get("link") is not None and (node["type"] == REROUTE or entry.get("type") == kind):
            return int(entry["link"])
    return None


def _widget_values(node: Mapping[str, Any]) -> dict[str, Any]:
    """A node's values by their inputs' names."""
    named = node.get("widgets_values_named")
    if isinstance(named, dict):
        return dict(named)
    values = node.get("widgets_values")
    if isinstance(values, dict):
        return dict(values)
    kind = NODES.get(node["type"])
    return {} if kind is None or not isinstance(values, list) else dict(_by_place(kind, values))


def _by_place(kind: NodeKind, values: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    place = 0
    names = [name for name, wanted in kind.inputs.items() if not isinstance(wanted.spec, Socket)]
    while names and place < len(values):
        name = names.pop(0)
        yield name, values[place]
        spec = kind.inputs[name].spec
        if isinstance(spec, Branch):  # the inputs of the option that is chosen, and of no other
            parts = [f"{name}.{part}" for part in spec.parts.get(str(values[place]), ())]
            later = [each for each in names if not each.startswith(f"{name}.")]
            names = [each for each in parts if each in names] + later
        place += 1
        if name in SEEDS and place < len(values) and values[place] in CONTROL:
            place += 1
