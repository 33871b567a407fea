"""The TensorRT backends' refusals, on real plans. What needs a GPU is in test_tensorrt_gpu.py."""

from __future__ import annotations

import dataclasses
import shutil
import sys
import threading
import types
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from tensorrt_plans import MODULE, WIDTH, H, X, Y, with_engines, write_bundle

import zimage_rt
from zimage_rt.backends import _tensorrt_cache as caches
from zimage_rt.backends import nvidia_driver
from zimage_rt.backends._tensorrt_plans import (
    check_border,
    check_inputs,
    check_output,
    checked_plans,
    choose_profile,
    initializers,
    map_tensors,
    rows_per_run,
)
from zimage_rt.backends.base import Device
from zimage_rt.backends.registry import BACKENDS, load_backend, probe_backends
from zimage_rt.bundle.manifest import EngineSpec, Manifest, ShapeRange, ShapeRanges, TensorSpec, read_manifest
from zimage_rt.errors import BackendUnavailable, BundleMismatch, RequestError

trt = pytest.importorskip(
    "tensorrt_rtx", reason="builds plans with TensorRT-RTX: pip install 'zimage-rt[tensorrt-rtx]'"
)
pytest.importorskip("cuda.bindings", reason="the TensorRT backends use cuda-bindings")

GPU_PROBLEM = nvidia_driver.query().problem
VERSION = trt.__version__
TARGETS = ("8.6", "8.9")

needs_no_gpu = pytest.mark.skipif(GPU_PROBLEM is None, reason="says what happens where there is no GPU")


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plans") / "bundle"
    write_bundle(trt, folder, TARGETS)
    return folder


@pytest.fixture
def folder(built: Path, tmp_path: Path) -> Path:
    """A copy to spoil."""
    return shutil.copytree(built, tmp_path / "bundle")


@pytest.fixture
def manifest(built: Path) -> Manifest:
    return read_manifest(built)


@pytest.fixture
def engines(manifest: Manifest) -> tuple[EngineSpec, ...]:
    return manifest.modules[MODULE].engines


def plans(folder: Path, manifest: Manifest, **changes: str) -> list[tuple[EngineSpec, bytes]]:
    """What would be shown to the library; the other files' check does nothing, as with `verify=False`."""
    options = {"backend": "tensorrt_rtx", "version": VERSION, "capability": "8.6"} | changes
    found = checked_plans(folder, manifest, MODULE, lambda module: None, **options)
    return [(engine, bytes(plan)) for engine, plan in found]


# Which plans are taken.


def test_the_plans_of_this_gpu_come_in_order_and_whole(folder: Path, manifest: Manifest, engines) -> None:
    taken = plans(folder, with_engines(manifest, *reversed(engines)))
    assert [engine.part for engine, _ in taken] == [0, 1]
    assert [plan for _, plan in taken] == [(folder / engine.file).read_bytes() for engine in engines]


def test_of_plans_for_several_gpus_this_ones_are_taken(folder: Path, manifest: Manifest, engines) -> None:
    others = [dataclasses.replace(engine, file="other", compute_capabilities=("12.0",)) for engine in engines]
    taken = plans(folder, with_engines(manifest, *others, *engines), capability="8.9")
    assert [engine.file for engine, _ in taken] == [engine.file for engine in engines]


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("place", [0, 5, 0.5, -1], ids=["magic", "header", "middle", "end"])
def test_a_changed_byte_is_refused_whatever_verify_says(
    folder: Path, manifest: Manifest, part: int, place: float
) -> None:
    path = folder / f"{MODULE}.part{part}.engine"
    content = bytearray(path.read_bytes())
    content[int(place * len(content)) if isinstance(place, float) else place] ^= 1
    path.write_bytes(content)
    with pytest.raises(BundleMismatch, match=rf"part{part}.engine: expected sha256 .* a plan is a program"):
        plans(folder, manifest)


def test_a_truncated_missing_or_unnamed_plan_is_refused(folder: Path, manifest: Manifest, engines) -> None:
    path = folder / engines[1].file
    content = path.read_bytes()
    path.write_bytes(content[:-7])
    with pytest.raises(BundleMismatch, match=f"expected {len(content)} bytes, got {len(content) - 7}"):
        plans(folder, manifest)
    path.unlink()
    with pytest.raises(BundleMismatch, match="it is missing"):
        plans(folder, manifest)
    unnamed = dataclasses.replace(manifest, files={engines[0].file: manifest.files[engines[0].file]})
    path.write_bytes(content)
    with pytest.raises(BundleMismatch, match="the manifest has no hash of it"):
        plans(folder, unnamed)


