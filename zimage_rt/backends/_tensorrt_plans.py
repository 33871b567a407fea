"""Checks of TensorRT plans before they run, without a GPU and NVIDIA's libraries.

A plan is a program, which the library trusts. So a plan is selected by its entry in the manifest, then hashed, and only
then given to the library. `verify=False` skips the hashes of other files, never those of plans.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..bundle.manifest import EngineSpec, Manifest, ModuleSpec, ProfileRange, TensorSpec, shape_text
from ..bundle.verify import check_file
from ..errors import BundleMismatch, RequestError
from .base import CheckModule

Shape = tuple[int, ...]
Shapes = Mapping[str, Shape]

# Bytes per element; bfloat16 only between the parts of a split module, because numpy has none.
ITEM_SIZES = {
    "float32": 4,
    "float16": 2,
    "bfloat16": 2,
    "int64": 8,
    "int32": 4,
    "int8": 1,
    "uint8": 1,
    "bool": 1,
}

# TensorRT's names of data types → the manifest's.
DTYPES = {
    "FLOAT": "float32",
    "HALF": "float16",
    "BF16": "bfloat16",
    "INT64": "int64",
    "INT32": "int32",
    "INT8": "int8",
    "UINT8": "uint8",
    "BOOL": "bool",
}


def checked_plans(
    bundle: Path, manifest: Manifest, module: str, check: CheckModule, backend: str, version: str, capability: str
) -> list[tuple[EngineSpec, mmap.mmap]]:
    """A module's plans in order, each mapped and hashed, ready for the library.

    Args:
        bundle, manifest, module: the bundle and the module's name.
        check: checks the module's other files, which only stripped plans need.
        backend, version: the library's name and version.
        capability: the GPU's compute capability, e.g. `8.6`.

    Raises:
        BundleMismatch: the bundle has no plan for this, or not the one its manifest names.
    """
    spec = manifest.module(module)
    engines = select_engines(module, spec.engines, backend, version, capability)
    check_chain(module, spec, engines)
    if any(engine.stripped for engine in engines):
        check(module)
    return [(engine, read_plan(bundle, manifest, engine.file)) for engine in engines]


def select_engines(
    module: str, engines: Sequence[EngineSpec], backend: str, version: str, capability: str
) -> tuple[EngineSpec, ...]:
    """The parts of a module for this backend, library version and GPU, in order.

    A bundle may have plans for several GPUs. Raises BundleMismatch, with the plans that the bundle has, if none fits.
    """
    again = f"export it again here with --backend {backend}"
    ours = [engine for engine in engines if engine.backend == backend]
    if not ours:
        there = ", ".join(sorted({engine.backend for engine in engines}))
        raise BundleMismatch(
            f"{module}: expected engines of backend {backend}, got {f'engines of {there}' if there else 'none'} "
            f"in this bundle; export it with --backend {backend}"
        )
    of_version = [engine for engine in ours if engine.version == version]
    if not of_version:
        built = ", ".join(sorted({engine.version for engine in ours}))
        raise BundleMismatch(
            f"{module}: expected engines of {backend} {version}, which is installed here, got engines of {built}; "
            f"{again}, or install the version that built it"
        )
    parts = [engine for engine in of_version if capability in engine.compute_capabilities]
    if not parts:
        built = ", ".join(sorted({target for engine in of_version for target in engine.compute_capabilities}))
        raise BundleMismatch(
            f"{module}: expected engines for compute capability {capability}, which this GPU has, got engines for "
            f"{built}; export it again with --backend {backend} --sm {capability.replace('.', '')}"
        )
    parts.sort(key=lambda engine: engine.part)
    if [engine.part for engine in parts] != list(range(len(parts))):
        raise BundleMismatch(
            f"{module}: expected parts 0 to {len(parts) - 1}, got "
            f"{', '.join(str(part.part) for part in parts)}; {again}"
        )
    return tuple(parts)


def check_chain(module: str, spec: ModuleSpec, parts: Sequence[EngineSpec]) -> None:
    """Raise BundleMismatch unless the parts, run in order, compute the module's outputs from its inputs."""
    known = {tensor.name: tensor for tensor in spec.inputs}
    for part in parts:
        for tensor in part.inputs:
            if tensor.name not in known:
                raise BundleMismatch(
                    f"{module}: part {part.part} needs {tensor.name!r}, which is neither an input of the module nor "
                    "an output of an earlier part; export the bundle again"
                )
            if (had := known[tensor.name]).dtype != tensor.dtype or len(had.dims) != len(tensor.dims):
                raise BundleMismatch(
                    f"{module}: part {part.part} takes {tensor.name} as {tensor.dtype} {shape_text(tensor.dims)}, got "
                    f"{had.dtype} {shape_text(had.dims)}; export the bundle again"
                )
        ranged = {name for profile in part.profiles for name in profile}
        if not part.profiles or not ranged <= {tensor.name for tensor in part.inputs}:
            raise BundleMismatch(
                f"{module}: part {part.part} has {len(part.profiles)} profiles for {', '.join(sorted(ranged))}, "
                f"expected one or more for {', '.join(tensor.name for tensor in part.inputs)}; export the bundle again"
            )
        known |= {tensor.name: tensor for tensor in part.outputs}
        for tensor in (*part.inputs, *part.outputs):
            if tensor.dtype not in ITEM_SIZES:
                raise BundleMismatch(
                    f"{module}.{tensor.name}: expected one of {', '.join(ITEM_SIZES)}, got {tensor.dtype}; "
                    "upgrade zimage_rt"
                )
    made = {tensor.name for part in parts for tensor in part.outputs}
    for tensor in spec.outputs:
        if tensor.name not in made:
            raise BundleMismatch(f"{module}: no part gives the output {tensor.name!r}; export the bundle again")


