"""`zimage-export --backend tensorrt_rtx`: what it refuses, in whose words, and what it leaves behind when stopped."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("diffusers")
pytest.importorskip("transformers")

import onnx  # noqa: E402
import typer.testing  # noqa: E402
from export_checkpoints import recipe  # noqa: E402
from shared import CHECKPOINT  # noqa: E402
from zimage_rt.export import cli  # noqa: E402
from zimage_rt.export.builders import builder_for, tensorrt, tensorrt_rtx  # noqa: E402
from zimage_rt.export.builders._tensorrt_plan_builder import PlanBuilder  # noqa: E402
from zimage_rt.export.checkpoint import open_checkpoint  # noqa: E402
from zimage_rt.export.errors import BuildError, BuilderUnavailable, BuildMemoryError, DiskFullError, RecipeError  # noqa: E402
from zimage_rt.export.plan import Blocks, plan_modules  # noqa: E402
from zimage_rt.export.precision import FP32  # noqa: E402
from zimage_rt.export.recipe import read_recipe  # noqa: E402
from zimage_rt.export.tensorrt_options import TensorRTOptions  # noqa: E402

from zimage_rt.bundle.manifest import ShapeRange, read_manifest  # noqa: E402

needs_rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="pip install 'zimage-rt[tensorrt-rtx]'"
)

# --- recipes and the command line -------------------------------------------------------------------------------------


def read(tmp_path: Path, text: str) -> TensorRTOptions:
    path = tmp_path / "x.toml"
    path.write_text(f'checkpoint = "."\n[shapes]\nheight = {{ max = 1024 }}\n{text}')
    return read_recipe(path).tensorrt


def test_a_recipe_says_how_plans_are_built(tmp_path: Path):
    options = read(
        tmp_path,
        "[tensorrt]\nsm = [86, 120]\nsplit = { transformer = 2 }\nworkspace_gb = 4\noptimization_level = 3\n"
        "[[tensorrt.profiles]]\nheight = { opt = 512, max = 512 }\n[[tensorrt.profiles]]\nbatch = { max = 1 }\n",
    )
    assert (options.sm, options.split, options.workspace_gb) == ((86, 120), {"transformer": 2}, 4.0)
    assert options.profiles[0].height == ShapeRange(64, 512, 512, 16)
    assert options.profiles[1].height == ShapeRange(64, 1024, 1024, 16)
    assert [profile.batch.max for profile in options.profiles] == [8, 1]
    assert read(tmp_path, "") == TensorRTOptions()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("tactics = 1", r"\[tensorrt\]: unknown key 'tactics'; known: sm, split"),
        ("sm = 86", "sm: expected list, got 86"),
        ('sm = ["86"]', "expected numbers as in"),
        ("sm = [86, 86]", "names one twice"),
        ("split = { transformer = 0 }", "transformer: expected how many plans, 1 or more, got 0"),
        ("optimization_level = 9", "expected 0 to 5, got 9"),
        ("workspace_gb = -1", "expected more than 0, got -1"),
        ("profiles = [1]", r"\[tensorrt.profiles 1\]: expected a table"),
        ("profiles = [{ depth = { max = 3 } }]", r"\[tensorrt.profiles 1\]: unknown key 'depth'"),
        ("profiles = [{ height = { max = 2048 } }]", "profiles 1.height.: expected 64 to 1024.*got 64 to 2048"),
    ],
)
def test_recipes_that_are_refused(tmp_path: Path, text: str, message: str):
    with pytest.raises(RecipeError, match=message):
        read(tmp_path, f"[tensorrt]\n{text}\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sm", "86"], "sm: backend onnxruntime builds no plans; add --backend tensorrt_rtx"),
        (["--backend", "tensorrt_rtx", "--sm", "8.6"], "--sm: expected numbers as in 86,89,120, got '8.6'"),
        (["--backend", "tensorrt_rtx", "--split", "transformer"], "--split: expected MODULE=COUNT"),
    ],
)
def test_command_lines_that_are_refused(tmp_path: Path, arguments: list[str], message: str):
    line = ["--checkpoint", str(CHECKPOINT), "--out", str(tmp_path / "out"), *arguments]
    result = typer.testing.CliRunner().invoke(cli.app, line)
    assert isinstance(result.exception, RecipeError)
    assert message in str(result.exception)
    assert not (tmp_path / "out").exists()


# --- before any work is done ------------------------------------------------------------------------------------------


@needs_rtx
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tensorrt": TensorRTOptions(sm=(90,))}, "expected any of 80, 86, 89, 120, 121, got 90"),
        ({"tensorrt": TensorRTOptions(sm=(75,))}, "expected any of 80, .*, got 75"),
        ({"tensorrt": TensorRTOptions(split={"tiny_vae_decoder": 2})}, "expected transformer or text_encoder"),
        ({"precision": "fp32"}, "runs fp16 and bf16, got 'fp32'; it fuses no attention in fp32"),
    ],
)
def test_what_no_plan_can_be_built_for(tmp_path: Path, changes: dict[str, Any], message: str):
    wanted = recipe(tmp_path, tmp_path / "out", **{"precision": "fp16", "backend": "tensorrt_rtx", **changes})
    with pytest.raises(RecipeError, match=message):
        tensorrt_rtx.check(wanted)


@pytest.mark.parametrize("backend", ["tensorrt", "tensorrt_rtx"])
def test_a_missing_package_names_its_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str):
    monkeypatch.setitem(sys.modules, backend, None)
    wanted = recipe(tmp_path, tmp_path / "out", precision="fp16", backend=backend)
    extra = backend.replace("_", "-")
    with pytest.raises(BuilderUnavailable, match=rf"{backend}.*pip install 'zimage-rt\[{extra}\]'"):
        builder_for(backend).check(wanted)


def test_tensorrt_builds_for_the_gpu_that_is_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "tensorrt", sys)  # what is asked of it comes later
    wanted = recipe(tmp_path, tmp_path / "out", precision="fp16", backend="tensorrt")
    monkeypatch.setattr(tensorrt, "_capability", lambda: (9, 0))
    tensorrt.check(dataclasses.replace(wanted, tensorrt=TensorRTOptions(sm=(90,))))
    with pytest.raises(RecipeError, match="builds for the GPU of this machine, 90, got 86; leave it out"):
        tensorrt.check(dataclasses.replace(wanted, tensorrt=TensorRTOptions(sm=(86,))))


def test_tensorrt_needs_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    problem = tensorrt.nvidia_driver.query().problem
    if problem is None:
        pytest.skip("there is one")
    monkeypatch.setitem(sys.modules, "tensorrt", sys)
    with pytest.raises(BuilderUnavailable, match=f"builds on the GPU that will run the plans: {re.escape(problem)}"):
        tensorrt.check(recipe(tmp_path, tmp_path / "out", precision="fp16", backend="tensorrt"))


# --- while building ---------------------------------------------------------------------------------------------------


def build(bundle: Path, checkpoint: Path, name: str, graph: Path, folder: Path, **options: Any) -> tuple[Any, ...]:
    """Build a plan of one of the small bundle's modules, whose graphs are fp32."""
    plan = next(plan for plan in plan_modules(open_checkpoint(checkpoint), FP32, ()) if plan.name == name)
    given = recipe(checkpoint, folder / "out", tensorrt=TensorRTOptions(**{"sm": (89,), **options}))
    return tensorrt_rtx.build(plan, graph, folder, given, read_manifest(bundle).pipeline, lambda *_: None)


