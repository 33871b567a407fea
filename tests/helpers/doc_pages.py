"""Finds the commands of the documentation in the fenced blocks and sentences of its pages."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGES = (
    "README.md",
    "CONTRIBUTING.md",
    "CHANGELOG.md",
    "SECURITY.md",
    "docs/*.md",
    "examples/*.md",
    "checkpoints/*/README.md",
    "benchmarks/README.md",
    "findings/README.md",
)
SHELLS = ("sh", "bash", "shell", "console")
OURS = re.compile(r"(\$ )?(\.venv/bin/)?(zimage|zimage-export|make|python3? -m zimage_rt\S*|pip install) \S")


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    Attributes:
        page: path relative to the repository.
        line: number of its first line of content, from 1.
        language: the info string of the fence.
        caption: the line of text before the fence.
    """

    page: str
    line: int
    language: str
    text: str
    caption: str


@dataclasses.dataclass(frozen=True)
class Command:
    """A command of a page.

    Attributes:
        words: its words without assignments of environment variables.
        whole: whether it can be run; a command in a sentence may be incomplete (`zimage generate --like`).
    """

    page: str
    line: int
    words: tuple[str, ...]
    environment: tuple[str, ...] = ()
    whole: bool = True

    @property
    def program(self) -> str:
        """Name of the program without its folder: `zimage` for `.venv/bin/zimage`."""
        name = self.words[0].removeprefix("$").removeprefix(".venv/bin/")
        return "python" if re.fullmatch(r"python3?(\.\d+)?", name) else name

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {shlex.join(self.words)}"


class Refused(Exception):
    """A command that its program would refuse, or a missing file."""


def pages() -> list[str]:
    """All pages, the README first."""
    return [path.relative_to(ROOT).as_posix() for pattern in PAGES for path in sorted(ROOT.glob(pattern))]


def blocks(page: str, text: str) -> list[Block]:
    """Fenced blocks of a page. Raises Refused: a block is not closed."""
    found, lines, start, fence, caption = [], text.splitlines(), 0, "", ""
    for number, line in enumerate(lines, 1):
        mark = re.match(r"\s*(```+)\s*([\w+-]*)", line)
        if mark and not fence:
            fence, language, start = mark[1], mark[2], number
            caption = next((before for before in reversed(lines[: number - 1]) if before.strip()), "")
        elif mark and line.strip() == fence:
            found.append(Block(page, start + 1, language, "\n".join(lines[start : number - 1]), caption))
            fence = ""
    if fence:
        raise Refused(f"{page}:{start}: a block that nothing closes")
    return found


def commands_in(block: Block) -> Iterator[Command]:
    """Commands of a shell block, or of a block without a language if a line begins with one of our programs."""
    if block.language not in (*SHELLS, ""):
        return
    waiting, first = "", block.line
    for number, line in enumerate(block.text.splitlines(), block.line):
        first = first if waiting else number
        waiting += line
        if waiting.endswith("\\"):
            waiting = waiting[:-1] + " "
            continue
        if block.language or OURS.match(waiting):
            yield from _split(block.page, first, waiting.removeprefix("$ "))
        waiting = ""
    if waiting and (block.language or OURS.match(waiting)):
        yield from _split(block.page, first, waiting)


def _split(page: str, line: int, text: str) -> Iterator[Command]:
    """Commands of a line. Raises Refused: its quotes do not match."""
    lexer = shlex.shlex(text, posix=True, punctuation_chars="&|;")
    lexer.whitespace_split = True
    words: list[str] = []
    try:
        for word in [*lexer, ";"]:
            if word.strip("&|;"):
                words.append(word)
                continue
            count = 0
            while count < len(words) and re.fullmatch(r"[A-Za-z_]\w*=.*", words[count], re.DOTALL):
                count += 1
            if words[count:]:
                yield Command(page, line, tuple(words[count:]), tuple(words[:count]))
            words = []
    except ValueError as error:
        raise Refused(f"{page}:{line}: {text}: {error}") from error


def inline_commands(page: str, text: str) -> Iterator[Command]:
    """Commands in sentences and tables, complete or not; fenced blocks are skipped."""
    inside = False
    for number, line in enumerate(text.splitlines(), 1):
        if re.match(r"\s*```", line):
            inside = not inside
        elif not inside:
            for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", line):
                if OURS.match(span):
                    with contextlib.suppress(Refused):  # a sentence may cut a command anywhere
                        for command in _split(page, number, span):
                            yield dataclasses.replace(command, whole=False)