def read_plan(bundle: Path, manifest: Manifest, file: str) -> mmap.mmap:
    """Map a plan and compare its hash with the manifest's; the hashed mapping is returned. Raises BundleMismatch."""
    if file not in manifest.files:
        raise BundleMismatch(
            f"{file}: the manifest has no hash of it; a plan is a program and runs only if its hash stands there: "
            "export the bundle again"
        )
    entry = manifest.files[file]
    check_file(bundle, file, entry, content=False)
    if entry.size == 0:
        raise BundleMismatch(f"{bundle / file}: the plan is empty; export the bundle again")
    with (bundle / file).open("rb") as stream:
        plan = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
    if (actual := hashlib.sha256(plan).hexdigest()) != entry.sha256:
        raise BundleMismatch(
            f"{bundle / file}: expected sha256 {entry.sha256[:16]}…, got {actual[:16]}…: the plan was changed, and a "
            "plan is a program; copy the bundle again, or export it again"
        )
    return plan


def check_border(label: str, spec: EngineSpec, border: Sequence[tuple[TensorSpec, bool]], profiles: int) -> None:
    """Raise BundleMismatch unless a loaded engine has the tensors and profiles of its manifest entry.

    Args:
        label: the plan's name in messages.
        spec: the manifest's entry.
        border: the engine's tensors, with dynamic sizes as -1, and whether each is an input.
        profiles: the number of the engine's profiles.
    """
    again = "export the bundle again"
    found = {tensor.name: (tensor, is_input) for tensor, is_input in border}
    wanted = {tensor.name: (tensor, True) for tensor in spec.inputs}
    wanted |= {tensor.name: (tensor, False) for tensor in spec.outputs}
    if set(found) != set(wanted):
        raise BundleMismatch(
            f"{label}: expected tensors {', '.join(sorted(wanted))}, got {', '.join(sorted(found))}; {again}"
        )
    for name, (tensor, is_input) in wanted.items():
        got, got_input = found[name]
        if got_input != is_input or got.dtype != tensor.dtype or not _dims_match(tensor.dims, got.dims):
            raise BundleMismatch(
                f"{label}: expected {'input' if is_input else 'output'} {name} as {tensor.dtype} "
                f"{shape_text(tensor.dims)}, got {'input' if got_input else 'output'} {got.dtype} "
                f"{shape_text(got.dims)}; {again}"
            )
    if profiles != len(spec.profiles):
        raise BundleMismatch(f"{label}: expected {len(spec.profiles)} profiles, got {profiles}; {again}")


def _dims_match(dims: Sequence[int | str], got: Sequence[int | str]) -> bool:
    """Whether sizes, -1 for dynamic ones, match the dims of a spec."""
    return len(dims) == len(got) and all(
        size in (dim, -1) or isinstance(dim, str) for dim, size in zip(dims, got, strict=True)
    )