def test_another_target_another_version_another_backend(folder: Path, manifest: Manifest) -> None:
    with pytest.raises(BundleMismatch, match=r"compute capability 12\.0.*got engines for 8\.6, 8\.9.*--sm 120"):
        plans(folder, manifest, capability="12.0")
    with pytest.raises(BundleMismatch, match=rf"tensorrt_rtx 1\.8\.0\.1, which is installed here, got .* {VERSION}"):
        plans(folder, manifest, version="1.8.0.1")
    with pytest.raises(
        BundleMismatch, match=r"got engines of tensorrt_rtx in this bundle; export it .*--backend tensorrt$"
    ):
        plans(folder, manifest, backend="tensorrt")
    with pytest.raises(BundleMismatch, match="got none in this bundle; export it with --backend tensorrt_rtx"):
        plans(folder, with_engines(manifest))


def test_cheap_checks_come_before_the_hash(folder: Path, manifest: Manifest, engines) -> None:
    for engine in engines:
        (folder / engine.file).write_bytes(b"")
    with pytest.raises(BundleMismatch, match="compute capability"):
        plans(folder, manifest, capability="7.5")


def change(engine: EngineSpec, **fields: object) -> EngineSpec:
    return dataclasses.replace(engine, **fields)


BROKEN: dict[str, tuple[Callable[[EngineSpec, EngineSpec], tuple[EngineSpec, ...]], str]] = {
    "no part 1": (lambda first, second: (first, change(second, part=2)), "expected parts 0 to 1, got 0, 2"),
    "two parts 0": (lambda first, second: (first, change(second, part=0)), "expected parts 0 to 1, got 0, 0"),
    "no output": (lambda first, second: (first,), "no part gives the output 'y'"),
    "unknown input": (
        lambda first, second: (first, change(second, inputs=(TensorSpec("z", "float32", (1,)),), profiles=({},))),
        "needs 'z', which is neither",
    ),
    "another type": (
        lambda first, second: (first, change(second, inputs=(dataclasses.replace(H, dtype="float16"), X))),
        "takes hidden as float16",
    ),
    "no profiles": (lambda first, second: (change(first, profiles=()), second), "has 0 profiles"),
    "unknown type": (
        lambda first, second: (
            change(first, outputs=(TensorSpec("hidden", "float8", ("batch", WIDTH)),)),
            change(second, inputs=(TensorSpec("hidden", "float8", ("batch", WIDTH)), X)),
        ),
        "got float8",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_parts_that_do_not_fit_together(folder: Path, manifest: Manifest, engines, case: str) -> None:
    spoil, message = BROKEN[case]
    with pytest.raises(BundleMismatch, match=message):
        plans(folder, with_engines(manifest, *spoil(*engines)))


# What an engine says of itself, and what a request asks of it.


def test_an_engine_unlike_its_manifest_is_refused(engines) -> None:
    free = [
        (TensorSpec(name, "float32", (-1, WIDTH)), is_input) for name, is_input in (("hidden", 1), ("x", 1), ("y", 0))
    ]
    check_border("p", engines[1], free, 2)
    with pytest.raises(BundleMismatch, match="expected tensors hidden, x, y, got hidden, x"):
        check_border("p", engines[1], free[:2], 2)
    for wrong in (
        (TensorSpec("y", "float16", (-1, WIDTH)), False),
        (TensorSpec("y", "float32", (-1, 8)), False),
        (TensorSpec("y", "float32", (-1,)), False),
        (TensorSpec("y", "float32", (-1, WIDTH)), True),
    ):
        with pytest.raises(BundleMismatch, match=r"expected output y as float32 \[batch, 16\], got"):
            check_border("p", engines[1], [*free[:2], wrong], 2)
    with pytest.raises(BundleMismatch, match="expected 2 profiles, got 1"):
        check_border("p", engines[1], free, 1)


@pytest.mark.parametrize(("batch", "profile"), [(1, 0), (4, 0), (6, 1), (8, 1), (9, 1), (32, 1)])
def test_the_nearest_profile_that_holds_the_shapes_is_chosen(engines, batch: int, profile: int) -> None:
    assert choose_profile("p", engines[1].profiles, {"hidden": (batch, WIDTH), "x": (batch, WIDTH)}) == profile


@pytest.mark.parametrize("shape", [(33, WIDTH), (0, WIDTH), (4, WIDTH + 1), (4, WIDTH, 1)])
def test_shapes_outside_every_profile_name_the_profiles(engines, shape: tuple[int, ...]) -> None:
    with pytest.raises(RequestError) as caught:
        choose_profile("transformer", engines[0].profiles, {"x": shape})
    assert "profile 0: x [1, 16] to [8, 16]; profile 1: x [4, 16] to [32, 16]" in str(caught.value)


@pytest.mark.parametrize(("batch", "rows"), [(1, 1), (32, 32), (33, 17), (64, 32), (65, 22), (100, 25)])
def test_a_batch_too_large_for_every_profile_runs_in_even_pieces(engines, batch: int, rows: int) -> None:
    assert rows_per_run(engines[0].profiles, (X,), {"x": (batch, WIDTH)}) == rows


def test_a_batch_that_no_split_helps_stays_whole(engines) -> None:
    assert rows_per_run(engines[0].profiles, (X,), {"x": (40, WIDTH + 1)}) == 40
    fixed = dataclasses.replace(X, dims=(40, WIDTH))
    assert rows_per_run(engines[0].profiles, (fixed,), {"x": (40, WIDTH)}) == 40


def test_inputs_are_held_to_the_manifest() -> None:
    specs = (X, dataclasses.replace(H, dims=("batch", "rows")))
    good = {"x": np.zeros((2, WIDTH), np.float32), "hidden": np.zeros((3, 2), np.float32).T}
    assert check_inputs("m", specs, good)["hidden"].flags.c_contiguous
    for name, wrong in (
        ("x", np.zeros((2, WIDTH), np.float16)),
        ("x", np.zeros((2, WIDTH + 1), np.float32)),
        ("hidden", np.zeros((3, 3), np.float32)),
        ("hidden", np.zeros(2, np.float32)),
    ):
        with pytest.raises(RequestError, match=rf"m\.{name}: expected float32"):
            check_inputs("m", specs, good | {name: wrong})


def test_an_outputs_bytes_come_from_its_shape() -> None:
    assert check_output("p", Y, (3, WIDTH)) == 3 * WIDTH * 4
    assert check_output("p", TensorSpec("hidden", "bfloat16", ("batch", 8)), (5, 8)) == 80
    for shape in ((3, 8), (-1, WIDTH), (3,)):
        with pytest.raises(BundleMismatch, match="expected"):
            check_output("p", Y, shape)


def test_weights_are_mapped_where_they_lie(bundle: Path) -> None:
    from safetensors import safe_open

    path = bundle / "transformer.safetensors"
    mapped = map_tensors(path)
    with safe_open(path, "np") as file:
        assert set(mapped) == set(file.keys())
        for name in file.keys():  # noqa: SIM118
            assert mapped[name].tobytes() == file.get_tensor(name).tobytes()
    # Views of one mapping: no tensor owns memory of its own.
    assert not any(data.flags.owndata for data in mapped.values())


@pytest.mark.parametrize("module", ["transformer", "text_encoder", "tiny_vae_decoder", "full_vae_decoder"])
def test_the_initializers_of_a_graph_are_found_without_onnx(bundle: Path, module: str) -> None:
    """A stripped plan is refitted with them: one too many, or too few, and the library refuses."""
    import onnx

    path = bundle / f"{module}.onnx"
    graph = onnx.load(path, load_external_data=False).graph
    external = {item.name for item in graph.initializer if item.data_location == onnx.TensorProto.EXTERNAL}
    assert initializers(path.read_bytes(), map_tensors(bundle / f"{module}.safetensors")) == external


# What the library itself says, on any machine.


def test_the_library_refuses_what_is_no_plan(folder: Path, manifest: Manifest, engines) -> None:
    from zimage_rt.backends._tensorrt_engine import Log, deserialize
    from zimage_rt.backends.tensorrt_rtx import diagnosis

    log = Log(trt)
    runtime = trt.Runtime(log.logger)
    plan = (folder / engines[0].file).read_bytes()
    for broken in (b"no plan", plan[:32]):
        with pytest.raises(BundleMismatch, match=r"tensorrt_rtx refuses the plan: .*(Error|failed).*; export"):
            deserialize(runtime, log, "transformer", "tensorrt_rtx", broken)
    validity, diagnostics = runtime.get_engine_validity(plan[:10])
    assert validity == trt.EngineValidity.INVALID
    assert diagnosis(diagnostics) == "malformed engine"
    assert diagnosis(0) == "it gave no reason"


@needs_no_gpu
def test_without_a_gpu_the_library_deserialises_nothing(folder: Path, engines) -> None:
    from zimage_rt.backends._tensorrt_engine import Log, deserialize

    log = Log(trt)
    with pytest.raises(BundleMismatch, match=r"refuses the plan: .*CUDA driver"):
        deserialize(trt.Runtime(log.logger), log, "p", "tensorrt_rtx", (folder / engines[0].file).read_bytes())


# Bundles that `zimage-export` built.


@pytest.fixture(scope="session")
def exported(small_checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every module's plans in fp16, the transformer's in two parts; built fast, for nothing runs them."""
    from export_checkpoints import recipe
    from zimage_rt.export.bundle import export
    from zimage_rt.export.tensorrt_options import TensorRTOptions

    out = tmp_path_factory.mktemp("exported") / "bundle"
    options = TensorRTOptions(sm=(86,), split={"transformer": 2}, optimization_level=0)
    size = ShapeRange(64, 128, 256, 16)
    shapes = ShapeRanges(ShapeRange(1, 1, 2), size, size, ShapeRange(1, 16, 64))
    export(
        recipe(
            small_checkpoint,
            out,
            backend="tensorrt_rtx",
            precision="fp16",
            parity=False,
            tensorrt=options,
            shapes=shapes,
        )
    )
    return out


def test_an_exported_bundle_passes_every_check(exported: Path) -> None:
    """All that comes before the library: the plans of each module fit together, and whole requests find profiles."""
    manifest = read_manifest(exported)
    sizes = {"batch": 2, "latent_height": 16, "latent_width": 32, "height": 128, "width": 256}
    sizes |= {"prompt_tokens": 40, "context_tokens": 64}
    for module, spec in manifest.modules.items():
        found = checked_plans(exported, manifest, module, lambda name: None, "tensorrt_rtx", VERSION, "8.6")
        assert len(found) == (2 if module == "transformer" else 1)
        first = found[0][0]
        shapes = {item.name: tuple(sizes.get(dim, dim) for dim in item.dims) for item in first.inputs}
        assert [item.name for item in first.inputs] == [item.name for item in spec.inputs]
        assert choose_profile(module, first.profiles, shapes) == 0
        assert rows_per_run(first.profiles, spec.inputs, {name: (6, *shape[1:]) for name, shape in shapes.items()}) == 2
    with pytest.raises(BundleMismatch, match=r"got engines for 8\.6; export it .*--sm 89"):
        checked_plans(exported, manifest, "transformer", lambda name: None, "tensorrt_rtx", VERSION, "8.9")


class Untouched:
    """In place of the library's runtime: whatever is asked of it fails the test."""

    def __getattr__(self, name: str) -> None:
        pytest.fail(f"the library was asked for {name}")


def test_the_library_sees_no_plan_before_its_hash_is_right(folder: Path, manifest: Manifest, engines) -> None:
    from zimage_rt.backends._tensorrt_engine import Log
    from zimage_rt.backends.tensorrt_rtx import TensorRTRTXBackend

    # All of a backend that loading needs before a GPU; its own constructor would ask for one.
    backend = TensorRTRTXBackend.__new__(TensorRTRTXBackend)
    backend._cache_dir = None
    backend.library, backend.log, backend.lock = trt, Log(trt), threading.Lock()
    backend.gpu = types.SimpleNamespace(compute_capability="8.6", make_current=lambda: None)
    backend.runtime = Untouched()
    pipeline = backend.open(folder, manifest, lambda module: None)
    with pytest.raises(pytest.fail.Exception, match="asked for get_engine_validity"):
        pipeline.load([MODULE])
    for engine in engines:
        path = folder / engine.file
        content = path.read_bytes()
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(BundleMismatch, match="a plan is a program"):
            pipeline.load([MODULE])
        path.write_bytes(content)
    stripped = with_engines(manifest, *(change(engine, stripped=True) for engine in engines))
    backend.check_plan = lambda label, plan: None
    backend.runtime = types.SimpleNamespace(deserialize_cuda_engine=lambda plan: None)
    checked: list[str] = []
    with pytest.raises(BundleMismatch, match="refuses the plan: it gave no reason"):
        backend.open(folder, stripped, checked.append).load([MODULE])
    assert checked == [MODULE], "the weights of a stripped plan are checked too"


# Backends that cannot run here.


@needs_no_gpu
def test_no_gpu_is_said_and_other_backends_named(bundle: Path) -> None:
    with pytest.raises(BackendUnavailable, match=r"'tensorrt_rtx': no NVIDIA driver.*backend='onnxruntime'"):
        zimage_rt.Engine.load(bundle, backend="tensorrt_rtx")
    probe = next(probe for probe in probe_backends() if probe.name == "tensorrt_rtx")
    assert probe.problem is not None and probe.versions["tensorrt_rtx"] == VERSION


def test_what_a_gpu_cannot_run_is_said_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    from zimage_rt.backends import _cuda_runtime, _tensorrt_common
    from zimage_rt.backends.tensorrt_rtx import TensorRTRTXBackend

    hopper = Device("NVIDIA H200", (9, 0), 150 << 30)
    monkeypatch.setattr(nvidia_driver, "query", lambda: nvidia_driver.Driver(None, "13.0", [hopper]))
    assert _cuda_runtime.runtime_problem(1) == "no device 1: there are 1 GPUs"
    monkeypatch.setattr(_tensorrt_common, "runtime_problem", lambda device: None)
    with pytest.raises(
        BackendUnavailable, match=r"does not run on NVIDIA H200 \(compute capability 9\.0\); use backend="
    ):
        load_backend("tensorrt_rtx", {})
    assert TensorRTRTXBackend.probe(trt)[0].devices == [hopper]


@pytest.mark.parametrize("name", ["tensorrt", "tensorrt_rtx"])
@pytest.mark.parametrize("missing", ["", "cuda.bindings"])
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, name: str, missing: str) -> None:
    for loaded in [*sys.modules]:
        if loaded.startswith("zimage_rt.backends.") and ("tensorrt" in loaded or "_cuda" in loaded):
            monkeypatch.delitem(sys.modules, loaded)
    # None in sys.modules is how Python itself marks a module that cannot be imported.
    monkeypatch.setitem(sys.modules, missing or name, None)
    with pytest.raises(BackendUnavailable, match=rf"pip install 'zimage-rt\[{BACKENDS[name][2]}\]'"):
        load_backend(name, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"shape_kernels": "fast"}, "shape_kernels: expected one of lazy, eager, none"),
        ({"cuda_graph": 1}, "cuda_graph: expected True or False"),
        ({"device": -1}, "device: expected the number of a GPU"),
        ({"threads": 2}, "threads"),
    ],
)
def test_impossible_options(options: dict, message: str) -> None:
    with pytest.raises(RequestError, match=message):
        load_backend("tensorrt_rtx", options)


