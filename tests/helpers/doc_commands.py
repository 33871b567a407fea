"""Checks the commands and programs of the documentation with their own parsers.

As a program it runs them, which takes minutes; see `tests/hardware/doc_commands.sh`.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import time
import warnings
from pathlib import Path
from typing import Any, TypeGuard

from doc_pages import ROOT, Block, Command, Refused, blocks, commands_in, pages

# Paths that a reader downloads: the original's checkpoints. Names in capitals are placeholders as well.
PLACEHOLDERS = ("checkpoints/Z-Image-Turbo", "checkpoints/comfyui", "checkpoints/taef1", "checkpoints/tokenizer")
# Exported by `make bundle`, which `make demo` and `make test` call.
BUNDLE = "engines/nano"
# Options for the output of a command.
OUTPUTS = ("out", "output", "output_dir", "data")
FOLDERS = tuple(f"{path.name}/" for path in sorted(ROOT.iterdir()) if path.is_dir() and not path.name.startswith("."))


class _Parsed(Exception):
    """Stops a program after its parser."""

    def __init__(self, values: dict[str, Any]) -> None:
        super().__init__()
        self.values = values


# --- parsing ----------------------------------------------------------------------------------------------------------


def parse(command: Command) -> dict[str, Any]:
    """Parses a command with its own parser; returns the options by name. Nothing is run.

    Raises Refused with the parser's words.
    """
    if command.program == "zimage":
        from zimage_rt.cli.main import app

        return _typer(command, app, list(command.words[1:]))
    if command.program == "zimage-export":
        from zimage_rt.export.cli import app

        return _typer(command, app, list(command.words[1:]))
    if command.program == "make":
        return _make(command)
    if command.program == "pip":
        return _pip(command)
    if command.program == "python":
        return _python(command)
    if "/" in command.words[0] and not Path(command.words[0]).is_absolute():
        if not (ROOT / command.words[0]).is_file():
            raise Refused(f"{command}: there is no {command.words[0]}")
        if not os.access(ROOT / command.words[0], os.X_OK):
            raise Refused(f"{command}: {command.words[0]} is not executable")
    return {}


def _typer(command: Command, app: Any, words: list[str]) -> dict[str, Any]:
    import typer

    known = typer.main.get_command(app)
    name, parent = command.program, None
    while hasattr(known, "commands") and not (words and words[0].startswith("-")):
        subcommand = words.pop(0) if words else ""
        if not subcommand and known.invoke_without_command:
            break
        if subcommand not in known.commands:
            raise Refused(f"{command}: {name} has no command {subcommand!r}; it has {', '.join(known.commands)}")
        known = known.commands[subcommand]
        name = f"{name} {subcommand}"
    if not command.whole:
        options = {option for parameter in known.params for option in (*parameter.opts, *parameter.secondary_opts)}
        for word in words:
            if word.startswith("-") and word.partition("=")[0] not in {*options, "--help", "-"}:
                raise Refused(f"{command}: {name} has no option {word}")
        return {}
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            return dict(known.make_context(name, words, parent=parent).params)
    except Exception as error:  # click's usage errors, and those of our own parsers
        if type(error).__name__ == "Exit":  # --help
            return {}
        message = error.format_message() if hasattr(error, "format_message") else error
        raise Refused(f"{command}: {message}") from error


def _make(command: Command) -> dict[str, Any]:
    targets = [word for word in command.words[1:] if "=" not in word and not word.startswith("-")]
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    for word in command.words[1:]:
        name, equals, _ = word.partition("=")
        if equals and not re.search(rf"^{re.escape(name)}\s*[?:]?=|\$\({re.escape(name)}\)", text, re.MULTILINE):
            raise Refused(f"{command}: the Makefile reads no {name}")
    # A dry run; make must not take our own caller for its parent.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}
    run = subprocess.run(["make", "-n", *targets], cwd=ROOT, env=environment, capture_output=True, text=True)
    if run.returncode:
        raise Refused(f"{command}: {run.stderr.strip()}")
    return {}


def _pip(command: Command) -> dict[str, Any]:
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for word in command.words[1:]:
        own = re.fullmatch(r"(zimage[-_]rt|\.|.*zimage_rt.*\.whl.*)\[([\w,-]+)\].*", word, re.DOTALL)
        unknown = set(own[2].split(",")) - set(project["optional-dependencies"]) if own else set()
        if unknown:
            raise Refused(f"{command}: pyproject.toml has no extra {', '.join(sorted(unknown))}")
    return {}


def _python(command: Command) -> dict[str, Any]:
    """`python FILE …` of this repository or `python -m zimage_rt.…`: run until its options are parsed."""
    words = list(command.words[1:])
    if words[:1] == ["-m"] and words[1:] and words[1].split(".")[0] == "zimage_rt":
        name, words = words[1], words[2:]
        run = lambda: runpy.run_module(name, run_name="__main__", alter_sys=True)  # noqa: E731
    elif words and words[0].endswith(".py"):
        path, words = ROOT / words[0], words[1:]
        if not path.is_file():
            raise Refused(f"{command}: there is no {path.relative_to(ROOT)}")
        run = lambda: runpy.run_path(str(path), run_name="__main__")  # noqa: E731
    else:
        return {}  # another module's business: pytest, venv
    if not command.whole and any(_is_placeholder(word) for word in words):
        return {}
    return _up_to_the_parser(command, run, words)


def _up_to_the_parser(command: Command, run: Any, words: list[str]) -> dict[str, Any]:
    import typer

    parse_args = argparse.ArgumentParser.parse_args

    def parsed(parser: argparse.ArgumentParser, args: Any = None, namespace: Any = None) -> Any:
        raise _Parsed(vars(parse_args(parser, args, namespace)))

    def run_typer(function: Any) -> None:
        app = typer.Typer(add_completion=False)
        app.command()(function)
        raise _Parsed(_typer(command, app, words))

    def call_typer(app: Any, *_: Any, **__: Any) -> None:
        raise _Parsed(_typer(command, app, words))

    errors, kept = io.StringIO(), (sys.argv, sys.path[:], typer.run, typer.Typer.__call__)
    argparse.ArgumentParser.parse_args = parsed  # type: ignore[method-assign,assignment]
    typer.run, typer.Typer.__call__ = run_typer, call_typer  # type: ignore[method-assign,assignment]
    sys.argv = [command.words[0], *words]
    try:
        with (
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(action="ignore", category=RuntimeWarning),  # of runpy: modules imported before
        ):
            run()
    except _Parsed as found:
        return found.values
    except SystemExit as error:
        if error.code not in (None, 0):
            raise Refused(f"{command}: {errors.getvalue().strip() or error.code}") from error
    except (ImportError, OSError) as error:
        raise Refused(f"{command}: {type(error).__name__}: {error}") from error
    finally:
        sys.argv, sys.path[:], typer.run, typer.Typer.__call__ = kept  # type: ignore[method-assign]
        argparse.ArgumentParser.parse_args = parse_args  # type: ignore[method-assign]
    return {}


# --- files ------------------------------------------------------------------------------------------------------------


def _is_placeholder(name: str) -> bool:
    return bool(re.search(r"…|\b[A-Z][A-Z_]+\b|<\w+>|\$", name)) or any(
        name == place or name.startswith(f"{place}/") for place in PLACEHOLDERS
    )


def exported(commands: list[Command]) -> set[str]:
    """Bundles that the pages' `zimage-export` commands write, relative to the repository."""
    from zimage_rt.export.recipe import read_recipe

    found = {BUNDLE}
    for page in pages():  # inside a program's comments, too
        for recipe in re.findall(r"zimage-export ([\w/.-]+\.toml)", (ROOT / page).read_text(encoding="utf-8")):
            if (ROOT / recipe).is_file():
                found.add(Path(os.path.relpath(read_recipe(ROOT / recipe).out, ROOT)).as_posix())
    for command in commands:
        if command.program == "zimage-export" and command.whole:
            try:
                options = parse(command)
            except Refused:
                continue  # told where its page is checked
            if options.get("out") is not None:
                found.add(Path(options["out"]).as_posix())
    return found


