"""The entry points of `zimage` and `zimage-export`, which report errors before their own code in one line."""

from __future__ import annotations

import importlib
import sys

# Modules of each command's extra; any other missing module is an error of the installation and is raised.
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
    """Print characters that the console cannot encode as escapes, so that a Chinese prompt does not end a command."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # streams of tests and notebooks may not have it
            stream.reconfigure(errors="backslashreplace")
