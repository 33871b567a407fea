"""Regular expressions of workflows. Python's `re` cannot be stopped, so they run in a process of their own."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..checks import shown
from .graph import WorkflowError

# Characters of a text in a workflow, and of a pattern.
MAX_TEXT, MAX_PATTERN = 1 << 20, 10_000
# Seconds that a search may take. What is meant for prompts takes milliseconds.
SECONDS = 2.0
CHILD = Path(__file__).with_name("regex_child.py")


class PatternError(Exception):
    """The pattern is none."""


def run_regex(pattern: str, text: str, **task: Any) -> Any:
    """Do a task of `regex_child.TASKS` with a stranger's pattern.

    Args:
        pattern: in the syntax of `re`.
        text: where it is searched.
        task: the task's `kind`, and the values that it takes.

    Returns:
        What the task returns.

    Raises:
        PatternError: the pattern, or the text that replaces what it finds, is malformed.
        WorkflowError: it takes longer than SECONDS, or gives more than `MAX_TEXT` characters.
    """
    for name, value, most in (("string", text, MAX_TEXT), ("regex_pattern", pattern, MAX_PATTERN)):
        if len(value) > most:
            raise WorkflowError(f"{name}: expected at most {most} characters, got {len(value)}")
    asked = json.dumps({"pattern": pattern, "text": text, "most": MAX_TEXT, **task})
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(CHILD)],
            input=asked.encode("ascii"),
            capture_output=True,
            timeout=SECONDS,
            check=False,
        )
        answer: Mapping[str, Any] = json.loads(done.stdout) if done.returncode == 0 else {"error": "it was ended"}
    except subprocess.TimeoutExpired:
        raise WorkflowError(
            f"regex_pattern: expected a search of at most {SECONDS:g} seconds, got more by {shown(pattern)}; avoid "
            "repeats of what is repeated already, such as (a+)+"
        ) from None
    if "malformed" in answer:
        raise PatternError(answer["malformed"])
    if "error" in answer:
        raise WorkflowError(f"regex_pattern: {shown(pattern)} failed: {answer['error']}")
    return answer["found"]
