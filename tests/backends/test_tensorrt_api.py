"""The calls this package makes, held to what the TensorRT libraries' own bindings declare.

mypy checks our calls against records (`make lint`); here the records are checked against the bindings that are
installed, and `tensorrt`'s against `tensorrt_rtx`'s, because one code path serves both. How the records were made:
tests/helpers/tensorrt_api.py.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import tempfile
from pathlib import Path

import pytest
from tensorrt_api import (
    RECORDS,
    generate,
    library_names_used,
    members,
    names_used,
    record,
    stub_libraries,
)

# All that we use of TensorRT-RTX and TensorRT has not: tensorrt_rtx.py's alone, of both kinds.
RTX_CLASSES = {
    "ComputeCapability",
    "CudaGraphStrategy",
    "DynamicShapesKernelSpecializationStrategy",
    "EngineInvalidityDiagnostics",
    "EngineValidity",
    "IRuntimeCache",
}
RTX_MEMBERS = {
    "IBuilderConfig": {"num_compute_capabilities", "set_compute_capability"},
    "IRuntimeConfig": {
        "create_runtime_cache",
        "cuda_graph_strategy",
        "dynamic_shapes_kernel_specialization_strategy",
        "set_runtime_cache",
    },
    "Runtime": {"get_engine_validity"},
}
# Named by files that a library of the other name never runs.
RTX_FILES = "/tensorrt_rtx.py"
TENSORRT_FILES = "/tensorrt.py"


def recorded(name: str) -> dict[str, dict[str, list[str]]]:
    return members(RECORDS[name].read_text(encoding="utf-8"))


def module_names(name: str) -> set[str]:
    """What a record has at its top: classes, and constants such as `float32`."""
    text = RECORDS[name].read_text(encoding="utf-8")
    return {"__version__", "__name__", *recorded(name)} | {
        line.split(":")[0] for line in text.splitlines() if line.endswith(": DataType")
    }


def check_record(name: str, stub: str) -> None:
    """Everything recorded is declared, word for word; a newer release may declare more."""
    wanted = recorded(name)
    declared = members(
        record(stub, "", names_used() | set(wanted) | {member for item in wanted.values() for member in item})
    )
    for cls, recorded_members in wanted.items():
        for member, declarations in recorded_members.items():
            found = declared.get(cls, {}).get(member, [])
            assert set(declarations) <= set(found), f"{cls}.{member}; if we may use it so, record it again"


def test_the_record_is_what_the_installed_tensorrt_rtx_declares() -> None:
    pytest.importorskip("tensorrt_rtx", reason="not installed: pip install 'zimage-rt[tensorrt-rtx]'")
    check_record("tensorrt_rtx", generate("tensorrt_rtx_bindings.tensorrt_rtx"))


def test_the_record_is_what_installed_tensorrt_bindings_declare() -> None:
    """Without the libraries: the bindings' few C functions are stubbed, which runs nothing but declares everything."""
    spec = importlib.util.find_spec("tensorrt_bindings")
    if spec is None or spec.origin is None:
        pytest.skip("tensorrt's bindings are not installed: pip install --no-deps tensorrt-cu13-bindings")
    if shutil.which("cc") is None:
        pytest.skip("no C compiler to stub the libraries with")
    text = Path(spec.origin).read_text(encoding="utf-8")
    major = re.search(r'^__version__ = "(\d+)', text, re.MULTILINE)
    assert major is not None
    with tempfile.TemporaryDirectory() as folder:
        stub_libraries(Path(folder), major[1])
        stub = generate("tensorrt_bindings.tensorrt", [Path(spec.origin).parent.parent], Path(folder))
    check_record("tensorrt 10" if major[1] == "10" else "tensorrt", stub)


@pytest.mark.parametrize("other", ["tensorrt", "tensorrt 10"])
def test_both_libraries_declare_the_same(other: str) -> None:
    rtx, tensorrt = recorded("tensorrt_rtx"), recorded(other)
    assert set(rtx) - set(tensorrt) == RTX_CLASSES
    for name in set(rtx) & set(tensorrt):
        assert set(rtx[name]) - set(tensorrt[name]) == RTX_MEMBERS.get(name, set()), name
        for member in set(rtx[name]) & set(tensorrt[name]):
            # TensorRT 10 reads plans from an older kind of stream as well.
            assert set(rtx[name][member]) <= set(tensorrt[name][member]), f"{name}.{member}"


def test_tensorrt_10_and_11_declare_the_same() -> None:
    ten, eleven = recorded("tensorrt 10"), recorded("tensorrt")
    for name, declared in eleven.items():
        for member, declarations in declared.items():
            assert set(declarations) <= set(ten[name][member]), f"{name}.{member}"


@pytest.mark.parametrize("file", sorted(library_names_used()))
def test_what_files_take_from_a_library_is_there(file: str) -> None:
    libraries = {"tensorrt_rtx", "tensorrt", "tensorrt 10"}
    if file.endswith(RTX_FILES):
        libraries = {"tensorrt_rtx"}
    elif file.endswith(TENSORRT_FILES):
        libraries -= {"tensorrt_rtx"}
    for library in libraries:
        missing = library_names_used()[file] - module_names(library)
        assert not missing, f"{file} names {sorted(missing)}, which the record of {library} has not; record it again"


def test_what_docstrings_do_not_declare_is_so() -> None:
    """`UNDECLARED` in tests/helpers/tensorrt_api.py: Dims are iterable, and IHostMemory is a buffer."""
    trt = pytest.importorskip("tensorrt_rtx", reason="not installed: pip install 'zimage-rt[tensorrt-rtx]'")
    assert tuple(trt.Dims((1, -1, 3))) == (1, -1, 3)
    assert trt.DataType.BF16.name == "BF16"
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    network = builder.create_network(0)
    tensor = network.add_input("x", trt.float32, (1, 4))
    network.mark_output(network.add_activation(tensor, trt.ActivationType.RELU).get_output(0))
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(trt.ComputeCapability.SM86, 0)
    memory = builder.build_serialized_network(network, config)
    assert len(bytes(memory)) == memory.nbytes


def test_every_element_type_has_a_name_in_the_manifest() -> None:
    trt = pytest.importorskip("tensorrt_rtx", reason="not installed: pip install 'zimage-rt[tensorrt-rtx]'")
    from zimage_rt.backends._tensorrt_plans import DTYPES, ITEM_SIZES

    assert set(DTYPES) <= set(trt.DataType.__members__)
    assert set(DTYPES.values()) == set(ITEM_SIZES)
    for name, dtype in DTYPES.items():
        assert getattr(trt.DataType, name).itemsize == ITEM_SIZES[dtype]
