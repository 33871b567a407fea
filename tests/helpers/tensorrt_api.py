"""The TensorRT APIs that this package uses, as the libraries' own bindings declare them.

    python tests/helpers/tensorrt_api.py tensorrt_rtx
    python tests/helpers/tensorrt_api.py tensorrt tensorrt_cu13_bindings-11.4….whl
    python tests/helpers/tensorrt_api.py tensorrt tensorrt_cu13_bindings-10.16….whl tests/helpers/tensorrt_10.16.pyi

The installed package, or a bindings wheel, becomes .mypy_path/tensorrt_rtx or .mypy_path/tensorrt.

writes a record: the signatures of the classes and members that our files name, and of what those mention. mypy holds
our calls to the records in .mypy_path (`make lint`), and test_tensorrt_api.py holds the records to the bindings. Run it
again when a file uses something new or for a new release.

`tensorrt`'s libraries need not be there: its bindings import from them nine C functions, which a compiler stubs here.
That is enough to read every signature, and to run nothing.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
RECORDS = {
    "tensorrt_rtx": ROOT / ".mypy_path" / "tensorrt_rtx" / "__init__.pyi",
    "tensorrt": ROOT / ".mypy_path" / "tensorrt" / "__init__.pyi",
    "tensorrt 10": ROOT / "tests" / "helpers" / "tensorrt_10.16.pyi",
}

# What `tensorrt.so` imports from libnvinfer, libnvinfer_plugin and libnvonnxparser (nm -D, 10.16 and 11.4 alike).
C_FUNCTIONS = (
    "createInferBuilder_INTERNAL",
    "createInferRefitter_INTERNAL",
    "createInferRuntime_INTERNAL",
    "createNvOnnxParserRefitter_INTERNAL",
    "createNvOnnxParser_INTERNAL",
    "getBuilderPluginRegistry",
    "getNvOnnxParserVersion",
    "getPluginRegistry",
    "initLibNvInferPlugins",
)

# What the classes do and their docstrings do not say; test_tensorrt_api.py tries it.
UNDECLARED = {
    "Dims": "def __iter__(self) -> typing.Iterator[int]: ...",
    "IHostMemory": "def __buffer__(self, flags: int, /) -> memoryview: ...",
}


def sources() -> list[Path]:
    """Our files that talk to either library."""
    folders = (ROOT / "zimage_rt" / "backends", ROOT / "export" / "builders")
    return sorted(path for folder in folders for path in folder.glob("*tensorrt*.py"))


def names_used() -> set[str]:
    """Every attribute that those files name, whosoever it is."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in sources()]
    return {node.attr for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def library_names_used() -> dict[str, set[str]]:
    """File → the attributes taken from a library's module itself, which files call `trt` or `library`."""
    used = {}
    for path in sources():
        tree = ast.parse(path.read_text(encoding="utf-8"))
        used[str(path.relative_to(ROOT))] = {
            node.attr
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute)
            and (
                (isinstance(node.value, ast.Name) and node.value.id in ("trt", "library"))
                or (isinstance(node.value, ast.Attribute) and node.value.attr in ("trt", "library"))
            )
        }
    return used


def stub_libraries(folder: Path, major: str) -> None:
    """Libraries that have the names the bindings ask for, and do nothing."""
    code = "".join(f"void *{name}(void) {{ return 0; }}\n" for name in C_FUNCTIONS)
    for library in ("nvinfer", "nvinfer_plugin", "nvonnxparser"):
        file = f"lib{library}.so.{major}"
        command = ["cc", "-shared", "-fPIC", f"-Wl,-soname,{file}", "-x", "c", "-", "-o", str(folder / file)]
        subprocess.run(command, input=code, text=True, check=True)


def generate(module: str, path: list[Path] = [], libraries: Path | None = None) -> str:  # noqa: B006
    """The stub that mypy's stubgen makes of an extension module, from the signatures in its docstrings."""
    environment = dict(os.environ)
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(str(entry) for entry in path)
    if libraries is not None:
        environment["LD_LIBRARY_PATH"] = str(libraries)
    with tempfile.TemporaryDirectory() as folder:
        command = [str(Path(sys.executable).parent / "stubgen"), "-q", "--inspect-mode", "-m", module, "-o", folder]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=folder)
        stub = Path(folder) / (module.replace(".", "/") + ".pyi")
        if not stub.is_file():
            raise RuntimeError(f"{module}: stubgen made nothing: {run.stdout}{run.stderr}")
        return stub.read_text(encoding="utf-8")