@needs_rtx
def test_more_parts_than_blocks(small_bundle: Path, small_checkpoint: Path, tmp_path: Path):
    graph = small_bundle / "transformer.onnx"
    with pytest.raises(RecipeError, match="transformer can be split into 2 plans at most, got 3"):
        build(small_bundle, small_checkpoint, "transformer", graph, tmp_path, split={"transformer": 3})


@needs_rtx
def test_a_node_that_tensorrt_does_not_know_is_named(small_bundle: Path, small_checkpoint: Path, tmp_path: Path):
    model = onnx.load(small_bundle / "context_refiner.onnx", load_external_data=False)
    node = next(node for node in model.graph.node if node.op_type == "Softmax")
    node.op_type, node.domain, node.name = "Softmaximum", "nowhere", "the_odd_one"
    model.opset_import.append(onnx.helper.make_opsetid("nowhere", 1))
    graph = shutil.copytree(small_bundle, tmp_path / "bundle") / "odd.onnx"  # its weights lie beside it
    graph.write_bytes(model.SerializeToString())
    with pytest.raises(BuildError, match=r"context_refiner: tensorrt_rtx cannot read the graph: the_odd_one: "):
        build(small_bundle, small_checkpoint, "context_refiner", graph, tmp_path)


@needs_rtx
def test_what_the_builder_cannot_do_is_told_in_its_words(small_bundle: Path, small_checkpoint: Path, tmp_path: Path):
    graph = small_bundle / "context_refiner.onnx"
    with pytest.raises(BuildError, match=r"context_refiner: tensorrt_rtx cannot build the graph: .*Turing") as info:
        build(small_bundle, small_checkpoint, "context_refiner", graph, tmp_path, sm=(75,))
    assert "driver version" not in str(info.value)  # what every failure ends with where there is no GPU


@needs_rtx
def test_full_disk(small_bundle: Path, small_checkpoint: Path, tmp_path: Path):
    (tmp_path / "context_refiner.engine").symlink_to("/dev/full")
    with pytest.raises(DiskFullError, match="no space left"):
        build(small_bundle, small_checkpoint, "context_refiner", small_bundle / "context_refiner.onnx", tmp_path)


@pytest.mark.parametrize("module", ["transformer", "full_vae_decoder"])
def test_want_of_memory_names_the_module_and_what_helps_it(module: str):
    builder = PlanBuilder.__new__(PlanBuilder)
    builder.name, builder.package = module, tensorrt_rtx.PACKAGE
    builder.blocks = Blocks(4, 384, lambda sizes: 0) if module == "transformer" else None
    # The first is what it says under `ulimit -v`; which call meets the limit is chance, so no test sets one.
    for words in ("Unexpected exception std::bad_alloc", "OutOfMemory: requested 12 GB", "Cannot allocate memory"):
        builder.log = type("Log", (), {"errors": [words]})
        error = builder._failure()
        assert isinstance(error, BuildMemoryError)
        assert str(error).startswith(f"{module}: ")
        # A VAE cannot be split; its memory is that of its largest image.
        assert ("--split transformer=4" in str(error)) == (module == "transformer")
        assert ("allow smaller ones" in str(error)) == (module == "full_vae_decoder")


@needs_rtx
def test_interrupted_while_building_leaves_nothing(tmp_path: Path):
    """Ctrl-C while TensorRT works: it stops at its next step, and the old bundle is untouched."""
    out = tmp_path / "out"
    line = [sys.executable, "-m", "zimage_rt.export.cli", "--checkpoint", str(CHECKPOINT), "--out", str(out)]
    line += ["--precision", "fp16", "--backend", "tensorrt_rtx", "--vae", "tiny", "--skip-parity"]
    process = subprocess.Popen(
        line,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        # Processes started from a shell's background ignore it, and so would this one.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stderr is not None
    for text in process.stderr:
        if "text_encoder: build" in text:
            break
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 130, rest
    assert "transformer: trace" not in rest
    assert list(tmp_path.iterdir()) == []
