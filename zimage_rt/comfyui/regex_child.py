"""The program of `regex`'s process: a task as JSON from the standard input, its answer to the standard output."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Any

# Bytes of memory, where the system has such a limit.
MAX_MEMORY = 1 << 29


class TooLong(Exception):
    """The text that is made is longer than asked for."""


def match(pattern: re.Pattern[str], text: str, task: Mapping[str, Any]) -> bool:
    """Whether the pattern is somewhere in the text."""
    del task
    return pattern.search(text) is not None


def first(pattern: re.Pattern[str], text: str, task: Mapping[str, Any]) -> str:
    """What a group finds first, 0 being the whole pattern; empty if there is none."""
    found = pattern.search(text)
    return (found[task["group"]] or "") if found and pattern.groups >= task["group"] else ""


def all_matches(pattern: re.Pattern[str], text: str, task: Mapping[str, Any]) -> list[str]:
    """Everything that the pattern finds; of a pattern with groups what the first one finds, as `findall` has it."""
    group = min(pattern.groups, 1)
    return _bounded((found[group] or "" for found in pattern.finditer(text)), task["most"])


def every(pattern: re.Pattern[str], text: str, task: Mapping[str, Any]) -> list[str]:
    """What a group finds, each time that it takes part; nothing of a pattern without such a group."""
    if not pattern.groups or pattern.groups < task["group"]:
        return []
    group = task["group"]
    return _bounded((found[group] for found in pattern.finditer(text) if found[group] is not None), task["most"])


def replace(pattern: re.Pattern[str], text: str, task: Mapping[str, Any]) -> str:
    """The text with replacements: `count` of them, or all if it is 0."""
    left = task["most"] - len(text)
    pattern.sub(task["replace"], "")  # a malformed text is refused even if nothing is replaced

    def put(found: re.Match[str]) -> str:
        nonlocal left
        new = found.expand(task["replace"])
        left -= len(new) - len(found[0])
        if left < 0:
            raise TooLong(f"expected a text of at most {task['most']} characters, got more")
        return new

    return pattern.sub(put, text, count=task["count"])


def _bounded(texts: Iterable[str], most: int) -> list[str]:
    found = []
    for text in texts:  # which may overlap, so that together they are longer than the whole
        most -= len(text) + 1
        if most < -1:
            raise TooLong("expected a shorter text, got more than a workflow may have")
        found.append(text)
    return found


TASKS: Mapping[str, Callable[[re.Pattern[str], str, Mapping[str, Any]], Any]] = {
    "match": match,
    "first": first,
    "all": all_matches,
    "every": every,
    "replace": replace,
}


def answer(task: Mapping[str, Any]) -> dict[str, Any]:
    """`found`, or `malformed` or `error` with a sentence."""
    try:
        pattern = re.compile(task["pattern"], task["flags"])
        return {"found": TASKS[task["kind"]](pattern, task["text"], task)}
    except (re.error, IndexError, OverflowError) as error:
        return {"malformed": str(error)}
    except (MemoryError, RecursionError, TooLong) as error:
        return {"error": str(error) or type(error).__name__}


if __name__ == "__main__":
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    json.dump(answer(json.load(sys.stdin)), sys.stdout)
