"""Compiles our C++ files without linking, with another compiler and standard library than the build's.

    python cmake/second_compiler.py build/cuda/compile_commands.json [COMPILER...]

The default is the clang and libc++ of the `ziglang` wheel; `g++-14` or a path with arguments is possible. Files that
rely on transitive includes fail here first. CUDA files are skipped: nvcc does not support libc++ on x86.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WARNINGS = ("-Wall", "-Wextra", "-Wshadow", "-Werror")
KEPT = re.compile(r"-I|-D|-std=")


def arguments(command: str) -> list[str]:
    """Include folders, definitions and standard of an entry of a compilation database."""
    words, kept = shlex.split(command), []
    for word, following in zip(words, [*words[1:], ""], strict=True):
        if word == "-isystem":
            kept += [word, following]
        elif KEPT.match(word):
            kept.append(word)
    return kept


def main() -> None:
    """Compiles every .cc file of the database once; exits with the number of failures."""
    database = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    compiler = sys.argv[2:] or [sys.executable, "-m", "ziglang", "c++", "-target", "x86_64-linux-gnu.2.28"]
    files = {entry["file"]: entry for entry in database if entry["file"].endswith(".cc")}

    def compile_one(entry: dict[str, str]) -> str:
        with tempfile.NamedTemporaryFile(suffix=".o") as made:
            command = [*compiler, *arguments(entry["command"]), *WARNINGS, "-c", "-o", made.name, entry["file"]]
            run = subprocess.run(command, cwd=entry["directory"], capture_output=True, text=True)
        return "" if run.returncode == 0 else f"{entry['file']}\n{run.stderr}"

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        failed = [message for message in pool.map(compile_one, files.values()) if message]
    version = subprocess.run([*compiler, "--version"], capture_output=True, text=True).stdout.splitlines()
    print(
        "\n".join(
            [
                *failed,
                f"{version[0] if version else compiler}: {len(files) - len(failed)} of {len(files)} files compile",
            ]
        )
    )
    sys.exit(len(failed))


if __name__ == "__main__":
    main()
