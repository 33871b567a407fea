"""Running a checked workflow: its nodes in order, and again only those whose inputs have changed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from ..checks import shown
from ..errors import ZImageError
from .graph import Link, Node, WorkflowError
from .inputs import File, InputError, Socket
from .plan import Plan
from .registry import NODES
from .run import Run

# A node's outputs by its signature.
Cache = dict[str, tuple[Any, ...]]


def execute(checked: Plan, run: Run, cache: Cache | None = None) -> list[str]:
    """Run the nodes of a plan; the ids of those that were taken from the cache.

    Args:
        checked: the workflow.
        run: what its nodes work with; it gets the images.
        cache: results of an earlier run, for nodes with the same inputs; it then holds this one's alone.

    Raises:
        WorkflowError: a node fails, with its label.
    """
    cache = {} if cache is None else cache
    results: dict[str, tuple[Any, ...]] = {}
    signatures: dict[str, str] = {}
    used: Cache = {}
    reused = []
    for name in checked.order:
        node = checked.graph[name]
        signature = signatures[name] = _signature(node, signatures, run)
        is_output = NODES[node.kind].is_output
        known = None if is_output else used.get(signature, cache.get(signature))
        if known is not None:
            results[name] = known
            reused.append(name)
        else:
            results[name] = _run_node(node, results, run)
        if not is_output:
            used[signature] = results[name]
    cache.clear()
    cache.update(used)
    return reused


def _signature(node: Node, signatures: dict[str, str], run: Run) -> str:
    """A hash of a node's kind and of everything that it depends on."""
    inputs: dict[str, Any] = {}
    for name, wanted in NODES[node.kind].inputs.items():
        value = node.inputs.get(name)
        inputs[name] = [signatures[value.node], value.output] if isinstance(value, Link) else value
        if isinstance(wanted.spec, File) and wanted.spec.folder == "input" and isinstance(value, str):
            stat = run.files.image(value).stat()
            inputs[name] = [value, stat.st_size, stat.st_mtime_ns]
    text = json.dumps([node.kind, inputs], sort_keys=True, default=repr)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _run_node(node: Node, results: dict[str, tuple[Any, ...]], run: Run) -> tuple[Any, ...]:
    kind = NODES[node.kind]
    run.node = node.id
    given: dict[str, Any] = {}
    for name, wanted in kind.inputs.items():
        if name not in node.inputs:
            continue
        value = node.inputs[name]
        linked = isinstance(value, Link)
        value = results[value.node][value.output] if linked else value
        try:
            given[name] = value if isinstance(wanted.spec, Socket) else wanted.spec.check(value)
        except InputError as error:
            raise _failed(node, f"{name}: {error}", error.kind) from error
    try:
        return kind.function(run, **given)
    except (WorkflowError, InputError) as error:
        raise _failed(node, str(error), "execution_failed") from error
    except ZImageError as error:
        error.args = (f"{node.label}: {error}",)
        raise
    except Exception as error:  # as ComfyUI does: whatever a node's values lead to, the node is named
        raise _failed(node, f"failed: {type(error).__name__}: {shown(str(error))}", "execution_failed") from error


def _failed(node: Node, message: str, kind: str) -> WorkflowError:
    entry = {"type": kind, "message": message, "details": message, "extra_info": {}}
    errors = {node.id: {"errors": [entry], "dependent_outputs": [], "class_type": node.kind}}
    return WorkflowError(f"{node.label}: {message}", kind, errors)