class Files:
    """Files that a page's commands may read: the repository's, and outputs of earlier commands.

    Args:
        bundles: see `exported`.
        shown: names of files whose content the page shows.
    """

    def __init__(self, bundles: set[str], shown: set[str]) -> None:
        self._bundles, self._made = bundles, set(shown)

    def check(self, command: Command, options: dict[str, Any]) -> None:
        """Adds a command's outputs. Raises Refused: the command reads a file that does not exist."""
        written = {str(options[name]) for name in OUTPUTS if isinstance(options.get(name), Path)}  # defaults, too
        given = {Path(part) for word in command.words[1:] for part in (word, word.partition("=")[2]) if part}
        paths = {name: value for name, value in options.items() if isinstance(value, Path)}
        read = {str(value) for name, value in paths.items() if name not in OUTPUTS and value in given}
        read |= {word for word in command.words[1:] if word.startswith(FOLDERS) and word not in written}
        if command.program == "zimage":
            read.update(options.get("lora") or ())  # FILE or FILE=WEIGHT
        for name in sorted(read):
            plain = re.sub(r"=-?[\d.]+$", "", name)
            if not self.has(plain):
                raise Refused(f"{command}: there is no {plain}, and no command before it makes one")
        self._made |= written

    def has(self, name: str) -> bool:
        """Whether a file exists or is a placeholder."""
        places = [Path(name).as_posix(), *(place.as_posix() for place in Path(name).parents)]
        known = self._bundles | self._made
        return _is_placeholder(name) or any(place in known for place in places) or (ROOT / name).exists()