def check_inputs(module: str, specs: Sequence[TensorSpec], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The module's inputs, contiguous. Raises RequestError if one does not match the manifest."""
    sizes: dict[str, int] = {}
    checked = {}
    for tensor in specs:
        got = inputs[tensor.name]
        fits = got.dtype == tensor.dtype and _dims_match(tensor.dims, got.shape)
        if not fits or any(
            sizes.setdefault(dim, size) != size
            for dim, size in zip(tensor.dims, got.shape, strict=True)
            if isinstance(dim, str)
        ):
            raise RequestError(
                f"{module}.{tensor.name}: expected {tensor.dtype} {shape_text(tensor.dims)}"
                f"{_known_sizes(sizes, tensor)}, got {got.dtype} {shape_text(got.shape)}"
            )
        checked[tensor.name] = np.ascontiguousarray(got)
    return checked


def _known_sizes(sizes: Mapping[str, int], tensor: TensorSpec) -> str:
    known = [f"{dim} {sizes[dim]}" for dim in tensor.dims if isinstance(dim, str) and dim in sizes]
    return f" with {', '.join(known)}" if known else ""


def choose_profile(label: str, profiles: Sequence[Mapping[str, ProfileRange]], shapes: Shapes) -> int:
    """The optimisation profile for shapes: of those that contain them, the one tuned for the nearest.

    Raises RequestError, with the engine's profiles, if none contains them.
    """
    fitting = [index for index, profile in enumerate(profiles) if _holds(profile, shapes)]
    if not fitting:
        names = sorted({name for profile in profiles for name in profile})
        wanted = ", ".join(f"{name} {shape_text(shapes[name])}" for name in names if name in shapes)
        raise RequestError(
            f"{label}: {wanted} lies outside every profile of its engine: {profiles_text(profiles)}; ask for a size "
            "inside one, or export the bundle with a profile that holds this one"
        )
    return min(fitting, key=lambda index: _distance(profiles[index], shapes))


def rows_per_run(profiles: Sequence[Mapping[str, ProfileRange]], specs: Sequence[TensorSpec], shapes: Shapes) -> int:
    """The number of samples per run of a batch: all, or as many as a profile allows.

    Guidance doubles a batch, and a profile for large images may allow one sample; a sample's result does not depend on
    the others. If no profile fits it is the whole batch, for which `choose_profile` raises.
    """
    batch = shapes[specs[0].name][0]
    if all(spec.dims[0] == "batch" for spec in specs):
        for rows in range(batch, 0, -1):
            fewer = {name: (rows, *shape[1:]) for name, shape in shapes.items()}
            if any(_holds(profile, fewer) for profile in profiles):
                # Runs of nearly equal size.
                return math.ceil(batch / math.ceil(batch / rows))
    return batch


def profiles_text(profiles: Sequence[Mapping[str, ProfileRange]]) -> str:
    """The profiles for messages: `profile 0: latents [1, 16, 8, 8] to [4, 16, 64, 64]; profile 1: …`."""
    return "; ".join(
        f"profile {index}: "
        + ", ".join(f"{name} {shape_text(item.min)} to {shape_text(item.max)}" for name, item in profile.items())
        for index, profile in enumerate(profiles)
    )


def _holds(profile: Mapping[str, ProfileRange], shapes: Shapes) -> bool:
    return all(
        len(shapes[name]) == len(item.min)
        and all(low <= size <= high for low, size, high in zip(item.min, shapes[name], item.max, strict=True))
        for name, item in profile.items()
    )


def _distance(profile: Mapping[str, ProfileRange], shapes: Shapes) -> float:
    """The distance of shapes from a profile's `opt`: the sum of the sizes' absolute log ratios."""
    return sum(
        abs(math.log(size / opt))
        for name, item in profile.items()
        for size, opt in zip(shapes[name], item.opt, strict=True)
    )


def check_output(label: str, tensor: TensorSpec, shape: Shape) -> int:
    """Bytes of an output with the shape that the engine inferred. Raises BundleMismatch if the manifest's differs."""
    if any(size < 0 for size in shape) or not _dims_match(tensor.dims, shape):
        raise BundleMismatch(
            f"{label}.{tensor.name}: expected {shape_text(tensor.dims)}, got {shape_text(shape)}; "
            "export the bundle again"
        )
    return math.prod(shape) * ITEM_SIZES[tensor.dtype]


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file as views of bytes of the mapped file."""
    with path.open("rb") as file:
        mapped = np.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), np.uint8)
    start = 8 + int.from_bytes(mapped[:8].tobytes(), "little")
    header = json.loads(mapped[8:start].tobytes())
    header.pop("__metadata__", None)
    return {
        name: mapped[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        for name, entry in header.items()
    }


def initializers(graph: bytes, names: Iterable[str]) -> set[str]:
    """The subset of these tensors that are initializers of an ONNX graph; constant folding removes some.

    The graph is searched without the onnx package: `TensorProto.name` is field 8 (onnx.proto3), so that a name follows
    the tag 0x42 and its length. Node names, values and other strings have other tags.
    """
    return {name for name in names if b"\x42" + _varint(len(name.encode())) + name.encode() in graph}


def _varint(value: int) -> bytes:
    """A number in protobuf's varint encoding: seven bits per byte, the lowest first."""
    data = b""
    while value > 0x7F:
        data += bytes([value & 0x7F | 0x80])
        value >>= 7
    return data + bytes([value])
