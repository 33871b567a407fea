"""A workflow checked as a whole before anything is drawn, and the order of its nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from . import nodes
from .articles import as_meant
from .graph import Graph, Link, Node, WorkflowError
from .inputs import File, InputError, Socket
from .registry import ANY, NODES, REQUIRED, Input, NodeKind
from .run import Files

assert nodes.__all__  # importing them registers them
# Outputs that an input of another type takes, too.
CONVERTED = {("INT", "FLOAT"), ("STRING", "COMBO")}


@dataclasses.dataclass(frozen=True)
class Plan:
    """A checked workflow.

    Attributes:
        graph: its nodes, with what articles call them put right.
        order: the ids of the nodes that are run; each comes after those that it needs.
        outputs: the ids of the nodes that it is run for.
        warnings: sentences.
    """

    graph: Graph
    order: tuple[str, ...]
    outputs: tuple[str, ...]
    warnings: tuple[str, ...]


class _Check:
    """The faults of a workflow, all at once, in ComfyUI's shape."""

    def __init__(self, graph: Graph, files: Files) -> None:
        self._graph, self._files = graph, files
        self.faults: dict[str, list[dict[str, Any]]] = {}
        self.warnings: list[str] = []

    def fault(self, node: Node, kind: str, message: str, name: str = "") -> None:
        where = f"{name}: " if name else ""
        extra = {"input_name": name} if name else {}
        entry = {"type": kind, "message": message, "details": f"{where}{message}", "extra_info": extra}
        self.faults.setdefault(node.id, []).append(entry)

    def node(self, node: Node) -> None:
        kind = NODES[node.kind]
        for name, wanted in kind.inputs.items():
            if name not in node.inputs:
                self._missing(node, name, wanted)
            elif isinstance(node.inputs[name], Link):
                self._link(node, name, wanted, node.inputs[name])
            else:
                self._value(node, name, wanted, node.inputs[name])

    def _missing(self, node: Node, name: str, wanted: Input) -> None:
        if wanted.default is REQUIRED:
            self.fault(node, "required_input_missing", f"expected {wanted.spec.type}, got nothing", name)
        elif wanted.default is not None:
            self.warnings.append(f"{node.label}: {name} is left out; {wanted.default!r} is taken")

    def _link(self, node: Node, name: str, wanted: Input, link: Link) -> None:
        source = self._graph.get(link.node)
        if source is None:
            self.fault(node, "bad_linked_input", f"expected a link to a node, got one to #{link.node}: none", name)
            return
        if source.kind not in NODES:
            return  # a fault of that node
        outputs = NODES[source.kind].outputs
        if not 0 <= link.output < len(outputs):
            message = f"expected one of {len(outputs)} outputs of {source.label}, got number {link.output}"
            self.fault(node, "bad_linked_input", message, name)
            return
        got = outputs[link.output]
        is_any = ANY in (got, wanted.spec.type)
        if not is_any and got != wanted.spec.type and (got, wanted.spec.type) not in CONVERTED:
            message = f"expected {wanted.spec.type}, got {got} of {source.label}"
            self.fault(node, "return_type_mismatch", message, name)

    def _value(self, node: Node, name: str, wanted: Input, value: Any) -> None:
        try:
            checked = wanted.spec.check(value)
            if isinstance(wanted.spec, File):
                check_file(self._files, wanted.spec.folder, checked)
        except InputError as error:
            if not (isinstance(wanted.spec, Socket) and value is None and wanted.default is None):
                self.fault(node, error.kind, str(error), name)


def check_file(files: Files, folder: str, name: str) -> None:
    """Raise InputError if there is no such file."""
    if folder == "loras":
        files.lora(name)
    elif folder == "input":
        files.image(name)
    elif folder == "upscale_models":
        files.upscaler(name)
    else:
        files.bundle(folder, name)


def plan(graph: Graph, files: Files, targets: Sequence[str] | None = None) -> Plan:
    """Check a workflow and put its nodes in order.

    Args:
        graph: the workflow.
        files: what it may name.
        targets: the output nodes that it is run for; None takes all.

    Raises WorkflowError with all faults: kinds of nodes that there are not, links to nowhere or in a circle, values out
    of range, unknown files.
    """
    graph, meant = as_meant(graph)
    check = _Check(graph, files)
    for node in graph.values():
        if node.kind not in NODES:
            check.fault(node, "missing_node_type", f"there is no node {node.kind!r} here; docs/comfyui.md lists them")
    outputs = [node.id for node in graph.values() if node.kind in NODES and NODES[node.kind].is_output]
    if targets is not None:
        outputs = [name for name in outputs if name in targets]
    if not outputs and not check.faults:
        raise WorkflowError("workflow: expected a node that saves or shows an image, got none", "prompt_no_outputs")
    order = tuple(_ordered(graph, outputs, check))
    for name in order:
        if graph[name].kind in NODES:
            check.node(graph[name])
    if check.faults:
        raise _refusal(graph, check.faults, outputs)
    needed = set(order)
    left_out = [node.label for node in graph.values() if node.id not in needed]
    unused = [f"{label}: nothing leads to it; it is left out" for label in left_out]
    return Plan(graph, order, tuple(outputs), (*meant, *check.warnings, *unused))


def _ordered(graph: Graph, outputs: list[str], check: _Check) -> Iterator[str]:
    """The ids that the outputs need, each after those that it needs; a circle is a fault of the node that closes it."""
    done: set[str] = set()
    open_nodes: set[str] = set()
    for output in outputs:
        waiting: list[tuple[str, Iterator[str]]] = []
        following: str | None = output
        while following is not None or waiting:
            if following is not None:
                if following in done or following not in graph:
                    pass
                elif following in open_nodes:
                    check.fault(graph[following], "dependency_cycle", "its inputs lead back to itself")
                else:
                    open_nodes.add(following)
                    waiting.append((following, _needs(graph[following])))
                following = None
                continue
            name, needs = waiting[-1]
            following = next(needs, None)
            if following is None:
                waiting.pop()
                open_nodes.discard(name)
                done.add(name)
                yield name


def _needs(node: Node) -> Iterator[str]:
    kind = NODES.get(node.kind)
    return iter(
        [
            link.node
            for name, link in node.inputs.items()
            if isinstance(link, Link) and (not kind or name in kind.inputs)
        ]
    )


def _refusal(graph: Graph, faults: Mapping[str, list[dict[str, Any]]], outputs: list[str]) -> WorkflowError:
    node_errors = {
        name: {"errors": errors, "dependent_outputs": outputs, "class_type": graph[name].kind}
        for name, errors in faults.items()
    }
    first = "; ".join(f"{graph[name].label}: {errors[0]['details']}" for name, errors in list(faults.items())[:5])
    more = "" if len(faults) <= 5 else f"; and {len(faults) - 5} more"
    is_missing = any(error["type"] == "missing_node_type" for errors in faults.values() for error in errors)
    kind = "missing_node_type" if is_missing else "prompt_outputs_failed_validation"
    return WorkflowError(f"{first}{more}", kind, node_errors)


def explain(checked: Plan) -> list[str]:
    """A line for each node that is run, in order."""
    return [_line(checked.graph[name], NODES[checked.graph[name].kind]) for name in checked.order]


def _line(node: Node, kind: NodeKind) -> str:
    said = {name: node.inputs[name] for name in kind.inputs if name in node.inputs}
    parts = [f"{name}=#{v.node}.{v.output}" if isinstance(v, Link) else f"{name}={v!r}" for name, v in said.items()]
    return f"{node.label}: {kind.name}({', '.join(parts)})"
