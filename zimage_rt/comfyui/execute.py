"""Running a checked workflow: the nodes that its outputs need, and again only those whose inputs have changed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from typing import Any

from ..checks import shown
from ..errors import ZImageError
from .graph import Link, Node, WorkflowError
from .inputs import File, InputError, Socket
from .plan import Plan
from .registry import NODES
from .run import Files, Run

# A node's outputs by its signature.
Cache = dict[str, tuple[Any, ...]]


def execute(
    checked: Plan, run: Run, cache: Cache | None = None, is_shown: Callable[[str], bool] = lambda signature: False
) -> list[str]:
    """Run the nodes that a plan's outputs need; the ids of those that were taken from the cache.

    Args:
        checked: the workflow.
        run: what its nodes work with; it gets the images, and is told of every node.
        cache: results of an earlier run, for nodes with the same inputs; it then holds this one's alone.
        is_shown: whether the images of an output node of that signature are there already; it is then not run again.

    Raises:
        WorkflowError: a node fails, with its label.
    """
    return _Execution(checked, run, {} if cache is None else cache, is_shown).run()


class _Execution:
    def __init__(self, checked: Plan, run: Run, cache: Cache, is_shown: Callable[[str], bool]) -> None:
        self._graph, self._plan, self._run, self._cache = checked.graph, checked, run, cache
        self._signatures = signatures(checked, run.files)
        self._results: dict[str, tuple[Any, ...]] = {}
        known = {signature: cache[signature] for signature in self._signatures.values() if signature in cache}
        cache.clear()
        cache.update(known)
        self._outputs = set(checked.outputs)
        self._shown = {
            name for name in checked.outputs if is_shown(self._signatures[name]) and self._signatures[name] in cache
        }

    def run(self) -> list[str]:
        reused = [
            name
            for name in self._plan.order
            if (name in self._shown if name in self._outputs else self._signatures[name] in self._cache)
        ]
        self._run.events.cached(reused)
        for output in self._plan.outputs:
            if output in self._shown:
                self._run.events.executed(output, self._signatures[output], (), is_cached=True)
            else:
                self._run_needed(output)
        return reused

    def _run_needed(self, output: str) -> None:
        """Run a node after those that it needs, without recursion: workflows may be thousands of nodes deep."""
        waiting = [output]
        while waiting:
            name = waiting[-1]
            if name in self._results:
                waiting.pop()
                continue
            known = self._cache.get(self._signatures[name])
            # An output node is taken from the cache only if what it shows is there already.
            if known is not None and (name in self._shown or name not in self._outputs):
                self._results[name] = known
                continue
            missing = [each for each in self._needs(self._graph[name]) if each not in self._results]
            if missing:
                waiting += reversed(missing)
                continue
            self._results[name] = self._cache[self._signatures[name]] = self._run_node(self._graph[name])

    def _needs(self, node: Node) -> Iterator[str]:
        """The nodes that a node needs next; of a switch first those that decide, then those that it chooses."""
        kind = NODES[node.kind]
        links = {name: value for name, value in node.inputs.items() if name in kind.inputs and isinstance(value, Link)}
        first = [link.node for name, link in links.items() if name not in kind.lazy]
        yield from first
        if links.keys() & kind.lazy and all(name in self._results for name in first):
            chosen = self._chosen(node)
            yield from (links[name].node for name in kind.lazy if name in links and name in chosen)

    def _chosen(self, node: Node) -> set[str]:
        kind = NODES[node.kind]
        if kind.chooses is None:
            return set(kind.lazy)
        return set(kind.chooses(self._given(node, kind.inputs.keys() - kind.lazy)))

    def _given(self, node: Node, names: set[str]) -> dict[str, Any]:
        """A node's inputs as its function takes them. Raises WorkflowError."""
        given: dict[str, Any] = {}
        for name, wanted in NODES[node.kind].inputs.items():
            if name not in node.inputs or name not in names:
                continue
            value = node.inputs[name]
            value = self._results[value.node][value.output] if isinstance(value, Link) else value
            try:
                given[name] = value if isinstance(wanted.spec, Socket) else wanted.spec.check(value)
            except InputError as error:
                raise failed(node, f"{name}: {error}", error.kind) from error
        return given

    def _run_node(self, node: Node) -> tuple[Any, ...]:
        kind, run = NODES[node.kind], self._run
        run.begin(node.id)
        names = set(kind.inputs)
        if kind.lazy:
            names -= kind.lazy - self._chosen(node)
        given = self._given(node, names)
        try:
            results = kind.function(run, **given)
        except (WorkflowError, InputError) as error:
            raise failed(node, str(error), "execution_failed") from error
        except ZImageError as error:
            error.args = (f"{node.label}: {error}",)
            raise
        except Exception as error:  # as ComfyUI does: whatever a node's values lead to, the node is named
            text = f"failed: {type(error).__name__}: {shown(str(error))}"
            raise failed(node, text, "execution_failed") from error
        if kind.is_output:
            run.events.executed(node.id, self._signatures[node.id], run.shown_by(node.id), is_cached=False)
        return results


def signatures(checked: Plan, files: Files) -> dict[str, str]:
    """A hash per node, of its kind and of everything that it depends on."""
    found: dict[str, str] = {}
    for name in checked.order:
        node = checked.graph[name]
        inputs: dict[str, Any] = {}
        for key, wanted in NODES[node.kind].inputs.items():
            value = node.inputs.get(key)
            inputs[key] = [found[value.node], value.output] if isinstance(value, Link) else value
            if isinstance(wanted.spec, File) and wanted.spec.folder == "input" and isinstance(value, str):
                inputs[key] = hashlib.sha256(files.image(value)).hexdigest()
        text = json.dumps([node.kind, inputs], sort_keys=True, default=repr)
        found[name] = hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
    return found


def failed(node: Node, message: str, kind: str) -> WorkflowError:
    """The error of a node that failed while it ran."""
    entry = {"type": kind, "message": message, "details": message, "extra_info": {}}
    errors = {node.id: {"errors": [entry], "dependent_outputs": [], "class_type": node.kind}}
    return WorkflowError(f"{node.label}: {message}", kind, errors)