def generate_from_wheel(wheel: Path) -> str:
    """The stub of a `tensorrt` bindings wheel, without its libraries."""
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
        stub_libraries(Path(folder), wheel.name.split("-")[1].split(".")[0])
        return generate("tensorrt_bindings.tensorrt", [Path(folder)], Path(folder))


def parse(stub: str) -> ast.Module:
    """A stub's tree, without the lines that are no Python: one docstring has a default before a plain argument."""
    lines = stub.splitlines()
    for _ in range(10):
        try:
            return ast.parse("\n".join(lines))
        except SyntaxError as error:
            del lines[(error.lineno or 1) - 1]
    raise ValueError("the stub cannot be read")


def members(stub: str) -> dict[str, dict[str, list[str]]]:
    """Class → member → its declarations (several where overloaded)."""
    return {
        node.name: {name: [ast.unparse(item) for item in items] for name, items in _members(node).items()}
        for node in parse(stub).body
        if isinstance(node, ast.ClassDef)
    }


def _members(node: ast.ClassDef) -> dict[str, list[ast.stmt]]:
    found: dict[str, list[ast.stmt]] = {}
    for item in node.body:
        if isinstance(item, ast.FunctionDef | ast.ClassDef):
            found.setdefault(item.name, []).append(item)
        elif isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            found.setdefault(item.target.id, []).append(item)
    return found


def _typed(item: ast.stmt) -> ast.stmt:
    """What the bindings leave untyped, as Any: mypy wants it said."""
    for node in ast.walk(item):
        if isinstance(node, ast.FunctionDef):
            arguments = [*node.args.args[1:], *node.args.kwonlyargs, node.args.vararg, node.args.kwarg]
            for argument in arguments:
                if argument is not None and argument.annotation is None:
                    argument.annotation = ast.Name("Any")
            node.returns = node.returns or ast.Name("Any")
    return item


def record(stub: str, version: str, used: set[str]) -> str:
    """The part of a stub that is used: classes that are named, their members that are, and what those mention."""
    tree = parse(stub)
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    kept: dict[str, ast.ClassDef] = {}
    waiting = sorted(name for name in classes if name in used)
    while waiting:
        name = waiting.pop()
        if name in kept:
            continue
        node = classes[name]
        names = {*used, "__init__"}
        node.body = [
            _typed(item)
            for member, items in _members(node).items()
            for item in items
            if member in names or isinstance(item, ast.ClassDef)
        ]
        node.body += ast.parse(UNDECLARED.get(name, "")).body
        node.body = node.body or [ast.Expr(ast.Constant(...))]
        kept[name] = node
        mentioned = {item.id for part in (node, *node.bases) for item in ast.walk(part) if isinstance(item, ast.Name)}
        waiting += sorted(mentioned & set(classes))
    lines = [
        f"# Written by tests/helpers/tensorrt_api.py from the bindings of {version}: what this package uses of them.",
        "import collections.abc",
        "import typing",
        "from typing import Any, Callable, ClassVar, overload",
        "import numpy",
        "import typing_extensions",
        "__version__: str",
    ]
    for item in tree.body:
        # `bool` and its like are element types in the bindings and would hide Python's.
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id in used - {"bool"}:
            lines.append(ast.unparse(item))
        if isinstance(item, ast.ClassDef) and item.name in kept:
            lines.append(ast.unparse(item))
        if isinstance(item, ast.FunctionDef) and item.name in used:
            lines.append(ast.unparse(item))
    return "\n".join(lines).replace("nvinfer1::", "") + "\n"


def main(arguments: list[str]) -> None:
    """Write one record; see the module's docstring."""
    library, *rest = arguments
    if library == "tensorrt_rtx":
        import tensorrt_rtx

        stub, version = generate("tensorrt_rtx_bindings.tensorrt_rtx"), f"tensorrt_rtx {tensorrt_rtx.__version__}"
    else:
        wheel = Path(rest.pop(0)).resolve()
        stub, version = generate_from_wheel(wheel), "tensorrt " + wheel.name.split("-")[1]
    target = Path(rest[0]) if rest else RECORDS[library]
    target.write_text(record(stub, version, names_used()), encoding="utf-8")
    for command in ("format -q", "check --fix -q", "format -q"):
        subprocess.run([str(Path(sys.executable).parent / "ruff"), *command.split(), str(target)], check=True)


if __name__ == "__main__":
    main(sys.argv[1:])
