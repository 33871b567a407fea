"""The shapes of ComfyUI's messages, of its history, and of its list of jobs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .workflow_run import WorkflowRun

# ComfyUI's states of a job by ours.
STATUSES: Mapping[str, str] = {
    "queued": "pending",
    "running": "in_progress",
    "done": "completed",
    "failed": "failed",
    "cancelled": "cancelled",
}


def status(remaining: int) -> dict[str, Any]:
    """The data of `status`."""
    return {"status": {"exec_info": {"queue_remaining": remaining}}}


def place_of_node(job: str, node: str) -> dict[str, Any]:
    """A node of a run, as previews and progress name it."""
    return {
        "node_id": node,
        "display_node_id": node,
        "parent_node_id": None,
        "real_node_id": node,
        "prompt_id": job,
    }


def node_state(job: str, node: str, value: float, most: float, state: str) -> dict[str, Any]:
    """A node's progress in `progress_state`."""
    return {"value": value, "max": most, "state": state, **place_of_node(job, node)}


def end_of(run: WorkflowRun, failures: Sequence[BaseException]) -> tuple[str, dict[str, Any]]:
    """The message that ends a run, and its data."""
    job = run.job
    executed = [node for node, state in run.progress.items() if state["state"] == "finished"]
    error = job.error or {}
    node = next(iter(error.get("node_errors", {})), run.node)
    kind = "" if node is None or node not in run.graph else run.graph[node]["class_type"]
    if job.state == "cancelled" and error.get("code") == "cancelled":
        return "execution_interrupted", {"node_id": node, "node_type": kind, "executed": executed}
    if job.state == "done" and not failures:
        return "execution_success", {}
    message = error.get("message") or f"the images could not be kept: {failures[0]}"
    return "execution_error", {
        "node_id": node or next(iter(run.graph)),
        "node_type": kind,
        "executed": executed,
        "exception_message": message,
        "exception_type": error.get("code", "storage_full"),
        "traceback": [message],
        "current_inputs": {},
        "current_outputs": list(run.outputs),
    }


def history_entry(run: WorkflowRun) -> dict[str, Any]:
    """A run that has ended, as `/history` has it."""
    is_success = run.log[-1][0] == "execution_success"
    return {
        "prompt": run.queue_entry(),
        "outputs": dict(run.outputs),
        "status": {
            "status_str": "success" if is_success else "error",
            "completed": is_success,
            "messages": [list(each) for each in run.log],
        },
        "meta": {
            node: {"node_id": node, "display_node": node, "parent_node": None, "real_node_id": node}
            for node in run.outputs
        },
    }


def listed_job(run: WorkflowRun) -> dict[str, Any]:
    """A run as `/api/jobs` lists it."""
    job = run.job
    shown = [
        (node, each)
        for node, output in run.outputs.items()
        for files in output.values()
        for each in files
        if isinstance(each, dict)
    ]
    # A saved image says more than a preview.
    best = next((each for each in shown if each[1]["type"] == "output"), shown[0] if shown else None)
    preview = None if best is None else {**best[1], "nodeId": best[0], "mediaType": "images"}
    end, said = run.log[-1] if run.log and job.is_finished else ("", {})
    state = STATUSES[job.state]
    return {
        "id": job.id,
        "status": "failed" if end == "execution_error" and state == "completed" else state,
        "create_time": _milliseconds(job.created),
        "execution_start_time": _milliseconds(job.started),
        "execution_end_time": _milliseconds(job.finished),
        "priority": run.number,
        "outputs_count": len(shown),
        "preview_output": preview,
        "execution_error": said if end == "execution_error" else None,
        "workflow_id": _workflow_id(run.extra_data),
    }


def _workflow_id(extra_data: Mapping[str, Any]) -> str | None:
    extra = extra_data.get("extra_pnginfo")
    workflow = extra.get("workflow") if isinstance(extra, Mapping) else None
    found = workflow.get("id") if isinstance(workflow, Mapping) else None
    return found if isinstance(found, str) else None


def _milliseconds(seconds: float | None) -> int | None:
    return None if seconds is None else int(seconds * 1000)