# The cache of compiled kernels.


def test_where_the_cache_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    bundle = tmp_path / "disk" / "bundle"
    bundle.mkdir(parents=True)
    assert caches.cache_folder(bundle, None) is None
    assert caches.cache_folder(bundle, tmp_path / "mine") == tmp_path / "mine"
    beside = caches.cache_folder(bundle, "beside")
    assert beside == tmp_path / "disk" / "bundle.cache"
    assert not any(bundle.iterdir()), "nothing is written into a bundle"
    # Others may write there: what lies there is not to be run.
    beside.chmod(0o777)
    assert caches.cache_folder(bundle, "beside") == tmp_path / "home" / ".cache" / "zimage_rt"
    # No folder can be made there.
    beside.rmdir()
    beside.write_text("in the way")
    assert caches.cache_folder(bundle, "beside") == tmp_path / "home" / ".cache" / "zimage_rt"
    assert caches.cache_folder(bundle, beside) is None


def test_a_cache_is_read_only_if_nobody_else_can_have_written_it(tmp_path: Path) -> None:
    path = caches.cache_file(tmp_path, "plan", "1.7.1", "RTX 4090", "13.0")
    assert path != caches.cache_file(tmp_path, "plan", "1.7.1", "RTX 4090", "13.1")
    assert path != caches.cache_file(tmp_path, "another", "1.7.1", "RTX 4090", "13.0")
    assert caches.read_cache(path) == b""
    caches.write_cache(path, b"old")
    caches.write_cache(path, b"kernels")
    assert caches.read_cache(path) == b"kernels"
    assert [item.name for item in tmp_path.iterdir()] == [path.name]
    (tmp_path / "link").symlink_to(path)
    assert caches.read_cache(tmp_path / "link") == b""
    path.chmod(0o666)
    assert caches.read_cache(path) == b""
    caches.write_cache(tmp_path / "no such folder" / "cache", b"kernels")
