"""`zimage doctor` on the machine that runs the tests, with whatever it lacks."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnxruntime as ort
import pytest

from zimage_rt import _core
from zimage_rt.backends import nvidia_driver, registry
from zimage_rt.backends.cuda_libraries import has_code

NAMES = [
    "onnxruntime/cpu",
    "onnxruntime/cuda",
    "onnxruntime/tensorrt",
    "onnxruntime/nv_tensorrt_rtx",
    "cuda",
    "tensorrt",
    "tensorrt_rtx",
]

NO_GPU = nvidia_driver.query().problem


def doctor(*arguments: str, before: str = "", columns: int = 80) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own; `before` is Python to run in it first."""
    code = f"import sys\n{before}\nfrom zimage_rt.cli.main import main\nsys.argv[1:] = {['doctor', *arguments]}\nmain()"
    environment = {**os.environ, "COLUMNS": str(columns)}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)


def backends(run: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    assert run.stderr == ""
    return {entry["name"]: entry for entry in json.loads(run.stdout)["backends"]}


def test_every_backend_answers() -> None:
    run = doctor("--json")
    assert run.returncode == 0, run.stderr
    found = backends(run)
    assert list(found) == NAMES
    cpu = found["onnxruntime/cpu"]
    assert cpu["runs"] is True
    assert cpu["problem"] is None
    assert cpu["devices"] == []
    assert cpu["fastest_precision"] == ("int8" if _core.multiplies_bytes_exactly() else "fp32")
    assert ort.__version__ in cpu["versions"].values()
    for entry in found.values():
        assert entry["runs"] == (entry["problem"] is None)


@pytest.mark.skipif(NO_GPU is None, reason="this machine has an NVIDIA GPU")
def test_without_a_gpu_every_reason_is_said() -> None:
    found = backends(doctor("--json"))
    assert [name for name, entry in found.items() if entry["runs"]] == ["onnxruntime/cpu"]
    assert all(entry["devices"] == [] for entry in found.values())
    for name in NAMES[1:4]:
        assert found[name]["problem"].startswith(NO_GPU)
    if importlib.util.find_spec("onnxruntime_ep_nv_tensorrt_rtx") is None:
        assert "pip install 'zimage-rt[onnxruntime-rtx]'" in found["onnxruntime/nv_tensorrt_rtx"]["problem"]
    if importlib.util.find_spec("zimage_rt._cuda") is None:
        assert _core.cuda_skipped != ""
        assert _core.cuda_skipped in found["cuda"]["problem"]
        assert found["cuda"]["problem"].endswith("ZIMAGE_RT_CUDA=ON pip install '.[cuda]'")
    else:
        assert NO_GPU is not None and NO_GPU in found["cuda"]["problem"]
    if importlib.util.find_spec("tensorrt") is None:
        assert "pip install 'zimage-rt[tensorrt]'" in found["tensorrt"]["problem"]


@pytest.mark.gpu
@pytest.mark.skipif(NO_GPU is not None, reason=f"no NVIDIA GPU here: {NO_GPU}")
def test_with_a_gpu_the_cuda_backend_runs_on_what_the_driver_sees() -> None:
    pytest.importorskip("zimage_rt._cuda", reason="zimage_rt was built without CUDA: no nvcc here")
    cuda = backends(doctor("--json"))["cuda"]
    assert cuda["runs"] is True
    assert [device["name"] for device in cuda["devices"]] == [device.name for device in nvidia_driver.query().devices]
    # The CUDA runtime and the driver count the same memory.
    assert cuda["devices"][0]["memory"] == nvidia_driver.query().devices[0].memory
    assert set(cuda["versions"]) == {"architectures", "cublasLt", "cudnn"}


@pytest.mark.parametrize(
    ("architectures", "runs", "does_not"),
    [
        ("80-real,89-real,90a-real,120", ["8.0", "8.6", "8.9", "9.0", "12.0", "12.1", "13.0"], ["7.5", "10.0", "11.0"]),
        ("90a-real", ["9.0"], ["8.9", "10.0", "12.0"]),
        ("100f-real", ["10.0", "10.3"], ["9.0", "11.0"]),
        ("80", ["8.0", "9.0", "10.0"], ["7.5"]),
        ("native", ["8.0", "10.0"], []),
    ],
)
def test_a_build_says_which_gpus_it_has_code_for(architectures: str, runs: list[str], does_not: list[str]) -> None:
    def fits(capability: str) -> bool:
        major, _, minor = capability.partition(".")
        return has_code(architectures, (int(major), int(minor)))

    assert [fits(capability) for capability in runs] == [True] * len(runs)
    assert [fits(capability) for capability in does_not] == [False] * len(does_not)


def test_the_table_cuts_no_command() -> None:
    run = doctor(columns=60)
    assert run.returncode == 0, run.stderr
    for name, entry in backends(doctor("--json")).items():
        if entry["problem"] is not None:
            assert f"{name}: {entry['problem']}\n" in run.stdout


def test_a_missing_package_hides_nothing_else() -> None:
    run = doctor("--json", before="sys.modules['onnxruntime'] = None  # what import makes of a package that is missing")
    found = backends(run)
    assert list(found) == ["onnxruntime", *NAMES[4:]]
    assert "pip install 'zimage-rt[onnxruntime]'" in found["onnxruntime"]["problem"]
    if NO_GPU is not None:
        assert run.returncode == 1, "nothing can run here, and the exit status must say so"


def test_it_loads_no_torch() -> None:
    check = "import atexit; atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))"
    assert doctor("--json", before=check).stderr == "False\n"


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ("x = 1", "does not say whether it can run"),
        ("raise OSError('libteapot.so.1: cannot open')", "OSError: libteapot.so.1: cannot open"),
        ("import teapot_without_a_spout", r"teapot_without_a_spout.*pip install 'zimage-rt\[tea\]'"),
        ("def probe():\n    raise KeyError('spout')", "KeyError: 'spout'"),
    ],
)
def test_a_backend_that_breaks_is_one_line_of_the_answer(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: str, problem: str
) -> None:
    (tmp_path / "teapot_backend.py").write_text(source)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "teapot_backend", raising=False)
    monkeypatch.setitem(registry.BACKENDS, "teapot", ("teapot_backend", "Teapot", "tea"))
    probes = {probe.name: probe for probe in registry.probe_backends()}
    assert probes["onnxruntime/cpu"].problem is None
    assert re.search(problem, probes["teapot"].problem or "")
