"""The entry points of `zimage` and `zimage-export`: what can go wrong before their own code runs is one line, too."""

from __future__ import annotations

import importlib
import sys

# What each command's extra brings, as modules; any other that is missing is a fault of the installation, and is shown.
EXTRAS = {
    "cli": ("typer", "rich"),
    "export": ("torch", "onnx", "onnxscript", "onnx_ir", "safetensors", "onnxruntime", "typer", "rich"),
}
INTERRUPTED = 130


def zimage() -> None:
    """`zimage`. Exit codes: 0 done, 1 failed, 2 wrong usage, 130 interrupted."""
    _run("zimage", "zimage_rt.cli.main", "cli")


def zimage_export() -> None:
    """`zimage-export`. Exit codes: 0 done, 1 failed, 2 wrong usage or recipe, 130 interrupted."""
    _run("zimage-export", "zimage_rt.export.cli", "export")


def _run(program: str, module: str, extra: str) -> None:
    show_every_character()
    try:
        importlib.import_module(module).main()
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in EXTRAS[extra]:
            raise
        print(
            f"{program}: it needs {missing}, which is not installed; install it with: pip install 'zimage-rt[{extra}]'",
            file=sys.stderr,
        )
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"{program}: stopped", file=sys.stderr)
        sys.exit(INTERRUPTED)


def show_every_character() -> None:
    """Print what the console cannot show as escapes: a prompt in Chinese must not end a command that has drawn it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # a test's or a notebook's own stream may not have it
            stream.reconfigure(errors="backslashreplace")