def shown_files(page_blocks: list[Block]) -> set[str]:
    """Files whose content a page shows, named in the caption of a block, as in "`animals.csv`, in GBK:"."""
    return {
        match[1] for block in page_blocks if (match := re.match(r"`([\w./-]+\.\w+)`[^`]*:$", block.caption.strip()))
    }


# --- Python -----------------------------------------------------------------------------------------------------------


def check_python(block: Block, files: Files) -> None:
    """Compiles a block and checks its names of zimage_rt. Raises Refused."""
    import zimage_rt

    where = f"{block.page}:{block.line}"
    try:
        tree = ast.parse(block.text)
        compile(tree, where, "exec")
    except SyntaxError as error:
        raise Refused(f"{block.page}:{block.line + (error.lineno or 1) - 1}: {error.msg}") from error
    fields = {*zimage_rt.GenerateRequest.__dataclass_fields__, "callback"}
    for node in ast.walk(tree):
        line = f"{block.page}:{block.line + getattr(node, 'lineno', 1) - 1}"
        if isinstance(node, ast.Attribute):
            _check_attribute(line, node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "zimage_rt":
            module = __import__(node.module or "", fromlist=["x"])
            for name in node.names:
                if not hasattr(module, name.name):
                    raise Refused(f"{line}: {node.module} has no {name.name}")
        elif isinstance(node, ast.Call) and _is_generate(node.func):
            unknown = {keyword.arg for keyword in node.keywords if keyword.arg} - fields
            if unknown:
                raise Refused(f"{line}: a request has no {', '.join(sorted(unknown))}")
        elif _is_path(node) and not files.has(node.value):
            raise Refused(f"{line}: there is no {node.value}, and no page says how to make it")


def _is_generate(function: ast.expr) -> bool:
    """Whether a call is of `Engine.generate`; `client.images.generate` is of OpenAI's client."""
    if not isinstance(function, ast.Attribute) or function.attr != "generate":
        return False
    return not (isinstance(function.value, ast.Attribute) and function.value.attr == "images")


def _is_path(node: ast.AST) -> TypeGuard[ast.Constant]:
    value = node.value if isinstance(node, ast.Constant) else None
    return isinstance(value, str) and value.startswith(FOLDERS) and not re.search(r"\s", value)


def _check_attribute(line: str, node: ast.Attribute) -> None:
    names: list[str] = []
    inner: ast.expr = node
    while isinstance(inner, ast.Attribute):
        names.insert(0, inner.attr)
        inner = inner.value
    if not isinstance(inner, ast.Name) or inner.id != "zimage_rt":
        return
    found: Any = __import__("zimage_rt")
    for i, name in enumerate(names):
        if not hasattr(found, name):
            with contextlib.suppress(ImportError):
                __import__(".".join(["zimage_rt", *names[: i + 1]]))
        if not hasattr(found, name):
            raise Refused(f"{line}: {'.'.join(['zimage_rt', *names[:i]])} has no {name}")
        found = getattr(found, name)


# --- running ----------------------------------------------------------------------------------------------------------


def runnable(command: Command, gpu: bool) -> str | None:
    """Reason for which the release script skips a command; None if it runs it."""
    text = shlex.join(command.words)
    if "zimage_rt.benchmarks" in text:
        return "a benchmark: tests/hardware/cuda_gpu.sh and benchmarks/README.md"
    if command.program == "python" and not any(word.endswith(".py") for word in command.words[1:2]):
        return "runs tests or tools: CI does it"
    if command.program not in ("zimage", "zimage-export", "python"):
        return "installs or builds: CI and the other release scripts do it"
    if any(_is_placeholder(word) for word in command.words):
        return "needs what no clone has"
    if re.search(r"\bz-image\b", text):
        return "needs the 6 B checkpoint"
    if not gpu and (
        re.search(r"--backend tensorrt\b(?!_)|--device cuda|provider=cuda", text)
        or (command.program == "zimage" and re.search(r"--backend (cuda|tensorrt)", text))
    ):
        return "needs an NVIDIA GPU"
    return None


def main() -> int:
    """Runs the commands of all pages in order, each page in a folder of its own; returns the number of failures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="a folder for the logs and for what the commands write")
    parser.add_argument("--page", action="append", help="only these pages, as in docs/tensorrt.md")
    parser.add_argument("--gpu", action="store_true", help="run what needs an NVIDIA GPU, too")
    given = parser.parse_args()
    failures = 0
    out = given.out.absolute()
    tree = out / "tree"
    tree.mkdir(parents=True, exist_ok=True)
    for path in ROOT.iterdir():  # recipes name checkpoints beside them, and what is exported goes beside recipes
        if path.name not in ("engines", ".venv", ".git", "build", out.name) and not (tree / path.name).exists():
            (tree / path.name).symlink_to(path)
    shutil.copytree(
        ROOT / "engines",
        tree / "engines",
        ignore=lambda folder, names: {n for n in names if not n.endswith(".toml")},
        dirs_exist_ok=True,
    )
    if (ROOT / BUNDLE / "manifest.json").is_file() and not (tree / BUNDLE).exists():
        (tree / BUNDLE).symlink_to(ROOT / BUNDLE)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done: set[tuple[str, ...]] = set()
    for page in given.page or pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in blocks(page, text):
            for command in commands_in(block):
                reason = runnable(command, given.gpu)
                if reason is None and command.program == "zimage-export" and command.words in done:
                    reason = "was run for a page before"
                if reason is not None:
                    print(f"skipped   {command}  ({reason})", flush=True)
                    continue
                words = [word.removeprefix(".venv/bin/") for word in command.words]
                start = time.perf_counter()
                with (out / "log.txt").open("a", encoding="utf-8") as log:
                    log.write(f"--- {command}\n")
                    log.flush()
                    run = subprocess.run(words, cwd=tree, env=environment, stdout=log, stderr=subprocess.STDOUT)
                done.add(command.words)
                failures += run.returncode != 0
                state = "ok" if run.returncode == 0 else f"FAILED {run.returncode}"
                print(f"{state:<9} {command}  ({time.perf_counter() - start:.1f} s)", flush=True)
    print(f"{failures} failed" if failures else "all passed")
    return min(failures, 1)


if __name__ == "__main__":
    sys.exit(main())
